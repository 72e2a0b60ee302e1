"""InfoNCE: tell a query's positives from the other candidates. One implementation for every head, with several
positives, hard and in-batch negatives, Matryoshka widths, any number of ranks, and scores in blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from embedsmith.core import recipe as checks
from embedsmith.core.batch import ABSENT, Batch, Loss, LossOutput, RetrievalBatch
from embedsmith.core.collectives import mean_over_ranks
from embedsmith.core.reps import exceeds
from embedsmith.core.shelf import losses
from embedsmith.losses.candidates import (
    NEVER,
    Candidates,
    LogTemperature,
    Negatives,
    cross_entropy,
    in_blocks,
    learned,
    masked_logsumexp,
    mean_over_slots,
)
from embedsmith.losses.identity import Relation, rows_of, swapped


@losses.register(
    "infonce",
    formula="-log( e^{s(q,p)/t} / (e^{s(q,p)/t} + sum_n e^{s(q,n)/t}) ), mean over positives, then over queries",
    source="van den Oord et al. 2018 (1807.03748); options: see the fields",
)
@dataclass(frozen=True)
class InfoNCE(Loss):
    """Contrastive loss over the candidates of all ranks.

    For query i with positives p_1..p_m and negatives N_i, scores s and temperature t:

        outside:  L_i = 1/m sum_r -log( e^{s(q_i,p_r)/t} / (e^{s(q_i,p_r)/t} + sum_{n in N_i} e^{s(q_i,n)/t}) )
        inside:   L_i = -log( sum_r e^{s(q_i,p_r)/t} / (sum_r e^{s(q_i,p_r)/t} + sum_{n in N_i} e^{s(q_i,n)/t}) )

    and the mean over the queries that have a positive. A query's own positives are never among its negatives, and a
    text that occurs several times among the candidates counts once.

    temperature: t; the starting value when it is learned.
    head: the representation that is scored.
    multi_positive: `outside` or `inside` the logarithm.
    negatives: `all` candidates of the batch; other queries' positives and a query's own hard negatives
        (`positives_and_own`, Qwen3-Embedding); other queries' `positives` only (F2LLM's in-batch term); a query's
        `own` hard negatives only (in-batch negatives off).
    mask_false_negatives: a document that any row of the batch names as a positive of the same query is no negative;
        with labels, of any query of the same class.
    margin: drop negatives with s(q,n) > s(q,p) + margin (Qwen3-Embedding: 0.1).
    relative_margin: drop negatives with s(q,n) > relative_margin * s(q,p) (NV-Retriever: 0.95).
        Inside the logarithm p is the query's best positive. Both are decided without gradient, at every width; a score
        above its limit by no more than rounding stays (`core.reps.exceeds`).
    symmetric: the mean of this loss and the loss of the documents searching for their queries.
    include_qq, include_dd: add other queries, and the similarity of the positive to other queries' positives, to the
        denominator (Qwen3-Embedding, section 3). Queries that share a positive, or a text, do not count.
    hardness_weight, hardness_on: add hardness_weight * s (no gradient) to the logits of the `hard`, the `in_batch`
        or `all` negatives (EmbeddingGemma: 5 on hard ones).
    focal_gamma: weigh query i by (1 - P_i)^gamma with P_i = e^{-L_i}, weights divided by their mean (KaLM v2: 0.5).
    learn_temperature, temperature_name: train log t as the extra of that name; losses of one name share it.
    block_size: candidates scored at a time; the full score matrix then never exists, and scores are computed again
        in the backward pass. `None` scores all at once.

    Batches: retrieval. Errors: `RecipeError` for a value outside its range. Source: 1807.03748; several positives
    and the masks as in CoDiEmb (2508.11442, released code) and Qwen3-Embedding (2506.05176).
    """

    batches = (RetrievalBatch,)

    temperature: float = 0.02
    head: str = "dense"
    multi_positive: Literal["outside", "inside"] = "outside"
    negatives: Negatives = "all"
    mask_false_negatives: bool = True
    margin: float | None = None
    relative_margin: float | None = None
    symmetric: bool = False
    include_qq: bool = False
    include_dd: bool = False
    hardness_weight: float = 0.0
    hardness_on: Literal["hard", "in_batch", "all"] = "hard"
    focal_gamma: float = 0.0
    learn_temperature: bool = False
    temperature_name: str = "temperature"
    block_size: int | None = None

    def __post_init__(self) -> None:
        checks.above_zero(self, "temperature", "relative_margin", "block_size")
        checks.not_negative(self, "margin", "hardness_weight", "focal_gamma")
        checks.one_of(self, "multi_positive", "outside", "inside")
        checks.one_of(self, "negatives", "all", "positives_and_own", "positives", "own")
        checks.one_of(self, "hardness_on", "hard", "in_batch", "all")
        checks.not_empty(self, "head", "temperature_name")
        if self.include_dd and self.multi_positive == "inside":
            raise checks.wrong(self, "include_dd with multi_positive inside", "multi_positive: outside")

    def extras(self, dimension: int) -> Mapping[str, nn.Module]:
        return {self.temperature_name: LogTemperature(self.temperature)} if self.learn_temperature else {}

    def __call__(self, batch: Batch) -> LossOutput:
        assert isinstance(batch, RetrievalBatch)
        output = self._one_way(batch)
        if not self.symmetric:
            return output
        back = self._one_way(swapped(batch))
        return LossOutput((output.value_W + back.value_W) / 2, output.parts)

    def _one_way(self, batch: RetrievalBatch) -> LossOutput:
        found = Candidates.of(batch, self.head, self.mask_false_negatives, self.block_size)
        temperature = learned(batch, self.temperature_name) if self.learn_temperature else self.temperature
        score_WQP = found.positive_scores()
        limit_WQP = self._limit(score_WQP.detach(), found.valid_QP)
        lse_WQP = _add(self._terms(batch, found, temperature, limit_WQP))
        if self.multi_positive == "inside":
            positive_WQ = masked_logsumexp(score_WQP / temperature, found.valid_QP)
            loss_WQP, valid_QX = cross_entropy(lse_WQP, positive_WQ[..., None]), found.valid_QP.any(-1, keepdim=True)
        else:
            loss_WQP, valid_QX = cross_entropy(lse_WQP, score_WQP / temperature), found.valid_QP
        value_W = self._mean(batch, loss_WQP, valid_QX)
        positive_W = batch.mean_over_rows(mean_over_slots(score_WQP.detach(), found.valid_QP), found.valid_QP.any(-1))
        return LossOutput(value_W, {"positive_score": positive_W[0]})

    def _mean(self, batch: RetrievalBatch, loss_WQP: Tensor, valid_QP: Tensor) -> Tensor:
        """Over slots, then over queries; focal weights are divided by their mean over all ranks."""
        valid_Q = valid_QP.any(-1)
        if self.focal_gamma == 0:
            return batch.mean_over_rows(mean_over_slots(loss_WQP, valid_QP), valid_Q)
        weight_WQP = (-torch.expm1(-loss_WQP.detach())).pow(self.focal_gamma)
        mean_W = batch.mean_over_rows(mean_over_slots(weight_WQP, valid_QP), valid_Q)
        value_W = batch.mean_over_rows(mean_over_slots(loss_WQP * weight_WQP, valid_QP), valid_Q)
        return value_W / mean_over_ranks(mean_W, batch.group).clamp_min(1e-12)

    def _limit(self, score_WQP: Tensor, valid_QP: Tensor) -> Tensor | None:
        """limit_WQP: the score above which a candidate is taken for a false negative; one slot where all agree."""
        if self.margin is None and self.relative_margin is None:
            return None
        if self.multi_positive == "inside":
            score_WQP = score_WQP.masked_fill(~valid_QP, NEVER).amax(-1, keepdim=True)
        limits = [score_WQP + self.margin] if self.margin is not None else []
        limits += [score_WQP * self.relative_margin] if self.relative_margin is not None else []
        return torch.stack(limits).amin(0)

    def _terms(
        self, batch: RetrievalBatch, found: Candidates, temperature: float | Tensor, limit_WQP: Tensor | None
    ) -> list[Tensor]:
        """lse_WQP of every block of every term of the denominator beside the positive."""
        if self.negatives == "own":
            score_WQM = found.negative_scores()
            mask_QM = found.negative_row_QM != ABSENT
            logit_WQM = self._logits(score_WQM, temperature, mask_QM)
            terms = [_lse(logit_WQM, score_WQM, mask_QM, limit_WQP)]
        else:

            def block(start: int, score_WQB: Tensor) -> Tensor:
                mask_QB = found.allowed(start, score_WQB.shape[-1], self.negatives)
                own_QB = found.is_own(start, score_WQB.shape[-1]) if self.hardness_weight else mask_QB
                return _lse(self._logits(score_WQB, temperature, own_QB), score_WQB, mask_QB, limit_WQP)

            terms = found.over_blocks(block)
        terms += self._query_terms(batch, found, temperature, limit_WQP) if self.include_qq else []
        terms += self._document_terms(found, temperature, limit_WQP) if self.include_dd else []
        return terms

    def _logits(self, score_WQB: Tensor, temperature: float | Tensor, own_QB: Tensor) -> Tensor:
        logit_WQB = score_WQB / temperature
        if self.hardness_weight == 0:
            return logit_WQB
        chosen_QB = torch.ones_like(own_QB) if self.hardness_on == "all" else own_QB
        chosen_QB = ~own_QB if self.hardness_on == "in_batch" else chosen_QB
        return logit_WQB + self.hardness_weight * score_WQB.detach() * chosen_QB

    def _query_terms(
        self, batch: RetrievalBatch, found: Candidates, temperature: float | Tensor, limit_WQP: Tensor | None
    ) -> list[Tensor]:
        """Other queries in the denominator: not the same text, nor (masking false negatives) one with a positive in
        common."""
        id_G = batch.query_id_G
        row_G = rows_of(id_G, id_G)
        place_G = torch.arange(len(id_G), device=id_G.device)
        counts_G = row_G == place_G
        same = Relation.between(batch.query_id_Q[:, None], place_G[:, None], id_G)
        slots = batch.positive_id_GP.shape[1]
        shared = Relation.between(
            batch.positive_id_QP, place_G.repeat_interleave(slots)[:, None], batch.positive_id_GP.flatten()
        )

        def block(start: int, score_WQB: Tensor) -> Tensor:
            mask_QB = counts_G[start : start + score_WQB.shape[-1]].expand(score_WQB.shape[1:]).clone()
            same.mark(mask_QB, start, False)
            if self.mask_false_negatives:
                shared.mark(mask_QB, start, False)
            return _lse(score_WQB / temperature, score_WQB, mask_QB, limit_WQP)

        pairs = [(found.query, batch.query.all(self.head))]
        return in_blocks(pairs, batch.widths, self.block_size, block)

    def _document_terms(self, found: Candidates, temperature: float | Tensor, limit_WQP: Tensor | None) -> list[Tensor]:
        """The positive of each slot against other queries' positives."""
        slots = []
        for slot, row_Q in enumerate(found.positive_row_QP.unbind(1)):
            limit_WQ1 = None if limit_WQP is None else limit_WQP[..., slot : slot + 1]

            def block(start: int, score_WQB: Tensor, limit_WQ1: Tensor | None = limit_WQ1) -> Tensor:
                mask_QB = found.allowed(start, score_WQB.shape[-1], "positives")
                return _lse(score_WQB / temperature, score_WQB, mask_QB, limit_WQ1)

            positive = replace(found, query=found.document.rows(row_Q.clamp_min(0)))
            slots.append(_add(positive.over_blocks(block)))
        return [torch.cat(slots, -1)]


