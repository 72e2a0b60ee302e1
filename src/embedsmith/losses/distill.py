"""Learning from a teacher: from its scores, or from its vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedsmith.core.batch import ABSENT, Batch, GroupBatch, Loss, LossOutput, PairBatch, RetrievalBatch, Side
from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.reps import TEACHER, Dense, in_fp32
from embedsmith.core.settings import Count, Positive, Word, name_of
from embedsmith.core.shelf import losses
from embedsmith.core.transfer import to_device
from embedsmith.losses.candidates import NEVER, Candidates, in_blocks, masked_logsumexp, mean_over_slots, own_rows
from embedsmith.losses.scored_list import ScoredList, derive_temperature


@losses.register(
    "score_kl",
    formula="mean_i KL( softmax(teacher_i / t_T) || softmax(s_i / t) ) over the query's own documents",
    source="M3-Embedding's `kl_div` option (FlagEmbedding); Hinton et al. 2015 (1503.02531)",
)
@dataclass(frozen=True)
class ScoreKL(Loss):
    """Follow a reranker's distribution over a query's own positives and negatives.

        L = mean_i sum_c T_ic ( log T_ic - log softmax(s_i / t)_c ),   T_i = softmax(teacher_i / t_T)

    over the documents the teacher scored, for queries with at least two. FlagEmbedding's `kl_div` is this with
    t_T = 1, up to a constant, plus InfoNCE: a `sum` of both.

    temperature: the temperature t of the student's scores; where it is not given, 0.02 for cosines and 1 for a
        reranker's logits.
    teacher_temperature: the temperature t_T, by which the teacher's scores are divided.

    Batches: retrieval, groups, with teacher scores. No query with two scores: 0, connected.
    """

    batches = (RetrievalBatch, GroupBatch)

    temperature: Positive | None = None
    teacher_temperature: Positive = 1.0
    head: Word = "dense"

    def __call__(self, batch: Batch) -> LossOutput:
        own = ScoredList.of(batch, self.head)
        target_QX = own.targets(self.teacher_temperature)
        temperature = derive_temperature(self.temperature, batch)
        log_student_WQX = (own.score_WQX / temperature).masked_fill(~own.known_QX, NEVER).log_softmax(-1)
        divergence_WQX = torch.xlogy(target_QX, target_QX) - target_QX * log_student_WQX
        value_WQ = divergence_WQX.masked_fill(~own.known_QX, 0.0).sum(-1)
        return LossOutput(batch.mean_over_rows(value_WQ, own.known_QX.sum(-1) >= 2))


@losses.register(
    "margin_mse",
    formula="mean ( (s(q,p) - s(q,n)) - scale (T(q,p) - T(q,n)) )^2",
    source="Hofstaetter et al. 2020 (2010.02666)",
)
@dataclass(frozen=True)
class MarginMSE(Loss):
    """Reproduce the teacher's margins between positives and negatives.

        L = mean_i mean over (p, n) of ( s(q_i,p) - s(q_i,n) - scale (T(q_i,p) - T(q_i,n)) )^2

    over the positives and negatives of query i that the teacher scored.

    scale: brings the teacher's margins to the range of the student's (cosines: about 1 / the teacher's largest
        margin); above 0, 1 by default.

    Batches: retrieval, groups, with teacher scores. No scored pair: 0, connected.
    """

    batches = (RetrievalBatch, GroupBatch)

    scale: Positive = 1.0
    head: Word = "dense"

    def __call__(self, batch: Batch) -> LossOutput:
        own = ScoredList.of(batch, self.head)
        difference_WQX = own.score_WQX - self.scale * own.teacher_QX
        positive_WQP, negative_WQM = difference_WQX.tensor_split([own.positives], -1)
        square_WQPM = (positive_WQP[..., :, None] - negative_WQM[..., None, :]).square()
        known_QP, known_QM = own.known_QX.tensor_split([own.positives], -1)
        known_QPM = known_QP[:, :, None] & known_QM[:, None, :]
        value_WQ = mean_over_slots(square_WQPM.flatten(-2), known_QPM.flatten(-2))
        return LossOutput(batch.mean_over_rows(value_WQ, known_QPM.flatten(-2).any(-1)))


@losses.register(
    "m3_ranked_kd",
    formula="mean_i sum_g T_ig * -log( e^{s_ig/t} / ( sum_{h ranked at or below g} e^{s_ih/t} + in-batch ) )",
    source="M3-Embedding's `m3_kd_loss` option (FlagEmbedding code)",
)
@dataclass(frozen=True)
class M3RankedKD(Loss):
    """Each of a query's own documents against those the teacher ranks below it and the rest of the batch.

        L = mean_i sum_g T_ig ( log( sum over h with rank(h) >= rank(g) of e^{s_ih/t} + sum over others of e^{s_i/t} )
                                - s_ig / t ),   T_i = softmax(teacher_i)

    Documents are ranked by teacher score, highest first (ties by slot): the published code leaves the order to the
    data. The positive need not be first. Others are the candidates of all ranks that are neither the query's own nor
    known positives of it.

    Batches: retrieval with teacher scores. No scored document: 0, connected.
    """

    batches = (RetrievalBatch,)

    temperature: Positive = 0.02
    head: Word = "dense"
    block_size: Count | None = None

    def __call__(self, batch: Batch) -> LossOutput:
        assert isinstance(batch, RetrievalBatch)
        pair = batch.pair(self.head)
        found = Candidates.of(batch, mask_false_negatives=True, block_size=self.block_size)
        own = ScoredList.of_candidates(batch, pair, found)

        def block(start: int, score_WQB: Tensor) -> Tensor:
            mask_QB = found.allowed(start, score_WQB.shape[-1], "all")
            found.own.mark(mask_QB, start, False)
            return masked_logsumexp(score_WQB / self.temperature, mask_QB)

        blocks = in_blocks([pair], self.block_size, block)
        others_WQ = torch.stack(blocks).logsumexp(0)
        order_QX = torch.argsort(own.teacher_QX.masked_fill(~own.known_QX, NEVER), dim=-1, descending=True, stable=True)
        rank_QX = torch.argsort(order_QX, dim=-1)
        below_QXX = (rank_QX[:, None, :] >= rank_QX[:, :, None]) & own.known_QX[:, None, :]
        logit_WQX = own.score_WQX / self.temperature
        rest_WQX = masked_logsumexp(logit_WQX[..., None, :], below_QXX)
        loss_WQX = torch.logaddexp(rest_WQX, others_WQ[..., None]) - logit_WQX
        value_WQ = (loss_WQX * own.targets(1.0)).masked_fill(~own.known_QX, 0.0).sum(-1)
        return LossOutput(batch.mean_over_rows(value_WQ, own.known_QX.any(-1)))


@losses.register(
    "teacher_vectors",
    formula="mean 1 - cos(x, T)  or  mean (x - T[:d])^2, on both sides of the batch",
    source="F2LLM-v2 (mse); EmbeddingGemma (2509.20354, cosine); spec: docs/losses.md",
)
@dataclass(frozen=True)
class TeacherVectors(Loss):
    """Match a teacher's vectors, computed beforehand, text by text.

        cosine:  1 - cos(x, T)              mse:  mean over coordinates of (x - T)^2

    averaged over the texts of each side that have a teacher vector, then over the two sides. T is the teacher's
    leading coordinates, as many as the student has (a Matryoshka teacher), or, with `project`, the whole vector, to
    which a trainable linear layer lifts the student's.

    Teacher vectors stand beside the model's own in each side, as the dense head `teacher`; a row of NaN is unknown.
    They carry no gradient. At a Matryoshka width the leading coordinates of both are compared (cosines are not
    affected by length; for `mse` nothing is normalised again).

    kind: what is minimised: `cosine`, one minus it, or `mse`, the mean squared difference.
    project: whether a trainable linear layer lifts the student's vectors to the teacher's width; off by default.
    teacher_dimension: the width of the teacher's vectors, needed with `project`.
    name: the name of the lifting layer; losses with different teachers need different names.
    head: the dense head that is compared.

    Batches: retrieval, pairs. No teacher vector: 0, connected. Errors: `DataError` when the head `teacher` is missing
    or narrower than the student without `project`.
    """

    batches = (RetrievalBatch, PairBatch)

    kind: Literal["cosine", "mse"] = "cosine"
    project: bool = False
    teacher_dimension: Count | None = None
    name: Word = "teacher_projection"
    head: Word = "dense"

    def __post_init__(self) -> None:
        if self.project and self.teacher_dimension is None:
            raise RecipeError(
                "project without teacher_dimension", where=name_of(self), expected="the width of the teacher's vectors"
            )

    def reads(self) -> frozenset[str]:
        return frozenset({TEACHER})

    def extras(self, dimension: int) -> Mapping[str, nn.Module]:
        if not self.project or self.teacher_dimension is None:
            return {}
        return {self.name: nn.Linear(dimension, self.teacher_dimension, bias=False)}

    def __call__(self, batch: Batch) -> LossOutput:
        if isinstance(batch, PairBatch):
            counted = (batch.left_id_N != ABSENT, batch.right_id_N != ABSENT)
        else:  # a document that several ranks hold counts once
            assert isinstance(batch, RetrievalBatch)
            counted = (batch.query_id_Q != ABSENT, batch.first_of_its_id_K[own_rows(batch.document)])
        first, second = (self._side(batch, *one) for one in zip(batch.sides(), counted, strict=True))
        return LossOutput((first + second) / 2)

    def _side(self, batch: Batch, side: Side, counts_N: Tensor) -> Tensor:
        teacher, student = side.local.get(TEACHER), side.local[self.head]
        if not isinstance(teacher, Dense) or not isinstance(student, Dense):
            raise DataError(
                "no teacher vectors in this batch", where=batch.source or None, fix="set `teacher` for this source"
            )
        student_ND = in_fp32(student.vector_ND)
        teacher_ND = teacher.vector_ND.detach().to(student_ND.dtype)
        known_N = torch.isfinite(teacher_ND).all(-1) & to_device(counts_N, teacher_ND.device)
        teacher_ND = teacher_ND.masked_fill(~known_N[:, None], 0.0)
        widths = batch.widths or (student_ND.shape[1],)
        value_WN = torch.stack([self._distance(batch, student_ND[:, :w], teacher_ND) for w in widths])
        return batch.mean_over_rows(value_WN, known_N)

    def _distance(self, batch: Batch, student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
        width = student_ND.shape[1]
        if self.project:
            layer = batch.extras[self.name]
            assert isinstance(layer, nn.Linear)
            student_ND = F.linear(student_ND, layer.weight[:, :width].to(student_ND))
        elif teacher_ND.shape[1] < width:
            raise DataError(
                f"teacher vectors of width {teacher_ND.shape[1]} for a student of {width}",
                where=batch.source or None,
                fix="set project: true and teacher_dimension",
            )
        teacher_ND = teacher_ND[:, : student_ND.shape[1]]
        if student_ND.shape[1] != teacher_ND.shape[1]:
            raise DataError(
                f"teacher vectors of width {teacher_ND.shape[1]}",
                where=batch.source or None,
                expected=f"teacher_dimension, {self.teacher_dimension}",
            )
        if self.kind == "mse":
            return (student_ND - teacher_ND).square().mean(-1)
        return 1 - F.cosine_similarity(student_ND, teacher_ND, dim=-1, eps=1e-12)


@losses.register(
    "teacher_neighbours",
    formula="mean_i -sum_{j != i} p_ij log q_ij,  p = softmax(cos(T_i, T_j) / t),  q = softmax(s_ij / t)",
    source="Learning without forgetting (1606.09282), equation 2, on the texts of a batch in the place of classes",
)
@dataclass(frozen=True)
class TeacherNeighbours(Loss):
    """Keep whom each text is near to: the teacher's distribution over the other texts of its side.

        L = mean over sides of mean_i - sum_{j != i} p_ij log q_ij
        p_i = softmax over j != i of cos(T_i, T_j) / t,      q_i = softmax over j != i of s_ij / t

    over the distinct texts of all ranks that have a teacher vector. It is the distillation loss of Learning without
    forgetting, whose y^(1/T) / sum y^(1/T) of the outputs y = softmax(s / t_0) is softmax(s / (T t_0)): t = T t_0, with
    the paper's T = 2. Unlike `teacher_vectors` it leaves the space free to turn, and the widths of both may differ.

    Teacher vectors are those of `teacher_vectors`.

    temperature: the temperature t of both; 0.1 is twice that of a usual contrastive loss.
    head: the dense head that is compared.

    Batches: retrieval, pairs. Fewer than two texts: 0, connected. Errors: `DataError` when the head `teacher` is
    missing.
    """

    batches = (RetrievalBatch, PairBatch)

    temperature: Positive = 0.1
    head: Word = "dense"

    def reads(self) -> frozenset[str]:
        return frozenset({TEACHER})

    def __call__(self, batch: Batch) -> LossOutput:
        if isinstance(batch, PairBatch):
            ids = (batch.left_id_N, batch.right_id_N)
        else:
            assert isinstance(batch, RetrievalBatch)
            ids = (batch.query_id_Q, batch.document_id_N)
        first, second = (self._side(batch, *one) for one in zip(batch.sides(), ids, strict=True))
        return LossOutput((first + second) / 2)

    def _side(self, batch: Batch, side: Side, id_N: Tensor) -> Tensor:
        if TEACHER not in side.local:
            fix = "set `teacher` for this source"
            raise DataError("no teacher vectors in this batch", where=batch.source or None, fix=fix)
        logit_WNK = side.local[self.head].scores(side.all(self.head), batch.widths) / self.temperature
        teacher_KD = in_fp32(side.all(TEACHER).vector_ND).detach().to(logit_WNK.dtype)
        mine = own_rows(side)
        id_K, id_N = (to_device(one, logit_WNK.device) for one in (side.all_ids(id_N), id_N))
        repeated_K = (id_K[:, None] == id_K[None, :]).tril(-1).any(-1)
        known_K = torch.isfinite(teacher_KD).all(-1) & (id_K != ABSENT) & ~repeated_K
        teacher_KD = F.normalize(teacher_KD.masked_fill(~known_K[:, None], 0.0), dim=-1)
        other_NK = known_K[None, :] & (id_N[:, None] != id_K[None, :])
        target_NK = (teacher_KD[mine] @ teacher_KD.T / self.temperature).masked_fill(~other_NK, NEVER).softmax(-1)
        log_WNK = logit_WNK.masked_fill(~other_NK, NEVER).log_softmax(-1)
        value_WN = -(target_NK * log_WNK).masked_fill(~other_NK, 0.0).sum(-1)
        return batch.mean_over_rows(value_WN, known_K[mine] & other_NK.any(-1))
