"""`evaluate.held_out`: a part of every source is scored before and after instead of being trained on, where the recipe
names no task.

The parts are those of `embedsmith split`, written once into the run's folder: a run that is continued reads what it
began with, and the trained model can be scored on the same texts afterwards. They do not depend on the run's seed: runs
that differ in it alone are scored on the same texts, and none has learned what another is scored on.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from embedsmith.core.collectives import on_first_rank
from embedsmith.core.errors import DataError, RecipeError
from embedsmith.data import Source
from embedsmith.data.record import Task
from embedsmith.data.source import source_name
from embedsmith.data.split import NO_PART, Split, split_source
from embedsmith.train.config import Recipe

_SHARE = 0.1


def with_held_out(recipe: Recipe, folder: Path, *, begun: bool = False) -> Recipe:
    """The recipe that trains on one part of each source and scores the other; both lie in `folder`, of a run that has
    `begun` already. Collective.

    Errors: `RecipeError` for a source that cannot be parted; those of `split_source` and of `Split.read`.
    """
    rows = recipe.evaluate.held_out
    if rows is None or recipe.evaluate.tasks:
        return recipe
    places = [folder / name for name in _names(recipe.data)]
    splits = on_first_rank(lambda: [Split.read(place) for place in places] if begun else _parted(recipe, places, rows))
    sources = tuple(_training_part(source, split) for source, split in zip(recipe.data, splits, strict=True))
    tasks = tuple(split.test for split in splits)
    return replace(recipe, data=sources, evaluate=replace(recipe.evaluate, tasks=tasks, held_out=None))


def training_parts(sources: Sequence[Source], folder: Path) -> list[Source]:
    """What a run trained on, of which `folder` holds the parts. Errors: those of `Split.read`."""
    return [
        _training_part(source, Split.read(folder / name)) for source, name in zip(sources, _names(sources), strict=True)
    ]


def _names(sources: Sequence[Source]) -> list[str]:
    names = [source_name(source) for source in sources]
    return [name if names.count(name) == 1 else f"{name}-{place}" for place, name in enumerate(names)]


def _parted(recipe: Recipe, places: Sequence[Path], rows: int) -> list[Split]:
    for source in recipe.data:
        if source.streaming:
            raise RecipeError(
                "nothing can be held out of a stream, which is never read whole",
                where=f"data: {source.path}",
                fix="score a file of its own, evaluate.held_out=null evaluate.tasks=[FILE]",
            )
    splits = []
    for source, place in zip(recipe.data, places, strict=True):
        try:
            splits.append(split_source(source, place, test=_SHARE, most=rows, overwrite=True))
        except DataError as error:
            if NO_PART not in error.what:
                raise
            fix = f"{error.fix}; or hold nothing out: evaluate.held_out=null"
            raise DataError(error.what, where=error.where, expected=error.expected, fix=fix) from error
    return splits


def _training_part(source: Source, split: Split) -> Source:
    """The source as it was, but for where its rows are and how they are read: they are written in our own layout."""
    return replace(
        source,
        path=split.train,
        rows=None,
        name=source_name(source),
        task=cast(Task, split.task),
        format=None,
        columns=None,
        score_range=(0.0, 1.0) if split.task == "sts" else None,
        split=None,
        limit=None,
        part=None,
    )
