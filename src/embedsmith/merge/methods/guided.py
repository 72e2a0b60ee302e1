"""CoDiEmb's delta-guided hierarchical fusion. RECONSTRUCTED: the paper's formula could not be read; see below."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from embedsmith.core.progress import progress_bar
from embedsmith.core.settings import Finite, Positive
from embedsmith.core.shelf import merge_methods
from embedsmith.merge.method import Combine, Job, Method, block_of
from embedsmith.merge.methods.formulas import normalised, not_negative
from embedsmith.merge.tensor_blocks import Block, RowSums

_FLOOR = 1e-3
Vectors = Callable[[Block], Tensor]
"""A block to task vectors [K, E]."""
WeightOf = Callable[[str], Tensor]
"""A tensor's name to the weights [K] of what is merged."""


@merge_methods.register(
    "codiemb",
    formula="w_i(x) ~ a_i (s_i/mean s)^layer ((|V_i(x)| + e) / (mean_j |V_j(x)| + e))^element, sum_i w_i = 1",
    source="CoDiEmb (2508.11442), reconstructed",
)
@dataclass(frozen=True)
class DeltaGuided(Method):
    """Fusion guided by how far each parameter moved from its pre-trained value, in two levels. Reconstructed.

    Of the paper only this is known: weights come from each parameter's deviation from its pre-trained value, at layer
    and at parameter granularity, for checkpoints of different training trajectories. One family holds the readings:

        s_i = ( mean_{x in layer} |V_i(x)|^power )^(1/power),   S = mean_i s_i,   e = 1e-3 S
        w_i(x) proportional to a_i f(s_i) ((|V_i(x)| + e) / (mean_j |V_j(x)| + e))^element,   sum_i w_i(x) = 1
        theta_m(x) = theta_0(x) + scale * sum_i w_i(x) V_i(x)

    with f(s) = (s/S)^layer, or exp(s / (temperature S)). layer = element = 0 is the soup, 1 and 0 the layer level, 0
    and 1 the parameter level, 1 and 1 hierarchical; a negative exponent trusts what moved least. Checkpoints that name
    a trajectory are merged with each other first, then the results with the deviations measured anew. A merged norm
    above the soup's comes with element > 0.

    `layer`: exponent of the layer's deviation. `element`: exponent of the parameter's own. `power`: of the mean that
    is a layer's deviation. `weighting`: the function f, by `power` or `softmax`. `temperature`: of the softmax.
    `unit`: what a layer is, `tensor`, `block`, or `row` of a matrix (a vector is one row).
    `scale`: factor of the merged task vector.
    """

    layer: Finite = 1.0
    element: Finite = 1.0
    power: Literal[1, 2] = 2
    weighting: Literal["power", "softmax"] = "power"
    temperature: Positive = 1.0
    unit: Literal["tensor", "block", "row"] = "tensor"
    scale: Finite = 1.0

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        return self.unit == "row"

    def prepare(self, job: Job) -> Combine:
        runs: dict[Any, list[int]] = {}  # places of the parents by trajectory; a parent without one stands alone
        for place, parent in enumerate(job.parents):
            runs.setdefault(place if parent.trajectory is None else parent.trajectory, []).append(place)

        def of_run(places: list[int]) -> Vectors:
            return lambda block: block.delta_ME[places]

        def weights_of(places: list[int]) -> WeightOf:
            return lambda name: not_negative(job.weight_of(name))[places]

        within = [
            _Level(self, of_run(places), weights_of(places), self._moved(job, of_run(places)))
            for places in runs.values()
        ]
        last = within[0]
        if len(within) > 1:

            def merged_runs(block: Block) -> Tensor:
                return torch.stack([level(block) for level in within])

            def weight_of_runs(name: str) -> Tensor:
                weight_M = not_negative(job.weight_of(name))
                return torch.stack([weight_M[places].mean() for places in runs.values()])

            last = _Level(self, merged_runs, weight_of_runs, self._moved(job, merged_runs))
        job.report["effective_parents"] = {} if self.by_rows else last.effective()

        def combine(block: Block) -> Tensor:
            assert block.base_E is not None
            return last(block).mul_(self.scale).add_(block.base_E.double())

        return combine

    def _moved(self, job: Job, vectors: Vectors) -> dict[str, Tensor]:
        """s [K] of every tensor: the power mean of |V| over its unit, in one pass; for rows a block says it."""
        if self.by_rows:
            return {}
        sums, unit_of = RowSums(), {name: name if self.unit == "tensor" else block_of(name) for name in job.names}
        sizes: dict[str, int] = defaultdict(int)
        with progress_bar("measuring deviations", sum(job.size(name) for name in job.names)) as bar:
            for block in job.blocks():
                sums.add(unit_of[block.name], vectors(block).abs_().pow_(self.power))
                sizes[unit_of[block.name]] += block.stop - block.start
                bar.advance(block.stop - block.start)
        moved = {
            key: (torch.tensor(sums[key], dtype=torch.float64) / size) ** (1 / self.power)
            for key, size in sizes.items()
        }
        return {name: moved[unit_of[name]] for name in job.names}


