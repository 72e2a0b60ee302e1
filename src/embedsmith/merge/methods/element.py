"""Element methods: TIES, DARE, DELLA, Breadcrumbs, SCE and MagMax, on task vectors, streamed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from embedsmith.core.errors import RecipeError
from embedsmith.core.progress import progress_bar
from embedsmith.core.shelf import merge_methods
from embedsmith.merge.method import Base, Combine, Job
from embedsmith.merge.methods.formulas import normalised, norms
from embedsmith.merge.methods.select import group_thresholds, keep_count
from embedsmith.merge.stream import UNIT, Block, RowSums, uniform

# What element methods share: thinned task vectors, an election of signs, an aggregate, and a length.
# theta_m = theta_0 + scale * rescaled( aggregate of the entries that agree with the elected sign )

Thin = Callable[[Block], Tensor]
"""A block to task vectors [M, E], float64, with some entries set to 0."""
Rescale = Literal["none", "norm", "trimmed_norm"]
Aggregate = Literal["mean", "sum", "max"]
Election = Literal["mass", "count"]


@dataclass(frozen=True)
class How:
    """How thinned vectors become one. `election=None`: no signs are elected, the weighted mean of all entries.

    `mass` elects the sign of sum_i w_i V'_i, `count` that of sum_i w_i sign(V'_i). `mean` is over the entries that
    agree and are not 0. `norm` stretches the result to the mean norm of the task vectors, `trimmed_norm` to that of
    the thinned ones.
    """

    scale: float = 1.0
    election: Election | None = "mass"
    aggregate: Aggregate = "mean"
    rescale: Rescale = "none"


@dataclass
class _Seen:
    """What one rehearsal over a group has added up. `square`: |merged|^2 with undecided signs taken as + and as -;
    `thinned`: |V'_i|^2; `kept`: entries that are not 0."""

    kept: list[int]
    signs: float = 0.0
    square: tuple[float, float] = (0.0, 0.0)
    thinned: tuple[float, ...] = ()


def combine_thinned(
    job: Job, thin: Thin, how: How, share: Mapping[str, Tensor] | None = None, by_rows: bool = False
) -> Combine:
    """The last two steps of every element method. `share`: group key to the weights [M] of the aggregate, where they
    are not the parents' weights. Writes the densities achieved into the job's report."""
    group_of = {name: key for key, names in job.groups.items() for name in names}
    weight_M = normalised(job.weight_M)
    shares = share or dict.fromkeys(job.groups, weight_M)
    seen = _rehearse(job, thin, how, shares, group_of, by_rows) if _needs_rehearsal(how) else {}
    sign = {key: 1.0 if found.signs >= 0 else -1.0 for key, found in seen.items()}
    length = {key: _stretch(job, key, found, how, sign[key]) for key, found in seen.items()}
    for key, found in seen.items():
        total = sum(job.size(name) for name in job.groups[key])
        job.report.setdefault("density", {})[key] = [count / total for count in found.kept]

    def combine(block: Block) -> Tensor:
        key = group_of[block.name]
        merged_E = aggregate(thin(block), weight_M, shares[key], how, sign.get(key, 1.0))
        assert block.base_E is not None
        return merged_E.mul_(how.scale * length.get(key, 1.0)).add_(block.base_E.double())

    return combine


def aggregate(thinned_ME: Tensor, vote_M: Tensor, share_M: Tensor, how: How, undecided: float) -> Tensor:
    """Merged task vector [E]. `undecided`: the sign taken where the votes cancel out."""
    if how.election is None:
        return share_M @ thinned_ME
    sign_E = elected(thinned_ME, vote_M, how.election)
    sign_E[sign_E == 0] = undecided
    agreeing_ME = torch.where(thinned_ME * sign_E > 0, thinned_ME, 0.0)
    if how.aggregate == "max":
        return agreeing_ME.abs().amax(0) * sign_E
    if how.aggregate == "sum":
        return share_M @ agreeing_ME
    voters_E = share_M @ (agreeing_ME != 0).double()
    return (share_M @ agreeing_ME).div_(torch.where(voters_E > 0, voters_E, 1.0))


def elected(thinned_ME: Tensor, vote_M: Tensor, election: Election) -> Tensor:
    """The sign of every element: -1, 0 or 1. Exact zeros have no vote."""
    votes_ME = thinned_ME if election == "mass" else thinned_ME.sign()
    return (vote_M @ votes_ME).sign_()


def _needs_rehearsal(how: How) -> bool:
    return how.election is not None or how.rescale != "none"


def _rehearse(
    job: Job, thin: Thin, how: How, shares: Mapping[str, Tensor], group_of: Mapping[str, str], by_rows: bool
) -> dict[str, _Seen]:
    """One pass that writes nothing: the majority sign (which decides where votes cancel), norms, densities."""
    found = {key: _Seen([0] * len(job.parents)) for key in job.groups}
    squares = RowSums()
    weight_M = normalised(job.weight_M)
    with progress_bar("electing signs", sum(job.size(name) for name in job.names)) as bar:
        for block in job.blocks(by_rows=by_rows):
            key = group_of[block.name]
            row, thinned_ME = found[key], thin(block)
            row.kept = [a + b for a, b in zip(row.kept, thinned_ME.count_nonzero(1).tolist(), strict=True)]
            if how.election is not None:
                row.signs += float(elected(thinned_ME, weight_M, how.election).sum())
            if how.rescale != "none":
                merged = [aggregate(thinned_ME, weight_M, shares[key], how, undecided) for undecided in (1.0, -1.0)]
                squares.add(key, torch.cat([torch.stack(merged), thinned_ME]).square_())
            bar.advance(block.stop - block.start)
    for key in squares:
        plus, minus, *thinned = squares[key]
        found[key].square, found[key].thinned = (plus, minus), tuple(thinned)
    return found


def _stretch(job: Job, key: str, seen: _Seen, how: How, undecided: float) -> float:
    """mean_i |V_i| / |merged|, and 1 where nothing is stretched or nothing is left."""
    square = seen.square[0 if undecided > 0 else 1]
    if how.rescale == "none" or square == 0:
        return 1.0
    if how.rescale == "norm":
        wanted = norms(job.gram.of(job.groups[key])).mean()
    else:
        wanted = torch.tensor(seen.thinned, dtype=torch.float64).sqrt().mean()
    return float(wanted) / math.sqrt(square)


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
