"""A retrieval batch with its ids resolved to rows: what every loss over candidates starts from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from embedsmith.core.batch import ABSENT, Batch, RetrievalBatch
from embedsmith.core.reps import Representation, Widths
from embedsmith.losses.identity import Relation, first_in_row, group_keys, rows_of

# Scores in blocks: every candidate loss is written once against blocks of candidates.
# One block is the plain path. With a block size each block is scored under a checkpoint: only its small result is kept,
# and its scores are computed again in the backward pass, so that the whole score matrix never exists.

R = TypeVar("R")

NEVER = -1e30
"""The logit of a candidate that does not count. Finite, so that a row without candidates has no NaN gradient."""


def in_blocks(
    pairs: Sequence[tuple[Representation, Representation]],
    widths: Widths | None,
    block_size: int | None,
    reduce: Callable[..., R],
) -> list[R]:
    """`reduce(start, *scores)` of every block of candidates, in order.

    `pairs` are the queries and candidates of one head or of several; each gives one score_WQB of the block that
    begins at row `start`.
    """

    def scored(start: int, *blocks: Representation) -> R:
        return reduce(start, *(query.scores(block, widths) for (query, _), block in zip(pairs, blocks, strict=True)))

    documents = [document for _, document in pairs]
    if block_size is None or block_size >= len(documents[0]):
        return [scored(0, *documents)]
    blocks = zip(*(_split(document, block_size) for document in documents), strict=True)
    return [
        checkpoint(scored, number * block_size, *block, use_reentrant=False, preserve_rng_state=False)
        for number, block in enumerate(blocks)
    ]


def _split(document: Representation, size: int) -> Iterator[Representation]:
    """Blocks of rows. Split, not sliced: the gradient of all blocks is then put together once, not added up in a
    full-size buffer for every block."""
    names = [f.name for f in fields(document)]
    for column in zip(*(tensor.split(size) for tensor in document.tensors()), strict=True):
        yield replace(document, **dict(zip(names, column, strict=True)))


def pair_scores(
    query: Representation, document: Representation, row_QX: Tensor, widths: Widths | None, replay: bool
) -> Tensor:
    """score_WQX of query n against the documents `row_QX[n]`; an absent slot has the score of row 0, to be masked.

    Slot by slot, so that no more than one document a query is copied at a time; `replay` computes them again in the
    backward pass instead of keeping the copies.
    """

    def slot(row_Q: Tensor) -> Tensor:
        return query.paired(document.rows(row_Q), widths)

    columns = row_QX.clamp_min(0).unbind(1)
    if not replay:
        return torch.stack([slot(row_Q) for row_Q in columns], -1)
    replayed = [checkpoint(slot, row_Q, use_reentrant=False, preserve_rng_state=False) for row_Q in columns]
    return torch.stack(replayed, -1)


Negatives = Literal["all", "positives_and_own", "positives", "own"]
"""Whom a query is told apart from: `all` candidates of the batch; other queries' `positives` and its own hard
negatives; other queries' `positives` only; its `own` hard negatives only (in-batch negatives off)."""