def _lse(logit_WQB: Tensor, score_WQB: Tensor, mask_QB: Tensor, limit_WQP: Tensor | None) -> Tensor:
    """lse_WQP of the negatives in a block: one slot, or one a positive when the margin depends on it."""
    if limit_WQP is None:
        return masked_logsumexp(logit_WQB, mask_QB)[..., None]
    slots = [
        masked_logsumexp(logit_WQB, mask_QB & ~exceeds(score_WQB.detach(), limit_WQ[..., None]))
        for limit_WQ in limit_WQP.unbind(-1)
    ]
    return torch.stack(slots, -1)


def _add(lse_WQP: list[Tensor]) -> Tensor:
    """The logsumexp of sums given by their logsumexp."""
    return torch.stack(torch.broadcast_tensors(*lse_WQP)).logsumexp(0)


# Published retrieval objectives as settings of InfoNCE, under the names people look for.


@losses.register(
    "conan_weak",
    formula="-log( e^{s(x_i,y_i)/t} / sum_j e^{s(x_i,y_j)/t} ), mean over i",
    source="Conan-embedding (2408.15710), eq. 1; the temperature is reconstructed",
)
@dataclass(frozen=True)
class ConanWeak(Loss):
    """Conan's first stage, on weakly related pairs: in-batch contrast in one direction, no hard negatives.

        L = mean_i -log( e^{s(x_i,y_i)/t} / sum_j e^{s(x_i,y_j)/t} ),   y_j the positives of all rows, all ranks

    The same as `infonce` with `negatives: positives`. The paper prints a sum and no temperature; the mean and
    t = 0.02 are reconstructed. symmetric: both directions. block_size: as in `infonce`.

    Batches: retrieval. Source: 2408.15710, eq. 1.
    """

    batches = (RetrievalBatch,)

    temperature: float = 0.02
    symmetric: bool = False
    head: str = "dense"
    block_size: int | None = None

    def __post_init__(self) -> None:
        checks.above_zero(self, "temperature", "block_size")
        checks.not_empty(self, "head")

    def __call__(self, batch: Batch) -> LossOutput:
        return InfoNCE(
            self.temperature,
            self.head,
            negatives="positives",
            symmetric=self.symmetric,
            block_size=self.block_size,
        )(batch)


