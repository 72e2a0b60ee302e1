"""A retrieval batch with its ids resolved to rows: what every loss over candidates starts from.

Texts are matched by identity, never by position: `rows_of` finds the row of an id, `Relation` says which candidates
belong to which query. Both are sorted lists and binary searches: a matrix of queries against candidates exists only
for the block of candidates that is being scored.

Scores come in blocks, and every loss over candidates is written once against blocks. One block is the plain path. With
a block size each block is scored under a checkpoint: only its small result is kept, and its scores are computed again
in the backward pass, so that neither the score matrix nor its mask ever exists as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from embedsmith.core.batch import ABSENT, Pair, RetrievalBatch, Side
from embedsmith.core.collectives import rank
from embedsmith.core.reps import Representation
from embedsmith.core.transfer import to_device

R = TypeVar("R")

NEVER = -1e30
"""The logit of a candidate that does not count. Finite, so that a row without candidates has no NaN gradient."""


def rows_of(id_X: Tensor, id_K: Tensor) -> Tensor:
    """row_X: where each id stands first in `id_K`; `ABSENT` for an id that is absent or not found. Any shape."""
    sorted_K, order_K = torch.sort(id_K, stable=True)
    place_X = torch.searchsorted(sorted_K, id_X.contiguous()).clamp_max(len(id_K) - 1)
    found_X = (sorted_K[place_X] == id_X) & (id_X != ABSENT)
    return torch.where(found_X, order_K[place_X], ABSENT)


def own_rows(side: Side) -> slice:
    """This rank's rows among those of `side.all`."""
    start = rank(side.group) * side.rows
    return slice(start, start + len(side))


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
    def between(key_QX: Tensor, row_RY: Tensor, key_R: Tensor, query_Q: Tensor | None = None) -> Relation:
        """Queries with their keys against rows with theirs, both as rectangles; entries with an `ABSENT` key or row
        are left out. `query_Q`: which query each row of `key_QX` is, when they do not stand in order."""
        query_Q = torch.arange(len(key_QX), device=key_QX.device) if query_Q is None else query_Q
        query_I, key_I = query_Q[:, None].expand_as(key_QX).flatten(), key_QX.flatten()
        row_J, key_J = row_RY.flatten(), key_R[:, None].expand_as(row_RY).flatten()
        kept_I, kept_J = key_I != ABSENT, (key_J != ABSENT) & (row_J != ABSENT)
        key_I, order_I = torch.sort(key_I[kept_I])
        row_J, order_J = torch.sort(row_J[kept_J])
        return Relation(query_I[kept_I][order_I], key_I, row_J, key_J[kept_J][order_J])

    @staticmethod
    def by_position(row_QX: Tensor) -> Relation:
        """Query n is related to the candidates `row_QX[n]` and to no others."""
        place_Q = torch.arange(len(row_QX), device=row_QX.device)
        return Relation.between(place_Q[:, None], row_QX, place_Q)

    def mark(self, mask_QB: Tensor, start: int, value: bool) -> None:
        """Write `value` at every related pair of the block of candidates that begins at row `start`, where the mask
        lies."""
        edge = torch.tensor([start, start + mask_QB.shape[1]])
        low, high = torch.searchsorted(self.row_J, edge).tolist()
        key_J, row_J = self.key_J[low:high], self.row_J[low:high]
        first_J = torch.searchsorted(self.key_I, key_J)
        count_J = torch.searchsorted(self.key_I, key_J, right=True) - first_J
        pair_E = torch.repeat_interleave(torch.arange(len(key_J), device=key_J.device), count_J)
        within_E = torch.arange(len(pair_E), device=key_J.device) - (count_J.cumsum(0) - count_J)[pair_E]
        pairs = (self.query_I[first_J[pair_E] + within_E], row_J[pair_E] - start)
        mask_QB[tuple(to_device(one_E, mask_QB.device) for one_E in pairs)] = value

    def holds(self, key_Q: Tensor, row_QX: Tensor) -> Tensor:
        """related_QX: whether query n, known by its one key, is related to each of the candidates `row_QX[n]`."""
        _, place = torch.unique(torch.cat([key_Q, self.key_J]), return_inverse=True)
        rows = int(torch.cat([row_QX.flatten(), self.row_J, row_QX.new_zeros(1)]).max()) + 1
        code_QX = place[: len(key_Q), None] * rows + row_QX
        return torch.isin(code_QX, place[len(key_Q) :] * rows + self.row_J) & (row_QX != ABSENT)


