"""The loss of masked auto-encoding: the model computes the cross-entropies, this averages them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from embedsmith.core.batch import ABSENT, Batch, RetrievalBatch
from embedsmith.core.collectives import mean_over_ranks
from embedsmith.core.loss import Loss, LossOutput
from embedsmith.core.registry import losses
from embedsmith.core.reps import in_fp32
from embedsmith.losses import checks
from embedsmith.losses.identity import own_rows


@losses.register(
    "retromae",
    formula="CE of the masked tokens + CE of the decoder's tokens, means over all tokens of the batch",
    source="RetroMAE (2205.12035), enhanced decoding, FlagEmbedding's code; M3-Embedding's first stage",
)
@dataclass(frozen=True)
class RetroMAE(Loss):
    """Masked auto-encoding, with a model that has the head `retromae` (models/retromae.py).

        L = sum CE of masked tokens / their number + sum CE of the decoder's tokens / their number

    over the texts of all ranks. sides: pre-train on the `documents` (queries are short), on the `queries`, or `both`.
    The batch needs no negatives, and pairs serve as texts. Parts: `masked`, `decoded`.

    Batches: retrieval.
    """

    batches = (RetrievalBatch,)

    sides: Literal["documents", "queries", "both"] = "documents"
    head: str = "retromae"

    def __post_init__(self) -> None:
        checks.one_of(self, "sides", "documents", "queries", "both")
        checks.not_empty(self, "head")

    def __call__(self, batch: Batch) -> LossOutput:
        assert isinstance(batch, RetrievalBatch)
        own_N = batch.first_of_its_id_K[own_rows(batch.document)]  # a text that several ranks hold counts once
        sides = {"queries": (batch.query, batch.query_id_Q != ABSENT), "documents": (batch.document, own_N)}
        rows = [
            in_fp32(side.local[self.head].tensors()[0]).masked_fill(~counts_N[:, None], 0.0)
            for name, (side, counts_N) in sides.items()
            if self.sides in (name, "both")
        ]
        sum_4 = torch.cat(rows).sum(0)
        count_2 = mean_over_ranks(sum_4[[1, 3]].detach(), batch.group).clamp_min(1e-9)
        masked, decoded = (sum_4[[0, 2]] / count_2).unbind()
        return LossOutput((masked + decoded)[None], {"masked": masked.detach(), "decoded": decoded.detach()})
