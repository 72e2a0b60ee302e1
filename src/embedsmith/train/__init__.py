"""Training: the recipe, the loop, the step."""

from embedsmith.train.config import EvaluateConfig, Recipe, TrainConfig
from embedsmith.train.loop import rehearse, train
from embedsmith.train.reference import read_recipe

__all__ = ["EvaluateConfig", "Recipe", "TrainConfig", "read_recipe", "rehearse", "train"]
