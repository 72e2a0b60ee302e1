"""Negatives that are replaced while a model trains. `LiveState` says which of each record's are in use: a state machine
of numbers, without texts or models. `mine_pools` gives all records new candidates by the model as it is now (ANCE,
2007.00808); nothing of that is kept on disk.

Conan-embedding's dynamic hard-negative mining (2408.15710, section 3.2; 2509.12892). What it leaves open is marked
"reconstructed" in `LiveNegatives` and docs/mining.md.
"""

import hashlib
import math
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from embedsmith.core.collectives import Group, objects_of_all_ranks, rank, world_size
from embedsmith.core.errors import CheckpointError
from embedsmith.core.reps import Representation, exceeds
from embedsmith.core.tokens import IntArray
from embedsmith.mining.config import LiveNegatives, Selection
from embedsmith.mining.offline import Texts, candidates_of
from embedsmith.mining.searchers import Searcher, TextReps
from embedsmith.mining.selection import SUSPECT, conan_window
from embedsmith.search.exact import FloatArray, IndexArray
from embedsmith.search.hybrid import join
from embedsmith.search.top_k import top_k_of_ranks

EMPTY = -1
"""The candidate of a slot that holds none: a pool smaller than the number of negatives."""


@dataclass(frozen=True)
class _Change:
    """Slots that were given another candidate, and from which step on batches are drawn with it."""

    step: int
    row_E: IntArray
    slot_E: IntArray
    old_E: IntArray


