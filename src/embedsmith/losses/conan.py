"""Conan-embedding's supervised stage: contrast and similarity balanced in one optimizer step."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from embedsmith.core.batch import ABSENT, Batch, Loss, LossOutput, PairBatch, RetrievalBatch, gather_pair_scores
from embedsmith.core.collectives import agreed_by_hosts
from embedsmith.core.errors import RecipeError
from embedsmith.core.settings import Finite, Positive, Word
from embedsmith.core.shelf import losses
from embedsmith.core.transfer import to_device
from embedsmith.losses.candidates import NEVER, Candidates, cross_entropy, mean_over_slots


@losses.register(
    "cross_batch_balance",
    formula="mean_i -log( e^{s(x,y)/t} / ( e^{s(x,y)/t} + sum over ranks and slots of e^{s(x,y-)/t} ) )",
    source="Conan-embedding (2408.15710), eq. 5; pool of negatives and temperature reconstructed",
)
@dataclass(frozen=True)
class CrossBatchBalance(Loss):
    """The retrieval part of Conan's cross-GPU batch balance: a query's hard negatives are spread over the ranks.

        L = 1/B sum_i -log( e^{s(x_i,y_i)/t} / ( e^{s(x_i,y_i)/t} + sum_k sum_j e^{s(x_i,y-_ikj)/t} ) )

    k runs over ranks, j over the negatives that rank k holds for the query. Rows are matched by query id: rows of the
    same query, on whatever ranks, pool their negatives, and a negative held twice counts once. So two layouts give
    the same loss: every rank has the same queries and another slice of their negatives (Conan's figure), or every
    rank has its own queries with all their negatives (less to encode). Only scores travel between ranks, so a query's
    documents must be among its own rank's candidates. As printed, other queries' documents are no negatives; for
    that use `infonce`.

    The loss of the step is this plus beta times CoSENT on a part of similarity pairs; `balance_weights` gives the
    weights of the two parts.

    temperature: the temperature t, not published; 0.02 is reconstructed.

    Parts: `negatives`, how many a query has, those of all ranks together.

    Batches: retrieval. A query without negatives: 0, connected. Source: 2408.15710, section 3.3.
    """

    batches = (RetrievalBatch,)

    temperature: Positive = 0.02
    head: Word = "dense"

    def __call__(self, batch: Batch) -> LossOutput:
        assert isinstance(batch, RetrievalBatch)
        alone = batch.alone()
        found, pair = Candidates.of(alone, mask_false_negatives=False), alone.pair(self.head)
        positive_WGP, positive_id_GP = _everywhere(
            batch, found.scores_of(pair, found.positive_row_QP), _kept(batch.positive_id_QP, found.positive_row_QP)
        )
        negative_WGM, negative_id_GM = _everywhere(
            batch, found.scores_of(pair, found.negative_row_QM), _kept(batch.negative_id_QM, found.negative_row_QM)
        )
        _, query_G = torch.unique(batch.query_id_G, return_inverse=True)
        negative_GM = _distinct(query_G, negative_id_GM, positive_id_GP)
        known = (negative_GM, query_G, positive_id_GP != ABSENT)
        negative_GM, query_G, valid_GP = (to_device(one, positive_WGP.device) for one in known)
        lse_WG = _pooled_logsumexp(negative_WGM / self.temperature, negative_GM, query_G)
        loss_WGP = cross_entropy(lse_WG[..., None], positive_WGP / self.temperature)
        value_WG = mean_over_slots(loss_WGP, valid_GP)
        valid_G = valid_GP.any(-1)
        value_W = value_WG.sum(-1) / valid_G.sum().clamp_min(1)
        pooled_V = torch.zeros_like(query_G).index_add(0, query_G, negative_GM.sum(1))
        pooled = (pooled_V[query_G] * valid_G).sum() / valid_G.sum().clamp_min(1)
        return LossOutput(value_W, {"negatives": pooled})


def _kept(id_QX: Tensor, row_QX: Tensor) -> Tensor:
    """Ids of the slots that count; `ABSENT` elsewhere. As wide as `row_QX`, which has at least one slot."""
    id_QX = F.pad(id_QX, (0, row_QX.shape[1] - id_QX.shape[1]), value=ABSENT)
    return id_QX.where(row_QX != ABSENT, ABSENT)


def _everywhere(batch: RetrievalBatch, score_WQX: Tensor, id_QX: Tensor) -> tuple[Tensor, Tensor]:
    """score_WGX with gradient, and id_GX, of all ranks' rows; slots and rows padded to the largest rank's."""
    slots = agreed_by_hosts(id_QX.shape[1], batch.group)
    missing = (0, slots - id_QX.shape[1], 0, batch.query.rows - len(id_QX))
    score_WQX = F.pad(score_WQX, missing)
    flat_WG = gather_pair_scores(score_WQX.flatten(1), batch.group)
    return flat_WG.unflatten(1, (-1, slots)), batch.query.all_ids(F.pad(id_QX, missing[:2], value=ABSENT))


def _distinct(query_G: Tensor, negative_id_GM: Tensor, positive_id_GP: Tensor) -> Tensor:
    """mask_GM: the first holder of each negative of a query, unless a row of that query names it as a positive."""
    _, document = torch.unique(torch.cat([negative_id_GM, positive_id_GP], 1), return_inverse=True)
    code_GX = query_G[:, None] * (int(document.max()) + 1) + document
    negative_GM, positive_GP = code_GX.split([negative_id_GM.shape[1], positive_id_GP.shape[1]], 1)
    known_GM = torch.isin(negative_GM, positive_GP[positive_id_GP != ABSENT])
    code_1E = negative_GM.masked_fill(negative_id_GM == ABSENT, ABSENT).reshape(1, -1)
    order = torch.argsort(code_1E[0], stable=True)
    first = torch.ones_like(order, dtype=torch.bool)
    first[order[1:]] = code_1E[0, order[1:]] != code_1E[0, order[:-1]]
    return first.view_as(negative_GM) & (negative_id_GM != ABSENT) & ~known_GM


def _pooled_logsumexp(logit_WGM: Tensor, mask_GM: Tensor, query_G: Tensor) -> Tensor:
    """lse_WG: the logsumexp over the negatives of all rows of the same query."""
    lse_WG = logit_WGM.masked_fill(~mask_GM, NEVER).logsumexp(-1)
    place_WG = query_G.expand_as(lse_WG)
    top_WV = torch.full_like(lse_WG, NEVER).scatter_reduce(1, place_WG, lse_WG.detach(), reduce="amax")
    share_WG = (lse_WG - top_WV.gather(1, place_WG)).exp()
    total_WV = torch.zeros_like(lse_WG).scatter_add(1, place_WG, share_WG)
    return total_WV.gather(1, place_WG).log() + top_WV.gather(1, place_WG)


def balance_weights(
    mode: Literal["balanced", "split"], retrieval_ranks: int, sts_ranks: int, beta: float = 0.8
) -> tuple[float, float]:
    """Weights of the retrieval and the similarity part of a step whose loss is L_retrieval + beta L_similarity.

    balanced: every rank computes both parts, (1, beta). split: W = K_r + K_s ranks, each computing one part in a
    group of its own. Gradients are averaged over all W ranks, so a retrieval rank weighs its loss by W / K_r and a
    similarity rank by beta W / K_s. Source: 2408.15710, section 3.3 (beta 0.8); the scaling is derived.

    Errors: `RecipeError` for a split without ranks on either side, or a negative beta.
    """
    if not 0 <= beta < float("inf"):
        raise RecipeError(f"beta is {beta}", where="balance_weights", expected="0 or more")
    if mode == "balanced":
        return 1.0, beta
    if retrieval_ranks < 1 or sts_ranks < 1:
        raise RecipeError(
            f"split over {retrieval_ranks} retrieval and {sts_ranks} similarity ranks",
            where="balance_weights",
            expected="at least one rank each; use the balanced mode on a single rank",
        )
    world = retrieval_ranks + sts_ranks
    return world / retrieval_ranks, beta * world / sts_ranks


@losses.register(
    "cosine_consistency",
    formula="mean over positive pairs of 1 - s(x, y)",
    source="a reading of Conan-embedding's second term; see docs/losses.md",
)
@dataclass(frozen=True)
class CosineConsistency(Loss):
    """Pull the score of positive pairs towards 1.

        L = mean over queries of the mean over their positives of 1 - s(x, y)

    A term beside a contrastive loss, which only orders scores; alone it collapses the space.

    threshold: the label from which on a pair of a labelled batch is positive.

    Batches: retrieval, pairs. No positive: 0, connected. Source: the reading of Conan-embedding's second term as a
    consistency of positive pairs; its formula is CoSENT (`cosent`).
    """

    batches = (RetrievalBatch, PairBatch)

    threshold: Finite = 1.0
    head: Word = "dense"

    def __call__(self, batch: Batch) -> LossOutput:
        if isinstance(batch, PairBatch):
            counts_N = (batch.label_N >= self.threshold) & (batch.left_id_N != ABSENT)
            return LossOutput(batch.mean_over_rows(1 - batch.scores(self.head), counts_N))
        assert isinstance(batch, RetrievalBatch)
        pair, found = batch.pair(self.head), Candidates.of(batch, mask_false_negatives=False)
        value_WQ = mean_over_slots(1 - found.scores_of(pair, found.positive_row_QP), found.valid_QP)
        return LossOutput(batch.mean_over_rows(value_WQ, found.valid_QP.any(-1)))
