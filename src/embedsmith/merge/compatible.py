"""Can these models be one model? Errors, choices and notes, from configurations and headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from embedsmith.core.errors import CheckpointError, RecipeError
from embedsmith.merge.parents import Parent, size_of
from embedsmith.merge.recipe import Packaging
from embedsmith.merge.stream import UNIT, read_finite
from embedsmith.models.backbone import read_architecture
from embedsmith.models.folder import FolderFacts

_HARMLESS = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "auto_map"),
    *("initializer_range", "initializer_factor", "gradient_checkpointing", "id2label", "label2id", "num_labels"),
    *("problem_type", "output_attentions", "output_hidden_states", "return_dict", "finetuning_task", "model_name"),
    *("task_specific_params", "chunk_size_feed_forward", "_attn_implementation_autoset", "tokenizer_class", "name"),
    *("max_position_embeddings", "vocab_size", "use_return_dict", "tie_word_embeddings", "prefix"),
}
"""Keys of config.json that change no vector; and lengths, vocabulary and ties, which have checks of their own."""
_OWN_CHECK = {"backbone", "embedding_config", "projections", "prompts", "default_prompt", "max_length"} | {
    *("similarity", "truncate_dim"),  # the latter changes no weight: the result has that of `like`
}
_ATTENTION = {"is_causal", "is_decoder", "bidirectional", "use_bidirectional_attention", "attention"}
"""A base that is no embedder may attend in another way: its weights are the ancestor all the same."""
_UNRELATED = 0.5


@dataclass(frozen=True)
class Sheet:
    """What a model's folder says of it, for comparison."""

    model: Parent
    facts: FolderFacts
    config: Mapping[str, Any]
    similarity: str

    @staticmethod
    def of(model: Parent) -> Sheet:
        """With every default of config.json filled in: folders of other versions leave other keys out.

        Errors: `ModelError` for a configuration that cannot be read.
        """
        config = dict(read_architecture(model.config_folder)[1].to_dict())
        facts = FolderFacts.read(model.folder)
        return Sheet(model, facts, config, facts.similarity or "cosine")

    @property
    def is_embedder(self) -> bool:
        return self.facts.pooling is not None


def check_same_kind(sheets: Sequence[Sheet]) -> list[str]:
    """Architecture, modules and numbers agree. Returns notes.

    Errors: `CheckpointError` naming the two models and what differs.
    """
    notes: list[str] = []
    first = sheets[0]
    for other in sheets[1:]:
        notes += _compare_configs(first, other)
        _compare_projections(first, other)
        if first.is_embedder and other.is_embedder:
            _compare_facts(first, other)
    return notes


def _compare_configs(first: Sheet, other: Sheet) -> list[str]:
    notes: list[str] = []
    for key in sorted(first.config.keys() | other.config.keys()):
        one, two = first.config.get(key), other.config.get(key)
        if one == two or key in _HARMLESS or (key in _ATTENTION and not (first.is_embedder and other.is_embedder)):
            continue
        if "drop" in key:
            notes.append(f"{key}: {one} in {first.model.id}, {two} in {other.model.id}; it only matters in training")
            continue
        fix = "merge models of one architecture and shape only"
        if key == "model_type":
            fix = "these are different architectures: nothing can be merged"
        elif key in _ATTENTION:
            fix = "attention modes cannot be mixed: train the parents with the same one"
        raise _differ(first, other, f"{key} of config.json", one, two, fix)
    return notes


def _compare_facts(first: Sheet, other: Sheet) -> None:
    """Pooling, normalisation and whatever else a folder says, but for what the recipe may choose."""
    for entry in (entry for entry in fields(FolderFacts) if entry.name not in _OWN_CHECK):
        one, two = getattr(first.facts, entry.name), getattr(other.facts, entry.name)
        if one != two:
            fix = "the vectors mean different things: train the parents with the same setting"
            raise _differ(first, other, entry.name, one, two, fix)
    one, two = (replace(sheet.facts.embedding_config, base=None, modules=()) for sheet in (first, other))
    for entry in fields(one):
        if getattr(one, entry.name) != getattr(two, entry.name):
            values = getattr(one, entry.name), getattr(two, entry.name)
            fix = "the models read or attend in different ways: train the parents with the same setting"
            raise _differ(first, other, f"{entry.name} of embedding_config.json", *values, fix)
    if first.similarity != other.similarity and not first.facts.normalize:
        fix = "dot products and cosines rank differently here: use parents with the same similarity"
        raise _differ(first, other, "similarity_fn_name", first.similarity, other.similarity, fix)


def _compare_projections(first: Sheet, other: Sheet) -> None:
    """Dense layers; a base may have none (the parents' heads then have no ancestor)."""
    if not (first.is_embedder and other.is_embedder):
        return
    one, two = (
        [(p.linear.in_features, p.linear.out_features, p.activation, p.use_residual) for p in sheet.facts.projections]
        for sheet in (first, other)
    )
    if one != two:
        fix = "projections to different spaces cannot be merged: drop them, or train them alike"
        raise _differ(first, other, "Dense layers (in, out, activation, residual)", one, two, fix)


def _differ(first: Sheet, other: Sheet, what: str, one: object, two: object, fix: str) -> CheckpointError:
    return CheckpointError(
        f"{what} differ: {one!r} in {first.model.id}, {two!r} in {other.model.id}", where="merge", fix=fix
    )


