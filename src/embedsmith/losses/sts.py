"""Losses over pairs with graded labels. They read one score a pair, so gathering all ranks' pairs is cheap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedsmith.core.batch import ABSENT, Batch, PairBatch
from embedsmith.core.collectives import gather_rows
from embedsmith.core.loss import Loss, LossOutput
from embedsmith.core.registry import losses
from embedsmith.losses import checks
from embedsmith.losses.blocks import NEVER


def scored_pairs(batch: Batch, head: str, cross_device: bool) -> tuple[Tensor, Tensor]:
    """score_WN and label_N of all ranks' pairs, or of this rank's; rows without a text are left out."""
    assert isinstance(batch, PairBatch)
    if not cross_device:
        real_N = batch.left_id_N != ABSENT
        return batch.scores(head)[:, real_N], batch.label_N[real_N]
    real_G = gather_rows(batch.left_id_N, batch.group) != ABSENT
    return batch.all_scores(head)[:, real_G], batch.label_G[real_G]


@losses.register(
    "cosent",
    formula="log( 1 + sum_{y_a > y_b} e^{(s_b - s_a)/t} )",
    source="CoSENT (Su 2022, blog post); Conan-embedding, eq. 3",
)
@dataclass(frozen=True)
class CoSENT(Loss):
    """Order the scores of pairs as their labels are ordered.

        L = log( 1 + sum over (a, b) with y_a > y_b of e^{(s_b - s_a)/t} )

    Tied labels are never compared; only the order of labels counts. It is a sum inside a logarithm, so values grow
    with the batch and are not comparable across batch sizes. The sum runs over sorted labels with a running
    logsumexp, so N pairs cost N log N time and N memory, never an N x N matrix.

    temperature: t; 0.05 is the usual scale of 20. head: the representation that is scored.
    cross_device: over the pairs of all ranks (several ranks equal one), or over each rank's own.

    Batches: pairs. No pair in order (one pair, all labels equal): 0, connected. Source: J. Su's post of 2022, and
    Conan-embedding (2408.15710), whose text mislabels the indices.
    """

    batches = (PairBatch,)

    temperature: float = 0.05
    head: str = "dense"
    cross_device: bool = True

    def __post_init__(self) -> None:
        checks.above_zero(self, "temperature")
        checks.not_empty(self, "head")

    def __call__(self, batch: Batch) -> LossOutput:
        score_WN, label_N = scored_pairs(batch, self.head, self.cross_device)
        return LossOutput(ordering_loss(score_WN / self.temperature, label_N))


def ordering_loss(logit_WN: Tensor, label_N: Tensor) -> Tensor:
    """value_W = log(1 + sum_{y_a > y_b} e^{z_b - z_a}), by a running logsumexp over the pairs in order of label."""
    sorted_N, order_N = torch.sort(label_N)
    logit_WN = logit_WN[:, order_N]
    below_N = torch.searchsorted(sorted_N, sorted_N)  # pairs with a lower label: they end just before this place
    running_WN = torch.logcumsumexp(logit_WN, -1)[:, (below_N - 1).clamp_min(0)]
    term_WN = (running_WN - logit_WN).masked_fill(below_N == 0, NEVER)
    zero_W1 = term_WN.new_zeros(len(term_WN), 1)
    return torch.cat([zero_W1, term_WN], -1).logsumexp(-1)
