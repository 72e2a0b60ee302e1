"""What a stage can do: a function from the plain tree of a verb's recipe to what it made. One line a verb in `VERBS`.

Every function may be called again after a stop, and on all ranks at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedsmith.core.collectives import join_ranks, on_first_rank
from embedsmith.core.errors import RecipeError
from embedsmith.core.recipe import parse, read_tree, section
from embedsmith.core.registry import to_plain


def run_mine(tree: dict[str, Any], where: str = "mine", overwrite: bool = False) -> Any:
    """Mine; returns the report."""
    from embedsmith.mining import MineRecipe, mine
    from embedsmith.models import load

    recipe = parse(MineRecipe, tree, where)
    join_ranks()
    return mine(recipe, load, overwrite=overwrite)


def _mine(tree: dict[str, Any], where: str) -> Path:
    return Path(run_mine(tree, where).output)


def _curate(tree: dict[str, Any], where: str) -> Path:
    from embedsmith.curation import evaluation_texts, load_encoder
    from embedsmith.data.curate import CurateRecipe, Tools, curate

    recipe = parse(CurateRecipe, tree, where)
    tools = Tools(encoder=load_encoder, evaluation=lambda names: evaluation_texts(names, None))
    join_ranks()
    on_first_rank(lambda: curate(recipe, tools).output)
    return Path(recipe.output)


def _train(tree: dict[str, Any], where: str) -> Path:
    from embedsmith.train import Recipe, train

    recipe = parse(Recipe, tree, where)
    output = Path(recipe.output)
    if (output / "finished.json").exists() and read_tree(output / "recipe.yaml") == to_plain(recipe):
        return output / "model"
    return train(recipe)


def _merge(tree: dict[str, Any], where: str) -> Path:
    from embedsmith.merge import MergeRecipe
    from embedsmith.merge.run import merge

    recipe = parse(MergeRecipe, tree, where)
    join_ranks()
    on_first_rank(lambda: str(merge(recipe)))
    return Path(recipe.output)


@section
@dataclass(frozen=True, kw_only=True)
class EvaluateStage:
    """What `embedsmith evaluate` is told on the command line. `output`: a file of results."""

    model: str
    tasks: tuple[str, ...]
    output: str
    data: str | None = None
    split: str = "test"

    def __post_init__(self) -> None:
        if not self.tasks:
            raise RecipeError("tasks: at least one is needed")


def _evaluate(tree: dict[str, Any], where: str) -> Path:
    from embedsmith.evaluate import evaluate, load_task
    from embedsmith.models import load

    stage = parse(EvaluateStage, tree, where)

    def score() -> None:
        tasks = [load_task(name, data_dir=stage.data, split=stage.split) for name in stage.tasks]
        evaluate(load(stage.model), tasks, about={"model": stage.model}).save(Path(stage.output), items=False)

    join_ranks()
    on_first_rank(score)
    return Path(stage.output)


@dataclass(frozen=True)
class Kind:
    """A verb as a stage: what runs it, and how its output is named where the recipe does not say."""

    run: Callable[[dict[str, Any], str], Path]
    suffix: str = ""


VERBS: dict[str, Kind] = {
    "curate": Kind(_curate, ".jsonl"),
    "mine": Kind(_mine, ".jsonl"),
    "train": Kind(_train),
    "merge": Kind(_merge),
    "evaluate": Kind(_evaluate, ".json"),
}