@losses.register(
    "f2llm",
    formula="L_hard + L_inbatch: softmax over own hard negatives, plus softmax over all positives",
    source="F2LLM (2510.02294), released code",
)
@dataclass(frozen=True)
class F2LLM(Loss):
    """The split form: one softmax over a query's hard negatives, another over the positives of the batch.

        L_hard    = mean_i -log( e^{s(q_i,p_i)/t} / ( e^{s(q_i,p_i)/t} + sum_k e^{s(q_i,n_ik)/t} ) )
        L_inbatch = mean_i -log( e^{s(q_i,p_i)/t} / sum_j e^{s(q_i,p_j)/t} ),   j over all ranks
        L         = L_hard + L_inbatch

    in_batch: leave the second term out for sources that are not retrieval (same-class rows are no negatives).
    block_size: as in `infonce`. Parts: `hard`, `in_batch`.

    Batches: retrieval. Source: F2LLM's code. Its gather carries no gradient; this one does.
    """

    batches = (RetrievalBatch,)

    temperature: float = 0.05
    in_batch: bool = True
    head: str = "dense"
    block_size: int | None = None

    def __post_init__(self) -> None:
        checks.above_zero(self, "temperature", "block_size")
        checks.not_empty(self, "head")

    def __call__(self, batch: Batch) -> LossOutput:
        hard = InfoNCE(self.temperature, self.head, negatives="own", block_size=self.block_size)(batch)
        if not self.in_batch:
            return LossOutput(hard.value_W, {"hard": hard.value.detach()})
        in_batch = InfoNCE(self.temperature, self.head, negatives="positives", block_size=self.block_size)(batch)
        parts = {"hard": hard.value.detach(), "in_batch": in_batch.value.detach()}
        return LossOutput(hard.value_W + in_batch.value_W, parts)


