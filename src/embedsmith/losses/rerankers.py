"""Putting a query's own documents into order: one by one (`binary`), or as a list (`listnet`, `lambda`). For rerankers,
and for embedders whose rows have negatives of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from embedsmith.core.batch import Batch, GroupBatch, Loss, LossOutput, RetrievalBatch
from embedsmith.core.settings import Count, NotNegative, Positive, Word
from embedsmith.core.shelf import losses
from embedsmith.losses.candidates import NEVER
from embedsmith.losses.scored_list import ScoredList, derive_temperature


@losses.register(
    "binary",
    formula="mean over pairs of -( w y log sigmoid(s/t) + (1 - y) log(1 - sigmoid(s/t)) )",
    source="binary cross-entropy, as in Nogueira and Cho 2019 (1901.04085), section 2",
)
@dataclass(frozen=True)
class Binary(Loss):
    """Does this document answer this query? Each pair is judged by itself.

        L = mean over all pairs (q, d) of -( w y log sigmoid(s/t) + (1 - y) log(1 - sigmoid(s/t)) )

    over the pairs of all ranks, with the grade y in [0, 1]: 1 for a positive, 0 for a negative, or the data's own.

    positive_weight: the weight w of what answers; about the number of negatives a query makes up for their number.
    temperature: the temperature t; where it is not given, 1 for a reranker's logits and 0.02 for cosines.

    Batches: groups, retrieval. No document: 0, connected.
    """

    batches = (GroupBatch, RetrievalBatch)

    positive_weight: Positive = 1.0
    temperature: Positive | None = None
    head: Word = "dense"

    def __call__(self, batch: Batch) -> LossOutput:
        own = ScoredList.of(batch, self.head)
        logit_WQX = own.score_WQX / derive_temperature(self.temperature, batch)
        grade_WQX = own.grade_QX.expand_as(logit_WQX)
        weight = logit_WQX.new_full((), self.positive_weight)
        value_WQX = F.binary_cross_entropy_with_logits(logit_WQX, grade_WQX, pos_weight=weight, reduction="none")
        return LossOutput(batch.mean_over_rows(value_WQX.flatten(1), own.there_QX.flatten()))


@losses.register(
    "listnet",
    formula="mean_i -sum_c softmax(y_i / t_y)_c log softmax(s_i / t)_c over the query's own documents",
    source="Cao et al. 2007 (ListNet), top-one probabilities",
)
@dataclass(frozen=True)
class ListNet(Loss):
    """Which of a query's documents is the one on top? Grades and scores are two distributions over the list.

        L = mean_i -sum_c Y_ic log softmax(s_i / t)_c,   Y_i = softmax(y_i / t_y)

    for queries with at least two documents; y is the grade in [0, 1]. With a small t_y the positives share all of Y:
    the softmax cross-entropy that is usual for one positive among negatives.

    grade_temperature: the temperature t_y of the grades; 1 as published.
    temperature: the temperature t; where it is not given, 1 for a reranker's logits and 0.02 for cosines.

    Batches: groups, retrieval. No query with two documents: 0, connected.
    """

    batches = (GroupBatch, RetrievalBatch)

    grade_temperature: Positive = 1.0
    temperature: Positive | None = None
    head: Word = "dense"

    def __call__(self, batch: Batch) -> LossOutput:
        own = ScoredList.of(batch, self.head)
        logit_WQX = own.score_WQX / derive_temperature(self.temperature, batch)
        target_QX = (own.grade_QX / self.grade_temperature).masked_fill(~own.there_QX, NEVER).softmax(-1)
        log_WQX = logit_WQX.masked_fill(~own.there_QX, NEVER).log_softmax(-1)
        value_WQ = -(target_QX * log_WQX).masked_fill(~own.there_QX, 0.0).sum(-1)
        return LossOutput(batch.mean_over_rows(value_WQ, own.there_QX.sum(-1) >= 2))


@losses.register(
    "lambda",
    formula="mean_i sum over y_a > y_b of w_ab log2(1 + e^{-(s_a - s_b)/t})",
    source="Wang et al. 2018 (LambdaLoss); LambdaRank: Burges et al. 2006",
)
@dataclass(frozen=True)
class LambdaLoss(Loss):
    """Bring the better of two documents in front, the more so the more nDCG it would gain.

        L = mean_i sum over pairs with y_a > y_b of w_ab log2(1 + e^{-(s_a - s_b) / t})

        lambdarank:  w_ab = |G_a - G_b| |1/D(r_a) - 1/D(r_b)|
        ndcg2:       w_ab = |G_a - G_b| |1/D(|r_a - r_b|) - 1/D(|r_a - r_b| + 1)|
        ndcg2++:     w_ab = lambdarank + mu ndcg2

    with gains G = (2^y - 1) / maxDCG, discounts D(r) = log2(1 + r) and ranks r from 1 by the scores as they are (ties
    by slot), for queries with a document graded above another. The paper's sum over a query's pairs is kept, where
    sentence-transformers takes the mean over the pairs of the batch.

    weight: how pairs count; `ndcg2++` is the paper's best.
    mu: the weight of `ndcg2` in `ndcg2++`.
    k: pairs count of which one is among the first k, and nDCG is that at k; all where it is not given.
    temperature: the temperature t; where it is not given, 1 for a reranker's logits and 0.02 for cosines.

    Batches: groups, retrieval. No document graded above another: 0, connected.
    """

    batches = (GroupBatch, RetrievalBatch)

    weight: Literal["lambdarank", "ndcg2", "ndcg2++"] = "ndcg2++"
    mu: NotNegative = 10.0
    k: Count | None = None
    temperature: Positive | None = None
    head: Word = "dense"

    def __call__(self, batch: Batch) -> LossOutput:
        own = ScoredList.of(batch, self.head)
        score_WQX = own.score_WQX / derive_temperature(self.temperature, batch)
        above_QXX = own.grade_QX[:, :, None] > own.grade_QX[:, None, :]
        above_QXX = above_QXX & own.there_QX[:, :, None] & own.there_QX[:, None, :]
        seen_WQX = score_WQX.detach().masked_fill(~own.there_QX, NEVER)
        order_WQX = seen_WQX.argsort(dim=-1, descending=True, stable=True)
        rank_WQX = (order_WQX.argsort(-1) + 1).to(score_WQX.dtype)
        weight_WQXX = self._weights(own, rank_WQX)
        margin_WQXX = score_WQX[..., :, None] - score_WQX[..., None, :]
        value_WQXX = weight_WQXX * F.softplus(-margin_WQXX) / math.log(2)
        value_WQ = value_WQXX.masked_fill(~above_QXX, 0.0).sum((-1, -2))
        return LossOutput(batch.mean_over_rows(value_WQ, above_QXX.any(-1).any(-1)))

    def _weights(self, own: ScoredList, rank_WQX: Tensor) -> Tensor:
        """w_WQXX, without gradient."""
        gain_QX = (2**own.grade_QX - 1).masked_fill(~own.there_QX, 0.0)
        best_QX = gain_QX.sort(-1, descending=True).values
        place_X = torch.arange(1, best_QX.shape[-1] + 1, device=best_QX.device, dtype=best_QX.dtype)
        counted_X = place_X <= (self.k or len(place_X))
        ideal_Q1 = (best_QX * counted_X * _discounted(place_X)).sum(-1, keepdim=True)
        gain_QX = gain_QX / ideal_Q1.clamp_min(1e-10)
        change_QXX = (gain_QX[:, :, None] - gain_QX[:, None, :]).abs()
        first_WQXX, second_WQXX = rank_WQX[..., :, None], rank_WQX[..., None, :]
        apart_WQXX = (first_WQXX - second_WQXX).abs().clamp_min(1)
        lambdarank = (_discounted(first_WQXX) - _discounted(second_WQXX)).abs()
        ndcg2 = _discounted(apart_WQXX) - _discounted(apart_WQXX + 1)
        of_ranks = {"lambdarank": lambdarank, "ndcg2": ndcg2, "ndcg2++": lambdarank + self.mu * ndcg2}[self.weight]
        if self.k is not None:
            of_ranks = of_ranks * (torch.minimum(first_WQXX, second_WQXX) <= self.k)
        return change_QXX * of_ranks


def _discounted(rank: Tensor) -> Tensor:
    """1 / D(r) = 1 / log2(1 + r)."""
    return 1 / torch.log2(1 + rank)
