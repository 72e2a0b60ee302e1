"""Checkpoints to a checkpoint."""

from embedsmith.merge.recipe import MergeRecipe, Override, Packaging, ParentSpec
from embedsmith.merge.run import Merged, merge

__all__ = ["MergeRecipe", "Merged", "Override", "Packaging", "ParentSpec", "merge"]
