"""Can these models be one model? Errors, choices and notes, from configurations and headers alone."""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from embedsmith.core.errors import CheckpointError, RecipeError
from embedsmith.merge.parents import MISSING, MeanOfOwners, Parent, Reordered, Weights
from embedsmith.merge.recipe import Packaging
from embedsmith.merge.tensor_blocks import UNIT
from embedsmith.merge.varying import mean_of
from embedsmith.models.backbone import load_tokenizer, read_architecture, skeleton
from embedsmith.models.expansion import with_token
from embedsmith.models.folder import FolderFacts
from embedsmith.models.static import is_static

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
_LAYERS = "Dense layers and their like (kind, in, out, activation, residual)"
"""What parents must have alike, and a base may lack: the parents' layers then have no ancestor."""
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "Überraschung! 12,5 % teurer als im März 2024?",
    "how do i reset my password",
    "SELECT name FROM users WHERE id = 42;",
    "检索增强生成",
    "def f(x): return x ** 2",
    " leading and trailing ",
    "naïve café — “quotes”",
    "e = mc^2",
    "a",
)
"""Texts that two tokenizers must cut alike: the vocabulary alone does not say whether an end token is added."""


@dataclass(frozen=True)
class Sheet:
    """What a model's folder says of it, for comparison."""

    model: Parent
    facts: FolderFacts
    config: Mapping[str, Any]
    similarity: str

    @classmethod
    def of(cls, model: Parent) -> Self:
        """With every default of config.json filled in: folders of other versions leave other keys out.

        Errors: `ModelError` for a configuration that cannot be read.
        """
        folder = model.config_folder
        table = is_static(folder)
        config = dict((skeleton(folder).config if table else read_architecture(folder)[1]).to_dict())  # type: ignore
        facts = FolderFacts.read(model.folder)
        if facts.expansion is not None and facts.expansion.token is None:
            tokenizer = load_tokenizer(facts.backbone, trust_remote_code=False)
            facts = replace(facts, expansion=with_token(facts.expansion, tokenizer, facts.backbone))
        return cls(model, facts, config, facts.similarity or "cosine")

    @property
    def is_embedder(self) -> bool:
        return self.facts.pooling is not None or self.facts.form != "dense"

    @property
    def backbone(self) -> Path:
        """The encoder's folder, relative to the model's."""
        return self.facts.backbone.resolve().relative_to(self.model.folder.resolve())


