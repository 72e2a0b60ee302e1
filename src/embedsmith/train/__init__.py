"""Training: the recipe, the loop, the step."""

from embedsmith.train.config import EvaluateConfig, Recipe, TrainConfig, read_recipe
from embedsmith.train.loop import rehearse, train

__all__ = ["EvaluateConfig", "Recipe", "TrainConfig", "read_recipe", "rehearse", "train"]
