"""Sparse vectors that stay short: a regulariser of their expected cost in an inverted index."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedsmith.core.batch import ABSENT, Batch, PairBatch, RetrievalBatch, Side
from embedsmith.core.errors import RecipeError
from embedsmith.core.loss import Loss, LossOutput
from embedsmith.core.registry import losses
from embedsmith.core.reps import Sparse
from embedsmith.losses import checks


@losses.register(
    "flops",
    formula="l_q sum_v (mean_i w_iv of queries)^2 + l_d sum_v (mean_i w_iv of documents)^2",
    source="SPLADE (2107.05720); Paria et al. 2020; the ramp: Tevatron's code",
)
@dataclass(frozen=True)
class Flops(Loss):
    """Sum over the vocabulary of the squared mean weight of each word, on either side.

        L = r ( l_q sum_v a_v(queries)^2 + l_d sum_v a_v(documents)^2 ),    a_v = mean over texts of all ranks of w_v

    with the ramp r = min((step + 1) / ramp_steps, 1)^2. Put it beside a contrastive loss in a `sum`. query, document:
    l_q and l_d, usually 1e-3 to 1e-2 (of pairs: the left and the right side). A repeated word counts with its
    largest weight; a text that several ranks hold counts once. head: a sparse head. Parts: `query`, `document`
    without l and r.

    Batches: retrieval, pairs. Errors: `RecipeError` for negative weights, or a head that is not sparse.
    """

    batches = (RetrievalBatch, PairBatch)

    query: float = 1e-3
    document: float = 1e-3
    ramp_steps: int = 0
    head: str = "sparse"

    def __post_init__(self) -> None:
        checks.not_negative(self, "query", "document", "ramp_steps")
        checks.not_empty(self, "head")

    def __call__(self, batch: Batch) -> LossOutput:
        if isinstance(batch, RetrievalBatch):
            counted = (batch.query_id_G != ABSENT, batch.first_of_its_id_K)
        else:
            assert isinstance(batch, PairBatch)
            ids = (batch.left.all_ids(batch.left_id_N), batch.right.all_ids(batch.right_id_N))
            counted = (ids[0] != ABSENT, ids[1] != ABSENT)
        first, second = (
            squared_means(self._sparse(side), counts_G) for side, counts_G in zip(batch.sides(), counted, strict=True)
        )
        ramp = min((batch.progress.step + 1) / self.ramp_steps, 1.0) ** 2 if self.ramp_steps else 1.0
        value = ramp * (self.query * first + self.document * second)
        return LossOutput(value[None], {"query": first.detach(), "document": second.detach()})

    def _sparse(self, side: Side) -> Sparse:
        found = side.all(self.head)
        if not isinstance(found, Sparse):
            raise RecipeError(f"the head {self.head!r} is not sparse", where="flops", expected="a sparse head")
        return found


def squared_means(sparse: Sparse, counts_N: Tensor) -> Tensor:
    """sum_v (mean over the rows that count of w_nv)^2."""
    coordinate_NT, weight_NT = sparse.coordinate_NT[counts_N], sparse.weight_NT[counts_N]
    if coordinate_NT.numel() == 0:
        return 0 * sparse.weight_NT.sum()
    weight_NU = Sparse(coordinate_NT, weight_NT).over(torch.unique(coordinate_NT))
    return weight_NU.mean(0).square().sum()