@dataclass(frozen=True)
class _Level:
    """One level of the fusion. `vectors`: what is merged; `weight_of`: a [K] and `moved`: s [K] by tensor name."""

    how: DeltaGuided
    vectors: Vectors
    weight_of: WeightOf
    moved: Mapping[str, Tensor]

    def __call__(self, block: Block) -> Tensor:
        """sum_i w_i V_i [E]."""
        vector_KE = self.vectors(block)
        if len(vector_KE) == 1:
            return vector_KE[0]
        width = len(vector_KE[0]) if not self.how.by_rows else block.shape[-1] if block.shape else 1
        vector_KRW = vector_KE.view(len(vector_KE), -1, width)
        if self.how.by_rows:
            moved_KR = vector_KRW.abs().pow(self.how.power).mean(-1) ** (1 / self.how.power)
        else:
            moved_KR = self.moved[block.name][:, None]
        share_KR = self.share(moved_KR, block.name)
        if self.how.element == 0 or not moved_KR.any():
            return (share_KR[..., None] * vector_KRW).sum(0).flatten()
        floor_R1 = (_FLOOR * moved_KR.mean(0)).clamp_min(torch.finfo(moved_KR.dtype).tiny)[:, None]
        size_KRW = vector_KRW.abs().add_(floor_R1)
        weight_KRW = (size_KRW / size_KRW.mean(0)).pow_(self.how.element).mul_(share_KR[..., None])
        return (weight_KRW * vector_KRW).sum(0).div_(weight_KRW.sum(0)).flatten()

    def share(self, moved_KR: Tensor, name: str) -> Tensor:
        """a_i f(s_i) of every unit of a tensor, normalised; a_i alone where nothing moved."""
        weight_K = normalised(self.weight_of(name))  # refuses weights that sum to nothing
        mean_R = moved_KR.mean(0)
        relative_KR = torch.where(mean_R > 0, moved_KR / torch.where(mean_R > 0, mean_R, 1.0), 1.0)
        if self.how.weighting == "softmax":
            factor_KR = torch.softmax(relative_KR / self.how.temperature, 0)
        else:
            factor_KR = relative_KR.clamp_min(0.0 if self.how.layer >= 0 else _FLOOR) ** self.how.layer
        share_KR = weight_K[:, None] * factor_KR
        return share_KR / share_KR.sum(0)

    def effective(self) -> dict[str, float]:
        """exp of the entropy of the layer's weights: how many parents count, by tensor."""
        shares = {name: self.share(moved_K[:, None], name)[:, 0] for name, moved_K in self.moved.items()}
        return {name: float(torch.exp(-torch.xlogy(share_K, share_K).sum())) for name, share_K in shares.items()}
