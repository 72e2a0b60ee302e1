"""Regularisers: spread the texts of one side over the sphere, and keep sparse vectors short.

Spreading is never across a positive pair: texts that should be close do not count. They are equal texts, queries that
share a positive (or a class), and documents of one query (or class), so spread no classification or clustering data
without labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from embedsmith.core.batch import ABSENT, Batch, Loss, LossOutput, PairBatch, RetrievalBatch, Side
from embedsmith.core.collectives import mean_over_ranks, sum_over_ranks, world_size
from embedsmith.core.errors import RecipeError
from embedsmith.core.reps import Sparse
from embedsmith.core.settings import Count, NotNegative, Range, Word
from embedsmith.core.shelf import losses
from embedsmith.core.transfer import to_device
from embedsmith.losses.candidates import Relation, in_blocks, own_rows, rows_of

Sides = Literal["both", "first", "second"]
"""Which sides of the batch are spread: queries or left texts are `first`, documents or right texts `second`."""


@losses.register(
    "uniformity",
    formula="log mean_{i<j} e^{-t |x_i - x_j|^2}, mean over sides",
    source="Wang and Isola 2020 (2005.10242)",
)
@dataclass(frozen=True)
class Uniformity(Loss):
    """Gaussian potential of the texts of a side: low when they cover the sphere evenly.

        L = mean over sides of log( mean over i != j of e^{-2 t (1 - s_ij)} ),    |x_i - x_j|^2 = 2 (1 - s_ij)

    Random unit vectors give -3.75 (width 32), -3.94 (128), -3.99 (1024) at t = 2; the floor is about -2t. A weight of
    0.1 beside a contrastive loss is usual.

    t: the kernel's sharpness, above 0 and at most 20, beyond which the potential underflows.
    sides: which side is spread: queries or left texts are `first`, documents or right texts `second`; or `both`.
    head: the dense head that is spread; its vectors have unit length.

    Batches: retrieval, pairs. Fewer than two texts: 0, connected.
    """

    batches = (RetrievalBatch, PairBatch)

    t: Annotated[float, Range(gt=0, le=20)] = 2.0
    sides: Sides = "both"
    head: Word = "dense"
    cross_device: bool = True
    block_size: Count | None = None

    def __call__(self, batch: Batch) -> LossOutput:
        view = batch if self.cross_device else batch.alone()
        potential = lambda score: ((score - 1) * (2 * self.t)).exp()
        values = []
        for one in _sides_to_spread(view, self.sides, self.head):
            mean_W, count = one.mean(view, potential, self.block_size)
            mean_W = _of_all_ranks(mean_W, view)
            values.append(mean_W.clamp_min(1e-38).log().where(count > 0, 0 * mean_W))
        return LossOutput(torch.stack(values).mean(0))


@losses.register(
    "gor",
    formula="mean_{i!=j} s_ij^2, sum over sides",
    source="EmbeddingGemma (2509.20354); Zhang et al. 2017 (1708.06320) without its mean term",
)
@dataclass(frozen=True)
class GOR(Loss):
    """Spread-out regulariser: the second moment of cosines within a side, which is 1/d for random vectors.

        L = sum over sides of mean over i != j of s_ij^2

    sides: which side is spread: queries or left texts are `first`, documents or right texts `second`; or `both`.

    Batches: retrieval, pairs. Fewer than two texts: 0, connected.
    """

    batches = (RetrievalBatch, PairBatch)

    sides: Sides = "both"
    head: Word = "dense"
    cross_device: bool = True
    block_size: Count | None = None

    def __call__(self, batch: Batch) -> LossOutput:
        view = batch if self.cross_device else batch.alone()
        spread = _sides_to_spread(view, self.sides, self.head)
        values = [one.mean(view, torch.square, self.block_size)[0] for one in spread]
        return LossOutput(torch.stack(values).sum(0))


@losses.register(
    "gor_st",
    formula="(mean s)^2 + relu( mean s^2 - 1/d ), mean or sum over sides",
    source="Zhang et al. 2017 (1708.06320); sentence-transformers' GlobalOrthogonalRegularizationLoss",
)
@dataclass(frozen=True)
class GORST(Loss):
    """Global orthogonal regularisation: both moments of cosines within a side as for random vectors.

        L = over sides of (M_1)^2 + relu(M_2 - 1/d),   M_k = mean over i != j of s_ij^k,   d the width

    combine: whether the two sides count with their `mean` or their `sum`.
    sides: which side is spread: queries or left texts are `first`, documents or right texts `second`; or `both`.

    Batches: retrieval, pairs. Fewer than two texts: 0, connected.
    """

    batches = (RetrievalBatch, PairBatch)

    combine: Literal["mean", "sum"] = "mean"
    sides: Sides = "both"
    head: Word = "dense"
    cross_device: bool = True
    block_size: Count | None = None

    def __call__(self, batch: Batch) -> LossOutput:
        view = batch if self.cross_device else batch.alone()
        values = []
        for one in _sides_to_spread(view, self.sides, self.head):
            first_W, second_W = (
                _of_all_ranks(one.mean(view, moment, self.block_size)[0], view)
                for moment in (lambda score: score, torch.square)
            )
            full = one.side.local[self.head].tensors()[0].shape[1]
            width_W = to_device(torch.tensor(view.widths or (full,), dtype=first_W.dtype), first_W.device)
            values.append(first_W.square() + (second_W - 1 / width_W).relu())
        stacked = torch.stack(values)
        return LossOutput(stacked.mean(0) if self.combine == "mean" else stacked.sum(0))


@dataclass(frozen=True)
class _OneSide:
    """The texts of one side: this rank's rows against all ranks' rows; `close` are pairs that should be close."""

    side: Side
    head: str
    id_N: Tensor
    close: tuple[Relation, ...]

    def mean(self, batch: Batch, of: Callable[[Tensor], Tensor], block_size: Count | None) -> tuple[Tensor, Tensor]:
        """This rank's share of mean_W of `of(score)` over the pairs of all ranks that count, and their number."""
        id_G = self.side.all_ids(self.id_N)
        first_G = rows_of(id_G, id_G) == torch.arange(len(id_G))
        device = self.side.local[self.head].tensors()[0].device
        id_G, id_N, first_G = (to_device(one, device) for one in (id_G, self.id_N, first_G))
        first_N = first_G[own_rows(self.side)]

        def block(start: int, score_WNB: Tensor) -> tuple[Tensor, Tensor]:
            here = slice(start, start + score_WNB.shape[-1])
            mask_NB = first_N[:, None] & first_G[here] & (id_G[here] != id_N[:, None])
            for relation in self.close:
                relation.mark(mask_NB, start, False)
            return of(score_WNB).masked_fill(~mask_NB, 0.0).sum((1, 2)), mask_NB.sum()

        pairs = [(self.side.local[self.head], self.side.all(self.head), batch.widths)]
        sums, counts = zip(*in_blocks(pairs, block_size, block), strict=True)
        total_W = torch.stack(list(sums)).sum(0)
        count = sum_over_ranks(torch.stack(list(counts)).sum(), batch.group)
        return total_W * world_size(batch.group) / count.clamp_min(1), count