class LiveState:
    """The candidates in use, [N, S] places in each row's pool, and what is known of their scores.

    A change decided after step t applies to batches from step t + 1 + `lag` on, so that batches may be drawn ahead and
    yet depend on nothing but the step. `draw` may be called by another thread than the rest. All ranks hold the same
    state and are given the same scores.
    """

    def __init__(self, config: LiveNegatives, size_N: Sequence[int] | IntArray, negatives: int, lag: int) -> None:
        self.config, self.lag, self.generation = config, lag, 0
        self.pool_NP: npt.NDArray[np.int32] | None = None
        self.replaced, self.exhausted_N = 0, np.zeros(len(size_N), bool)
        self._lock = threading.Lock()
        self._slots = negatives
        self._start(np.asarray(size_N, np.int64))

    def _start(self, size_N: IntArray) -> None:
        """The first negatives of every pool, nothing measured."""
        rows, slots = len(size_N), self._slots
        self.size_N = size_N
        self.round_N = np.zeros(rows, np.int32)
        self.active_NS = np.full((rows, slots), EMPTY, np.int32)
        for size in np.unique(size_N):
            window = np.arange(int(size))[conan_window(0, slots, self._offset(int(size)), int(size))]
            self.active_NS[size_N == size, : len(window)] = window
        self.next_N = (self.active_NS.max(1) + 1).astype(np.int32)
        self.first_NS = np.full((rows, slots), np.nan, np.float32)
        self.last_NS = np.full((rows, slots), np.nan, np.float32)
        self.guilty_N = np.zeros(rows, bool)  # v1: a false or unusable negative was seen since the last check
        self.first_step_N = np.full(rows, -1, np.int64)
        self.last_step_N = np.full(rows, -1, np.int64)
        self.exhausted_N = np.zeros(rows, bool)
        self._changes: deque[_Change] = deque()
        self._tally = _Tally()

    def _offset(self, size: int) -> int:
        """Conan's 10, unless the pool is too short to go on from there: then its top comes first (reconstructed)."""
        offset = 10 if self.config.offset is None else self.config.offset
        return offset if size >= offset + self._slots else self._slots

    def draw(self, row_Q: IntArray, step: int) -> IntArray:
        """candidate_QS that the batch of `step` uses; `EMPTY` where there is none. Pure: the same at any time."""
        with self._lock:
            candidate_QS = self.active_NS[row_Q].astype(np.int64)
            for change in (one for one in reversed(self._changes) if one.step > step):
                for entry in np.flatnonzero(np.isin(change.row_E, row_Q)):
                    candidate_QS[row_Q == change.row_E[entry], change.slot_E[entry]] = change.old_E[entry]
            return candidate_QS

    def observe(
        self, step: int, row_Q: IntArray, candidate_QS: IntArray, score_QS: FloatArray, positive_Q: FloatArray
    ) -> None:
        """Take in the scores of step `step`: of the candidates that were drawn (NaN: not scored on any rank, being a
        known positive or a repeated text), and of each row's weakest positive."""
        with self._lock:
            known_QS = (candidate_QS == self.active_NS[row_Q]) & (candidate_QS != EMPTY)
            seen_QS = known_QS & ~np.isnan(score_QS)
            self._measure(step, row_Q, seen_QS, score_QS)
            with np.errstate(invalid="ignore"):
                false_QS = seen_QS & exceeds(score_QS, (self.config.guard or np.inf) * positive_Q[:, None])
                self._tally.add(score_QS[seen_QS], (seen_QS & exceeds(score_QS, SUSPECT * positive_Q[:, None])).sum())
            unusable_QS = (known_QS & np.isnan(score_QS)) | false_QS
            if self.config.rule == "each_loss":
                self._next_each(step, row_Q, unusable_QS | self._too_easy(row_Q, seen_QS))
            else:
                self.guilty_N[row_Q] |= unusable_QS.any(1)
            while self._changes and self._changes[0].step <= step + 1:
                self._changes.popleft()

    def _measure(self, step: int, row_Q: IntArray, seen_QS: npt.NDArray[np.bool_], score_QS: FloatArray) -> None:
        """S0 where it is not known yet, and S."""
        first_QS = self.first_NS[row_Q]
        fresh_QS = seen_QS & np.isnan(first_QS)
        self.first_NS[row_Q] = np.where(fresh_QS, score_QS, first_QS)
        self.last_NS[row_Q] = np.where(seen_QS, score_QS, self.last_NS[row_Q])
        self.first_step_N[row_Q] = np.where(fresh_QS.any(1), step, self.first_step_N[row_Q])
        self.last_step_N[row_Q] = np.where(seen_QS.any(1), step, self.last_step_N[row_Q])

    def _too_easy(self, row_Q: IntArray, seen_QS: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """v2: S0 < 0.4, or 1.2 S < S0 and S < 0.7."""
        first_QS, last_QS = self.first_NS[row_Q].astype(np.float64), self.last_NS[row_Q].astype(np.float64)
        with np.errstate(invalid="ignore"):
            softened_QS = exceeds(first_QS, self.config.decay * last_QS) & exceeds(self.config.roof, last_QS)
            return np.asarray(seen_QS & (exceeds(self.config.too_easy, first_QS) | softened_QS))

    def _next_each(self, step: int, row_Q: IntArray, give_way_QS: npt.NDArray[np.bool_]) -> None:
        """Each slot marked takes the next candidate of its row's pool, in the order of the slots."""
        number_QS = np.cumsum(give_way_QS, axis=1) - 1
        candidate_QS = self.next_N[row_Q][:, None] + number_QS
        there_QS = give_way_QS & (candidate_QS < self.size_N[row_Q][:, None])
        place_E, slot_E = np.nonzero(there_QS)
        self.exhausted_N[row_Q[(give_way_QS & ~there_QS).any(1)]] = True
        self._install(step, row_Q[place_E], slot_E, candidate_QS[place_E, slot_E])
        self.next_N[row_Q] += there_QS.sum(1).astype(np.int32)

    def _install(self, step: int, row_E: IntArray, slot_E: IntArray, candidate_E: IntArray) -> None:
        if len(row_E) == 0:
            return
        old_E = self.active_NS[row_E, slot_E].astype(np.int64)
        self._changes.append(_Change(step + 1 + self.lag, row_E, slot_E, old_E))
        self.active_NS[row_E, slot_E] = candidate_E
        self.first_NS[row_E, slot_E] = self.last_NS[row_E, slot_E] = np.nan
        self.replaced += len(row_E)
        self._tally.replaced += len(row_E)

    def due(self, step: int) -> bool:
        """Whether the scheduled rule looks at its rows after step `step`."""
        return self.config.rule == "scheduled" and (step + 1) % self.config.every == 0

    def to_rescore(self, step: int, count: int) -> IntArray:
        """At most `count` rows measured once since the last check, the longest ago first: a scheduled check scores them
        again with the model as it is (reconstructed)."""
        since = step + 1 - self.config.every
        once_N = (self.first_step_N >= since) & (self.last_step_N == self.first_step_N)
        row_E = np.flatnonzero(once_N)
        return row_E[np.argsort(self.first_step_N[row_E], kind="stable")][:count]

    def check(self, step: int) -> None:
        """v1, by the means over a row's negatives: 1.15 S < S0 and S < 0.8 replaces all of them."""
        with self._lock:
            since = step + 1 - self.config.every
            row_E = np.flatnonzero((self.last_step_N >= since) | self.guilty_N)
            measured_ES = ~np.isnan(self.first_NS[row_E])
            count_E = np.maximum(measured_ES.sum(1), 1)
            first_E = np.where(measured_ES, self.first_NS[row_E].astype(np.float64), 0).sum(1) / count_E
            last_E = np.where(measured_ES, self.last_NS[row_E].astype(np.float64), 0).sum(1) / count_E
            again_E = measured_ES.any(1) & (self.last_step_N[row_E] > self.first_step_N[row_E])
            softened_E = exceeds(first_E, self.config.decay * last_E) & exceeds(self.config.roof, last_E)
            self._next_all(step, row_E[again_E & softened_E | self.guilty_N[row_E]])
            self.guilty_N[:] = False

    def _next_all(self, step: int, row_E: IntArray) -> None:
        for row in row_E.tolist():
            size, round_ = int(self.size_N[row]), int(self.round_N[row])
            now, then = (conan_window(r, self._slots, self._offset(size), size) for r in (round_, round_ + 1))
            if now == then:
                self.exhausted_N[row] = True
                continue
            slot_E = np.arange(then.stop - then.start)
            self._install(step, np.full(len(slot_E), row), slot_E, np.arange(then.start, then.stop))
            self.round_N[row] += 1

    def wants_new_pools(self, step: int) -> bool:
        """Whether all pools are to be mined anew after step `step`."""
        every = self.config.remine_every
        if every is not None and (step + 1) % every == 0:
            return True
        return self.config.refill == "remine" and bool(self.exhausted_N.mean() >= 0.1)

    def install_pools(self, pool_NP: npt.NDArray[np.int32], size_N: IntArray) -> None:
        """Begin again with new pools, of corpus places. They hold at once: what was drawn ahead is void."""
        with self._lock:
            self.pool_NP = pool_NP
            self._start(np.asarray(size_N, np.int64))
            self.generation += 1

    def curves(self) -> dict[str, float]:
        """Since the last call: mean score of the negatives (hardness), how many were replaced, the share suspected
        to be false; and the share of rows whose pool is exhausted."""
        values = self._tally.values() | {"exhausted": float(self.exhausted_N.mean())}
        self._tally = _Tally()
        return values

    _ARRAYS = (
        *("size_N", "round_N", "active_NS", "next_N", "first_NS", "last_NS"),
        *("guilty_N", "first_step_N", "last_step_N", "exhausted_N"),
    )

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and numbers, for a `weights_only` load."""
        state: dict[str, Any] = {name: torch.from_numpy(getattr(self, name).copy()) for name in self._ARRAYS}
        state |= {"replaced": self.replaced, "lag": self.lag, "generation": self.generation}
        state["pool"] = None if self.pool_NP is None else torch.from_numpy(self.pool_NP)
        state["changes"] = [
            [change.step, *(torch.from_numpy(part) for part in (change.row_E, change.slot_E, change.old_E))]
            for change in self._changes
        ]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Errors: `CheckpointError` for a state of other rows, or of another number of negatives."""
        if tuple(state["active_NS"].shape) != self.active_NS.shape or state["lag"] != self.lag:
            raise CheckpointError(
                f"live negatives of {tuple(state['active_NS'].shape)} slots, the run has {self.active_NS.shape}",
                fix="continue with the same data and the same number of negatives",
            )
        for name in self._ARRAYS:
            setattr(self, name, state[name].numpy().copy())
        self.replaced, self.generation = int(state["replaced"]), int(state["generation"])
        self.pool_NP = None if state["pool"] is None else state["pool"].numpy().copy()
        self._changes = deque(
            _Change(int(step), *(part.numpy().copy() for part in parts)) for step, *parts in state["changes"]
        )

    def digest(self) -> str:
        """Equal on ranks that agree."""
        hasher = hashlib.blake2b(digest_size=16)
        for name in self._ARRAYS:
            hasher.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        return hasher.hexdigest()


class _Tally:
    """Sums since the last report."""

    def __init__(self) -> None:
        self.score, self.count, self.suspect, self.replaced = 0.0, 0, 0, 0

    def add(self, score_E: FloatArray, suspect: int) -> None:
        self.score += float(score_E.sum())
        self.count += len(score_E)
        self.suspect += int(suspect)

    def values(self) -> dict[str, float]:
        seen = max(self.count, 1)
        return {"hardness": self.score / seen, "suspect": self.suspect / seen, "replaced": float(self.replaced)}


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
    pool_NP = np.full((len(index_N), max(map(len, index_N))), EMPTY, np.int32)
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
    mine = documents.top_of_share(query, k, rank(group), world_size(group))
    return _Found(*top_k_of_ranks(mine, k, group))


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