@dataclass(frozen=True)
class Candidates:
    """Local queries and all ranks' documents of one head, with identities resolved.

    `positive_row_QP`, `negative_row_QM`: rows of a query's own documents, `ABSENT` for a slot that does not count.
    `excluded`: candidates that are never negatives of a query. `own`: its own hard negatives.
    `countable_K`: a document that several ranks hold counts once. `positive_K`: it is somebody's positive.
    """

    query: Representation
    document: Representation
    positive_row_QP: Tensor
    negative_row_QM: Tensor
    excluded: Relation
    own: Relation
    countable_K: Tensor
    positive_K: Tensor
    widths: Widths | None
    block_size: int | None

    @staticmethod
    def of(batch: RetrievalBatch, head: str, mask_false_negatives: bool, block_size: int | None) -> Candidates:
        """`mask_false_negatives` excludes every known positive: those of all rows, on all ranks, with the same query
        (the same label where the batch has labels). Without it only the row's own positives are excluded."""
        document = batch.document.all(head)
        key_Q, key_G = group_keys(batch)
        row_GP = rows_of(batch.positive_id_GP, batch.document_id_K)
        positive_row_QP = _own_slots(batch.positive_id_QP, batch)
        negative_row_QM = _own_slots(batch.negative_id_QM, batch)
        if mask_false_negatives:
            excluded = Relation.between(key_Q[:, None], row_GP, key_G)
            known_QM = excluded.holds(key_Q, negative_row_QM)
        else:
            excluded = Relation.by_position(positive_row_QP)
            known_QM = (negative_row_QM[:, :, None] == positive_row_QP[:, None, :]).any(-1)
        negative_row_QM = negative_row_QM.masked_fill(known_QM, ABSENT)
        return Candidates(
            query=batch.query.local[head],
            document=document,
            positive_row_QP=positive_row_QP,
            negative_row_QM=negative_row_QM,
            excluded=excluded,
            own=Relation.by_position(negative_row_QM),
            countable_K=batch.first_of_its_id_K,
            positive_K=torch.zeros_like(batch.first_of_its_id_K).index_fill(0, row_GP[row_GP != ABSENT], True),
            widths=batch.widths,
            block_size=block_size,
        )

    @property
    def valid_QP(self) -> Tensor:
        return self.positive_row_QP != ABSENT

    def positive_scores(self) -> Tensor:
        """score_WQP of each query and its own positives."""
        return self._pairs(self.positive_row_QP)

    def negative_scores(self) -> Tensor:
        """score_WQM of each query and its own hard negatives."""
        return self._pairs(self.negative_row_QM)

    def _pairs(self, row_QX: Tensor) -> Tensor:
        return pair_scores(self.query, self.document, row_QX, self.widths, replay=self.block_size is not None)

    def allowed(self, start: int, size: int, negatives: Negatives) -> Tensor:
        """mask_QB: which candidates of a block are negatives of which query."""
        block = slice(start, start + size)
        counts_B = self.countable_K[block]
        if negatives != "all":
            counts_B = counts_B & self.positive_K[block]
        mask_QB = counts_B.expand(len(self.query), size).clone()
        if negatives == "positives_and_own":
            self.own.mark(mask_QB, start, True)
        self.excluded.mark(mask_QB, start, False)
        return mask_QB

    def is_own(self, start: int, size: int) -> Tensor:
        """mask_QB: which candidates of a block are the query's own hard negatives."""
        mask_QB = torch.zeros(len(self.query), size, dtype=torch.bool, device=self.countable_K.device)
        self.own.mark(mask_QB, start, True)
        return mask_QB

    def over_blocks(self, reduce: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        """`reduce(start, score_WQB)` of every block of candidates."""
        return in_blocks([(self.query, self.document)], self.widths, self.block_size, reduce)


def _own_slots(id_QX: Tensor, batch: RetrievalBatch) -> Tensor:
    """row_QX of a query's own documents: absent and repeated ids, and rows that are no query, left out. At least one
    slot, so that no shape is empty."""
    id_QX = F.pad(id_QX, (0, 1), value=ABSENT) if id_QX.shape[1] == 0 else id_QX
    counts_QX = first_in_row(id_QX) & (batch.query_id_Q != ABSENT)[:, None]
    return rows_of(id_QX.masked_fill(~counts_QX, ABSENT), batch.document_id_K)


def mean_over_slots(value_WQX: Tensor, valid_QX: Tensor) -> Tensor:
    """value_WQ: the mean over the valid slots of a row; 0 for a row without any."""
    return value_WQX.masked_fill(~valid_QX, 0.0).sum(-1) / valid_QX.sum(-1).clamp_min(1)


def masked_logsumexp(logit: Tensor, mask: Tensor) -> Tensor:
    """Over the last axis, of the entries that count; `NEVER` (about) and no gradient where none does."""
    return logit.masked_fill(~mask, NEVER).logsumexp(-1)


def cross_entropy(negative_lse: Tensor, positive_logit: Tensor) -> Tensor:
    """-log( e^p / (e^p + e^n) ), exact where it is tiny."""
    return F.softplus(negative_lse - positive_logit, threshold=50.0)


class LogTemperature(nn.Module):
    """A learnable temperature, kept as its logarithm; never below `minimum` (CLIP's floor)."""

    def __init__(self, start: float, minimum: float = 0.001) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(start)))
        self.minimum = minimum

    def forward(self) -> Tensor:
        return self.log.exp().clamp_min(self.minimum)


def learned(batch: Batch, name: str) -> Tensor:
    """The value of the learnable temperature `name`."""
    value: Tensor = batch.extras[name]()
    return value
