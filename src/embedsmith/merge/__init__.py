"""Checkpoints to a checkpoint. The room is also the verb: `embedsmith.merge(parents=..., base=..., method=...)`."""

import sys
from types import ModuleType
from typing import Any

from embedsmith.merge.recipe import MergeRecipe, Override, Packaging, ParentSpec
from embedsmith.merge.run import Merged, merge

__all__ = ["MergeRecipe", "Merged", "Override", "Packaging", "ParentSpec", "merge"]


class _Room(ModuleType):
    """A module that can be called: `embedsmith.merge` is the room and the verb, whichever was imported first."""

    def __call__(self, *arguments: Any, **settings: Any) -> Merged:
        return merge(*arguments, **settings)


sys.modules[__name__].__class__ = _Room