@dataclass(frozen=True)
class Sheets:
    """The sheets of a merge side by side, and what the recipe says of what stands around the weights. `notes`: what
    was noticed, for the report."""

    parents: Sequence[Sheet]
    base: Sheet | None
    packaging: Packaging
    notes: list[str]

    @property
    def every(self) -> list[Sheet]:
        return [*self.parents, *([] if self.base is None else [self.base])]

    def check_same_kind(self) -> None:
        """Architecture, modules and numbers agree.

        Errors: `CheckpointError` naming the two models and what differs.
        """
        first, *others = self.every
        for other in others:
            both = first.is_embedder and other.is_embedder
            for what, one, two, fix in (*self._configs(first, other), *(_facts(first, other) if both else ())):
                if one != two and not (two == [] and other is self.base and what == _LAYERS):
                    raise CheckpointError(
                        f"{what} differ: {one!r} in {first.model.id}, {two!r} in {other.model.id}",
                        where="merge",
                        fix=fix,
                    )

    def _configs(self, first: Sheet, other: Sheet) -> Iterator[tuple[str, object, object, str]]:
        """What must agree in config.json, with what to do where it does not."""
        for key in sorted(first.config.keys() | other.config.keys()):
            one, two = first.config.get(key), other.config.get(key)
            if one == two or key in _HARMLESS or (key in _ATTENTION and not (first.is_embedder and other.is_embedder)):
                continue
            if "drop" in key:
                self.notes.append(
                    f"{key}: {one} in {first.model.id}, {two} in {other.model.id}; it only matters in training"
                )
                continue
            fix = "merge models of one architecture and shape only"
            if key == "model_type":
                fix = "these are different architectures: nothing can be merged"
            elif key in _ATTENTION:
                fix = "attention modes cannot be mixed: train the parents with the same one"
            yield f"{key} of config.json", one, two, fix

    def like(self) -> Sheet:
        """Whose configuration, modules and tokenizer the result gets; never decided by the order of a list."""
        known = {sheet.model.id: sheet for sheet in self.every}
        chosen = self.packaging.like
        if chosen is not None:
            if chosen not in known:
                raise RecipeError(f"packaging.like is {chosen!r}", expected=f"one of the models: {', '.join(known)}")
            return known[chosen]
        modules = {len(sheet.facts.projections) for sheet in self.parents}
        if self.base is not None and self.base.is_embedder and modules == {len(self.base.facts.projections)}:
            return self.base
        return max(self.parents, key=lambda sheet: (sheet.is_embedder, mean_of(sheet.model.weight), sheet.model.id))

    def prompts(self) -> tuple[Mapping[str, str], str | None]:
        """Prompts and the default prompt. Errors: `RecipeError` when the parents differ and nobody chose."""
        theirs = {sheet.model.id: (dict(sheet.facts.prompts), sheet.facts.default_prompt) for sheet in self.parents}
        chosen, (first_id, first) = self.packaging.prompts, next(iter(theirs.items()))
        if isinstance(chosen, str):
            if chosen not in theirs:
                raise RecipeError(f"packaging.prompts is {chosen!r}", expected=f"one of {', '.join(theirs)}")
            return theirs[chosen]
        if chosen is not None:
            return chosen, first[1] if first[1] in chosen else None
        different = next((name for name, value in theirs.items() if value != first), None)
        if different is not None:
            raise RecipeError(
                f"the prompts of {first_id} and {different} differ: {first[0]} and {theirs[different][0]}",
                where="merge",
                fix=f"say whose are kept (packaging.prompts={different}), or write them out under packaging.prompts",
            )
        return first

    def max_length(self) -> int | None:
        """What the recipe says, else the smallest of the parents'."""
        if self.packaging.max_length is not None:
            return self.packaging.max_length
        facts = {sheet.model.id: sheet.facts.max_length for sheet in self.parents}
        lengths = {name: length for name, length in facts.items() if length is not None}
        if len(set(lengths.values())) > 1:
            self.notes.append(f"max_length is the smallest of {lengths}")
        return min(lengths.values(), default=None)

    def same_tokens(self, like: Parent) -> tuple[tuple[Parent, ...], Parent | None]:
        """Parents and base, with token tables whose rows mean the same tokens.

        Errors: `CheckpointError` for differing vocabularies that the recipe does not align, and for tokenizers that
        cut a text in different ways.
        """
        parents, base = [sheet.model for sheet in self.parents], None if self.base is None else self.base.model
        folders = {sheet.model.id: sheet.facts.backbone for sheet in self.every}
        files = {name: folder / "tokenizer.json" for name, folder in folders.items()}
        if len({file.read_bytes() if file.exists() else name.encode() for name, file in files.items()}) == 1:
            return tuple(parents), base
        tokenizers = {name: load_tokenizer(folder, trust_remote_code=False) for name, folder in folders.items()}
        vocabularies: dict[str, Mapping[str, int]] = {name: found.get_vocab() for name, found in tokenizers.items()}
        target = vocabularies[like.id]
        tables = all(sheet.facts.form == "static" for sheet in self.every)  # whose texts stand without special tokens
        for (name, other), text in itertools.product(tokenizers.items(), PROBES):
            mine, theirs = (
                one.convert_ids_to_tokens(one(text, add_special_tokens=not tables)["input_ids"])
                for one in (tokenizers[like.id], other)
            )
            if mine != theirs and set(vocabularies[name]) == set(target):
                raise CheckpointError(
                    f"the tokenizers of {like.id} and {name} cut {text!r} differently: {mine[:8]} and {theirs[:8]}",
                    where="merge",
                    fix="merge models with one tokenizer; look at the special tokens it adds and its lower-casing",
                )
        others = [name for name, vocabulary in vocabularies.items() if vocabulary != target]
        if not others:
            return tuple(parents), base
        if self.packaging.vocabulary == "same":
            other = vocabularies[others[0]]
            lacking, extra = len(target.keys() - other.keys()), len(other.keys() - target.keys())
            moved = sum(other[token] != place for token, place in target.items() if token in other)
            raise CheckpointError(
                f"the vocabularies of {like.id} and {others[0]} differ: {lacking} tokens only in the first, {extra}"
                f" only in the second, {moved} with another id",
                where="merge",
                fix="packaging.vocabulary=align matches the rows token by token",
            )
        self.notes.append(f"rows of the token table of {', '.join(others)} were matched to those of {like.id} by token")
        return _aligned(parents, base, like, vocabularies)


