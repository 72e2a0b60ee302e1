"""InfoNCE: separate a query's positives from the other candidates. One implementation for every head, with several
positives, hard and in-batch negatives, Matryoshka widths, any number of ranks, and scores in blocks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from embedsmith.core.batch import ABSENT, Batch, Loss, LossOutput, Pair, RetrievalBatch
from embedsmith.core.collectives import mean_over_ranks
from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.reps import GUIDE, exceeds
from embedsmith.core.settings import Count, Finite, NotNegative, Positive, Range, Word, name_of
from embedsmith.core.shelf import losses
from embedsmith.core.transfer import to_device
from embedsmith.losses.candidates import (
    NEVER,
    Candidates,
    Negatives,
    Relation,
    cross_entropy,
    in_blocks,
    masked_logsumexp,
    mean_over_slots,
    swapped,
)
from embedsmith.losses.terms import CrossBatchMemory, Term, other_positives, other_queries, without_memory

CrossDevice = bool | tuple[Word, ...]
"""Whether candidates are those of all ranks: for every head, for none, or for the heads that are named."""


def crosses(cross_device: CrossDevice, head: str) -> bool:
    return cross_device if isinstance(cross_device, bool) else head in cross_device


_Limits = Sequence[Tensor | None]
"""By pair of queries and candidates, the score above which a candidate is taken for a false negative."""


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
    guide_margin: of a source with a guide, a model that knows which negatives are false, drop negatives with
        G(q,n) > G(q,p) - guide_margin, G the cosine of the guide's vectors (GISTEmbed: 0); decided as with `margin`.
    guide_relative_margin: drop negatives with G(q,n) > G(q,p) - guide_relative_margin |G(q,p)|.
    grades: what graded positives (`positive_scores` of a record, from 0 to 1) are worth. `weights`: the loss of each
        positive counts by its grade, divided by the mean grade of the batch; an unknown grade is 1. `soft`: the query's
        positives, and its own negatives with a grade above 0, are one list, on which the model's distribution over all
        candidates is to put the share of each grade: L_i = -sum_c y_c log softmax(s_i/t)_c, y_c = grade / sum of grades
        (listwise soft labels). Where not given, all positives are alike.
    memory: so many document vectors of earlier steps are further negatives (cross-batch memory); 0 is none.
    memory_after: the optimizer step from which on they count: vectors move too fast in the beginning.
    memory_name: the name of the memory; losses of one name share it, and keep their sources apart.
    focal_gamma: weigh query i by (1 - P_i)^gamma with P_i = e^{-L_i}, weights divided by their mean (KaLM v2: 0.5).
    cross_device: whether the candidates are those of all ranks, which is the default; `false`: a rank's own, as if its
        rows were a batch of their own; or a list of heads whose candidates are those of all ranks, for a loss that is
        used on several. Means go over the rows of all ranks in any case.
    learn_temperature: train log t.
    temperature_name: the name of the learned temperature; losses of one name share it.

    Batches: retrieval. Errors: `RecipeError` for a value outside its range, `DataError` for a guide that is missing.
    Source: 1807.03748; several positives and the masks as in CoDiEmb (2508.11442, released code) and Qwen3-Embedding
    (2506.05176); guide: GISTEmbed (2402.16829); memory: 1912.06798; soft labels: ListNet (Cao et al. 2007).
    """

    batches = (RetrievalBatch,)

    temperature: Positive = 0.02
    head: Word = "dense"
    multi_positive: Literal["outside", "inside"] = "outside"
    negatives: Negatives = "all"
    mask_false_negatives: bool = True
    margin: NotNegative | None = None
    relative_margin: Positive | None = None
    guide_margin: Finite | None = None
    guide_relative_margin: NotNegative | None = None
    grades: Literal["weights", "soft"] | None = None
    memory: Annotated[int, Range(ge=0)] = 0
    memory_after: Annotated[int, Range(ge=0)] = 0
    memory_name: Word = "memory"
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
        apart = "one positive at a time, outside the logarithm"
        for wrong, what, expected in (
            (self.include_dd and self.multi_positive == "inside", "include_dd with multi_positive inside", apart),
            (
                self.grades and self.multi_positive == "inside",
                "grades with multi_positive inside",
                apart,
            ),
            (self.grades == "soft" and self.include_dd, "include_dd with soft grades", apart),
            (self.memory and self.guided, "memory with a guide, which has not seen what is kept", "one of the two"),
            (self.memory and self.cross_device is not True, "memory of a rank's own", "cross_device: true"),
        ):
            if wrong:
                raise RecipeError(what, where=name_of(self), expected=expected)

    @property
    def guided(self) -> bool:
        return self.guide_margin is not None or self.guide_relative_margin is not None

    def reads(self) -> frozenset[str]:
        return frozenset({GUIDE} if self.guided else ())

    def extras(self, dimension: int) -> Mapping[str, nn.Module]:
        made: dict[str, nn.Module] = {}
        if self.learn_temperature:
            made[self.temperature_name] = LogTemperature(self.temperature)
        if self.memory:
            made[self.memory_name] = CrossBatchMemory(self.memory, dimension)
        return made

    def remember(self, batch: Batch) -> None:
        if self.memory and isinstance(batch, RetrievalBatch):
            self._kept(batch).add(batch, self.head)

    def _kept(self, batch: Batch) -> CrossBatchMemory:
        kept = batch.extras[self.memory_name]
        assert isinstance(kept, CrossBatchMemory)
        return kept

    def __call__(self, batch: Batch) -> LossOutput:
        assert isinstance(batch, RetrievalBatch)
        if not crosses(self.cross_device, self.head):
            batch = batch.with_own_candidates()
        output = self._one_way(batch)
        if not self.symmetric:
            return output
        back = self._one_way(replace(swapped(batch), extras=without_memory(batch.extras)))
        return LossOutput((output.value_W + back.value_W) / 2, output.parts)

    def _one_way(self, batch: RetrievalBatch) -> LossOutput:
        pairs, found = [batch.pair(self.head)], Candidates.of(batch, self.mask_false_negatives, self.block_size)
        grade_QX = None
        if self.grades is not None:
            grade_QX = _grades(batch.positive_grade_QP, found.positive_row_QP, unknown=1.0)
            if self.grades == "soft":
                grade_QM = _grades(batch.negative_grade_QM, found.negative_row_QM, unknown=0.0)
                found, grade_QX = found.listing(grade_QM > 0), torch.cat([grade_QX, grade_QM], 1)
            grade_QX = to_device(grade_QX, found.device)
        temperature = batch.extras[self.temperature_name]() if self.learn_temperature else self.temperature
        score_WQX, valid_QX = found.scores_of(pairs[0], found.positive_row_QP), found.valid_QP
        valid_Q = valid_QX.any(-1)
        limits = [self._limit(score_WQX.detach(), valid_QX, self.margin, self.relative_margin, lambda s, r: s * r)]
        if self.guided:
            if GUIDE not in batch.query.local:
                raise DataError(
                    "no guide for this batch", where=batch.source or None, fix="set `guide` for this source"
                )
            pairs.append((*batch.pair(GUIDE)[:2], None))  # at its whole width
            guide_WQX = found.scores_of(pairs[1], found.positive_row_QP)
            below = None if self.guide_margin is None else -self.guide_margin
            share = self.guide_relative_margin
            limits.append(self._limit(guide_WQX, valid_QX, below, share, lambda s, r: s - r * s.abs()))
        negative_WQX = self._negatives(batch, pairs, found, temperature, limits)
        logit_WQX = score_WQX / temperature
        positive_W = batch.mean_over_rows(mean_over_slots(score_WQX.detach(), valid_QX), valid_Q)
        if self._together:  # the positives of a query are one
            together_WQ1 = masked_logsumexp(logit_WQX, valid_QX)[..., None]
            loss_WQX = cross_entropy(negative_WQX, together_WQ1)
            if self.grades == "soft" and grade_QX is not None:
                grade_QX = grade_QX.to(loss_WQX.dtype).masked_fill(~valid_QX, 0.0)
                share_QX = grade_QX / grade_QX.sum(-1, keepdim=True).clamp_min(1e-9)
                over_WQX = (share_QX * (together_WQ1 - logit_WQX)).sum(-1, keepdim=True)  # what each wants of the sum
                loss_WQX, valid_Q = loss_WQX + over_WQX, valid_Q & (grade_QX.sum(-1) > 0)
            valid_QX = valid_Q[:, None]
        else:
            loss_WQX = cross_entropy(negative_WQX, logit_WQX)
        weight_WQX = None
        if self.grades == "weights" and grade_QX is not None:
            weight_WQX = grade_QX.to(loss_WQX.dtype).expand_as(loss_WQX)
        if self.focal_gamma:
            focal_WQX = (-torch.expm1(-loss_WQX.detach())).pow(self.focal_gamma)
            weight_WQX = focal_WQX if weight_WQX is None else focal_WQX * weight_WQX
        if weight_WQX is None:
            value_W = batch.mean_over_rows(mean_over_slots(loss_WQX, valid_QX), valid_Q)
        else:  # weights are divided by their mean over all ranks
            mean_W = batch.mean_over_rows(mean_over_slots(weight_WQX, valid_QX), valid_Q)
            value_W = batch.mean_over_rows(mean_over_slots(loss_WQX * weight_WQX, valid_QX), valid_Q)
            value_W = value_W / mean_over_ranks(mean_W, batch.group).clamp_min(1e-12)
        return LossOutput(value_W, {"positive_score": positive_W})

    @property
    def _together(self) -> bool:
        return self.multi_positive == "inside" or self.grades == "soft"

    def _limit(
        self,
        score_WQX: Tensor,
        valid_QX: Tensor,
        margin: float | None,
        relative: float | None,
        scaled: Callable[[Tensor, float], Tensor],
    ) -> Tensor | None:
        """limit_WQX: the score above which a candidate is taken for a false negative, by that of the positive; of the
        best alone where positives stand together."""
        if self._together:
            score_WQX = score_WQX.masked_fill(~valid_QX, NEVER).amax(-1, keepdim=True)
        limits = [score_WQX + margin] if margin is not None else []
        limits += [scaled(score_WQX, relative)] if relative is not None else []
        return torch.stack(limits).amin(0) if limits else None

    def _negatives(
        self,
        batch: RetrievalBatch,
        pairs: Sequence[Pair],
        found: Candidates,
        temperature: float | Tensor,
        limits: _Limits,
    ) -> Tensor:
        """The logsumexp of the denominator without the positive: one slot, or one a positive when it depends on it.

        `pairs`: queries and candidates as the scored head sees them, then as the guide does; `limits` of each, by which
        candidates are dropped."""

        def lse(scores: Sequence[Tensor], mask_QB: Tensor, own_QB: Tensor | None, limits: _Limits) -> Tensor:
            score_WQB = scores[0]
            logit_WQB = score_WQB / temperature
            if own_QB is not None:
                chosen_QB = torch.ones_like(own_QB) if self.hardness_on == "all" else own_QB
                chosen_QB = ~own_QB if self.hardness_on == "in_batch" else chosen_QB
                logit_WQB = logit_WQB + self.hardness_weight * score_WQB.detach() * chosen_QB
            set_limits = [(score, limit) for score, limit in zip(scores, limits) if limit is not None]
            if not set_limits:
                return masked_logsumexp(logit_WQB, mask_QB)[..., None]
            slots: list[Tensor] = []
            for slot in range(set_limits[0][1].shape[-1]):
                within_WQB = mask_QB
                for score, limit_WQX in set_limits:
                    within_WQB = within_WQB & ~exceeds(score.detach(), limit_WQX[..., slot, None])
                slots.append(masked_logsumexp(logit_WQB, within_WQB))
            return torch.stack(slots, -1)

        def of_term(term: Term, limits: _Limits, own: Relation | None = None) -> list[Tensor]:
            def block(start: int, *scores: Tensor) -> Tensor:
                mask_QB, own_QB = term.mask(start, scores[0].shape[-1]), None
                if own is not None:
                    own_QB = torch.zeros_like(mask_QB)
                    own.mark(own_QB, start, True)
                return lse(scores, mask_QB, own_QB, limits)

            return in_blocks(term.pairs, self.block_size, block)

        if self.negatives == "own":
            mask_QM = to_device(found.negative_row_QM != ABSENT, found.device)
            own_QM = mask_QM if self.hardness_weight else None
            parts = [lse([found.scores_of(pair, found.negative_row_QM) for pair in pairs], mask_QM, own_QM, limits)]
        else:
            allowed = lambda start, size: found.allowed(start, size, self.negatives)
            own = found.own if self.hardness_weight else None
            parts = of_term(Term(pairs, allowed), limits, own)
        if self.memory_name in batch.extras and self.memory and batch.progress.step >= self.memory_after:
            parts += of_term(self._kept(batch).term(batch, pairs[0], found, self.mask_false_negatives), limits)
        if self.include_qq:
            heads = [self.head, *([GUIDE] if self.guided else [])]
            parts += of_term(other_queries(batch, heads, self.mask_false_negatives), limits)
        if self.include_dd:
            slots = range(found.positive_row_QP.shape[1])
            each = [[None if limit is None else limit[..., slot, None] for limit in limits] for slot in slots]
            made = [of_term(one, bounds) for one, bounds in zip(other_positives(pairs, found), each, strict=True)]
            parts.append(torch.cat([torch.stack(blocks).logsumexp(0) for blocks in made], -1))
        return torch.stack(torch.broadcast_tensors(*parts)).logsumexp(0)


def _grades(grade_QX: Tensor | None, row_QX: Tensor, unknown: float) -> Tensor:
    """Graded relevance, as wide as the row slots."""
    if grade_QX is None:
        return torch.full(row_QX.shape, unknown)
    grade_QX = torch.nn.functional.pad(grade_QX, (0, row_QX.shape[1] - grade_QX.shape[1]), value=float("nan"))
    return grade_QX.nan_to_num(nan=unknown)


class LogTemperature(nn.Module):
    """A learnable temperature, kept as its logarithm; never below `minimum` (CLIP's floor)."""

    def __init__(self, start: float, minimum: float = 0.001) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(start)))
        self.minimum = minimum

    def forward(self) -> Tensor:
        return self.log.exp().clamp_min(self.minimum)
