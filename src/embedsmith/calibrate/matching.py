"""Parent matching: place the merge so that on each parent's own texts it sees what that parent saw. Without labels.

    min over (a, lambda):  mean over parents of  mean over pairs (x, y) of parent i's texts of
                           ( cos_merged(x, y) - cos_i(x, y) )^2                    or of 1 - CKA(merged, parent i)

The same descent as Self-Positioning with another loss; our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embedsmith.calibrate.live import ROLES, LiveMerge, texts_of
from embedsmith.calibrate.positioning import Drawn, PositioningConfig, ProbeBatches
from embedsmith.core.batch import Batch, Loss, LossOutput, PairBatch, PairIds
from embedsmith.core.encoder import Role
from embedsmith.core.reps import TEACHER, Dense, Representation, in_fp32
from embedsmith.core.tokens import TokenBatch
from embedsmith.data import RecordSet
from embedsmith.train.build import derive_memory
from embedsmith.train.config import TrainConfig
from embedsmith.train.feed import Supply
from embedsmith.train.step import Part

Objective = Literal["similarity", "cka"]


@dataclass(frozen=True)
class MatchTeacher(Loss):
    """How far the texts' similarities are from the teacher's, over all pairs of the batch's texts.

    `similarity`: mean (cos - cos_teacher)^2. `cka`: 1 - linear CKA, blind to rotation and scale.
    """

    batches = (PairBatch,)

    objective: Objective = "similarity"

    def __call__(self, batch: Batch) -> LossOutput:
        own_ND, teacher_ND = (self._vectors(batch, head) for head in ("dense", TEACHER))
        if self.objective == "cka":
            return LossOutput((1 - linear_cka(own_ND, teacher_ND))[None])
        own_NN, teacher_NN = (F.normalize(vector, dim=-1) for vector in (own_ND, teacher_ND))
        return LossOutput((own_NN @ own_NN.T - teacher_NN @ teacher_NN.T).square().mean()[None])

    def _vectors(self, batch: Batch, head: str) -> Tensor:
        parts: list[Representation] = [side.local[head] for side in batch.sides()]
        return torch.cat([in_fp32(part.tensors()[0]) for part in parts])


def linear_cka(left_ND: Tensor, right_ND: Tensor) -> Tensor:
    """|Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F) of centred rows, in [0, 1]: how alike two sets of vectors of the same texts
    are, whatever their rotation and scale (Kornblith et al. 2019). 0 where one of them is constant."""
    left_ND, right_ND = (vector - vector.mean(0) for vector in (left_ND, right_ND))
    cross = (right_ND.T @ left_ND).square().sum()
    scale = (left_ND.T @ left_ND).norm() * (right_ND.T @ right_ND).norm()
    alike: Tensor = cross / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    return alike


@dataclass(frozen=True)
class MatchBatches(ProbeBatches):
    """Batches of each parent's texts, with the vectors that parent gives them."""

    tokens: Sequence[Sequence[tuple[str, Role]]] = ()
    teachers: Sequence[Tensor] = ()
    loss_of: Loss = MatchTeacher()

    @staticmethod
    def match(
        live: LiveMerge, sets: Sequence[RecordSet], config: PositioningConfig, objective: Objective
    ) -> MatchBatches:
        """Texts of every parent's sample, encoded once by the parent, split like a probe."""
        texts = [texts_of(records) for records in sets]
        teachers = []
        for parent, (own, records) in enumerate(zip(texts, sets, strict=True)):
            live.place_parent(parent)
            teachers.append(_vectors_of(live, own, records.task))
        splits = [_halves(len(own), config) for own in texts]
        return MatchBatches(
            live=live,
            supplies=[Supply(records, MatchTeacher(objective), config.batch_size, 1.0, 1, 0) for records in sets],
            train=[part for part, _ in splits],
            held_out=[part for _, part in splits],
            extras={},
            memory=derive_memory(TrainConfig(), live.model.device),
            seed=config.seed,
            tokens=texts,
            teachers=teachers,
            loss_of=MatchTeacher(objective),
            size=config.batch_size,
        )

    def _part(self, task: int, rows: Sequence[int], visit: int, shares: int = 1) -> Drawn:
        """The batch's texts in two sides (queries and documents have prompts of their own)."""
        own, records = self.tokens[task], self.supplies[task].records
        by_role = {role: [row for row in rows if own[row][1] == role] for role in ROLES}
        model = self.live.model
        first, second = (model.tokenize([own[row][0] for row in by_role[role]], role, records.task) for role in ROLES)
        vectors = [Dense(self.teachers[task][by_role[role]]) for role in ROLES]
        sizes = [torch.zeros(len(side), dtype=torch.int64) for side in (first, second)]
        return TokenBatch.concatenate([first, second]), Part(
            source=records.name,
            task=records.task,
            ids=PairIds(left_id_N=sizes[0], right_id_N=sizes[1], label_N=torch.zeros(0)),
            loss=self.loss_of,
            weight=1 / (len(self.supplies) * shares),
            teacher=(vectors[0], vectors[1]),
        )


def _vectors_of(live: LiveMerge, texts: Sequence[tuple[str, Role]], task: str) -> Tensor:
    """vector_ND of every text under its role, in order."""
    vector_ND: Tensor | None = None
    for role in ROLES:
        rows = [row for row, (_, own) in enumerate(texts) if own == role]
        if rows:
            part_ND = live.represent([texts[row][0] for row in rows], role=role, task=task)["dense"].tensors()[0]
            vector_ND = part_ND.new_zeros(len(texts), part_ND.shape[1]) if vector_ND is None else vector_ND
            vector_ND[rows] = part_ND
    assert vector_ND is not None, "a sample has texts"
    return vector_ND


def _halves(count: int, config: PositioningConfig) -> tuple[list[int], list[int]]:
    order = np.random.default_rng(config.seed).permutation(count).tolist()
    held_out = max(round(config.held_out * count), 2)
    return order[held_out:], order[:held_out]
