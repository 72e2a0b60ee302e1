"""Losses over pairs with graded labels. They read one score a pair, so gathering all ranks' pairs is cheap.

With `cross_device` (the default) a loss sees the pairs of all ranks and has the same value on each; without, it is
computed on each rank's own pairs, as in CoDiEmb, and then depends on how the batch is spread.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from embedsmith.core.batch import ABSENT, Batch, Loss, LossOutput, PairBatch, gather_pair_scores
from embedsmith.core.collectives import gather_by_hosts
from embedsmith.core.errors import RecipeError
from embedsmith.core.reps import Dense, Widths, in_fp32
from embedsmith.core.settings import Positive, Word
from embedsmith.core.shelf import losses
from embedsmith.core.transfer import to_device
from embedsmith.losses.candidates import NEVER


def gathered_pairs(
    batch: Batch, head: str, cross_device: bool, scorer: Callable[[PairBatch], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """score_WN of the pairs of all ranks (of this rank's alone unless `cross_device`), and on the host their label_N;
    rows without a text are left out. Scores are the head's, or what `scorer` makes of a batch."""
    assert isinstance(batch, PairBatch)
    batch = batch if cross_device else batch.alone()
    score_WN = batch.scores(head) if scorer is None else scorer(batch)
    place_N = (gather_by_hosts(batch.left_id_N, batch.group) != ABSENT).nonzero()[:, 0]
    score_WN = gather_pair_scores(score_WN, batch.group)[:, to_device(place_N, score_WN.device)]
    return score_WN, batch.label_G[place_N].to(score_WN.dtype)


@losses.register(
    "cosent",
    formula="log( 1 + sum_{y_a > y_b} e^{(s_b - s_a)/t} )",
    source="CoSENT (Su 2022, blog post); Conan-embedding (2408.15710), eq. 3",
)
@dataclass(frozen=True)
class CoSENT(Loss):
    """Order the scores of pairs as their labels are ordered.

        L = log( 1 + sum over (a, b) with y_a > y_b of e^{(s_b - s_a)/t} )

    Tied labels are never compared; only the order of labels counts. It is a sum inside a logarithm, so values grow
    with the batch and are not comparable across batch sizes. The sum runs over sorted labels with a running
    logsumexp, so N pairs cost N log N time and N memory, never an N x N matrix.

    temperature: the temperature t; 0.05 is the usual scale of 20.

    Batches: pairs. No pair in order (one pair, all labels equal): 0, connected. Errors: `RecipeError` for a
    temperature of 0 or less. Source: J. Su's post of 2022; Conan-embedding, whose text mislabels the indices.
    """

    batches = (PairBatch,)

    temperature: Positive = 0.05
    head: Word = "dense"
    cross_device: bool = True

    def __call__(self, batch: Batch) -> LossOutput:
        score_WN, label_N = gathered_pairs(batch, self.head, self.cross_device)
        return LossOutput(ordering_loss(score_WN / self.temperature, label_N))


def ordering_loss(logit_WN: Tensor, label_N: Tensor) -> Tensor:
    """value_W = log(1 + sum_{y_a > y_b} e^{z_b - z_a}), by a running logsumexp over the pairs in order of label."""
    sorted_N, order_N = torch.sort(label_N)
    below_N = torch.searchsorted(sorted_N, sorted_N)  # pairs with a lower label: they end just before this place
    order_N, below_N = (to_device(one, logit_WN.device) for one in (order_N, below_N))
    logit_WN = logit_WN[:, order_N]
    running_WN = torch.logcumsumexp(logit_WN, -1)[:, (below_N - 1).clamp_min(0)]
    term_WN = (running_WN - logit_WN).masked_fill(below_N == 0, NEVER)
    zero_W1 = term_WN.new_zeros(len(term_WN), 1)
    return torch.cat([zero_W1, term_WN], -1).logsumexp(-1)


@losses.register(
    "angle",
    formula="log( 1 + sum_{y_a > y_b} e^{(c_b - c_a)/t} ), c = |sum(Re + Im)| of x / y as unit complex vectors",
    source="AnglE (Li and Li 2023, 2309.12871), section 3.4, and its released code",
)
@dataclass(frozen=True)
class AnglE(Loss):
    """Order pairs by the difference of angles in complex space, where cosine has flat ends.

    The first half of a vector is read as real parts, the second as imaginary parts: x = a + ib, y = c + id. With

        x / y (moduli divided out) = ( (a.c + b.d) + i (b.c - a.d) ) / (|x| |y|),     c(x, y) = | Re + Im |

    summed over coordinates, the loss is CoSENT's over c in place of the cosine:

        L = log( 1 + sum over (a, b) with y_a > y_b of e^{(c_b - c_a)/t} )

    The paper adds it to CoSENT and an in-batch contrastive term, with weights 1 each: in a recipe a `sum` of `cosent`,
    `angle` and `mid_nce` with head dense. Alone it does not constrain the sign of the cosine.

    temperature: the temperature t; 0.05 is the usual scale of 20.
    head: the dense head that is read, of even width.

    Batches: pairs. No pair in order: 0, connected. Errors: `RecipeError` for an odd width (Matryoshka widths too).
    Source: 2309.12871.
    """

    batches = (PairBatch,)

    temperature: Positive = 0.05
    head: Word = "dense"
    cross_device: bool = True

    def check(self, dimension: int) -> None:
        if dimension % 2:
            raise RecipeError(f"angle cannot halve a width of {dimension}", expected="an even width")

    def __call__(self, batch: Batch) -> LossOutput:
        def angles(pairs: PairBatch) -> Tensor:
            left, right = pairs.left.local[self.head], pairs.right.local[self.head]
            assert isinstance(left, Dense)
            assert isinstance(right, Dense)
            return complex_angles(left, right, pairs.widths)

        score_WN, label_N = gathered_pairs(batch, self.head, self.cross_device, angles)
        return LossOutput(ordering_loss(score_WN / self.temperature, label_N))


def complex_angles(left: Dense, right: Dense, widths: Widths | None) -> Tensor:
    """score_WN = |Re + Im| of left / right as unit complex vectors, at every width."""
    left_ND, right_ND = in_fp32(left.vector_ND), in_fp32(right.vector_ND)

    def at(width: int) -> Tensor:
        x_ND, y_ND = left_ND[:, :width], right_ND[:, :width]
        (a_NX, b_NX), (c_NX, d_NX) = x_ND.chunk(2, 1), y_ND.chunk(2, 1)
        total_N = (a_NX * c_NX + b_NX * d_NX + b_NX * c_NX - a_NX * d_NX).sum(1)
        norms_N = torch.linalg.vector_norm(x_ND, dim=1) * torch.linalg.vector_norm(y_ND, dim=1)
        angle_N: Tensor = total_N.abs() / norms_N.clamp_min(1e-12)
        return angle_N

    return torch.stack([at(width) for width in widths or (left_ND.shape[1],)])


@losses.register(
    "pearson",
    formula="1 - cov(s, y) / (std(s) std(y))",
    source="Pcc-tuning (2406.09790); CoDiEmb (2508.11442), released code",
)
@dataclass(frozen=True)
class Pearson(Loss):
    """One minus the Pearson correlation of scores and labels (population moments).

        L = 1 - cov(s, y) / sqrt( var(s) var(y) + 1e-16 ),     in [0, 2]

    The scale and origin of labels do not matter.

    cross_device: over the pairs of all ranks, or `false`, over each rank's own; the mean of ranks' own losses is
        another quantity.

    Batches: pairs. Labels all equal, or one pair: 0, connected. Scores all equal: 1, with a gradient of zero (the
    correlation is undefined there, and its gradient next to it as large as one over the spread).
    Source: CoDiEmb's code; with unbiased variances, as in Pcc-tuning's, the correlation could not exceed (N-1)/N.
    """

    batches = (PairBatch,)

    head: Word = "dense"
    cross_device: bool = True

    def __call__(self, batch: Batch) -> LossOutput:
        score_WN, label_N = gathered_pairs(batch, self.head, self.cross_device)
        count = max(len(label_N), 1)
        label_N = to_device(label_N - label_N.sum() / count, score_WN.device)
        score_WN = score_WN - score_WN.sum(-1, keepdim=True) / count
        covariance_W = (score_WN * label_N).sum(-1) / count
        score_variance_W, label_variance = score_WN.square().sum(-1) / count, label_N.square().sum() / count
        correlation_W = covariance_W / (score_variance_W * label_variance + 1e-16).sqrt()
        value_W = 1 - correlation_W.where(score_variance_W >= 1e-12, 0 * covariance_W)
        return LossOutput(value_W.where(label_variance >= 1e-12, 0 * covariance_W))


@losses.register(
    "rank_kl",
    formula="KL( softmax(g/t) || softmax(s/t) ), g = 1 - (average rank of the label) / (N - 1)",
    source="CoDiEmb (2508.11442), released code; ListNet with rank-normalised targets",
)
@dataclass(frozen=True)
class RankKL(Loss):
    """Make the distribution over pairs that scores induce follow the one that the labels' ranks induce.

        g_i = (N - 1 - r_i) / (N - 1),   r_i the average rank of y_i from the top (ties share it), from 0
        L = sum_i P_i (log P_i - log Q_i),   P = softmax(g / t),   Q = softmax(s / t)   over the N pairs

    temperature: the temperature t of labels and scores. At 0.05 only about the top 8 of 32 pairs carry weight.
    reduction: `sum` is the divergence; `reference` divides it by N, as the published code does by accident
        (torch's `batchmean` on one row), so that its weight of 5 at N = 32 is 0.156 of the divergence.

    Batches: pairs. Labels all equal, or one pair: 0, connected (the divergence would press all scores together).
    Source: CoDiEmb's code.
    """

    batches = (PairBatch,)

    temperature: Positive = 0.05
    reduction: Literal["sum", "reference"] = "reference"
    head: Word = "dense"
    cross_device: bool = True

    def __call__(self, batch: Batch) -> LossOutput:
        score_WN, label_N = gathered_pairs(batch, self.head, self.cross_device)
        log_target_N = to_device((rank_targets(label_N) / self.temperature).log_softmax(-1), score_WN.device)
        log_score_WN = (score_WN / self.temperature).log_softmax(-1)
        divergence_W = (log_target_N.exp() * (log_target_N - log_score_WN)).sum(-1)
        divergence_W = divergence_W / max(len(label_N), 1) if self.reduction == "reference" else divergence_W
        tied = to_device((label_N == label_N[:1]).all(), score_WN.device)
        return LossOutput(divergence_W.where(~tied, 0 * divergence_W))


def rank_targets(label_N: Tensor) -> Tensor:
    """g_N in [0, 1]: 1 for the highest label, 0 for the lowest, ties at the mean of their ranks."""
    _, place_N, count_V = torch.unique(label_N, return_inverse=True, return_counts=True)
    above_V = len(label_N) - count_V.cumsum(0)
    rank_V = above_V.to(label_N.dtype) + (count_V.to(label_N.dtype) - 1) / 2
    target_N: Tensor = 1 - rank_V[place_N] / max(len(label_N) - 1, 1)
    return target_N


@losses.register(
    "pro",
    formula="mean_k -log( e^{s_k w_k/t} / (e^{s_k w_k/t} + sum_{y_i < y_k} e^{s_i (y_k - y_i)/t}) ), w_k = max gap",
    source="CoDiEmb (2508.11442), released code; Preference Ranking Optimization (2306.17492)",
)
@dataclass(frozen=True)
class PRO(Loss):
    """Every pair against all pairs with a strictly lower label, each weighed by the gap between the labels.

        gap_ki = y_k - y_i,   V_k = { i : gap_ki > 1e-8 },   w_k = max gap over V_k
        l_k = -log( e^{s_k w_k / t} / ( e^{s_k w_k / t} + sum over V_k of e^{s_i gap_ki / t} ) )
        L   = mean of l_k over the k with V_k not empty

    V_k already means "ranked lower", so there is no loop over ranks, and no N x N matrix either. Gaps multiply
    scores: labels should lie in [0, 1], and the loss depends on the level of scores, not only on their differences.

    center: subtract the mean score first, which removes that dependence (reconstructed: ours, not published); off by
        default.

    Batches: pairs. No pair in order: 0, connected. Source: CoDiEmb's code.
    """

    batches = (PairBatch,)

    temperature: Positive = 0.05
    center: bool = False
    head: Word = "dense"
    cross_device: bool = True

    def __call__(self, batch: Batch) -> LossOutput:
        score_WN, label_N = gathered_pairs(batch, self.head, self.cross_device)
        if self.center:
            score_WN = score_WN - score_WN.sum(-1, keepdim=True) / max(len(label_N), 1)
        value_W: Tensor = _PreferenceRanking.apply(score_WN / self.temperature, label_N)  # type: ignore[no-untyped-call]
        return LossOutput(value_W)


class _PreferenceRanking(torch.autograd.Function):
    """PRO of z = s / t, a row for every distinct label: what lies below an anchor, and by how much, is the same for
    all anchors with its label, and human labels have few values. Rows come in blocks, sorted by label so that a block
    reads only what lies below it.

    The gradient is computed beside the value, while a block is in the cache; no N x N matrix exists.
    """

    BLOCK = 128

    @staticmethod
    def forward(ctx: Any, logit_WN: Tensor, label_N: Tensor) -> Tensor:
        label_N, order_N = torch.sort(label_N)
        level_V, size_V = torch.unique_consecutive(label_N, return_counts=True)
        end_V = size_V.cumsum(0)
        below = torch.searchsorted(label_N, level_V - _TIE).tolist()  # how many labels lie below each level
        first = sum(count == 0 for count in below)  # the lowest labels are no anchors
        lowest = int(end_V[first - 1]) if first else 0
        anchors, gradient_WN = max(len(label_N) - lowest, 1), torch.zeros_like(logit_WN)
        row_A = torch.repeat_interleave(size_V)  # the level of each label
        known = (label_N, level_V, row_A, order_N)
        label_N, level_V, row_A, order_N = (to_device(one, logit_WN.device) for one in known)
        sorted_WN, values = logit_WN[:, order_N], []
        for logit_N, gradient_N in zip(sorted_WN.unbind(), gradient_WN.unbind(), strict=True):
            over, start = [logit_N.new_zeros(0)], lowest
            for row in range(first, len(below), _PreferenceRanking.BLOCK):
                rows = slice(row, row + _PreferenceRanking.BLOCK)
                stop = int(end_V[rows][-1])
                block = (logit_N[:stop], label_N[:stop], level_V[rows], row_A[start:stop] - row)
                over.append(_rank_block(*block, start, below[row], gradient_N[:stop]))
                start = stop
            values.append(torch.nn.functional.softplus(torch.cat(over), threshold=50.0).sum() / anchors)
        ctx.save_for_backward(torch.empty_like(gradient_WN).index_copy(1, order_N, gradient_WN / anchors))
        return torch.stack(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient_WN,) = ctx.saved_tensors
        return gradient_WN * gradients[0][:, None], None


_TIE = 1e-8


def _rank_block(
    logit_N: Tensor, label_N: Tensor, level_V: Tensor, level_A: Tensor, start: int, below: int, gradient_N: Tensor
) -> Tensor:
    """By how much the logsumexp below exceeds the anchor's own logit, for the anchors from `start` on, whose labels
    are `level_V`, `level_A` that of each; adds the gradient of their terms to `gradient_N`. The first `below` labels
    are below all of these anchors. (V: distinct labels, A: anchors.)"""
    gap_VN = level_V[:, None] - label_N
    power_VN = gap_VN * logit_N
    power_VN[:, below:].masked_fill_(gap_VN[:, below:] <= _TIE, float("-inf"))
    top_V1 = power_VN.amax(1, keepdim=True)
    total_V = power_VN.sub_(top_V1).exp_().sum(1)
    widest_A = gap_VN[:, 0][level_A]
    over_A = torch.addcmul((total_V.log() + top_V1[:, 0])[level_A], logit_N[start:], widest_A, value=-1)
    share_A = over_A.sigmoid()
    share_V = torch.zeros_like(total_V).index_add_(0, level_A, share_A)
    gradient_N += (share_V / total_V) @ power_VN.mul_(gap_VN)
    gradient_N[start:].addcmul_(share_A, widest_A, value=-1)
    return over_A
