"""Token tables of models whose vocabularies differ: rows matched by token, tokens a model lacks filled in."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedsmith.core.errors import CheckpointError
from embedsmith.merge.parents import Parent, Weights
from embedsmith.models.backbone import load_tokenizer
from embedsmith.models.folder import read_folder

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
_MISSING = -1


@dataclass(frozen=True)
class Reordered:
    """Rows of `table` in a new order; a row numbered -1 comes from `instead` (zeros without it)."""

    table: Weights
    row_V: NDArray[np.int64]
    instead: Weights | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.row_V), self.table.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.table.dtype

    def read(self, start: int, stop: int) -> Tensor:
        width = self.shape[1]
        first, last = start // width, -(-stop // width)
        found = [self._run(int(run[0]), int(run[-1]) + 1) for run in _runs(self.row_V, first, last)]
        return torch.cat(found)[start - first * width : stop - first * width]

    def _run(self, first: int, last: int) -> Tensor:
        """New rows [first, last), which lie side by side in the table, or are all missing."""
        width, row = self.shape[1], int(self.row_V[first])
        if row != _MISSING:
            return self.table.read(row * width, (row + last - first) * width).float()
        if self.instead is None:
            return torch.zeros((last - first) * width)
        return self.instead.read(first * width, last * width).float()


def _runs(row_V: NDArray[np.int64], first: int, last: int) -> list[NDArray[np.int64]]:
    place = np.arange(first, last)
    row = row_V[first:last]
    goes_on = np.where(row[1:] == _MISSING, row[:-1] == _MISSING, (row[1:] == row[:-1] + 1) & (row[:-1] != _MISSING))
    return np.split(place, np.flatnonzero(~goes_on) + 1)


@dataclass(frozen=True)
class MeanOfOwners:
    """Row by row the mean over the tables that have it: the ancestor of a token the base does not know."""

    tables: tuple[Reordered, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tables[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def read(self, start: int, stop: int) -> Tensor:
        width = self.shape[1]
        row_E = torch.arange(start, stop) // width
        total_E = torch.zeros(stop - start, dtype=torch.float64)
        owners_E = torch.zeros(stop - start, dtype=torch.float64)
        for table in self.tables:
            has_E = torch.from_numpy(table.row_V != _MISSING)[row_E]
            total_E += torch.where(has_E, table.read(start, stop).double(), 0.0)
            owners_E += has_E
        return (total_E / owners_E.clamp_min(1)).float()


def tokenizer_of(model: Parent) -> Any:
    return load_tokenizer(read_folder(model.folder).backbone, trust_remote_code=False)


def match_vocabularies(
    parents: Sequence[Parent], base: Parent | None, like: Parent, policy: str, notes: list[str]
) -> tuple[tuple[Parent, ...], Parent | None]:
    """Parents and base, with token tables whose rows mean the same tokens.

    Errors: `CheckpointError` for differing vocabularies under the policy `same`, and for tokenizers that cut a text
    in different ways.
    """
    models = [*parents, *([] if base is None else [base])]
    if len({_tokenizer_bytes(model) for model in models}) == 1:
        return tuple(parents), base
    tokenizers = {model.id: tokenizer_of(model) for model in models}
    vocabularies: dict[str, Mapping[str, int]] = {name: found.get_vocab() for name, found in tokenizers.items()}
    _check_cuts(tokenizers, like.id)
    target = vocabularies[like.id]
    others = [name for name, vocabulary in vocabularies.items() if vocabulary != target]
    if not others:
        return tuple(parents), base
    if policy == "same":
        raise _vocabularies_differ(like.id, target, others[0], vocabularies[others[0]])
    notes.append(f"rows of the token table of {', '.join(others)} were matched to those of {like.id} by token")
    return _aligned(parents, base, like, vocabularies)


def _tokenizer_bytes(model: Parent) -> bytes:
    file = read_folder(model.folder).backbone / "tokenizer.json"
    return file.read_bytes() if file.exists() else model.id.encode()


def _check_cuts(tokenizers: Mapping[str, Any], like: str) -> None:
    for name, other in tokenizers.items():
        for text in PROBES:
            mine, theirs = (
                found.convert_ids_to_tokens(found(text)["input_ids"]) for found in (tokenizers[like], other)
            )
            if mine != theirs and set(other.get_vocab()) == set(tokenizers[like].get_vocab()):
                raise CheckpointError(
                    f"the tokenizers of {like} and {name} cut {text!r} differently: {mine[:8]} and {theirs[:8]}",
                    where="merge",
                    fix="merge models with one tokenizer; look at the special tokens it adds and its lower-casing",
                )


def _vocabularies_differ(
    like: str, target: Mapping[str, int], other: str, vocabulary: Mapping[str, int]
) -> CheckpointError:
    lacking, extra = len(target.keys() - vocabulary.keys()), len(vocabulary.keys() - target.keys())
    moved = sum(vocabulary[token] != place for token, place in target.items() if token in vocabulary)
    return CheckpointError(
        f"the vocabularies of {like} and {other} differ: {lacking} tokens only in the first, {extra} only in the"
        f" second, {moved} with another id",
        where="merge",
        fix="packaging.vocabulary=align matches the rows token by token",
    )


def _aligned(
    parents: Sequence[Parent], base: Parent | None, like: Parent, vocabularies: Mapping[str, Mapping[str, int]]
) -> tuple[tuple[Parent, ...], Parent | None]:
    (name,) = like.token_tables
    rows = like.tensors[name].shape[0]

    def reordered(model: Parent) -> Reordered:
        table = model.tensors[name]
        return Reordered(table, _rows(vocabularies[like.id], vocabularies[model.id], rows, table.shape[0]))

    mean = MeanOfOwners(tuple(reordered(parent) for parent in parents))
    ancestor: Weights = mean if base is None else dataclasses.replace(reordered(base), instead=mean)
    found = tuple(_with(parent, name, dataclasses.replace(reordered(parent), instead=ancestor)) for parent in parents)
    if base is None or not isinstance(ancestor, Reordered):
        return found, None
    return found, _with(base, name, ancestor)


def _with(model: Parent, name: str, table: Reordered) -> Parent:
    remark = f"{model.remark} rows of {name} in the order {hashlib.sha256(table.row_V.tobytes()).hexdigest()}"
    return dataclasses.replace(model, tensors={**model.tensors, name: table}, remark=remark)


def _rows(target: Mapping[str, int], vocabulary: Mapping[str, int], rows: int, own: int) -> NDArray[np.int64]:
    """For every row of the result, the model's row of that token. Padding rows, which no token has, become zero."""
    row_V = np.full(rows, _MISSING, np.int64)
    for token, place in target.items():
        if token in vocabulary and vocabulary[token] < own and place < rows:
            row_V[place] = vocabulary[token]
    return row_V
