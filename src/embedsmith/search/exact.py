"""The running best of documents that are scored all: exact, repeatable, in bounded memory, on a GPU where there is
one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from embedsmith.core.ahead import one_ahead
from embedsmith.core.errors import SearchError
from embedsmith.core.reps import Dense, MultiVector, Representation, Sparse

FloatArray = npt.NDArray[np.float32]
IndexArray = npt.NDArray[np.int64]


class StoredMatrix(Protocol):
    """A matrix whose rows are read when they are asked for."""

    ndim: int

    @property
    def shape(self) -> tuple[int, int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice) -> FloatArray: ...


Vectors = npt.NDArray[Any] | Tensor | Representation | StoredMatrix
"""A matrix [N, D] (NumPy, memory-mapped, torch, or in files: `search.stored`), or a representation of any kind."""

_BUDGET = {"cpu": 2**20, "cuda": 2**27}  # numbers of a block of scores: 4 MB stay in a CPU's cache, 512 MB fill a GPU
_TOKEN_BUDGET = {"cpu": 2**24, "cuda": 2**29}  # the same for heads of tokens: 64 MB and 2 GB
_QUERIES = {Dense: 512, Sparse: 256, MultiVector: 32}  # queries scored together
_SENT = 2**26  # numbers of vectors that are sent to a GPU at once
_SPARE = 256  # places for candidates beyond the best k, before the best k are chosen again


def search_device(query: Vectors, device: torch.device | str | None = None) -> torch.device:
    """The device that was asked for; else that of the queries; for queries on the CPU a GPU where there is one."""
    if device is not None:
        return torch.device(device)
    tensors = query.tensors() if isinstance(query, Representation) else [query] if isinstance(query, Tensor) else []
    if tensors and tensors[0].device.type != "cpu":
        return tensors[0].device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class TopK:
    """The running best of documents that arrive in pieces, for a corpus that is never held whole.

    `add` numbers the documents from 0 in the order they come. Scores are computed on `device`, by default as
    `search_device` says.
    """

    def __init__(self, query: Vectors, k: int, first: int = 0, device: torch.device | str | None = None) -> None:
        """`first`: the number of the first query, for messages."""
        if k < 1:
            raise SearchError(f"k is {k}", expected="a number of documents, 1 or more")
        check_matrix(query, "the queries")
        self.device = search_device(query, device)
        self._query, self._k, self._seen, self._first = query, k, 0, first
        rows = _queries_at_once(query)
        starts = range(0, len(query), rows)
        self._parts = [on_device(rows_between(query, start, start + rows), self.device) for start in starts]
        self._best = [_best_for(self.device)(len(part), k, self.device) for part in self._parts]
        self._bounded = [_bounded(part) for part in self._parts]
        self._buffer: FloatArray = np.empty(0, np.float32)

    def add(self, document: Vectors) -> None:
        """Score the next documents, given as one block."""
        check_matrix(document, "the documents")
        block = on_device(rows_between(document, 0, len(document)), self.device)
        if len(block) == 0:
            return
        start, bounded = self._first, _bounded(block)
        for part, best, also in zip(self._parts, self._best, self._bounded, strict=True):
            self._score_into(best, part, block, start, self._seen, bounded and also)
            start += len(part)
        self._seen += len(block)

    def _score_into(
        self, best: _Best | _BestOnGpu, part: Representation, block: Representation, row: int, first: int, sound: bool
    ) -> None:
        """Score the documents from `first` on by the queries from `row` on; `sound`: no score can be NaN. Where a card
        has no room for so many at once, by halves."""
        half = len(block) // 2
        try:
            score_QB = self._scores(part, block)
            # One pass finds that nothing is wrong; on a GPU the best scores show it.
            suspect = isinstance(best, _Best) and not sound and bool(score_QB.sum().isnan())
            if (suspect and bool(score_QB.isnan().any())) or not best.add(score_QB, first):
                query, document = (int(place) for place in score_QB.isnan().nonzero()[0])
                raise SearchError(
                    f"the score of query {row + query} with document {first + document} is not a number",
                    fix="look for NaN or infinite values in the vectors",
                )
            return
        except torch.OutOfMemoryError as error:
            if half == 0:
                raise SearchError(
                    f"{self.device} has no memory left to score one document", fix="free some, or search on the CPU"
                ) from error
        for start, stop in ((0, half), (half, len(block))):
            self._score_into(best, part, block.rows(slice(start, stop)), row, first + start, sound)

    def add_in_blocks(self, document: Vectors, block: int | None = None) -> None:
        """Score the next documents, `block` rows at a time (derived from the budget by default)."""
        check_matrix(document, "the documents")
        rows = block or self.block_rows(document)
        blocks: Iterator[Representation] = (
            rows_between(document, start, start + rows) for start in range(0, len(document), rows)
        )
        if self.device.type == "cuda":  # the next block is read and pinned while one is scored
            blocks = one_ahead(
                block.map(lambda one: one.pin_memory() if one.device.type == "cpu" else one) for block in blocks
            )
        for one in blocks:
            self.add(one)

    def result(self) -> tuple[FloatArray, IndexArray]:
        """score_Qk and index_Qk so far."""
        if not self._best:
            return np.zeros((0, 0), np.float32), np.zeros((0, 0), np.int64)
        score, index = (torch.cat(column).cpu().numpy() for column in zip(*(best.chosen() for best in self._best)))
        return score, index

    def block_rows(self, document: Vectors) -> int:
        """How many documents to score at once so that a block of scores, and what leads to it, stays in the budget."""
        queries = min(_queries_at_once(document), max(len(self._query), 1))
        tokens = self._query.token_count if isinstance(self._query, Representation) else 1
        device = self.device.type
        if isinstance(document, Representation) and not isinstance(document, Dense):
            budget = _TOKEN_BUDGET.get(device, _TOKEN_BUDGET["cuda"])
            each = queries * max(tokens, 1) * (1 if isinstance(document, Sparse) else max(document.token_count, 1))
            return max(budget // each, 1)  # sparse: at most queries * tokens distinct coordinates
        rows = max(_BUDGET.get(device, _BUDGET["cuda"]) // queries, 1)
        if device == "cpu" or isinstance(document, Representation):
            return rows
        return max(min(rows, _SENT // max(document.shape[1], 1)), 1)

    def _scores(self, query: Representation, document: Representation) -> Tensor:
        """score_QB; on a CPU in a buffer that the next block overwrites."""
        if type(query) is not type(document):
            raise SearchError(f"queries are {type(query).__name__} and documents are {type(document).__name__}")
        if isinstance(query, Dense) and query.vector_ND.shape[1] != document.tensors()[0].shape[1]:
            sizes = f"{query.vector_ND.shape[1]} and {document.tensors()[0].shape[1]}"
            raise SearchError(f"queries and documents have vectors of {sizes} numbers", expected="the same model")
        with torch.no_grad():
            if type(query) is Dense and type(document) is Dense and self.device.type == "cpu":
                if self._buffer.size < len(query) * len(document):
                    self._buffer = np.empty(len(query) * len(document), np.float32)
                score = self._buffer[: len(query) * len(document)].reshape(len(query), len(document))
                _inner_products(query.vector_ND, document.vector_ND, score)
                return torch.from_numpy(score)
            return query.scores(document)[0].float()


def _queries_at_once(vectors: Vectors) -> int:
    """How many queries of this kind are scored together."""
    if not isinstance(vectors, Representation):
        return _QUERIES[Dense]
    return next((count for kind, count in _QUERIES.items() if isinstance(vectors, kind)), 32)


def _inner_products(left_QD: Tensor, right_BD: Tensor, score_QB: FloatArray) -> None:
    """On one thread OpenBLAS behind NumPy is faster than the library behind torch. On several, its threads and torch's
    wait for each other, which is slower than torch alone."""
    if torch.get_num_threads() > 1 and left_QD.dtype == right_BD.dtype == torch.float32:
        torch.mm(left_QD, right_BD.T, out=torch.from_numpy(score_QB))
        return
    with np.errstate(invalid="ignore", over="ignore"):  # what is not a number is reported with its place
        np.matmul(left_QD.numpy(), right_BD.numpy().T, out=score_QB)


def _bounded(rep: Representation) -> bool:
    """Whether the norms of dense vectors are finite in fp32: inner products of two such blocks cannot become NaN, by
    Cauchy-Schwarz, and need not be checked one by one."""
    if type(rep) is not Dense or rep.vector_ND.device.type != "cpu":
        return False
    flat = rep.vector_ND.numpy().reshape(-1)
    with np.errstate(invalid="ignore", over="ignore"):
        return bool(np.isfinite(np.dot(flat, flat)))


class _Best:
    """The best k documents of some queries, with room for candidates that beat the k-th when it was last looked up.

    A row's entries stand in the order of their documents. A block only adds the few scores above the row's floor,
    which on a CPU costs far less than choosing the best of every block.
    """

    def __init__(self, queries: int, k: int, device: torch.device) -> None:
        self._k = k
        self._score_QC = torch.empty(queries, 0, device=device)
        self._index_QC = torch.empty(queries, 0, dtype=torch.int64, device=device)
        self._count_Q = np.zeros(queries, np.int64)
        self._floor_Q1: Tensor | None = None
        self._above = np.empty(0, bool)

    def add(self, score_QB: Tensor, first: int) -> bool:
        """Take the scores of the documents `first`, `first + 1`, ..., which are numbers all."""
        if self._floor_Q1 is None:
            self._choose_with(score_QB, first)
            return True
        if self._above.size < score_QB.numel():
            self._above = np.empty(score_QB.numel(), bool)
        above_QB = self._above[: score_QB.numel()].reshape(score_QB.shape)
        place_H = np.flatnonzero(np.greater(score_QB.numpy(), self._floor_Q1.numpy(), out=above_QB))
        row_H = place_H // score_QB.shape[1]  # by a scalar: several times as fast as divmod
        column_H = place_H - row_H * score_QB.shape[1]
        hits_Q = np.bincount(row_H, minlength=len(score_QB))
        missing = int((self._count_Q + hits_Q).max()) - self._score_QC.shape[1]
        if missing > 0 and int(self._count_Q.max()) > self._k:
            self._choose_with(score_QB[:, :0], first)  # a higher floor lets fewer in
            return self.add(score_QB, first)
        if missing > 0:
            self._score_QC = F.pad(self._score_QC, (0, missing), value=float("-inf"))
            self._index_QC = F.pad(self._index_QC, (0, missing))
        free_Q = np.arange(len(hits_Q)) * self._score_QC.shape[1] + self._count_Q - (np.cumsum(hits_Q) - hits_Q)
        free_H = np.arange(len(row_H)) + np.repeat(free_Q, hits_Q)
        # NumPy scatters faster than torch
        self._score_QC.view(-1).numpy()[free_H] = score_QB.reshape(-1).numpy()[place_H]
        self._index_QC.view(-1).numpy()[free_H] = column_H + first
        self._count_Q += hits_Q
        if missing > 0:
            self._choose_with(score_QB[:, :0], first)
        return True

    def chosen(self) -> tuple[Tensor, Tensor]:
        """score_Qk and index_Qk, best first. Places that were never filled hold -inf behind k entries at least."""
        score_Qk, place_Qk = top_of_block(self._score_QC, self._k)
        return score_Qk, self._index_QC.gather(1, place_Qk)

    def _choose_with(self, score_QB: Tensor, first: int) -> None:
        """Choose the best k of what there is and of a whole block, and make room again."""
        known, more = self._score_QC.shape[1], score_QB.shape[1]
        score_QX = score_QB if not known else self._score_QC if not more else torch.cat([self._score_QC, score_QB], 1)
        if score_QX.shape[1] < self._k:
            index_B = torch.arange(first, first + score_QB.shape[1], device=score_QB.device)
            self._index_QC = torch.cat([self._index_QC, index_B.expand(len(score_QB), -1)], dim=1)
            self._score_QC = score_QX if known else score_QB.clone()  # the block may lie in a buffer
            return
        place_Qk, self._floor_Q1 = _places_of_top(score_QX, self._k)
        index_Qk = place_Qk + (first - known)
        if known:
            old_Qk = self._index_QC.gather(1, place_Qk.clamp_max(known - 1))
            index_Qk = torch.where(place_Qk < known, old_Qk, index_Qk)
        self._score_QC = F.pad(score_QX.gather(1, place_Qk), (0, _SPARE), value=float("-inf"))
        self._index_QC = F.pad(index_Qk, (0, _SPARE))
        self._count_Q[:] = self._k


class _BestOnGpu:
    """The best k documents of some queries, best first, by kernels that read a block of scores as seldom as may be, and
    one wait a block."""

    def __init__(self, queries: int, k: int, device: torch.device) -> None:
        self._k = k
        self._score_QC = torch.empty(queries, 0, device=device)
        self._index_QC = torch.empty(queries, 0, dtype=torch.int64, device=device)

    def add(self, score_QB: Tensor, first: int) -> bool:
        """Take the scores of the documents `first`, `first + 1`, ...; false where one of them is not a number."""
        k = self._k
        value_QC, place_QC = score_QB.topk(min(k + 1, score_QB.shape[1]), dim=1)  # NaN counts as the largest
        # Which of several documents with the k-th score are among the k, `topk` leaves open.
        open_Q = torch.zeros(len(score_QB), dtype=torch.bool, device=score_QB.device)
        if value_QC.shape[1] > k:
            open_Q = value_QC[:, k - 1] == value_QC[:, k]
            if self._score_QC.shape[1] == k:  # later documents with the worst score so far do not come in
                open_Q &= value_QC[:, k] > self._score_QC[:, -1]
            value_QC, place_QC = value_QC[:, :k], place_QC[:, :k]
        wrong, unsettled = torch.stack([value_QC[:, 0].isnan().any(), open_Q.any()]).tolist()
        if wrong:
            return False
        if unsettled:
            place_QC = place_QC.clone()
            place_QC[open_Q] = _places_of_first(score_QB[open_Q], value_QC[open_Q, -1:], k)
        place_QC = place_QC.sort(dim=1).values
        value_QC = score_QB.gather(1, place_QC) + 0.0  # which makes -0.0 the 0.0 that it ties with
        score_QX, index_QX = torch.cat([self._score_QC, value_QC], 1), torch.cat([self._index_QC, place_QC + first], 1)
        score_QX, order_QX = score_QX.sort(dim=1, descending=True, stable=True)
        self._score_QC, self._index_QC = score_QX[:, :k], index_QX.gather(1, order_QX[:, :k])
        return True

    def chosen(self) -> tuple[Tensor, Tensor]:
        return self._score_QC, self._index_QC


def _best_for(device: torch.device) -> type[_Best | _BestOnGpu]:
    return _Best if device.type == "cpu" else _BestOnGpu


def _places_of_first(score_QB: Tensor, floor_Q1: Tensor, k: int) -> Tensor:
    """place_Qk of what is above the k-th score, and of the first that have it."""
    above_QB, tied_QB = score_QB > floor_Q1, score_QB == floor_Q1
    room_Q1 = k - above_QB.sum(1, keepdim=True)
    kept_QB = above_QB | (tied_QB & (tied_QB.cumsum(1, dtype=torch.int32) <= room_Q1))
    return kept_QB.nonzero()[:, 1].view(-1, k)


def _places_of_top(score_QX: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """place_Qk of the k best columns in ascending order, ties to the lower column, and the k-th score, floor_Q1. On a
    CPU: NumPy's partition is eight times as fast as torch's topk there."""
    place = score_QX.shape[1] - k
    floor_Q1 = torch.from_numpy(np.partition(score_QX.numpy(), place, axis=1)[:, place, None].copy())
    kept_QX = score_QX >= floor_Q1
    if int(kept_QX.count_nonzero()) > k * len(kept_QX):
        # NumPy adds bytes eight times as fast as torch counts truths
        tied_Q = torch.from_numpy(np.add.reduce(kept_QX.numpy().view(np.uint8), axis=1, dtype=np.int64)) > k
        order = score_QX[tied_Q].sort(dim=1, descending=True, stable=True).indices[:, :k]
        kept_QX[tied_Q] = torch.zeros_like(kept_QX[tied_Q]).scatter(1, order, True)
    flat = np.flatnonzero(kept_QX.numpy()).reshape(-1, k)  # NumPy finds them several times as fast
    return torch.from_numpy(flat - np.arange(len(flat))[:, None] * kept_QX.shape[1]), floor_Q1


def top_of_block(score_QB: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of every row, best first, ties to the lower column."""
    if k >= score_QB.shape[1]:
        score_Qk, index_Qk = score_QB.sort(dim=1, descending=True, stable=True)
        return score_Qk, index_Qk
    place_Qk, _ = _places_of_top(score_QB, k)
    score_Qk, order = score_QB.gather(1, place_Qk).sort(dim=1, descending=True, stable=True)
    return score_Qk, place_Qk.gather(1, order)


def check_matrix(value: Vectors, name: str) -> None:
    if not isinstance(value, Representation) and value.ndim != 2:
        raise SearchError(f"{name} have the shape {tuple(value.shape)}", expected="a matrix [N, D]")


def rows_between(value: Vectors, start: int, stop: int) -> Representation:
    """Rows `start` to `stop` as a representation; only they are read from a memory-mapped matrix."""
    if isinstance(value, Representation):
        return value.rows(slice(start, stop))
    if isinstance(value, Tensor):
        return Dense(value[start:stop].float())
    part = value[start:stop]
    plain = part.dtype == np.float32 and part.flags.writeable and not isinstance(part, np.memmap)
    return Dense(torch.from_numpy(part if plain else np.array(part, dtype=np.float32)))


def on_device(rep: Representation, device: torch.device) -> Representation:
    return rep.map(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))
