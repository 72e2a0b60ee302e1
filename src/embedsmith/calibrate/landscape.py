"""How losses look around a merge: along its length, between a parent and the merge; and whether the tasks' gradients
oppose each other. Every point is one rebuild in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embedsmith.calibrate.explain import cosines
from embedsmith.calibrate.task_batches import TaskBatches
from embedsmith.core.progress import progress_bar
from embedsmith.merge.methods.formulas import sequential_slerp

LENGTHS = tuple(round(0.2 * step, 1) for step in range(9))


@dataclass(frozen=True)
class Landscape:
    """What a probe shows: losses along the length, barriers, cosines of the tasks' gradients by place."""

    along: list[dict[str, Any]]
    barriers: list[dict[str, Any]]
    gradients: dict[str, list[list[float]]]
    tasks: tuple[str, ...]

    @staticmethod
    def around_slerp(batches: TaskBatches, weight_M: Tensor) -> Landscape:
        """Around the SLERP of the parents."""
        live = batches.live
        slerp_M = sequential_slerp(live.gram().sum(0), weight_M, on_antipodal="linear")
        own_GM = slerp_M.expand(len(live.group_names), -1)
        places = {"base": 0 * own_GM, "slerp": own_GM}
        gradients = {name: gradient_cosines(batches, place_GM) for name, place_GM in places.items()}
        return Landscape(along_length(batches, own_GM, LENGTHS), barriers(batches, own_GM), gradients, batches.tasks)


def along_length(batches: TaskBatches, coefficient_GM: Tensor, lengths: Sequence[float]) -> list[dict[str, Any]]:
    """Losses at lambda times the merge."""
    rows = []
    with progress_bar("losses along the length", len(lengths)) as bar:
        for length in lengths:
            losses = batches.losses_at(length * coefficient_GM)
            rows.append({"length": length, **dict(zip(batches.tasks, losses, strict=True))})
            bar.advance()
    return rows


def barriers(batches: TaskBatches, coefficient_GM: Tensor, points: int = 7) -> list[dict[str, Any]]:
    """Losses on the segment from each parent to the merge; `barrier`: the most that a task's loss rises above the
    straight line between its ends."""
    live = batches.live
    rows = []
    for place, name in enumerate(live.names):
        start_GM = torch.eye(live.parents, dtype=torch.float64)[place].expand_as(coefficient_GM)
        shares = torch.linspace(0, 1, points, dtype=torch.float64)
        losses_PT = torch.tensor([batches.losses_at((1 - s) * start_GM + s * coefficient_GM) for s in shares])
        line_PT = (1 - shares[:, None]) * losses_PT[0] + shares[:, None] * losses_PT[-1]
        rise = (losses_PT - line_PT).amax(0).tolist()
        rows += [{"parent": name, "task": task, "barrier": r} for task, r in zip(batches.tasks, rise, strict=True)]
    return rows


def gradient_cosines(batches: TaskBatches, coefficient_GM: Tensor) -> list[list[float]]:
    """cos(grad L_i, grad L_j) [T, T] at a merge, on one batch of each task: below 0 where tasks pull apart."""
    live = batches.live
    live.place(coefficient_GM)
    gradients = []
    for part in batches.at(0):
        live.model.zero_grad(set_to_none=True)
        batches.backward([part])
        flat = [p.grad.flatten().double() for p in live.model.parameters() if p.grad is not None]
        gradients.append(torch.cat(flat))
    live.model.zero_grad(set_to_none=True)
    stacked = torch.stack(gradients)
    rows: list[list[float]] = cosines(stacked @ stacked.T).tolist()
    return rows