def choose_like(parents: Sequence[Sheet], base: Sheet | None, packaging: Packaging) -> Sheet:
    """Whose configuration, modules and tokenizer the result gets; never decided by the order of a list."""
    known = {sheet.model.id: sheet for sheet in [*parents, *([base] if base else [])]}
    if packaging.like is not None:
        if packaging.like not in known:
            raise RecipeError(
                f"packaging.like is {packaging.like!r}", expected=f"one of the models: {', '.join(known)}"
            )
        return known[packaging.like]
    modules = {len(sheet.facts.projections) for sheet in parents}
    if base is not None and base.is_embedder and modules == {len(base.facts.projections)}:
        return base
    return max(parents, key=lambda sheet: (sheet.is_embedder, sheet.model.weight, sheet.model.id))


def choose_prompts(parents: Sequence[Sheet], packaging: Packaging) -> tuple[Mapping[str, str], str | None]:
    """Prompts and the default prompt. Errors: `RecipeError` when the parents differ and nobody chose."""
    theirs = {sheet.model.id: (dict(sheet.facts.prompts), sheet.facts.default_prompt) for sheet in parents}
    if isinstance(packaging.prompts, str):
        if packaging.prompts not in theirs:
            raise RecipeError(f"packaging.prompts is {packaging.prompts!r}", expected=f"one of {', '.join(theirs)}")
        return theirs[packaging.prompts]
    if packaging.prompts is not None:
        default = next(iter(theirs.values()))[1]
        return packaging.prompts, default if default in packaging.prompts else None
    first = next(iter(theirs.values()))
    different = next((name for name, value in theirs.items() if value != first), None)
    if different is not None:
        raise RecipeError(
            f"the prompts of {next(iter(theirs))} and {different} differ: {first[0]} and {theirs[different][0]}",
            where="merge",
            fix=f"say whose are kept (packaging.prompts={different}), or write them out under packaging.prompts",
        )
    return first


def choose_max_length(parents: Sequence[Sheet], packaging: Packaging, notes: list[str]) -> int | None:
    """What the recipe says, else the smallest of the parents'."""
    if packaging.max_length is not None:
        return packaging.max_length
    lengths = {sheet.model.id: sheet.facts.max_length for sheet in parents if sheet.facts.max_length is not None}
    if len(set(lengths.values())) > 1:
        notes.append(f"max_length is the smallest of {lengths}")
    return min(lengths.values(), default=None)


def check_shapes(models: Sequence[Parent], names: Sequence[str]) -> None:
    """Errors: `CheckpointError` naming the tensor whose shapes differ."""
    for name in names:
        shapes = {model.id: model.tensors[name].shape for model in models if name in model.tensors}
        if len(set(shapes.values())) > 1:
            listing = ", ".join(f"{shape} in {who}" for who, shape in shapes.items())
            raise CheckpointError(
                f"{name} has different shapes: {listing}",
                where="merge",
                fix="merge models of one shape; token tables of different vocabularies need packaging.vocabulary=align",
            )


def check_copied(models: Sequence[Parent], name: str) -> None:
    """Integers must be equal, float buffers nearly so: neither is a weight, and a mean of them means nothing.

    Errors: `CheckpointError` naming the tensor.
    """
    holders = [model for model in models if name in model.tensors]
    first = holders[0].tensors[name]
    for other in holders[1:]:
        second = other.tensors[name]
        same = first.shape == second.shape and first.dtype.is_floating_point == second.dtype.is_floating_point
        if same:
            one, two = first.read(0, size_of(first)), second.read(0, size_of(second))
            bound = 1e-6 if first.dtype.is_floating_point else 0.0
            same = torch.allclose(one.double(), two.double(), rtol=bound, atol=0.0)
        if not same:
            raise CheckpointError(
                f"{name} is no weight and differs between {holders[0].id} and {other.id}",
                where="merge",
                expected="equal buffers, which are copied",
                fix="the models were built with different settings; merge models of one kind",
            )


def check_descent(
    parents: Sequence[Parent], base: Parent | None, names: Sequence[str], unrelated: bool
) -> dict[str, float]:
    """How far each parent is from the base, |V_i| / |theta_0|, on a sample of every matrix.

    Without a base the first parent stands for it. Errors: `CheckpointError` for a distance above 0.5, where merging
    gives noise, naming the model the others are closest to; `unrelated` makes it a note.
    """
    matrices = [name for name in names if len(parents[0].tensors[name].shape) > 1] or list(names)
    models = [*parents, *([] if base is None else [base])]
    sample = {model.id: _sample(model, matrices) for model in models}
    origin = sample[parents[0].id if base is None else base.id]
    size = float(origin.norm())
    distance = {parent.id: float((sample[parent.id] - origin).norm()) / size if size else 0.0 for parent in parents}
    far = max(distance, key=lambda name: distance[name])
    if distance[far] > _UNRELATED and not unrelated:
        total = {one.id: sum(float((sample[one.id] - other).norm()) for other in sample.values()) for one in models}
        nearest = min(total, key=lambda name: total[name])
        better = f" (of these models {nearest} is nearest to all the others)" if len(models) > 2 else ""
        raise CheckpointError(
            f"{far} is no descendant of {parents[0].id if base is None else base.id}: its weights differ by"
            f" {distance[far]:.0%} of their size (siblings differ by less than 10 %)",
            where="merge",
            fix=f"merge models trained from one base{better}; unrelated=true merges all the same",
        )
    return distance


def _sample(model: Parent, names: Sequence[str]) -> torch.Tensor:
    """The first and the middle unit of every tensor."""
    parts: list[torch.Tensor] = []
    for name in names:
        total = size_of(model.tensors[name])
        for start in sorted({0, total // 2 // UNIT * UNIT}):
            parts.append(read_finite(model, name, start, min(start + UNIT, total)).double())
    return torch.cat(parts)
