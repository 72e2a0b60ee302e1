"""Matching by identity: from ids to rows of the candidates, and which candidates are related to which query.

Everything is sorted lists and binary searches. A matrix of queries against candidates exists only for the block of
candidates that is being scored, so that the masks of a streamed loss cost no more memory than its scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedsmith.core.batch import ABSENT, RetrievalBatch, Side
from embedsmith.core.collectives import rank


def rows_of(id_X: Tensor, id_K: Tensor) -> Tensor:
    """row_X: where each id stands first in `id_K`; `ABSENT` for an id that is absent or not found. Any shape."""
    sorted_K, order_K = torch.sort(id_K, stable=True)
    place_X = torch.searchsorted(sorted_K, id_X.contiguous()).clamp_max(len(id_K) - 1)
    found_X = (sorted_K[place_X] == id_X) & (id_X != ABSENT)
    return torch.where(found_X, order_K[place_X], ABSENT)


def first_in_row(id_QX: Tensor) -> Tensor:
    """True for the first slot of each id within a row, and False for absent slots."""
    same_QXX = id_QX[:, :, None] == id_QX[:, None, :]
    return ~same_QXX.tril(-1).any(-1) & (id_QX != ABSENT)


@dataclass(frozen=True)
class Relation:
    """Candidates related to queries through a shared key (a query id, a label, a document id).

    Query `query_I[i]` has key `key_I[i]` (sorted by key); candidate `row_J[j]` has key `key_J[j]` (sorted by row).
    A query and a candidate are related when they share a key. Both may have several keys, or none.
    """

    query_I: Tensor
    key_I: Tensor
    row_J: Tensor
    key_J: Tensor

    @staticmethod
    def of_pairs(query_I: Tensor, key_I: Tensor, row_J: Tensor, key_J: Tensor) -> Relation:
        """From lists in any order; entries with an `ABSENT` key or row are left out."""
        kept_I, kept_J = key_I != ABSENT, (key_J != ABSENT) & (row_J != ABSENT)
        key_I, order_I = torch.sort(key_I[kept_I])
        row_J, order_J = torch.sort(row_J[kept_J])
        return Relation(query_I[kept_I][order_I], key_I, row_J, key_J[kept_J][order_J])

    @staticmethod
    def between(key_QX: Tensor, row_RY: Tensor, key_R: Tensor) -> Relation:
        """Queries with their keys against rows with theirs, both as rectangles."""
        query_QX = torch.arange(len(key_QX), device=key_QX.device)[:, None].expand_as(key_QX)
        key_RY = key_R[:, None].expand_as(row_RY)
        return Relation.of_pairs(query_QX.flatten(), key_QX.flatten(), row_RY.flatten(), key_RY.flatten())

    @staticmethod
    def by_position(row_QX: Tensor) -> Relation:
        """Query n is related to the candidates `row_QX[n]` and to no others."""
        place_Q = torch.arange(len(row_QX), device=row_QX.device)
        return Relation.between(place_Q[:, None], row_QX, place_Q)

    def mark(self, mask_QB: Tensor, start: int, value: bool) -> None:
        """Write `value` at every related pair of the block of candidates that begins at row `start`."""
        edge = torch.tensor([start, start + mask_QB.shape[1]], device=self.row_J.device)
        low, high = torch.searchsorted(self.row_J, edge).tolist()
        key_J, row_J = self.key_J[low:high], self.row_J[low:high]
        first_J = torch.searchsorted(self.key_I, key_J)
        count_J = torch.searchsorted(self.key_I, key_J, right=True) - first_J
        pair_E = torch.repeat_interleave(torch.arange(len(key_J), device=key_J.device), count_J)
        within_E = torch.arange(len(pair_E), device=key_J.device) - (count_J.cumsum(0) - count_J)[pair_E]
        mask_QB[self.query_I[first_J[pair_E] + within_E], row_J[pair_E] - start] = value

    def holds(self, key_Q: Tensor, row_QX: Tensor) -> Tensor:
        """related_QX: whether query n, known by its one key, is related to each of the candidates `row_QX[n]`."""
        _, place = torch.unique(torch.cat([key_Q, self.key_J]), return_inverse=True)
        rows = int(torch.cat([row_QX.flatten(), self.row_J, row_QX.new_zeros(1)]).max()) + 1
        code_QX = place[: len(key_Q), None] * rows + row_QX
        return torch.isin(code_QX, place[len(key_Q) :] * rows + self.row_J) & (row_QX != ABSENT)


def group_keys(batch: RetrievalBatch) -> tuple[Tensor, Tensor]:
    """key_Q and key_G: queries with equal keys have their positives in common. The label where there is one (a
    class), the id of the query's text otherwise."""
    if batch.label_Q is None:
        return batch.query_id_Q, batch.query_id_G
    return batch.label_Q, batch.query.all_ids(batch.label_Q)


def own_rows(side: Side) -> slice:
    """This rank's rows among those of `side.all`."""
    start = rank(side.group) * side.rows
    return slice(start, start + len(side))


def swapped(batch: RetrievalBatch) -> RetrievalBatch:
    """The same batch seen from the documents: each document that is someone's positive searches for its queries.

    Queries become candidates and have no hard negatives; a document held by several ranks asks once.
    """
    row_GP = rows_of(batch.positive_id_GP, batch.document_id_K)
    asker_E, slot_E = _askers(row_GP, len(batch.document_id_K))
    slots = max(int(slot_E.max()) + 1 if len(slot_E) else 0, 1)
    positive_id_KP = batch.query_id_G.new_full((len(batch.document_id_K), slots), ABSENT)
    positive_id_KP[row_GP.flatten()[asker_E], slot_E] = batch.query_id_G[asker_E // row_GP.shape[1]]
    mine = own_rows(batch.document)
    asks_N = (positive_id_KP[mine] != ABSENT).any(1)
    label_N = None
    if batch.label_Q is not None:
        label_K = torch.full_like(batch.document_id_K, ABSENT)
        first_E = asker_E[slot_E == 0]  # a document of several classes takes that of its first query
        label_K[row_GP.flatten()[first_E]] = group_keys(batch)[1][first_E // row_GP.shape[1]]
        label_N = label_K[mine]
    return RetrievalBatch(
        **batch.shared(),
        query=batch.document,
        document=batch.query,
        query_id_Q=torch.where(asks_N, batch.document_id_N, ABSENT),
        positive_id_QP=positive_id_KP[mine],
        negative_id_QM=batch.document_id_N.new_empty(len(batch.document_id_N), 0),
        document_id_N=batch.query_id_Q,
        label_Q=label_N,
    )


def _askers(row_GP: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Flat places in `row_GP` that hold a document, ordered by document, and their number among that document's."""
    order_E = torch.argsort(row_GP.flatten(), stable=True)
    order_E = order_E[row_GP.flatten()[order_E] != ABSENT]
    document_E = row_GP.flatten()[order_E]
    count_K = torch.bincount(document_E, minlength=rows)
    start_K = count_K.cumsum(0) - count_K
    return order_E, torch.arange(len(order_E), device=row_GP.device) - start_K[document_E]