def _facts(first: Sheet, other: Sheet) -> Iterator[tuple[str, object, object, str]]:
    """What two embedders must agree on beside config.json: Dense layers (a base may have none: the parents' heads then
    have no ancestor), pooling, normalisation and whatever else a folder says, but for what the recipe may choose."""
    one, two = ([layer.shape for layer in sheet.facts.projections] for sheet in (first, other))
    fix = "projections to different spaces cannot be merged: drop them, or train them alike"
    yield _LAYERS, one, two, fix
    for entry in (entry for entry in fields(FolderFacts) if entry.name not in _OWN_CHECK):
        values = getattr(first.facts, entry.name), getattr(other.facts, entry.name)
        yield entry.name, *values, "the vectors mean different things: train the parents with the same setting"
    own, their = (replace(sheet.facts.embedding_config, base=None, modules=()) for sheet in (first, other))
    fix = "the models read or attend in different ways: train the parents with the same setting"
    for entry in fields(own):
        yield f"{entry.name} of embedding_config.json", getattr(own, entry.name), getattr(their, entry.name), fix
    if not first.facts.normalize:
        fix = "dot products and cosines rank differently here: use parents with the same similarity"
        yield "similarity_fn_name", first.similarity, other.similarity, fix


def _aligned(
    parents: Sequence[Parent], base: Parent | None, like: Parent, vocabularies: Mapping[str, Mapping[str, int]]
) -> tuple[tuple[Parent, ...], Parent | None]:
    """Models with their token tables in the order of `like`. Padding rows, which no token has, become zero."""
    (name,) = like.token_tables
    rows = like.tensors[name].shape[0]

    def reordered(model: Parent) -> Reordered:
        table, own = model.tensors[name], vocabularies[model.id]
        row_V = np.full(rows, MISSING, np.int64)
        for token, place in vocabularies[like.id].items():
            if token in own and own[token] < table.shape[0] and place < rows:
                row_V[place] = own[token]
        return Reordered(table, row_V)

    def with_table(model: Parent, table: Reordered) -> Parent:
        order = hashlib.sha256(table.row_V.tobytes()).hexdigest()
        remark = f"{model.remark} rows of {name} in the order {order}"
        return replace(model, tensors={**model.tensors, name: table}, remark=remark)

    mean = MeanOfOwners(tuple(reordered(parent) for parent in parents))
    of_base = None if base is None else replace(reordered(base), instead=mean)
    ancestor: Weights = mean if of_base is None else of_base
    found = tuple(with_table(one, replace(reordered(one), instead=ancestor)) for one in parents)
    return found, None if base is None or of_base is None else with_table(base, of_base)


def check_tensors(models: Sequence[Parent], merged: Sequence[str], copied: Sequence[str]) -> None:
    """Weights have one shape in all models. Integers that are copied must be equal, float buffers nearly so: neither is
    a weight, and a mean of them means nothing.

    Errors: `CheckpointError` naming the tensor.
    """
    for name in merged:
        shapes = {model.id: model.tensors[name].shape for model in models if name in model.tensors}
        if len(set(shapes.values())) > 1:
            listing = ", ".join(f"{shape} in {who}" for who, shape in shapes.items())
            raise CheckpointError(
                f"{name} has different shapes: {listing}",
                where="merge",
                fix="merge models of one shape; token tables of different vocabularies need packaging.vocabulary=align",
            )
    for name in copied:
        holder, *others = [model for model in models if name in model.tensors]
        first = holder.tensors[name]
        for other in others:
            second = other.tensors[name]
            same = first.shape == second.shape and first.dtype.is_floating_point == second.dtype.is_floating_point
            if same:
                one, two = (tensor.read(0, holder.size(name)).double() for tensor in (first, second))
                same = torch.allclose(one, two, rtol=1e-6 if first.dtype.is_floating_point else 0.0, atol=0.0)
            if not same:
                raise CheckpointError(
                    f"{name} is no weight and differs between {holder.id} and {other.id}",
                    where="merge",
                    expected="equal buffers, which are copied",
                    fix="the models were built with different settings; merge models of one kind",
                )


def check_descent(
    parents: Sequence[Parent], base: Parent | None, names: Sequence[str], unrelated: bool
) -> dict[str, float]:
    """How far each parent is from the base, |V_i| / |theta_0|, on a sample of every matrix: its first and its
    middle unit.

    Without a base the first parent stands for it. Errors: `CheckpointError` for a distance above 0.5, where merging
    gives noise, naming the model the others are closest to; `unrelated` makes it a note.
    """
    matrices = [name for name in names if len(parents[0].tensors[name].shape) > 1] or list(names)
    models = [*parents, *([] if base is None else [base])]
    sample = {}
    for model in models:
        parts = []
        for name in matrices:
            for start in sorted({0, model.size(name) // 2 // UNIT * UNIT}):
                parts.append(model.read(name, start, min(start + UNIT, model.size(name))).double())
        sample[model.id] = torch.cat(parts)
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
