"""Candidates for all rows by a model as it is now, while it trains (ANCE, 2007.00808): nothing is kept on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from embedsmith.core.collectives import Group, objects_of_all_ranks, rank, world_size
from embedsmith.core.reps import Representation, exceeds
from embedsmith.core.tokens import IntArray
from embedsmith.mining.config import LiveNegatives, Selection
from embedsmith.mining.offline import Texts, candidates_of
from embedsmith.mining.searchers import PIECE, Searcher, TextReps, top_of_pieces
from embedsmith.search.exact import FloatArray, IndexArray
from embedsmith.search.hybrid import join


@dataclass(frozen=True)
class _Found(Searcher):
    """What a search gave, as a searcher."""

    score_Nk: FloatArray
    index_Nk: IndexArray

    def top(self, start: int, stop: int, k: int) -> tuple[FloatArray, IndexArray]:
        return self.score_Nk[start:stop, :k], self.index_Nk[start:stop, :k]

    def pairs(self, row_E: IndexArray, index_E: IndexArray) -> FloatArray:
        raise AssertionError("one searcher gives its scores with its candidates")


def mine_pools(
    texts: Texts, queries: TextReps, documents: TextReps, config: LiveNegatives, group: Group = None
) -> tuple[npt.NDArray[np.int32], IntArray]:
    """pool_NP of corpus places, best first, and size_N. Each rank encodes a share of queries and corpus and searches
    its share of the corpus for all queries; no rank holds the corpus's representations. A collective of `group`."""
    query = _on_all_ranks(queries, group)
    known = max(len(texts.positives_of(row)) for row in range(len(texts.queries))) + 1
    wanted = min(config.pool + config.skip + known, len(documents))
    found = _searched(query, documents, wanted, group)
    select = Selection(negatives=config.pool, skip=config.skip)
    index_N, score_N = candidates_of(texts, [found], config.pool + config.skip, select, 0, len(texts.queries))
    assert score_N is not None
    if config.guard is not None:
        index_N = _guarded(texts, query, documents, index_N, score_N, config.guard, group)
    pool_NP = np.full((len(index_N), max(max(map(len, index_N)), 1)), -1, np.int32)
    for row, index_C in enumerate(index_N):
        pool_NP[row, : len(index_C)] = index_C
    return pool_NP, np.array([len(index_C) for index_C in index_N], np.int64)


def _on_all_ranks(reps: TextReps, group: Group) -> Representation:
    """All representations on every rank, each computed on one of them."""
    each = math.ceil(len(reps) / world_size(group))
    mine = reps.part(slice(rank(group) * each, (rank(group) + 1) * each))
    parts = [part for theirs in objects_of_all_ranks(list(mine.pieces()), group) for part in theirs]
    return join(parts)


def _searched(query: Representation, documents: TextReps, k: int, group: Group) -> _Found:
    """The best k of the whole corpus for every query, ties to the lower place. Every rank searches its own pieces."""
    starts = range(0, len(documents), PIECE)[rank(group) :: world_size(group)]
    mine = np.zeros((len(query), 0), np.float32), np.zeros((len(query), 0), np.int64)
    if starts:
        score_Nk, local_Nk = top_of_pieces(query, (documents.piece(start) for start in starts), k)
        mine = score_Nk, np.asarray(starts, np.int64)[local_Nk // PIECE] + local_Nk % PIECE
    everyones = objects_of_all_ranks(mine, group)
    score_NX, index_NX = (np.concatenate(column, axis=1) for column in zip(*everyones, strict=True))
    order = np.lexsort((index_NX, -score_NX))[:, :k]
    return _Found(np.take_along_axis(score_NX, order, 1), np.take_along_axis(index_NX, order, 1))


def _guarded(
    texts: Texts,
    query: Representation,
    documents: TextReps,
    index_N: list[IndexArray],
    score_N: list[FloatArray],
    guard: float,
    group: Group,
) -> list[IndexArray]:
    """Without the candidates that score more than `guard` times the weakest positive."""
    positives = [texts.positives_of(row) for row in range(len(index_N))]
    place = {index: n for n, index in enumerate(sorted({index for row in positives for index in row}))}
    reps = _on_all_ranks(replace(documents, texts=[documents.texts[index] for index in place]), group)
    kept: list[IndexArray] = []
    for row, (index_C, score_C) in enumerate(zip(index_N, score_N, strict=True)):
        own = reps.rows(torch.tensor([place[index] for index in positives[row]]))
        weakest = float(query.rows(slice(row, row + 1)).scores(own)[0].min())
        kept.append(index_C[~exceeds(score_C, guard * weakest)])
    return kept
