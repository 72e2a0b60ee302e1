"""Stages of one recipe, in order: curate, mine, train, merge, evaluate."""

from embedsmith.pipeline.config import PipelineRecipe, Stage
from embedsmith.pipeline.run import run

__all__ = ["PipelineRecipe", "Stage", "run"]
