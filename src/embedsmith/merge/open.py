"""What a recipe says about parents and base, opened."""

from __future__ import annotations

import dataclasses
import glob
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from embedsmith.core.errors import ModelError, RecipeError
from embedsmith.core.progress import log
from embedsmith.merge.folders import open_folder, refuse_quantised
from embedsmith.merge.lora import is_adapter, read_config, with_adapter
from embedsmith.merge.parents import Parent
from embedsmith.merge.recipe import MergeRecipe, ParentSpec
from embedsmith.models.backbone import locate

Opener = Callable[[Path, str], Parent]
"""A folder that is no adapter, under a name."""


def open_models(recipe: MergeRecipe) -> tuple[tuple[Parent, ...], Parent | None]:
    """Parents and base as tensors to be read, from headers and configurations alone.

    Errors: `RecipeError` for a pattern that matches nothing or ids that are not unique; `ModelError` and
    `CheckpointError` for folders that cannot be read.
    """
    opener = partial(open_folder, trust_remote_code=recipe.trust_remote_code, cache=recipe.cache_folder)
    base, spec = None, recipe.base_spec
    if spec is not None:
        base = _open(spec, spec.id or "base", None, opener)
    specs = [found for spec in recipe.specs for found in expand(spec)]
    names = unique_names(specs)
    if base is not None and base.id in names:
        base = dataclasses.replace(base, id="theta_0")
    parents = [
        dataclasses.replace(
            _open(spec, name, base, opener),
            weight=spec.weight,
            trajectory=spec.trajectory,
            examples=spec.examples,
        )
        for spec, name in zip(specs, names, strict=True)
    ]
    return tuple(parents), base


def expand(spec: ParentSpec) -> list[ParentSpec]:
    """One entry for every folder a pattern matches, in natural order (step-20 before step-100), the `last` so many.

    The checkpoints of a pattern are one trajectory unless the recipe names another.
    """
    if not any(mark in spec.path for mark in "*?["):
        return [spec]
    matches = sorted(
        (path for path in glob.glob(str(Path(spec.path).expanduser())) if Path(path).is_dir()), key=_natural
    )
    if not matches:
        raise RecipeError(f"no folder matches the pattern {spec.path!r}", fix="check the path")
    chosen = matches[-spec.last :] if spec.last is not None else matches
    return [
        dataclasses.replace(
            spec,
            path=path,
            id=f"{spec.id}/{_varying(path, matches)}" if spec.id else None,
            trajectory=spec.trajectory or spec.id or spec.path,
            examples=_times_steps(spec.examples, path),
            last=None,
        )
        for path in chosen
    ]


def _natural(path: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path) if part]


def _times_steps(examples: Mapping[str, float] | None, path: str) -> dict[str, float] | None:
    """Examples of one step times the steps of a checkpoint, the last number in its path (step-200)."""
    steps = re.findall(r"\d+", path)
    return {task: count * int(steps[-1]) for task, count in examples.items()} if examples and steps else None


def _varying(path: str, matches: Sequence[str]) -> str:
    """The parts of the path in which the matches differ."""
    columns = list(zip(*(Path(match).parts for match in matches), strict=False))
    return "/".join(part for part, column in zip(Path(path).parts, columns, strict=False) if len(set(column)) > 1) or (
        Path(path).name
    )


def unique_names(specs: Sequence[ParentSpec]) -> list[str]:
    """Every parent's id: what the recipe says, else the shortest end of its path that no other parent shares.

    Errors: `RecipeError` when the recipe gives two parents one id.
    """
    paths = [Path(spec.adapter or spec.path).parts for spec in specs]
    names: list[str] = []
    for spec, parts in zip(specs, paths, strict=True):
        length = 1
        while length < len(parts) and sum(other[-length:] == parts[-length:] for other in paths) > 1:
            length += 1
        names.append(spec.id or "/".join(parts[-length:]))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(
            f"two parents are called {twice[0]!r}", fix="give every parent an id of its own, or leave one out"
        )
    return names


def _open(spec: ParentSpec, name: str, base: Parent | None, opener: Opener) -> Parent:
    folder = locate(spec.path, spec.revision)
    if is_adapter(folder):
        if spec.adapter is not None:
            raise RecipeError(f"{spec.path} is an adapter, and adapter {spec.adapter} is given on top", where=name)
        return with_adapter(_base_of(folder, base, opener), folder, name)
    opened = opener(folder, name)
    if spec.adapter is None:
        return opened
    return with_adapter(opened, locate(spec.adapter), name)


def _base_of(adapter: Path, base: Parent | None, opener: Opener) -> Parent:
    """The model an adapter lies on: where its configuration says, else the merge's base."""
    said = read_config(adapter).get("base_model_name_or_path")
    try:
        folder = locate(str(said)) if said else None
    except ModelError:
        if base is None:
            raise
        log.warning("%s: its base %s is not here; the merge's base stands in", adapter, said)
        folder = None
    if folder is None:
        if base is None:
            raise ModelError(
                "the adapter does not say which model it belongs to", where=adapter, fix="give the merge a base"
            )
        return base
    refuse_quantised(folder)
    if base is not None and folder.resolve() == base.folder.resolve():
        return base
    return opener(folder, str(said))
