"""Training: the recipe, the loop, the step."""

from embedsmith.train.config import EvaluateConfig, Recipe, TrainConfig
from embedsmith.train.loop import rehearse, train

__all__ = ["EvaluateConfig", "Recipe", "TrainConfig", "rehearse", "train"]
