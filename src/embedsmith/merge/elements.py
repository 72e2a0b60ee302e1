"""Element methods: TIES, DARE, DELLA, Breadcrumbs, SCE and MagMax, on task vectors, streamed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from embedsmith.core.errors import RecipeError
from embedsmith.core.registry import merge_methods
from embedsmith.merge.coefficients import normalised, norms
from embedsmith.merge.draw import uniform
from embedsmith.merge.method import Base, Combine, Job
from embedsmith.merge.select import group_thresholds, keep_count
from embedsmith.merge.stream import UNIT, Block
from embedsmith.merge.sums import RowSums
from embedsmith.merge.thinning import Aggregate, Election, How, Rescale, Thin, combine_thinned

Then = Literal["linear", "ties"]


def check_share(name: str, value: float, low: float = 0.0) -> None:
    """Errors: `RecipeError` for a fraction outside (low, 1]."""
    if not low < value <= 1:
        raise RecipeError(f"{name} is {value}", expected=f"above {low:g}, at most 1")


@merge_methods.register(
    "ties",
    formula="trim V_i; elect sign of sum_i w_i V'_i; mean of the V'_i that agree",
    source="TIES (Yadav et al. 2023, 2306.01708); rescale: 2410.15035, reconstructed",
)
@dataclass(frozen=True)
class Ties:
    """Trim small entries, elect a sign for every element, average the entries that agree with it.

    density: the fraction of the largest |V_i| that is kept, of the whole group: `granularity: model` trims over the
    whole model (the paper), `tensor` each tensor for itself (mergekit). threshold: keep |V_i| >= threshold instead.
    rescale: `norm` stretches the result to the mean norm of the task vectors, `trimmed_norm` to that of the trimmed
    ones; the paper 2410.15035 prints an average without saying of which, so both are reconstructed. `l1` gives every
    trimmed vector its tensor's former L1 norm back first (mergekit). prenorm: task vectors take part with equal norms.
    Entries of 0 neither vote nor count; where votes cancel, the majority sign of the group decides.
    """

    base: ClassVar[Base] = "needed"
    by_rows: ClassVar[bool] = False

    density: float = 0.2
    threshold: float | None = None
    scale: float = 1.0
    election: Election = "mass"
    aggregate: Aggregate = "mean"
    rescale: Literal["none", "norm", "trimmed_norm", "l1"] = "none"
    prenorm: bool = False

    def __post_init__(self) -> None:
        check_share("density", self.density)
        if self.threshold is not None and self.threshold < 0:
            raise RecipeError(f"threshold is {self.threshold}", expected="at least 0")

    def prepare(self, job: Job) -> Combine:
        thin = _equal_norms(job, self._trim(job)) if self.prenorm else self._trim(job)
        rescale: Rescale = "none" if self.rescale == "l1" else self.rescale
        thin = with_l1(job, thin) if self.rescale == "l1" else thin
        return combine_thinned(job, thin, How(self.scale, self.election, self.aggregate, rescale))

    def _trim(self, job: Job) -> Thin:
        if self.threshold is not None:
            least = torch.full((len(job.parents), 1), self.threshold)
            return _at_least(dict.fromkeys(job.names, least))
        found = group_thresholds(job, lambda total: [keep_count(self.density, total)])
        return _at_least({name: found[key] for key, names in job.groups.items() for name in names})


def _at_least(least: dict[str, Tensor]) -> Thin:
    def thin(block: Block) -> Tensor:
        delta_ME = block.delta_ME
        return torch.where(delta_ME.abs().float() >= least[block.name], delta_ME, 0.0)

    return thin


def _equal_norms(job: Job, thin: Thin) -> Thin:
    """Every vector times mean norm / its norm, so that signs are elected among equals."""
    factor: dict[str, Tensor] = {}
    for names in job.groups.values():
        length_M = norms(job.gram.of(names))
        stretch_M = torch.where(length_M > 0, length_M.mean() / length_M, 1.0)
        factor |= dict.fromkeys(names, stretch_M[:, None])
    return lambda block: thin(block) * factor[block.name]


def with_l1(job: Job, thin: Thin, by_rows: bool = False) -> Thin:
    """Every thinned tensor stretched to the L1 norm it had before (what mergekit calls rescaling)."""
    sums = RowSums()
    for block in job.blocks(by_rows=by_rows):
        both = torch.cat([block.delta_ME, thin(block)]).abs_()
        sums.add(block.name, both, (block.shape[-1] if block.shape else 1) if by_rows else UNIT)
    factor = {}
    for name in job.names:
        before_M, after_M = torch.tensor(sums[name], dtype=torch.float64).chunk(2)
        factor[name] = torch.where(after_M > 0, before_M / after_M, 1.0)[:, None]
    return lambda block: thin(block) * factor[block.name]


@dataclass(frozen=True)
class _Drops:
    """What the methods that drop entries share."""

    base: ClassVar[Base] = "needed"
    by_rows: ClassVar[bool] = False

    density: float = 0.5
    scale: float = 1.0
    then: Then = "linear"

    def how(self) -> How:
        return How(self.scale, None if self.then == "linear" else "mass")


@merge_methods.register(
    "dare", formula="V'_i = V_i m_i / density, m_i ~ Bernoulli(density)", source="DARE (Yu et al. 2024, 2311.03099)"
)
@dataclass(frozen=True)
class Dare(_Drops):
    """Drop entries at random and enlarge the rest, then the weighted mean (`then: linear`) or TIES' election (`ties`).

    density: the chance to be kept; embedders carry everything in small differences, so start at 0.5 or more. rescale:
    `inverse` divides by the density (the paper; the mean is kept), `l1` restores the tensor's L1 norm (mergekit),
    `none`. The draw belongs to seed, tensor, element and parent, whatever the block size or order.
    """

    rescale: Literal["inverse", "l1", "none"] = "inverse"

    def __post_init__(self) -> None:
        check_share("density", self.density)

    def prepare(self, job: Job) -> Combine:
        factor = 1 / self.density if self.rescale == "inverse" else 1.0

        def thin(block: Block) -> Tensor:
            kept_ME = drawn(job, block) < self.density
            return torch.where(kept_ME, block.delta_ME, 0.0).mul_(factor)

        return combine_thinned(job, with_l1(job, thin) if self.rescale == "l1" else thin, self.how())


def drawn(job: Job, block: Block) -> Tensor:
    """Numbers in [0, 1) [M, E], each parent its own, keyed by the parent's place."""
    rows = [uniform(job.seed, f"{place} {block.name}", block.start, block.stop) for place in range(len(job.parents))]
    return torch.stack(rows)