Negatives = Literal["all", "positives_and_own", "positives", "own"]
"""Whom a query is told apart from: `all` candidates of the batch; other queries' `positives` and its own hard
negatives; other queries' `positives` only; its `own` hard negatives only (in-batch negatives off)."""


@dataclass(frozen=True)
class Candidates:
    """Who is whose candidate among local queries and all ranks' documents, whatever the head that scores them.

    `positive_row_QP`, `negative_row_QM`: rows of a query's own documents, `ABSENT` for a slot that does not count, on
    the host; `valid_QP`: which slots of positives do, on the `device` of the representations.
    `excluded`: candidates that are never negatives of a query, by each of these relations.
    `countable_K`: a document that several ranks hold counts once. `positive_K`: it is somebody's positive.
    """

    positive_row_QP: Tensor
    negative_row_QM: Tensor
    valid_QP: Tensor
    excluded: tuple[Relation, ...]
    countable_K: Tensor
    positive_K: Tensor
    device: torch.device
    block_size: int | None

    @staticmethod
    def of(batch: RetrievalBatch, mask_false_negatives: bool, block_size: int | None = None) -> Candidates:
        """`mask_false_negatives` excludes every known positive: those of all rows, on all ranks, with the same query
        (the same label where the batch has labels). Without it only the row's own positives are excluded."""

        def own_rows_of(id_QX: Tensor) -> Tensor:
            """Absent and repeated ids, and rows that are no query, left out. At least one slot: no shape is empty."""
            id_QX = F.pad(id_QX, (0, 1), value=ABSENT) if id_QX.shape[1] == 0 else id_QX
            repeated_QX = (id_QX[:, :, None] == id_QX[:, None, :]).tril(-1).any(-1)
            counts_QX = ~repeated_QX & (batch.query_id_Q != ABSENT)[:, None]
            return rows_of(id_QX.masked_fill(~counts_QX, ABSENT), id_K)

        device = next(iter(batch.query.local.values())).tensors()[0].device
        key_Q = batch.query_id_Q if batch.label_Q is None else batch.label_Q  # of one key: positives in common
        key_G = batch.query_id_G if batch.label_Q is None else batch.query.all_ids(key_Q)  # the ids are gathered once
        id_GP, id_K, first_K = batch.positive_id_GP, batch.document_id_K, batch.first_of_its_id_K
        row_GP = rows_of(id_GP, id_K)
        positive_row_QP = own_rows_of(batch.positive_id_QP)
        negative_row_QM = own_rows_of(batch.negative_id_QM)
        if mask_false_negatives:
            excluded = Relation.between(key_Q[:, None], row_GP, key_G)
            known_QM = excluded.holds(key_Q, negative_row_QM)
        else:
            excluded = Relation.by_position(positive_row_QP)
            known_QM = (negative_row_QM[:, :, None] == positive_row_QP[:, None, :]).any(-1)
        negative_row_QM = negative_row_QM.masked_fill(known_QM, ABSENT)
        return Candidates(
            positive_row_QP=positive_row_QP,
            negative_row_QM=negative_row_QM,
            valid_QP=to_device(positive_row_QP != ABSENT, device),
            excluded=(excluded,),
            countable_K=first_K,
            positive_K=torch.zeros_like(first_K).index_fill(0, row_GP[row_GP != ABSENT], True),
            device=device,
            block_size=block_size,
        )

    def listing(self, chosen_QM: Tensor) -> Candidates:
        """Some of a query's own hard negatives among its positives, behind them, and no longer among its negatives."""
        chosen_QM = F.pad(chosen_QM, (0, self.negative_row_QM.shape[1] - chosen_QM.shape[1]))
        listed_QM = self.negative_row_QM.masked_fill(~chosen_QM, ABSENT)
        row_QP = torch.cat([self.positive_row_QP, listed_QM], 1)
        return replace(
            self,
            positive_row_QP=row_QP,
            negative_row_QM=self.negative_row_QM.masked_fill(chosen_QM, ABSENT),
            valid_QP=to_device(row_QP != ABSENT, self.device),
            excluded=(*self.excluded, Relation.by_position(listed_QM)),
        )

    @cached_property
    def own(self) -> Relation:
        """Each query and its own hard negatives."""
        return Relation.by_position(self.negative_row_QM)

    def scores_of(self, pair: Pair, row_QX: Tensor) -> Tensor:
        """score_WQX of query n against the documents `row_QX[n]`; an absent slot has the score of row 0, to be masked.

        Slot by slot, so that no more than one document a query is copied at a time; in blocks they are computed again
        in the backward pass instead of keeping the copies.
        """
        query, document, widths = pair

        def slot(row_Q: Tensor) -> Tensor:
            return query.paired(document.rows(row_Q), widths)

        columns = to_device(row_QX.clamp_min(0), self.device).unbind(1)
        if self.block_size is None:
            return torch.stack([slot(row_Q) for row_Q in columns], -1)
        replayed = [checkpoint(slot, row_Q, use_reentrant=False, preserve_rng_state=False) for row_Q in columns]
        return torch.stack(replayed, -1)

    def allowed(self, start: int, size: int, negatives: Negatives) -> Tensor:
        """mask_QB: which candidates of a block are negatives of which query."""
        block = slice(start, start + size)
        counts_B = self.countable_K[block]
        if negatives != "all":
            counts_B = counts_B & self.positive_K[block]
        mask_QB = to_device(counts_B, self.device).expand(len(self.valid_QP), size).clone()
        if negatives == "positives_and_own":
            self.own.mark(mask_QB, start, True)
        for relation in self.excluded:
            relation.mark(mask_QB, start, False)
        return mask_QB


