"""The best k documents of every query, by scoring them all: exact, repeatable, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedsmith.core.errors import SearchError
from embedsmith.core.reps import Dense, MultiVector, Representation, Sparse

FloatArray = npt.NDArray[np.float32]
IndexArray = npt.NDArray[np.int64]
Vectors = npt.NDArray[Any] | Tensor | Representation
"""A matrix [N, D] (NumPy, memory-mapped or torch), or a representation of any kind."""

_BUDGET = 2**24  # numbers held at once while scoring: 64 MB
_QUERIES = {Dense: 1024, Sparse: 256, MultiVector: 32}  # queries scored together


def exact_top_k(
    query: Vectors, document: Vectors, k: int, *, block: int | None = None
) -> tuple[FloatArray, IndexArray]:
    """score_Qk and index_Qk of the `min(k, K)` best documents of each query, best first; ties go to the lower index.

    The score is the inner product of dense vectors, or whatever `Representation.scores` says. Documents are read in
    blocks of `block` rows (derived from a 64 MB budget by default), so neither [Q, K] nor a memory-mapped matrix is
    ever held whole.
    Errors: `SearchError` for shapes that do not match, `k` below 1, and scores that are not a number.
    """
    best = TopK(query, k)
    best.add_in_blocks(document, block)
    return best.result()


class TopK:
    """The running best of documents that arrive in pieces, for a corpus that is never held whole.

    `add` numbers the documents from 0 in the order they come.
    """

    def __init__(self, query: Vectors, k: int) -> None:
        if k < 1:
            raise SearchError(f"k is {k}", expected="a number of documents, 1 or more")
        _check(query, "the queries")
        self._query, self._k, self._seen = query, k, 0
        count = _count(query)
        self._score_Qk = torch.empty(count, 0)
        self._index_Qk = torch.empty(count, 0, dtype=torch.int64)

    def add(self, document: Vectors) -> None:
        """Score the next documents, given as one block."""
        _check(document, "the documents")
        block = _part(document, 0, _count(document))
        if len(block) == 0:
            return
        tops = [self._top_of(part, start, block) for start, part in self._query_parts()]
        if tops:
            new_score_Qk, new_index_Qk = (torch.cat(column) for column in zip(*tops, strict=True))
            self._merge(new_score_Qk, new_index_Qk + self._seen)
        self._seen += len(block)

    def add_in_blocks(self, document: Vectors, block: int | None = None) -> None:
        """Score the next documents, `block` rows at a time (derived from the budget by default)."""
        _check(document, "the documents")
        rows = block or self.block_rows(document)
        for start in range(0, _count(document), rows):
            self.add(_part(document, start, start + rows))

    def result(self) -> tuple[FloatArray, IndexArray]:
        return self._score_Qk.numpy(), self._index_Qk.numpy()

    def block_rows(self, document: Vectors) -> int:
        """How many documents to score at once so that a block of scores, and what leads to it, stays in the budget."""
        kind = type(document) if isinstance(document, Representation) else Dense
        queries = min(_QUERIES.get(kind, 32), max(_count(self._query), 1))
        tokens = self._query.token_count if isinstance(self._query, Representation) else 1
        if isinstance(document, MultiVector):
            return max(_BUDGET // (queries * max(tokens, 1) * max(document.token_count, 1)), 1)
        return max(_BUDGET // (queries * max(tokens, 1)), 1)  # sparse: at most queries * tokens distinct coordinates

    def _query_parts(self) -> Iterator[tuple[int, Representation]]:
        rows = _QUERIES.get(type(self._query), 32) if isinstance(self._query, Representation) else _QUERIES[Dense]
        for start in range(0, _count(self._query), rows):
            yield start, _part(self._query, start, start + rows)

    def _top_of(self, query: Representation, start: int, document: Representation) -> tuple[Tensor, Tensor]:
        if type(query) is not type(document):
            raise SearchError(f"queries are {type(query).__name__} and documents are {type(document).__name__}")
        if isinstance(query, Dense) and query.vector_ND.shape[1] != document.tensors()[0].shape[1]:
            sizes = f"{query.vector_ND.shape[1]} and {document.tensors()[0].shape[1]}"
            raise SearchError(f"queries and documents have vectors of {sizes} numbers", expected="the same model")
        with torch.no_grad():
            score_QB = query.scores(document.map(lambda tensor: tensor.to(query.tensors()[0].device)))[0].float().cpu()
        if bool(score_QB.isnan().any()):
            row, column = (int(place) for place in score_QB.isnan().nonzero()[0])
            raise SearchError(
                f"the score of query {start + row} with document {self._seen + column} is not a number",
                fix="look for NaN or infinite values in the vectors",
            )
        return top_of_block(score_QB, self._k)

    def _merge(self, score_Qk: Tensor, index_Qk: Tensor) -> None:
        """Earlier documents stand first, so a stable sort keeps the lower index first among equals."""
        joined = torch.cat([self._score_Qk, score_Qk], dim=1)
        self._score_Qk, order = (part[:, : self._k] for part in joined.sort(dim=1, descending=True, stable=True))
        self._index_Qk = torch.cat([self._index_Qk, index_Qk], dim=1).gather(1, order)


def top_of_block(score_QB: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of every row, best first, ties to the lower column. `torch.topk` breaks ties as it likes, so
    its choice is put in order, and made again by a full sort in the rows where a tie crosses the cut."""
    if k >= score_QB.shape[1]:
        score_Qk, index_Qk = score_QB.sort(dim=1, descending=True, stable=True)
        return score_Qk, index_Qk
    score, index = score_QB.topk(k + 1, dim=1)
    index_Qk = index[:, :k].sort(dim=1).values
    score_Qk, order = score_QB.gather(1, index_Qk).sort(dim=1, descending=True, stable=True)
    index_Qk = index_Qk.gather(1, order)
    tied_Q = score[:, k] == score[:, k - 1]
    if bool(tied_Q.any()):
        exact = score_QB[tied_Q].sort(dim=1, descending=True, stable=True)
        score_Qk[tied_Q], index_Qk[tied_Q] = exact.values[:, :k], exact.indices[:, :k]
    return score_Qk, index_Qk


def _count(value: Vectors) -> int:
    return len(value)


def _check(value: Vectors, name: str) -> None:
    if not isinstance(value, Representation) and value.ndim != 2:
        raise SearchError(f"{name} have the shape {tuple(value.shape)}", expected="a matrix [N, D]")


def _part(value: Vectors, start: int, stop: int) -> Representation:
    """Rows `start` to `stop` as a representation; only they are read from a memory-mapped matrix."""
    if isinstance(value, Representation):
        return value.rows(slice(start, stop))
    if isinstance(value, Tensor):
        return Dense(value[start:stop].float())
    return Dense(torch.from_numpy(np.array(value[start:stop], dtype=np.float32)))