def _sides_to_spread(batch: Batch, sides: Sides, head: str) -> list[_OneSide]:
    first, second = batch.sides()
    if isinstance(batch, RetrievalBatch):
        both = _sides_of_retrieval(batch, head)
    else:
        assert isinstance(batch, PairBatch)
        both = [_OneSide(first, head, batch.left_id_N, ()), _OneSide(second, head, batch.right_id_N, ())]
    return both if sides == "both" else both[:1] if sides == "first" else both[1:]


def _sides_of_retrieval(batch: RetrievalBatch, head: str) -> list[_OneSide]:
    """Close are queries of one class (or text) or with a positive in common, and documents that are positives of such
    a group."""
    key_Q = batch.query_id_Q if batch.label_Q is None else batch.label_Q
    key_G, id_GP = batch.query.all_ids(key_Q), batch.positive_id_GP
    place_G = torch.arange(len(id_GP))
    group = Relation.between(key_Q[:, None], place_G[:, None], key_G)
    shared = Relation.between(batch.positive_id_QP, place_G[:, None].expand_as(id_GP).reshape(-1, 1), id_GP.flatten())
    row_E1 = rows_of(id_GP, batch.document_id_K).reshape(-1, 1)
    key_E = key_G[:, None].expand_as(id_GP).flatten()
    mine = own_rows(batch.document)
    local_E = ((row_E1 >= mine.start) & (row_E1 < mine.stop))[:, 0]
    documents = Relation.between(key_E[local_E, None], row_E1, key_E, row_E1[local_E, 0] - mine.start)
    return [
        _OneSide(batch.query, head, batch.query_id_Q, (group, shared)),
        _OneSide(batch.document, head, batch.document_id_N, (documents,)),
    ]