@losses.register(
    "qwen3",
    formula="-log( e^{s(q,p)/t} / Z ), Z over own hard negatives, other positives, q-q and p-p; margin mask 0.1",
    source="Qwen3-Embedding (2506.05176), section 3; details of the term list reconstructed",
)
@dataclass(frozen=True)
class Qwen3(Loss):
    """Qwen3-Embedding's contrastive loss.

        Z_i = e^{s(q_i,p_i)/t} + sum_k m e^{s(q_i,n_ik)/t} + sum_j m e^{s(q_i,p_j)/t}
                               + sum_j m e^{s(q_i,q_j)/t} + sum_j m e^{s(p_i,p_j)/t},      j != i, all ranks
        L   = mean_i -log( e^{s(q_i,p_i)/t} / Z_i )

    with m = 0 where that similarity is above s(q_i,p_i) + margin, or the documents are the same. The same as `infonce`
    with `negatives: positives_and_own`, `include_qq`, `include_dd` and `margin`.

    temperature: the published one is not known; 0.01 is the default of public fine-tuning code. hardness_weight: as in
    `infonce`, on the own hard negatives. block_size: as in `infonce`.

    Batches: retrieval. Source: 2506.05176, section 3.
    """

    batches = (RetrievalBatch,)

    temperature: float = 0.01
    margin: float = 0.1
    hardness_weight: float = 0.0
    head: str = "dense"
    block_size: int | None = None

    def __post_init__(self) -> None:
        checks.above_zero(self, "temperature", "block_size")
        checks.not_negative(self, "margin", "hardness_weight")
        checks.not_empty(self, "head")

    def __call__(self, batch: Batch) -> LossOutput:
        return InfoNCE(
            self.temperature,
            self.head,
            negatives="positives_and_own",
            margin=self.margin,
            include_qq=True,
            include_dd=True,
            hardness_weight=self.hardness_weight,
            block_size=self.block_size,
        )(batch)
