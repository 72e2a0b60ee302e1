"""The plan of a merge: which tensor is made how, decided before a weight is read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedsmith.core.errors import CheckpointError, RecipeError
from embedsmith.merge.compatible import Sheet, Sheets, check_descent, check_tensors
from embedsmith.merge.folders import open_models
from embedsmith.merge.method import Job, Method
from embedsmith.merge.parents import Parent, Reordered
from embedsmith.merge.recipe import MergeRecipe
from embedsmith.merge.varying import check_filters, layer_places, mean_of, value_at, varies

_POSITIONS = re.compile(r"(^|\.)(position_embeddings|wpe|embed_positions)\.weight$")


@dataclass(frozen=True)
class Plan:
    """parents and base as they are merged (vocabulary and lengths matched). by_method: each method with the names it
    makes; the base has all of them. averaged: names without an ancestor, with the places of the parents that have
    them. copied: buffers. positions: length of a shortened position table."""

    recipe: MergeRecipe
    parents: tuple[Parent, ...]
    base: Parent | None
    like: Sheet
    by_method: tuple[tuple[Method, tuple[str, ...]], ...]
    averaged: Mapping[str, tuple[int, ...]]
    copied: tuple[str, ...]
    prompts: Mapping[str, str]
    default_prompt: str | None
    max_length: int | None
    positions: int | None
    distance: Mapping[str, float]
    notes: tuple[str, ...]

    @property
    def models(self) -> list[Parent]:
        """The parents, and the base where there is one."""
        return [*self.parents, *([] if self.base is None else [self.base])]

    @property
    def weight_M(self) -> Tensor:
        """One number a parent: of weights that vary the mean."""
        return torch.tensor([mean_of(parent.weight) for parent in self.parents], dtype=torch.float64)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every tensor of the result, in the order in which the files hold them."""
        wanted = {*self.averaged, *self.copied, *(name for _, names in self.by_method for name in names)}
        order = dict.fromkeys(name for parent in self.parents for name in parent.tensors)
        return tuple(name for name in order if name in wanted)

    @cached_property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Numbers on disk of every tensor: as the recipe says, else the widest among the parents. Buffers stay."""
        wanted = self.recipe.dtype
        found: dict[str, torch.dtype] = {}
        for name in self.names:
            own = [parent.tensors[name].dtype for parent in self.parents if name in parent.tensors]
            stays = wanted is None or name in self.copied or name.startswith("token_heads.")
            found[name] = reduce(torch.promote_types, own) if stays else getattr(torch, str(wanted))
        return found

    def in_words(self) -> str:
        """What would be made how, and what was noticed."""
        elements = {name: self.holder(name).size(name) for name in self.names}
        size = sum(count * self.dtypes[name].itemsize for name, count in elements.items())
        counts = f"{len(elements)} tensors, {sum(elements.values()):,} weights, {size:,} bytes"
        lines = [f"{len(self.parents)} parents, {counts}"]
        lines += [f"{model.id}: {self.distance[model.id]:.2%} from the base" for model in self.parents]
        lines += [f"{method.registered_name}: {len(names)} tensors" for method, names in self.by_method]
        lines += [f"mean without an ancestor: {len(self.averaged)} tensors"] if self.averaged else []
        lines += [f"copied: {len(self.copied)} tensors"] if self.copied else []
        lines += [f"configuration, modules and tokenizer from {self.like.model.id}"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def holder(self, name: str) -> Parent:
        """A parent that has the tensor."""
        return next(parent for parent in self.parents if name in parent.tensors)

    def weights(self, names: tuple[str, ...]) -> Tensor | Mapping[str, Tensor]:
        """The parents' weights [M], or those of every tensor where they vary."""
        if not any(varies(parent.weight) for parent in self.parents):
            return self.weight_M
        places = layer_places(self.parents[0].tensors)
        rows = ((name, [value_at(parent.weight, name, places.get(name)) for parent in self.parents]) for name in names)
        return {name: torch.tensor(row, dtype=torch.float64) for name, row in rows}

    def job(self, names: tuple[str, ...]) -> Job:
        own, seed, cache = self.recipe.granularity, self.recipe.seed, self.recipe.cache_folder
        return Job(self.parents, self.base, names, self.weights(names), own, seed, cache)


def make_plan(recipe: MergeRecipe) -> Plan:
    """Open the models, compare them, and decide about every tensor. Reads headers, configurations and a sample.

    Errors: `RecipeError`, `ModelError` or `CheckpointError` for whatever cannot be merged, with what to do about it.
    """
    opened, base = open_models(recipe)
    notes: list[str] = []
    own = [Sheet.of(parent) for parent in opened]
    sheets = Sheets(own, None if base is None else Sheet.of(base), recipe.packaging, notes)
    sheets.check_same_kind()
    like = sheets.like()
    prompts, default_prompt = sheets.prompts()
    max_length = sheets.max_length()
    parents, base, positions = _same_positions(*sheets.same_tokens(like.model), notes)
    merged, averaged, copied = _sort_tensors(parents, base, recipe, notes)
    by_method = _methods(recipe, merged, base)
    _check_varying(parents, by_method, (*merged, *averaged))
    check_tensors([*parents, *([] if base is None else [base])], [*merged, *averaged], copied)
    return Plan(
        recipe,
        parents,
        base,
        like,
        by_method,
        averaged,
        copied,
        prompts,
        default_prompt,
        max_length,
        positions,
        check_descent(parents, base, merged, recipe.unrelated),
        tuple(notes),
    )