@merge_methods.register(
    "della",
    formula="V'_i = V_i m_i / p_i, p_i from density - eps to density + eps by rank in the row",
    source="DELLA (Deep et al. 2024, 2406.11617)",
)
@dataclass(frozen=True)
class Della(_Drops):
    """Drop entries at random, larger ones less often: the chance to be kept grows with the rank of |V| in its row.

    epsilon: from density - epsilon for the smallest to density + epsilon for the largest. rescale: `inverse` divides
    each entry by its own chance (the paper), `l1` restores the tensor's L1 norm (mergekit), `none`. A row of one
    element has the chance `density`; a vector is one row.
    """

    by_rows: ClassVar[bool] = True

    epsilon: float = 0.15
    rescale: Literal["inverse", "l1", "none"] = "inverse"

    def __post_init__(self) -> None:
        check_share("density", self.density)
        if not (self.epsilon >= 0 and self.density - self.epsilon > 0 and self.density + self.epsilon <= 1):
            raise RecipeError(
                f"density {self.density} with epsilon {self.epsilon}",
                expected="0 < density - epsilon and density + epsilon <= 1",
            )

    def prepare(self, job: Job) -> Combine:
        def thin(block: Block) -> Tensor:
            delta_ME = block.delta_ME
            chance_ME = self.chances(delta_ME, block.shape)
            kept_ME = torch.where(drawn(job, block) < chance_ME, delta_ME, 0.0)
            return kept_ME.div_(chance_ME) if self.rescale == "inverse" else kept_ME

        chosen = with_l1(job, thin, by_rows=True) if self.rescale == "l1" else thin
        return combine_thinned(job, chosen, self.how(), by_rows=True)

    def chances(self, delta_ME: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The chance of every entry to be kept, [M, E], for whole rows of a tensor of this shape."""
        width = shape[-1] if shape else 1
        rows = delta_ME.abs().view(len(delta_ME), -1, width)
        rank = rows.argsort(dim=-1, stable=True).argsort(dim=-1).double()
        lifted = rank / (width - 1) * 2 - 1 if width > 1 else torch.zeros_like(rank)
        return (self.density + self.epsilon * lifted).view_as(delta_ME)


@merge_methods.register(
    "breadcrumbs",
    formula="drop the top gamma and the smallest |V_i|, keep a fraction density between",
    source="Model Breadcrumbs (Davari and Belilovsky 2023, 2312.06795)",
)
@dataclass(frozen=True)
class Breadcrumbs(_Drops):
    """Drop the largest entries (outliers) and the smallest (noise) of every task vector.

    gamma: the fraction of the largest that is dropped; density: the fraction that is kept below them, of the group.
    Counts decide, so a small gamma on a small tensor drops nothing instead of everything.
    """

    gamma: float = 0.01

    def __post_init__(self) -> None:
        check_share("density", self.density)
        if not 0 <= self.gamma < 1 or self.gamma + self.density > 1:
            raise RecipeError(f"gamma {self.gamma}, density {self.density}", expected="gamma + density at most 1")

    def prepare(self, job: Job) -> Combine:
        found = group_thresholds(job, self._ranks)
        bounds = {name: found[key] for key, names in job.groups.items() for name in names}

        def thin(block: Block) -> Tensor:
            delta_ME = block.delta_ME
            size_ME, bound_M2 = delta_ME.abs().float(), bounds[block.name]
            kept_ME = (size_ME < bound_M2[:, :1]) & (size_ME >= bound_M2[:, 1:])
            return torch.where(kept_ME, delta_ME, 0.0)

        return combine_thinned(job, thin, self.how())

    def _ranks(self, total: int) -> list[int]:
        top = int(self.gamma * total)
        return [top, min(total, top + keep_count(self.density, total))]


@merge_methods.register(
    "sce",
    formula="select by variance; w_i ~ mean(V'_i^2); erase minority signs; weighted mean",
    source="SCE (2408.07990)",
)
@dataclass(frozen=True)
class Sce:
    """Select the elements on which the parents disagree most, weigh parents by mean square, erase minority signs.

    density: the fraction of elements with the largest variance over the parents that is kept, of the group (the paper
    and mergekit: `granularity: tensor`). The weight of a parent is a_i mean(V'_i^2) over the group, uniform only where
    nothing moved at all: no absolute epsilon.
    """

    base: ClassVar[Base] = "needed"
    by_rows: ClassVar[bool] = False

    density: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_share("density", self.density)

    def prepare(self, job: Job) -> Combine:
        thin = self._select(job)
        squares = RowSums()
        group_of = {name: key for key, names in job.groups.items() for name in names}
        for block in job.blocks():
            squares.add(group_of[block.name], thin(block).square_())
        share = {key: _mean_squares(torch.tensor(squares[key], dtype=torch.float64), job) for key in job.groups}
        job.report["weights"] = {key: share_M.tolist() for key, share_M in share.items()}
        return combine_thinned(job, thin, How(self.scale), share)

    def _select(self, job: Job) -> Thin:
        if self.density == 1:
            return lambda block: block.delta_ME
        least = group_thresholds(job, lambda total: [keep_count(self.density, total)], _variance)
        by_name = {name: least[key] for key, names in job.groups.items() for name in names}
        return lambda block: torch.where(_variance(block) >= by_name[block.name], block.delta_ME, 0.0)


def _variance(block: Block) -> Tensor:
    """[1, E] over the parents."""
    return block.delta_ME.var(0, unbiased=False, keepdim=True).float()


def _mean_squares(square_M: Tensor, job: Job) -> Tensor:
    weighted_M = square_M * job.weight_M
    return weighted_M / weighted_M.sum() if weighted_M.sum() > 0 else normalised(job.weight_M)


@merge_methods.register(
    "magmax",
    formula="V_m[x] = V_i[x] with i = argmax_i a_i |V_i[x]|",
    source="MagMax (Marczak et al. 2024, 2407.06322)",
)
@dataclass(frozen=True)
class MagMax:
    """Every element from the parent that moved it most (a_i |V_i|; the first parent where they are equal)."""

    base: ClassVar[Base] = "needed"
    by_rows: ClassVar[bool] = False

    scale: float = 1.0

    def prepare(self, job: Job) -> Combine:
        def combine(block: Block) -> Tensor:
            delta_ME = block.delta_ME
            winner_E = (delta_ME.abs() * job.weight_M[:, None]).argmax(0)
            assert block.base_E is not None
            return delta_ME.gather(0, winner_E[None])[0].mul_(self.scale).add_(block.base_E.double())

        return combine
