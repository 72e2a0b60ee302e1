"""CoDiEmb's delta-guided hierarchical fusion. RECONSTRUCTED: the paper's formula could not be read; see below."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from embedsmith.core.errors import RecipeError
from embedsmith.core.progress import progress_bar
from embedsmith.core.registry import merge_methods
from embedsmith.merge.coefficients import normalised
from embedsmith.merge.gram import block_of
from embedsmith.merge.method import Base, Combine, Job
from embedsmith.merge.stream import Block
from embedsmith.merge.sums import RowSums

_FLOOR = 1e-3


@merge_methods.register(
    "codiemb",
    formula="w_i(x) ~ a_i (s_i/mean s)^layer ((|V_i(x)| + e) / (mean_j |V_j(x)| + e))^element, sum_i w_i = 1",
    source="CoDiEmb (2508.11442), reconstructed",
)
@dataclass(frozen=True)
class DeltaGuided:
    """Fusion guided by how far each parameter moved from its pre-trained value, in two levels. Reconstructed.

    Of the paper only this is known: weights come from each parameter's deviation from its pre-trained value, at layer
    and at parameter granularity, for checkpoints of different training trajectories. One family holds the readings:

        s_i = ( mean_{x in layer} |V_i(x)|^power )^(1/power),   S = mean_i s_i,   e = 1e-3 S
        w_i(x) proportional to a_i f(s_i) ((|V_i(x)| + e) / (mean_j |V_j(x)| + e))^element,   sum_i w_i(x) = 1
        theta_m(x) = theta_0(x) + scale * sum_i w_i(x) V_i(x)

    with f(s) = (s/S)^layer, or exp(s / (temperature S)) with `weighting: softmax`. layer = element = 0 is the soup, 1
    and 0 the layer level, 0 and 1 the parameter level, 1 and 1 hierarchical; a negative exponent trusts what moved
    least. unit: what a layer is, `tensor` or `block`. Checkpoints that name a trajectory are merged with each other
    first, then the results with the deviations measured anew. A merged norm above the soup's comes with element > 0.
    """

    base: ClassVar[Base] = "needed"
    by_rows: ClassVar[bool] = False

    layer: float = 1.0
    element: float = 1.0
    power: Literal[1, 2] = 2
    weighting: Literal["power", "softmax"] = "power"
    temperature: float = 1.0
    unit: Literal["tensor", "block"] = "tensor"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise RecipeError(f"temperature is {self.temperature}", expected="a number above 0")

    def prepare(self, job: Job) -> Combine:
        runs = trajectories(job)
        first = [_Level(self, job.weight_M[places], self._moved(job, _rows(places))) for places in runs]

        def merged_runs(block: Block) -> Tensor:
            parts = [level(_rows(places)(block), block.name) for level, places in zip(first, runs, strict=True)]
            return torch.stack(parts)

        weight_T = torch.stack([job.weight_M[places].mean() for places in runs])
        second = _Level(self, weight_T, self._moved(job, merged_runs))
        last, rows = (first[0], _rows(runs[0])) if len(runs) == 1 else (second, merged_runs)
        job.report["effective_parents"] = last.effective()

        def combine(block: Block) -> Tensor:
            assert block.base_E is not None
            return last(rows(block), block.name).mul_(self.scale).add_(block.base_E.double())

        return combine

    def _moved(self, job: Job, vectors: Vectors) -> dict[str, Tensor]:
        """s [K] of every tensor: the power mean of |V| over its unit, in one pass."""
        sums = RowSums()
        sizes: dict[str, int] = defaultdict(int)
        with progress_bar("measuring deviations", sum(job.size(name) for name in job.names)) as bar:
            for block in job.blocks():
                key = self._unit(block.name)
                sums.add(key, vectors(block).abs_().pow_(self.power))
                sizes[key] += block.stop - block.start
                bar.advance(block.stop - block.start)
        moved = {
            key: (torch.tensor(sums[key], dtype=torch.float64) / size) ** (1 / self.power)
            for key, size in sizes.items()
        }
        return {name: moved[self._unit(name)] for name in job.names}

    def _unit(self, name: str) -> str:
        return name if self.unit == "tensor" else block_of(name)


Vectors = Callable[[Block], Tensor]
"""A block to task vectors [K, E]."""


def _rows(places: Sequence[int]) -> Vectors:
    return lambda block: block.delta_ME[list(places)]


@dataclass(frozen=True)
class _Level:
    """One level of the fusion. weight_K: a; moved: s [K] by tensor name."""

    how: DeltaGuided
    weight_K: Tensor
    moved: Mapping[str, Tensor]

    def __call__(self, vector_KE: Tensor, name: str) -> Tensor:
        """sum_i w_i V_i [E]."""
        if len(vector_KE) == 1:
            return vector_KE[0]
        share_K, moved_K = self.share(name), self.moved[name]
        if self.how.element == 0 or not moved_K.any():
            return share_K @ vector_KE
        size_KE = vector_KE.abs().add_(_FLOOR * moved_K.mean())
        weight_KE = (size_KE / size_KE.mean(0)).pow_(self.how.element).mul_(share_K[:, None])
        total_E = weight_KE.sum(0)
        return weight_KE.mul_(vector_KE).sum(0).div_(total_E)

    def share(self, name: str) -> Tensor:
        """a_i f(s_i), normalised; a_i alone where nothing moved."""
        moved_K = self.moved[name]
        relative_K = moved_K / moved_K.mean() if moved_K.any() else torch.ones_like(moved_K)
        if self.how.weighting == "softmax":
            factor_K = torch.softmax(relative_K / self.how.temperature, 0)
        else:
            factor_K = relative_K.clamp_min(0.0 if self.how.layer >= 0 else _FLOOR) ** self.how.layer
        return normalised(self.weight_K * factor_K)

    def effective(self) -> dict[str, float]:
        """exp of the entropy of the layer's weights: how many parents count, by tensor."""
        found = {}
        for name in self.moved:
            share_K = self.share(name)
            found[name] = float(torch.exp(-torch.xlogy(share_K, share_K).sum()))
        return found


def trajectories(job: Job) -> list[list[int]]:
    """Places of the parents by trajectory; a parent without one stands alone."""
    found: dict[Any, list[int]] = {}
    for place, parent in enumerate(job.parents):
        found.setdefault(parent.trajectory if parent.trajectory is not None else place, []).append(place)
    return list(found.values())