def _of_all_ranks(share_W: Tensor, batch: Batch) -> Tensor:
    """The mean of ranks' shares as a value on every rank; the gradient stays that of the own share."""
    return share_W + (mean_over_ranks(share_W.detach(), batch.group) - share_W.detach())


@losses.register(
    "flops",
    formula="l_q sum_v (mean_i w_iv of queries)^2 + l_d sum_v (mean_i w_iv of documents)^2",
    source="SPLADE (2107.05720); Paria et al. 2020; the ramp: Tevatron's code",
)
@dataclass(frozen=True)
class Flops(Loss):
    """Sum over the vocabulary of the squared mean weight of each word, on either side.

        L = r ( l_q sum_v a_v(queries)^2 + l_d sum_v a_v(documents)^2 ),    a_v = mean over texts of all ranks of w_v

    with the ramp r = min((step + 1) / ramp_steps, 1)^2. Put it beside a contrastive loss in a `sum`. A repeated word
    counts with its largest weight; a text that several ranks hold counts once.

    query: the weight l_q of queries (of pairs: the left side), usually 1e-3 to 1e-2.
    document: the weight l_d of documents (of pairs: the right side).
    ramp_steps: optimizer steps over which the weights grow to their full size; 0 is without a ramp.
    head: the sparse head that is kept short.

    Parts: `query`, `document`, without l and r.

    Batches: retrieval, pairs. Errors: `RecipeError` for negative weights, or a head that is not sparse.
    """

    batches = (RetrievalBatch, PairBatch)

    query: NotNegative = 1e-3
    document: NotNegative = 1e-3
    ramp_steps: Annotated[int, Range(ge=0)] = 0
    head: Word = "sparse"

    def __call__(self, batch: Batch) -> LossOutput:
        if isinstance(batch, RetrievalBatch):
            counted = (batch.query_id_G != ABSENT, batch.first_of_its_id_K)
        else:
            assert isinstance(batch, PairBatch)
            ids = (batch.left.all_ids(batch.left_id_N), batch.right.all_ids(batch.right_id_N))
            counted = (ids[0] != ABSENT, ids[1] != ABSENT)
        means = []
        for side, counts_G in zip(batch.sides(), counted, strict=True):
            found = side.all(self.head)
            if not isinstance(found, Sparse):
                raise RecipeError(f"the head {self.head!r} is not sparse", where="flops", expected="a sparse head")
            row_E = to_device(counts_G.nonzero()[:, 0], found.weight_NT.device)
            kept = found.rows(row_E)  # the squared mean weight of each word, over the rows that count
            if kept.coordinate_NT.numel() == 0:
                means.append(0 * kept.weight_NT.sum())
            else:
                means.append(kept.over(torch.unique(kept.coordinate_NT)).mean(0).square().sum())
        first, second = means
        ramp = min((batch.progress.step + 1) / self.ramp_steps, 1.0) ** 2 if self.ramp_steps else 1.0
        value = ramp * (self.query * first + self.document * second)
        return LossOutput(value[None], {"query": first.detach(), "document": second.detach()})
