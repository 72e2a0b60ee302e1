"""Token tables of models whose vocabularies differ: rows matched by token, tokens a model lacks filled in."""

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
from embedsmith.merge.parents import Parent, View, Weights
from embedsmith.models.backbone import load_tokenizer
from embedsmith.models.folder import FolderFacts

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
class Reordered(View):
    """Rows of a table in a new order; a row numbered -1 comes from `instead` (zeros without it)."""

    row_V: NDArray[np.int64]
    instead: Weights | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.row_V), self.whole.shape[1])

    def read(self, start: int, stop: int) -> Tensor:
        """Rows that lie side by side in the table, and rows that are all missing, are read together."""
        width = self.shape[1]
        first, last = start // width, -(-stop // width)
        row = self.row_V[first:last]
        goes_on = np.where(
            row[1:] == _MISSING, row[:-1] == _MISSING, (row[1:] == row[:-1] + 1) & (row[:-1] != _MISSING)
        )
        found = []
        for run in np.split(np.arange(first, last), np.flatnonzero(~goes_on) + 1):
            begin, count, own = int(run[0]), len(run), int(self.row_V[run[0]])
            if own != _MISSING:
                found.append(self.whole.read(own * width, (own + count) * width))
            elif self.instead is None:
                found.append(torch.zeros(count * width))
            else:
                found.append(self.instead.read(begin * width, (begin + count) * width))
        return torch.cat(found)[start - first * width : stop - first * width]


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


def match_vocabularies(
    parents: Sequence[Parent], base: Parent | None, like: Parent, policy: str, notes: list[str]
) -> tuple[tuple[Parent, ...], Parent | None]:
    """Parents and base, with token tables whose rows mean the same tokens.

    Errors: `CheckpointError` for differing vocabularies under the policy `same`, and for tokenizers that cut a text
    in different ways.
    """
    models = [*parents, *([] if base is None else [base])]
    folders = {model.id: FolderFacts.read(model.folder).backbone for model in models}
    files = {name: folder / "tokenizer.json" for name, folder in folders.items()}
    if len({file.read_bytes() if file.exists() else name.encode() for name, file in files.items()}) == 1:
        return tuple(parents), base
    tokenizers = {name: load_tokenizer(folder, trust_remote_code=False) for name, folder in folders.items()}
    vocabularies: dict[str, Mapping[str, int]] = {name: found.get_vocab() for name, found in tokenizers.items()}
    _check_cuts(tokenizers, like.id)
    target = vocabularies[like.id]
    others = [name for name, vocabulary in vocabularies.items() if vocabulary != target]
    if not others:
        return tuple(parents), base
    if policy == "same":
        other = vocabularies[others[0]]
        lacking, extra = len(target.keys() - other.keys()), len(other.keys() - target.keys())
        moved = sum(other[token] != place for token, place in target.items() if token in other)
        raise CheckpointError(
            f"the vocabularies of {like.id} and {others[0]} differ: {lacking} tokens only in the first, {extra} only"
            f" in the second, {moved} with another id",
            where="merge",
            fix="packaging.vocabulary=align matches the rows token by token",
        )
    notes.append(f"rows of the token table of {', '.join(others)} were matched to those of {like.id} by token")
    return _aligned(parents, base, like, vocabularies)


def _check_cuts(tokenizers: Mapping[str, Any], like: str) -> None:
    """Errors: `CheckpointError` for a tokenizer of the same vocabulary that cuts one of the `PROBES` differently."""
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


def _aligned(
    parents: Sequence[Parent], base: Parent | None, like: Parent, vocabularies: Mapping[str, Mapping[str, int]]
) -> tuple[tuple[Parent, ...], Parent | None]:
    """Models with their token tables in the order of `like`. Padding rows, which no token has, become zero."""
    (name,) = like.token_tables
    rows = like.tensors[name].shape[0]

    def reordered(model: Parent) -> Reordered:
        table, own = model.tensors[name], vocabularies[model.id]
        row_V = np.full(rows, _MISSING, np.int64)
        for token, place in vocabularies[like.id].items():
            if token in own and own[token] < table.shape[0] and place < rows:
                row_V[place] = own[token]
        return Reordered(table, row_V)

    def with_table(model: Parent, table: Reordered) -> Parent:
        order = hashlib.sha256(table.row_V.tobytes()).hexdigest()
        remark = f"{model.remark} rows of {name} in the order {order}"
        return dataclasses.replace(model, tensors={**model.tensors, name: table}, remark=remark)

    mean = MeanOfOwners(tuple(reordered(parent) for parent in parents))
    of_base = None if base is None else dataclasses.replace(reordered(base), instead=mean)
    ancestor: Weights = mean if of_base is None else of_base
    found = tuple(with_table(one, dataclasses.replace(reordered(one), instead=ancestor)) for one in parents)
    return found, None if base is None or of_base is None else with_table(base, of_base)
