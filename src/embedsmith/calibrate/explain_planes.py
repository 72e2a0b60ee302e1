"""How losses look around a merge: along the length, over a plane, between a parent and the merge; and whether the
tasks' gradients oppose each other. Every point is one rebuild in place."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embedsmith.calibrate.explain import cosines
from embedsmith.calibrate.live import LiveMerge
from embedsmith.calibrate.positioning import ProbeBatches
from embedsmith.core.batch import Progress
from embedsmith.core.progress import progress_bar
from embedsmith.data import RecordSet, Source
from embedsmith.train.step import run_step


@dataclass(frozen=True)
class Probes:
    """The losses of each task on a fixed batch of examples."""

    live: LiveMerge
    batches: ProbeBatches

    @staticmethod
    def of(live: LiveMerge, sources: Sequence[Source], sets: Sequence[RecordSet], batch_size: int = 32) -> Probes:
        return Probes(live, ProbeBatches.whole(live, sources, sets, batch_size, 0))

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(supply.records.name for supply in self.batches.supplies)

    def losses(self, coefficient_GM: Tensor) -> list[float]:
        """Mean loss of every task at theta_0 + sum_i c_i V_i."""
        self.live.place(coefficient_GM)
        count = len(self.batches.supplies)
        return [count * sum(self.batches.loss(part) for part in parts) for parts in self.batches.held_out_parts()]


def along_length(probes: Probes, coefficient_GM: Tensor, lengths: Sequence[float]) -> list[dict[str, Any]]:
    """Losses at lambda times the merge."""
    rows = []
    with progress_bar("losses along the length", len(lengths)) as bar:
        for length in lengths:
            losses = probes.losses(length * coefficient_GM)
            rows.append({"length": length, **dict(zip(probes.tasks, losses, strict=True))})
            bar.advance()
    return rows


def barriers(probes: Probes, coefficient_GM: Tensor, points: int = 7) -> list[dict[str, Any]]:
    """Losses on the segment from each parent to the merge; `barrier`: the most that a task's loss rises above the
    straight line between its ends."""
    live = probes.live
    rows = []
    for place, name in enumerate(live.names):
        start_GM = torch.eye(live.parents, dtype=torch.float64)[place].expand_as(coefficient_GM)
        shares = torch.linspace(0, 1, points, dtype=torch.float64)
        losses_PT = torch.tensor([probes.losses((1 - s) * start_GM + s * coefficient_GM) for s in shares])
        line_PT = (1 - shares[:, None]) * losses_PT[0] + shares[:, None] * losses_PT[-1]
        rise = (losses_PT - line_PT).amax(0).tolist()
        rows += [{"parent": name, "task": task, "barrier": r} for task, r in zip(probes.tasks, rise, strict=True)]
    return rows


@dataclass(frozen=True)
class Plane:
    """The plane through theta_0 and two parents: u along V_1, v the rest of V_2, both in units of |V_1|.

    `losses` [T][V][U] over `u` and `v`. `marks`: where base, parents and merges lie; those outside the plane at their
    projection.
    """

    u: list[float]
    v: list[float]
    tasks: tuple[str, ...]
    losses: list[list[list[float]]]
    marks: dict[str, tuple[float, float]]


def loss_plane(
    probes: Probes, first: int, second: int, marks: dict[str, Tensor], steps: int = 11, margin: float = 0.4
) -> Plane:
    """Each task's loss on a grid over the plane of two parents. `marks`: coefficients [M] of merges to show.

    Parallel parents span no plane; its second axis is then of length 0 and the losses do not change along it.
    """
    live = probes.live
    gram_MM = live.gram().sum(0)
    axis_M2 = plane_axes(gram_MM, first, second)
    eye = torch.eye(live.parents, dtype=torch.float64)
    named = {"base": 0 * eye[0], live.names[first]: eye[first], live.names[second]: eye[second], **marks}
    places = {name: project(coefficient_M, axis_M2, gram_MM) for name, coefficient_M in named.items()}
    u, v = (_ticks([place[axis] for place in places.values()], steps, margin) for axis in (0, 1))
    losses = [[[0.0] * len(u) for _ in v] for _ in probes.tasks]
    with progress_bar("losses over the plane", len(u) * len(v)) as bar:
        for (row, y), (column, x) in itertools.product(enumerate(v), enumerate(u)):
            for task, loss in enumerate(probes.losses(x * axis_M2[:, 0] + y * axis_M2[:, 1])):
                losses[task][row][column] = loss
            bar.advance()
    return Plane(u, v, probes.tasks, losses, places)


def plane_axes(gram_MM: Tensor, first: int, second: int) -> Tensor:
    """axis_M2: coefficients of two orthogonal vectors of length |V_1|."""
    eye = torch.eye(len(gram_MM), dtype=torch.float64)
    length = gram_MM[first, first].clamp_min(1e-300)
    rest_M = eye[second] - gram_MM[first, second] / length * eye[first]
    size = (rest_M @ gram_MM @ rest_M).clamp_min(0)
    scale = (length / size).sqrt() if float(size) > 1e-12 * float(gram_MM[second, second]) else torch.zeros(())
    return torch.stack([eye[first], scale * rest_M], -1)


def project(coefficient_M: Tensor, axis_M2: Tensor, gram_MM: Tensor) -> tuple[float, float]:
    """Coordinates of sum_i c_i V_i in the plane, in units of the axes."""
    square_2 = (axis_M2 * (gram_MM @ axis_M2)).sum(0).clamp_min(1e-300)
    x, y = ((coefficient_M @ gram_MM @ axis_M2) / square_2).tolist()
    return x, y


def _ticks(values: Sequence[float], steps: int, margin: float) -> list[float]:
    low, high = min(values) - margin, max(values) + margin
    return torch.linspace(low, high, steps, dtype=torch.float64).tolist()


def gradient_conflict(probes: Probes, coefficient_GM: Tensor) -> list[list[float]]:
    """cos(grad L_i, grad L_j) [T, T] at a merge, on one batch of each task: below 0 where tasks pull apart."""
    live = probes.live
    live.place(coefficient_GM)
    gradients = []
    for tokens, part in probes.batches.at(0):
        live.model.zero_grad(set_to_none=True)
        run_step(live.encode, tokens, [part], probes.batches.memory, probes.batches.extras, Progress())
        flat = [p.grad.flatten().double() for p in live.model.parameters() if p.grad is not None]
        gradients.append(torch.cat(flat))
    live.model.zero_grad(set_to_none=True)
    stacked = torch.stack(gradients)
    rows: list[list[float]] = cosines(stacked @ stacked.T).tolist()
    return rows
