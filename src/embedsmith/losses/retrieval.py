"""InfoNCE: separate a query's positives from the other candidates. One implementation for every head, with several
positives, hard and in-batch negatives, Matryoshka widths, any number of ranks, and scores in blocks.

Below it, published retrieval objectives as settings of InfoNCE, under the names people look for.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from embedsmith.core.batch import ABSENT, Batch, Loss, LossOutput, RetrievalBatch
from embedsmith.core.collectives import mean_over_ranks
from embedsmith.core.errors import RecipeError
from embedsmith.core.reps import Representation, exceeds
from embedsmith.core.settings import Count, NotNegative, Positive, Word, name_of
from embedsmith.core.shelf import losses
from embedsmith.losses.candidates import (
    NEVER,
    Candidates,
    CrossDevice,
    Negatives,
    Relation,
    cross_entropy,
    crosses,
    in_blocks,
    masked_logsumexp,
    mean_over_slots,
    rows_of,
    swapped,
)


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

    temperature: the temperature t, above 0; the starting value when it is learned.
    multi_positive: several positives of a query stand `outside` the logarithm, each of which has to win, or `inside`,
        where one is enough.
    negatives: `all` candidates of the batch; other queries' positives and a query's own hard negatives
        (`positives_and_own`, Qwen3-Embedding); other queries' `positives` only (F2LLM's in-batch term); a query's
        `own` hard negatives only (in-batch negatives off).
    mask_false_negatives: a document that any row of the batch names as a positive of the same query is no negative;
        with labels, of any query of the same class.
    margin: drop negatives with s(q,n) > s(q,p) + margin (Qwen3-Embedding: 0.1); none are dropped where it is not
        given. Inside the logarithm p is the query's best positive. It is decided without gradient, at every width; a
        score above its limit by no more than rounding stays (`core.reps.exceeds`).
    relative_margin: drop negatives with s(q,n) > relative_margin * s(q,p) (NV-Retriever: 0.95), as with `margin`.
    symmetric: the mean of this loss and the loss of the documents searching for their queries.
    include_qq: add other queries to the denominator (Qwen3-Embedding, section 3). Queries that share a positive, or a
        text, do not count.
    include_dd: add the similarity of the positive to other queries' positives to the denominator (Qwen3-Embedding).
    hardness_weight: add so many times s (without gradient) to the logits of negatives (EmbeddingGemma: 5).
    hardness_on: which negatives that is: the `hard` ones, the `in_batch` ones, or `all`.
    focal_gamma: weigh query i by (1 - P_i)^gamma with P_i = e^{-L_i}, weights divided by their mean (KaLM v2: 0.5).
    cross_device: whether the candidates are those of all ranks, which is the default; `false`: a rank's own, as if its
        rows were a batch of their own; or a list of heads whose candidates are those of all ranks, for a loss that is
        used on several. Means go over the rows of all ranks in any case.
    learn_temperature: train log t.
    temperature_name: the name of the learned temperature; losses of one name share it.

    Batches: retrieval. Errors: `RecipeError` for a value outside its range. Source: 1807.03748; several positives
    and the masks as in CoDiEmb (2508.11442, released code) and Qwen3-Embedding (2506.05176).
    """

    batches = (RetrievalBatch,)

    temperature: Positive = 0.02
    head: Word = "dense"
    multi_positive: Literal["outside", "inside"] = "outside"
    negatives: Negatives = "all"
    mask_false_negatives: bool = True
    margin: NotNegative | None = None
    relative_margin: Positive | None = None
    symmetric: bool = False
    include_qq: bool = False
    include_dd: bool = False
    hardness_weight: NotNegative = 0.0
    hardness_on: Literal["hard", "in_batch", "all"] = "hard"
    focal_gamma: NotNegative = 0.0
    cross_device: CrossDevice = True
    learn_temperature: bool = False
    temperature_name: Word = "temperature"
    block_size: Count | None = None

    def __post_init__(self) -> None:
        if self.include_dd and self.multi_positive == "inside":
            raise RecipeError(
                "include_dd with multi_positive inside", where=name_of(self), expected="multi_positive: outside"
            )

    def extras(self, dimension: int) -> Mapping[str, nn.Module]:
        return {self.temperature_name: LogTemperature(self.temperature)} if self.learn_temperature else {}

    def __call__(self, batch: Batch) -> LossOutput:
        assert isinstance(batch, RetrievalBatch)
        if not crosses(self.cross_device, self.head):
            batch = batch.with_own_candidates()
        output = self._one_way(batch)
        if not self.symmetric:
            return output
        back = self._one_way(swapped(batch))
        return LossOutput((output.value_W + back.value_W) / 2, output.parts)

    def _one_way(self, batch: RetrievalBatch) -> LossOutput:
        found = Candidates.of(batch, self.head, self.mask_false_negatives, self.block_size)
        temperature = batch.extras[self.temperature_name]() if self.learn_temperature else self.temperature
        score_WQP, valid_QP, valid_Q = found.scores_of(found.positive_row_QP), found.valid_QP, found.valid_QP.any(-1)
        inside = self.multi_positive == "inside"
        limit_WQP = None  # the score above which a candidate is taken for a false negative; one slot where all agree
        if self.margin is not None or self.relative_margin is not None:
            target_WQP = score_WQP.detach()
            if inside:
                target_WQP = target_WQP.masked_fill(~valid_QP, NEVER).amax(-1, keepdim=True)
            limits = [target_WQP + self.margin] if self.margin is not None else []
            limits += [target_WQP * self.relative_margin] if self.relative_margin is not None else []
            limit_WQP = torch.stack(limits).amin(0)
        negative_WQP = self._negatives(batch, found, temperature, limit_WQP)
        positive_WQX, valid_QX = score_WQP / temperature, valid_QP
        if inside:
            positive_WQX, valid_QX = masked_logsumexp(positive_WQX, valid_QP)[..., None], valid_Q[:, None]
        loss_WQX = cross_entropy(negative_WQP, positive_WQX)
        if self.focal_gamma == 0:
            value_W = batch.mean_over_rows(mean_over_slots(loss_WQX, valid_QX), valid_Q)
        else:  # weights are divided by their mean over all ranks
            weight_WQX = (-torch.expm1(-loss_WQX.detach())).pow(self.focal_gamma)
            mean_W = batch.mean_over_rows(mean_over_slots(weight_WQX, valid_QX), valid_Q)
            value_W = batch.mean_over_rows(mean_over_slots(loss_WQX * weight_WQX, valid_QX), valid_Q)
            value_W = value_W / mean_over_ranks(mean_W, batch.group).clamp_min(1e-12)
        positive_W = batch.mean_over_rows(mean_over_slots(score_WQP.detach(), valid_QP), valid_Q)
        return LossOutput(value_W, {"positive_score": positive_W[0]})

    def _negatives(
        self, batch: RetrievalBatch, found: Candidates, temperature: float | Tensor, limit_WQP: Tensor | None
    ) -> Tensor:
        """The logsumexp of the denominator without the positive: one slot, or one a positive when it depends on it."""

        def lse(score_WQB: Tensor, mask_QB: Tensor, own_QB: Tensor | None, limit_WQP: Tensor | None) -> Tensor:
            logit_WQB = score_WQB / temperature
            if own_QB is not None:
                chosen_QB = torch.ones_like(own_QB) if self.hardness_on == "all" else own_QB
                chosen_QB = ~own_QB if self.hardness_on == "in_batch" else chosen_QB
                logit_WQB = logit_WQB + self.hardness_weight * score_WQB.detach() * chosen_QB
            if limit_WQP is None:
                return masked_logsumexp(logit_WQB, mask_QB)[..., None]
            within = [~exceeds(score_WQB.detach(), limit_WQ[..., None]) for limit_WQ in limit_WQP.unbind(-1)]
            return torch.stack([masked_logsumexp(logit_WQB, mask_QB & within_WQB) for within_WQB in within], -1)

        def of_term(term: Term, limit_WQP: Tensor | None, own: Relation | None = None) -> list[Tensor]:
            def block(start: int, score_WQB: Tensor) -> Tensor:
                mask_QB, own_QB = term.mask(start, score_WQB.shape[-1]), None
                if own is not None:
                    own_QB = torch.zeros_like(mask_QB)
                    own.mark(own_QB, start, True)
                return lse(score_WQB, mask_QB, own_QB, limit_WQP)

            return in_blocks([(term.left, term.right)], batch.widths, self.block_size, block)

        if self.negatives == "own":
            mask_QM = found.negative_row_QM != ABSENT
            own_QM = mask_QM if self.hardness_weight else None
            parts = [lse(found.scores_of(found.negative_row_QM), mask_QM, own_QM, limit_WQP)]
        else:
            allowed = lambda start, size: found.allowed(start, size, self.negatives)
            own = found.own if self.hardness_weight else None
            parts = of_term(Term(found.query, found.document, allowed), limit_WQP, own)
        if self.include_qq:
            parts += of_term(other_queries(batch, self.head, self.mask_false_negatives), limit_WQP)
        if self.include_dd:
            limits = None if limit_WQP is None else limit_WQP.split(1, -1)
            slots = [of_term(one, limits and limits[slot]) for slot, one in enumerate(other_positives(found))]
            parts.append(torch.cat([torch.stack(blocks).logsumexp(0) for blocks in slots], -1))
        return torch.stack(torch.broadcast_tensors(*parts)).logsumexp(0)


