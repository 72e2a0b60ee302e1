"""A query's own documents as a list that is put into order: what the losses of rerankers and of their teachers read. An
embedder scores it by its vectors, a reranker pair by pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from embedsmith.core.batch import ABSENT, Batch, GroupBatch, Pair, RetrievalBatch
from embedsmith.core.reps import in_fp32
from embedsmith.core.transfer import to_device
from embedsmith.losses.candidates import NEVER, Candidates

OF_COSINES, OF_LOGITS = 0.02, 1.0
"""The temperature of scores where none is given: an embedder's are cosines, a reranker's are logits."""


def derive_temperature(asked: float | None, batch: Batch) -> float:
    usual = OF_LOGITS if isinstance(batch, GroupBatch) else OF_COSINES
    return usual if asked is None else asked


@dataclass(frozen=True)
class ScoredList:
    """A query's own documents, the `positives` first, with their grades and the scores of student and teacher.
    `there_QX` marks slots that hold a document, `known_QX` those among them that the teacher scored."""

    score_WQX: Tensor
    grade_QX: Tensor
    teacher_QX: Tensor
    there_QX: Tensor
    known_QX: Tensor
    positives: int

    @staticmethod
    def of(batch: Batch, head: str) -> ScoredList:
        if isinstance(batch, GroupBatch):
            score_WQX, there_QX = in_fp32(batch.scores()), batch.pair_QX != ABSENT
            return _listed(score_WQX, batch.grade_QX, batch.teacher_QX, there_QX, batch.positives)
        assert isinstance(batch, RetrievalBatch)
        pair = batch.pair(head)
        return ScoredList.of_candidates(batch, pair, Candidates.of(batch, mask_false_negatives=False))

    @staticmethod
    def of_candidates(batch: RetrievalBatch, pair: Pair, found: Candidates) -> ScoredList:
        rows = (found.positive_row_QP, found.negative_row_QM)
        row_QX, score_WQX = torch.cat(rows, 1), torch.cat([found.scores_of(pair, one) for one in rows], -1)
        sides = ((batch.positive_score_QP, found.positive_row_QP), (batch.negative_score_QM, found.negative_row_QM))
        grade_QX = torch.cat([torch.ones_like(sides[0][1]), torch.zeros_like(sides[1][1])], 1)
        teacher_QX = torch.cat([_teacher_slots(*side) for side in sides], 1)
        return _listed(score_WQX, grade_QX, teacher_QX, row_QX != ABSENT, found.positive_row_QP.shape[1])

    def targets(self, temperature: float) -> Tensor:
        """p_QX = softmax of the teacher's scores over the known slots; 0 elsewhere."""
        logit_QX = (self.teacher_QX / temperature).masked_fill(~self.known_QX, NEVER)
        return logit_QX.softmax(-1).masked_fill(~self.known_QX, 0.0)


def _listed(score_WQX: Tensor, grade_QX: Tensor, teacher_QX: Tensor, there_QX: Tensor, positives: int) -> ScoredList:
    device = score_WQX.device
    teacher_QX, grade_QX, there_QX = (to_device(one, device) for one in (teacher_QX, grade_QX, there_QX))
    teacher_QX, grade_QX = teacher_QX.to(score_WQX.dtype), grade_QX.to(score_WQX.dtype)
    known_QX = there_QX & torch.isfinite(teacher_QX)
    teacher_QX, grade_QX = teacher_QX.masked_fill(~known_QX, 0.0), grade_QX.masked_fill(~there_QX, 0.0)
    return ScoredList(score_WQX, grade_QX, teacher_QX, there_QX, known_QX, positives)


def _teacher_slots(score_QX: Tensor | None, row_QX: Tensor) -> Tensor:
    """Teacher scores as wide as the row slots; NaN where there is none."""
    if score_QX is None:
        return torch.full(row_QX.shape, float("nan"))
    return F.pad(score_QX, (0, row_QX.shape[1] - score_QX.shape[1]), value=float("nan"))