def in_blocks(pairs: Sequence[Pair], block_size: int | None, reduce: Callable[..., R]) -> list[R]:
    """`reduce(start, *scores)` of every block of candidates, in order: one score_WQB of the block that begins at row
    `start` for each of the pairs."""

    def scored(start: int, *blocks: Representation) -> R:
        both = zip(pairs, blocks, strict=True)
        return reduce(start, *(query.scores(block, widths) for (query, _, widths), block in both))

    documents = [document for _, document, _ in pairs]
    if block_size is None or block_size >= len(documents[0]):
        return [scored(0, *documents)]
    blocks = zip(*(document.split(block_size) for document in documents), strict=True)
    return [
        checkpoint(scored, number * block_size, *block, use_reentrant=False, preserve_rng_state=False)
        for number, block in enumerate(blocks)
    ]


def mean_over_slots(value_WQX: Tensor, valid_QX: Tensor) -> Tensor:
    """value_WQ: the mean over the valid slots of a row; 0 for a row without any."""
    return value_WQX.masked_fill(~valid_QX, 0.0).sum(-1) / valid_QX.sum(-1).clamp_min(1)


def masked_logsumexp(logit: Tensor, mask: Tensor) -> Tensor:
    """Over the last axis, of the entries that count; `NEVER` (about) and no gradient where none does."""
    return logit.masked_fill(~mask, NEVER).logsumexp(-1)


def cross_entropy(negative_lse: Tensor, positive_logit: Tensor) -> Tensor:
    """-log( e^p / (e^p + e^n) ), exact where it is tiny."""
    return F.softplus(negative_lse - positive_logit, threshold=50.0)


def swapped(batch: RetrievalBatch) -> RetrievalBatch:
    """The same batch seen from the documents: each document that is someone's positive searches for its queries.

    Queries become candidates and have no hard negatives; a document held by several ranks asks once.
    """
    row_E = rows_of(batch.positive_id_GP, batch.document_id_K).flatten()
    asker_E = torch.argsort(row_E, stable=True)  # places among all positive slots, by the document they hold
    asker_E = asker_E[row_E[asker_E] != ABSENT]
    document_E, query_E = row_E[asker_E], asker_E // batch.positive_id_GP.shape[1]
    count_K = torch.bincount(document_E, minlength=len(batch.document_id_K))
    slot_E = torch.arange(len(asker_E), device=row_E.device) - (count_K.cumsum(0) - count_K)[document_E]
    slots = max(int(slot_E.max()) + 1 if len(slot_E) else 0, 1)
    positive_id_KP = batch.query_id_G.new_full((len(batch.document_id_K), slots), ABSENT)
    positive_id_KP[document_E, slot_E] = batch.query_id_G[query_E]
    mine = own_rows(batch.document)
    asks_N = (positive_id_KP[mine] != ABSENT).any(1)
    label_N = None
    if batch.label_Q is not None:
        label_K = torch.full_like(batch.document_id_K, ABSENT)
        first_E = slot_E == 0  # a document of several classes takes that of its first query
        label_K[document_E[first_E]] = batch.query.all_ids(batch.label_Q)[query_E[first_E]]
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
