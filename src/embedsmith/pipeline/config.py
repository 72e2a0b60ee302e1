"""The recipe of a pipeline."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from embedsmith.core.errors import RecipeError
from embedsmith.core.recipe import section

Verb = Literal["curate", "mine", "train", "merge", "evaluate"]
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@section
@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a pipeline: the recipe of one verb.

    `recipe`: the fields of the verb's own recipe, or the path of a file that holds them; `set`: changes to it,
    key.path=value. In any text `${name}` stands for what the earlier stage of that name made (curate and mine: the
    file of records; train and merge: the folder of the model; evaluate: the file of results), and `${output}` for the
    pipeline's folder. `output` may be left out: it is then in that folder, under the stage's name.
    """

    name: str
    verb: Verb
    recipe: dict[str, Any] | str
    set: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name == "output":
            raise RecipeError(f"{self.name!r} cannot be a stage's name", expected="letters, digits, _ and -")


@section
@dataclass(frozen=True, kw_only=True)
class PipelineRecipe:
    """Stages that run in their order. `output`: the folder of all that has no place of its own."""

    output: str
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names:
            raise RecipeError("stages: at least one is needed")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RecipeError(f"two stages are called {twice[0]!r}", where="stages", fix="give each its own name")