@dataclass(frozen=True)
class Term:
    """A term of the denominator beside the candidates: each row of `left` against all rows of `right`, of which
    `mask(start, size)` says which count in a block."""

    left: Representation
    right: Representation
    mask: Callable[[int, int], Tensor]


def other_queries(batch: RetrievalBatch, head: str, mask_false_negatives: bool) -> Term:
    """Queries against other queries: not the same text, nor (masking false negatives) one with a positive in common."""
    id_G, id_GP = batch.query_id_G, batch.positive_id_GP
    place_G = torch.arange(len(id_G), device=id_G.device)
    counts_G = rows_of(id_G, id_G) == place_G
    excluded = [Relation.between(batch.query_id_Q[:, None], place_G[:, None], id_G)]
    if mask_false_negatives:
        place_E = place_G.repeat_interleave(id_GP.shape[1])
        excluded.append(Relation.between(batch.positive_id_QP, place_E[:, None], id_GP.flatten()))

    def mask(start: int, size: int) -> Tensor:
        mask_QB = counts_G[start : start + size].expand(len(batch.query), size).clone()
        for relation in excluded:
            relation.mark(mask_QB, start, False)
        return mask_QB

    return Term(batch.query.local[head], batch.query.all(head), mask)


def other_positives(found: Candidates) -> Iterator[Term]:
    """For each slot, its positive against other queries' positives."""
    for row_Q in found.positive_row_QP.clamp_min(0).unbind(1):
        mask = lambda start, size: found.allowed(start, size, "positives")
        yield Term(found.document.rows(row_Q), found.document, mask)