def _same_positions(
    parents: Sequence[Parent], base: Parent | None, notes: list[str]
) -> tuple[tuple[Parent, ...], Parent | None, int | None]:
    """Position tables cut to the shortest."""
    models = [*parents, *([] if base is None else [base])]
    tables = {name for model in models for name in model.tensors if _POSITIONS.search(name)}
    lengths = {name: {m.tensors[name].shape[0] for m in models if name in m.tensors} for name in tables}
    short = {name: min(found) for name, found in lengths.items() if len(found) > 1}
    if not short:
        return tuple(parents), base, None
    notes.append(f"position tables of different lengths were cut to the shortest, {min(short.values())}")

    def cut(model: Parent) -> Parent:
        rows = {name: np.arange(length) for name, length in short.items()}
        tensors = {name: Reordered(w, rows[name]) if name in rows else w for name, w in model.tensors.items()}
        return replace(model, tensors=tensors, remark=f"{model.remark} positions {sorted(short.items())}")

    return tuple(cut(parent) for parent in parents), None if base is None else cut(base), min(short.values())


def _sort_tensors(
    parents: Sequence[Parent], base: Parent | None, recipe: MergeRecipe, notes: list[str]
) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]], tuple[str, ...]]:
    """Names for the method, names without an ancestor, names to copy.

    Errors: `CheckpointError` for a token head that some parents lack, unless the recipe decides what happens to it.
    """
    merged: list[str] = []
    averaged: dict[str, tuple[int, ...]] = {}
    copied: list[str] = []
    for name in dict.fromkeys(name for parent in parents for name in parent.tensors):
        holders = tuple(place for place, parent in enumerate(parents) if name in parent.tensors)
        everywhere = len(holders) == len(parents)
        in_base = base is None or name in base.tensors
        parent = parents[holders[0]]
        if not parent.tensors[name].dtype.is_floating_point or name in parent.buffers:
            copied += [name] if everywhere else []
        elif everywhere and in_base:
            merged.append(name)
        elif name in parent.unused:
            notes.append(f"{name} is not in every model and no vector depends on it: left out")
        elif everywhere or (recipe.packaging.heads == "copy" and name.startswith("token_heads.")):
            averaged[name] = holders
        elif recipe.packaging.heads == "error" or not name.startswith("token_heads."):
            lacking = next(other.id for other in parents if name not in other.tensors)
            fix = "packaging.heads=drop or packaging.heads=copy" if name.startswith("token_heads.") else None
            raise CheckpointError(f"{name} is in {parent.id} and not in {lacking}", where="merge", fix=fix)
    if averaged:
        notes.append(f"without an ancestor, so averaged over the parents that have them: {', '.join(averaged)}")
    for parent in parents:
        if parent.left_out:
            notes.append(f"{parent.id}: {len(parent.left_out)} weights of heads the encoder does not use were left out")
    return tuple(merged), averaged, tuple(copied)


def _check_varying(
    parents: Sequence[Parent], by_method: Sequence[tuple[Method, tuple[str, ...]]], names: Sequence[str]
) -> None:
    """Whatever differs from tensor to tensor says something of every one of them.

    Errors: `RecipeError` naming the setting, and for a density of a parent that no method looks at.
    """
    places = layer_places(parents[0].tensors)
    thinned = [name for method, own in by_method if getattr(method, "thins", False) for name in own]
    for parent in parents:
        check_filters(parent.weight, names, places, f"weight of {parent.id}")
        if parent.density is not None and not thinned:
            raise RecipeError(
                f"{parent.id} has a density, and this merge keeps every entry",
                where="parents",
                fix="take it away, or use method: ties, dare, della or breadcrumbs",
            )
        if parent.density is not None:
            check_filters(parent.density, thinned, places, f"density of {parent.id}")
    for method, own in by_method:
        if (t := getattr(method, "t", None)) is not None:
            check_filters(t, own, places, f"t of {method.registered_name}")


def _methods(
    recipe: MergeRecipe, names: Sequence[str], base: Parent | None
) -> tuple[tuple[Method, tuple[str, ...]], ...]:
    """Each method with its names; the first override that matches a name decides."""
    own = [entry.method for entry in recipe.overrides]
    chosen: list[tuple[Any, list[str]]] = [(method, []) for method in (recipe.method, *own)]
    for name in names:
        hits = (place for place, entry in enumerate(recipe.overrides, start=1) if re.search(entry.match, name))
        chosen[next(hits, 0)][1].append(name)
    for method, _ in chosen:
        if base is None and method.base == "needed":
            raise RecipeError(
                f"{method.registered_name} works on task vectors, theta_i - theta_0",
                where="base",
                expected="the model all parents were trained from",
                fix="set base, or use method: average, which needs none",
            )
    unmatched = [entry.match for entry, (_, found) in zip(recipe.overrides, chosen[1:], strict=True) if not found]
    if unmatched:
        raise RecipeError(f"{unmatched[0]!r} matches no tensor", where="overrides", expected=f"such as {names[0]}")
    return tuple((method, tuple(found)) for method, found in chosen if found)
