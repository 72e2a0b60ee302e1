"""Training: the recipe, the loop, the step."""

from embedsmith.train.config import EvaluateConfig, Recipe, TrainConfig
from embedsmith.train.dry_run import rehearse
from embedsmith.train.loop import train

__all__ = ["EvaluateConfig", "Recipe", "TrainConfig", "rehearse", "train"]