class LogTemperature(nn.Module):
    """A learnable temperature, kept as its logarithm; never below `minimum` (CLIP's floor)."""

    def __init__(self, start: float, minimum: float = 0.001) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(start)))
        self.minimum = minimum

    def forward(self) -> Tensor:
        return self.log.exp().clamp_min(self.minimum)


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
    t = 0.02 are reconstructed.

    symmetric: both directions, as in `infonce`.

    Batches: retrieval. Source: 2408.15710, eq. 1.
    """

    batches = (RetrievalBatch,)

    temperature: Positive = 0.02
    symmetric: bool = False
    head: Word = "dense"
    block_size: Count | None = None

    def __call__(self, batch: Batch) -> LossOutput:
        contrast = InfoNCE(
            self.temperature, self.head, negatives="positives", symmetric=self.symmetric, block_size=self.block_size
        )
        return contrast(batch)


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

    in_batch: whether the second term counts; leave it out for sources that are not retrieval (rows of one class are
        no negatives of each other).

    Parts: `hard`, `in_batch`.

    Batches: retrieval. Source: F2LLM's code. Its gather carries no gradient; this one does.
    """

    batches = (RetrievalBatch,)

    temperature: Positive = 0.05
    in_batch: bool = True
    head: Word = "dense"
    block_size: Count | None = None

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

    temperature: the temperature t; the published one is not known, and 0.01 is the default of public fine-tuning code.
    margin: by how much a score may be above that of the positive before it is taken for a false negative.
    hardness_weight: as in `infonce`, on the query's own hard negatives.

    Batches: retrieval. Source: 2506.05176, section 3.
    """

    batches = (RetrievalBatch,)

    temperature: Positive = 0.01
    margin: NotNegative = 0.1
    hardness_weight: NotNegative = 0.0
    head: Word = "dense"
    block_size: Count | None = None

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
