"""M3-Embedding's joint objective: three heads, their weighted ensemble, and the ensemble as teacher of each head."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from embedsmith.core.batch import Batch, Loss, LossOutput, Pair, RetrievalBatch
from embedsmith.core.errors import RecipeError
from embedsmith.core.settings import Count, Positive, Range, Weights, name_of
from embedsmith.core.shelf import losses
from embedsmith.core.transfer import to_device
from embedsmith.losses.candidates import (
    NEVER,
    Candidates,
    cross_entropy,
    in_blocks,
    mean_over_slots,
)
from embedsmith.losses.retrieval import CrossDevice, InfoNCE, crosses


@losses.register(
    "m3_self_distillation",
    formula="(L + L')/2, L = (sum_h l_h L_h + L_ensemble)/(H+1), L' = sum_h l_h CE(ensemble, h)/H",
    source="M3-Embedding (2402.03216), section 3.3, and FlagEmbedding's code",
)
@dataclass(frozen=True)
class M3SelfDistillation(Loss):
    """Train dense, sparse and multi-vector scores together and let their ensemble teach each of them.

        s_inter = sum_h w_h s_h
        L   = ( sum_h l_h L_h + L_inter ) / (H + 1)        L_x: InfoNCE of the scores s_x, several positives outside
        L'  = ( sum_h l_h L'_h ) / H,                      L'_h = - sum_c P_c log softmax(s_h / t)_c
        P   = softmax(s_inter / t) over the candidates, without gradient
        loss = L before step `start_step`, (L + L') / 2 from it on

    The scale of L halves at the switch, as in the paper's recipe (about 6,000 steps without distillation). With
    `ramp_steps` it is (1 - a) L + a L' instead, where a grows over so many steps from 0 to 1/2. Steps are optimizer
    steps, so a resumed run goes on where it was.

    Every head's candidates come from all ranks unless `cross_device` says otherwise; the published code gathers the
    dense head only, which is `cross_device: [dense]`.

    temperature: the temperature t of student and teacher.
    weights: each head's weight w_h in the ensemble; any heads of the model.
    lambdas: each head's weight l_h in the loss; the same heads as in `weights`.
    cross_device: whether candidates are those of all ranks, which is the default; `false`: a rank's own, as if its rows
        were a batch of their own; or a list of the heads whose L_h has the candidates of all ranks. Then the other
        heads, the ensemble and what it teaches have a rank's own, and the representations of the other heads never
        leave their rank. Means go over the rows of all ranks in any case.
    start_step: the optimizer step from which on the ensemble teaches; from the first by default.
    ramp_steps: optimizer steps over which the teaching grows to its full share; at once by default.

    Parts: `dense`, ..., `ensemble`, `distilled`.

    Batches: retrieval. Errors: `RecipeError` when weights and lambdas name different heads, or one is negative.
    """

    batches = (RetrievalBatch,)

    temperature: Positive = 0.02
    weights: Weights = field(default_factory=lambda: {"dense": 1.0, "sparse": 0.3, "multivector": 1.0})
    lambdas: Weights = field(default_factory=lambda: {"dense": 1.0, "sparse": 0.1, "multivector": 1.0})
    start_step: Annotated[int, Range(ge=0)] = 0
    ramp_steps: Annotated[int, Range(ge=0)] = 0
    cross_device: CrossDevice = True
    mask_false_negatives: bool = True
    block_size: Count | None = None

    def __post_init__(self) -> None:
        if set(self.weights) != set(self.lambdas):
            raise RecipeError(
                f"weights for {set(self.weights)}, lambdas for {set(self.lambdas)}",
                where=name_of(self),
                expected="the same heads",
            )
        if not isinstance(self.cross_device, bool) and (unknown := set(self.cross_device) - set(self.weights)):
            raise RecipeError(
                f"cross_device names {', '.join(sorted(unknown))}",
                where=name_of(self),
                expected=f"heads of this loss: {', '.join(self.weights)}",
            )

    def heads(self) -> frozenset[str]:
        return frozenset(self.weights)

    def __call__(self, batch: Batch) -> LossOutput:
        assert isinstance(batch, RetrievalBatch)
        crossing = [head for head in self.weights if crosses(self.cross_device, head)]
        if len(crossing) == len(self.weights):
            return self._together(batch, {})
        masked, size = self.mask_false_negatives, self.block_size
        alone = [InfoNCE(self.temperature, head, mask_false_negatives=masked, block_size=size) for head in crossing]
        return self._together(batch.with_own_candidates(), {loss.head: loss(batch).value_W for loss in alone})

    def _together(self, batch: RetrievalBatch, contrasts: Mapping[str, Tensor]) -> LossOutput:
        """All terms over the candidates of `batch`, but for the heads whose L_h is given: `contrasts`, value_W each."""
        pairs = [batch.pair(head) for head in self.weights]
        found = Candidates.of(batch, self.mask_false_negatives, self.block_size)
        scores = [found.scores_of(pair, found.positive_row_QP) for pair in pairs]
        positive_XWQP = self._with_ensemble(scores) / self.temperature
        lse_XWQ, teacher_XWQ = self._negatives(pairs, found)
        contrast_XWQP = cross_entropy(lse_XWQ[..., None], positive_XWQP)
        # -sum_c P_c log softmax(s_h)_c = -log softmax(s_h)_positive + s_h of the positive - its mean under P
        share_WQP = torch.sigmoid(positive_XWQP[-1] - lse_XWQ[-1][..., None]).detach()
        mean_XWQP = share_WQP * positive_XWQP[:-1] + (1 - share_WQP) * teacher_XWQ[..., None]
        distilled_XWQP = contrast_XWQP[:-1] + positive_XWQP[:-1] - mean_XWQP
        valid_QP = found.valid_QP
        value_XW = batch.mean_over_rows(
            mean_over_slots(torch.cat([contrast_XWQP, distilled_XWQP]), valid_QP), valid_QP.any(-1)
        )
        heads = len(self.weights)
        scales = torch.tensor([self.lambdas[head] for head in self.weights], dtype=value_XW.dtype)
        scale_X1 = to_device(scales, value_XW.device)[:, None]
        ensemble_W, taught_XW = value_XW[heads], value_XW[heads + 1 :]
        contrast_XW = torch.stack(
            [
                contrasts[head].expand_as(ensemble_W) if head in contrasts else own_W
                for head, own_W in zip(self.weights, value_XW)
            ]
        )
        total_W = ((scale_X1 * contrast_XW).sum(0) + ensemble_W) / (heads + 1)
        distilled_W = (scale_X1 * taught_XW).sum(0) / heads
        parts = {head: contrast_XW[number].detach() for number, head in enumerate(self.weights)}
        parts |= {"ensemble": ensemble_W.detach(), "distilled": distilled_W.detach()}
        done = batch.progress.step - self.start_step + 1
        share = 0.5 * min(max(done, 0) / max(self.ramp_steps, 1), 1.0)  # of the distillation: 1/2 in the end
        return LossOutput((1 - share) * total_W + share * distilled_W, parts)

    def _with_ensemble(self, scores: list[Tensor]) -> Tensor:
        """score_XW...: each head's, and their weighted sum last. A head without widths is the same at every width."""
        score_XW = torch.stack(torch.broadcast_tensors(*scores))
        weight_X = to_device(torch.tensor(list(self.weights.values()), dtype=score_XW.dtype), score_XW.device)
        return torch.cat([score_XW, torch.tensordot(weight_X, score_XW, dims=1)[None]])

    def _negatives(self, pairs: list[Pair], found: Candidates) -> tuple[Tensor, Tensor]:
        """lse_XWQ of the negatives' logits, for each head and the ensemble, and each head's mean logit under the
        ensemble's distribution over negatives (that distribution without gradient)."""

        def block(start: int, *score_WQB: Tensor) -> tuple[Tensor, Tensor]:
            logit_XWQB = self._with_ensemble(list(score_WQB)) / self.temperature
            mask_QB = found.allowed(start, logit_XWQB.shape[-1], "all")
            teacher_WQB = logit_XWQB[-1].detach().masked_fill(~mask_QB, NEVER).softmax(-1)
            return logit_XWQB.masked_fill(~mask_QB, NEVER).logsumexp(-1), (logit_XWQB[:-1] * teacher_WQB).sum(-1)

        blocks = in_blocks(pairs, self.block_size, block)
        lse_YXWQ, mean_YXWQ = (torch.stack(list(column)) for column in zip(*blocks, strict=True))
        share_YWQ = lse_YXWQ[:, -1].detach().softmax(0)
        return lse_YXWQ.logsumexp(0), (share_YWQ[:, None] * mean_YXWQ).sum(0)
