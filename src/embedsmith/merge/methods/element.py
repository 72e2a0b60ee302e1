"""Element methods: TIES, DARE, DELLA, Breadcrumbs and SCE. Each says which entries of the task vectors are set to 0;
what becomes of the thinned vectors is one class for all:

    theta_m = theta_0 + scale * rescaled( aggregate of the entries that agree with the elected sign )
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from embedsmith.core.errors import RecipeError
from embedsmith.core.progress import progress_bar
from embedsmith.core.settings import Finite, NotNegative, Range
from embedsmith.core.shelf import merge_methods
from embedsmith.merge.method import Combine, Job, Method, settings_of
from embedsmith.merge.methods.formulas import normalised, norms, not_negative
from embedsmith.merge.tensor_blocks import UNIT, Block, RowSums

Density = Annotated[float, Range(gt=0, le=1)]
Thin = Callable[[Block], Tensor]
"""A block to task vectors [M, E], float64, with some entries set to 0."""


@dataclass(frozen=True)
class Fusion:
    """Thinned task vectors become one.

    `election=None`: no signs are elected, the weighted mean of all entries. `mass` elects the sign of sum_i w_i V'_i,
    `count` that of sum_i w_i sign(V'_i). `mean` is over the entries that agree and are not 0. `norm` stretches the
    result to the mean norm of the task vectors, `trimmed_norm` to that of the thinned ones; `l1` gives every thinned
    vector its tensor's former L1 norm back first. `shares`: tensor name to the weights [M] of the aggregate, where they
    are not the parents' weights. `normalize`: whether a sum is divided by that of the weights.
    """

    job: Job
    thin: Thin
    scale: float = 1.0
    election: Literal["mass", "count"] | None = "mass"
    aggregate: Literal["mean", "sum", "max"] = "mean"
    rescale: str = "none"
    shares: Mapping[str, Tensor] | None = None
    by_rows: bool = False
    normalize: bool = True

    def combine(self) -> Combine:
        """After a rehearsal over the weights where signs or lengths are to be decided. Writes the densities achieved
        into the job's report."""
        if self.rescale == "l1":
            return replace(self, thin=self._l1_kept(), rescale="none").combine()
        job = self.job
        votes: dict[str, Tensor] = {}
        for name in job.names:
            with settings_of(name):  # negative weights, or such that sum to 0
                weight_M = not_negative(job.weight_of(name))
                votes[name] = normalised(weight_M) if self.normalize else weight_M
        shares = self.shares or votes
        sign, stretch = dict.fromkeys(job.groups, 1.0), dict.fromkeys(job.groups, 1.0)
        if self.election is not None or self.rescale != "none":
            sign, stretch = self._rehearsed(votes, shares)

        def combine(block: Block) -> Tensor:
            key = job.group_of[block.name]
            merged_E = self._merged(self.thin(block), votes[block.name], shares[block.name], sign[key])
            assert block.base_E is not None
            return merged_E.mul_(self.scale * stretch[key]).add_(block.base_E.double())

        return combine

    def _merged(self, thinned_ME: Tensor, vote_M: Tensor, share_M: Tensor, undecided: float) -> Tensor:
        """Merged task vector [E]. `undecided`: the sign taken where the votes cancel out."""
        if self.election is None:
            return share_M @ thinned_ME
        sign_E = self._elected(thinned_ME, vote_M)
        sign_E[sign_E == 0] = undecided
        agreeing_ME = torch.where(thinned_ME * sign_E > 0, thinned_ME, 0.0)
        if self.aggregate == "max":
            return agreeing_ME.abs().amax(0) * sign_E
        if self.aggregate == "sum":
            return share_M @ agreeing_ME
        voters_E = share_M @ (agreeing_ME != 0).double()
        return (share_M @ agreeing_ME).div_(torch.where(voters_E > 0, voters_E, 1.0))

    def _elected(self, thinned_ME: Tensor, vote_M: Tensor) -> Tensor:
        """The sign of every element: -1, 0 or 1. Exact zeros have no vote."""
        votes_ME = thinned_ME if self.election == "mass" else thinned_ME.sign()
        return (vote_M @ votes_ME).sign_()

    def _rehearsed(
        self, votes: Mapping[str, Tensor], shares: Mapping[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """One pass that writes nothing. By group the majority sign, which decides where votes cancel, and the factor
        mean_i |V_i| / |merged|, which is 1 where nothing is stretched or nothing is left."""
        job, squares = self.job, RowSums()  # |merged|^2 with undecided signs as + and as -, and |V'_i|^2
        kept = {key: torch.zeros(len(job.parents), dtype=torch.int64) for key in job.groups}
        signs = dict.fromkeys(job.groups, 0.0)
        with progress_bar("electing signs", sum(job.size(name) for name in job.names)) as bar:
            for block in job.blocks(by_rows=self.by_rows):
                key, thinned_ME = job.group_of[block.name], self.thin(block)
                vote_M, share_M = votes[block.name], shares[block.name]
                kept[key] += thinned_ME.count_nonzero(1)
                if self.election is not None:
                    signs[key] += float(self._elected(thinned_ME, vote_M).sum())
                if self.rescale != "none":
                    merged = [self._merged(thinned_ME, vote_M, share_M, undecided) for undecided in (1.0, -1.0)]
                    squares.add(key, torch.cat([torch.stack(merged), thinned_ME]).square_())
                bar.advance(block.stop - block.start)
        sign = {key: 1.0 if total >= 0 else -1.0 for key, total in signs.items()}
        stretch = dict.fromkeys(job.groups, 1.0)
        for key, names in job.groups.items():
            total = sum(job.size(name) for name in names)
            job.report.setdefault("density", {})[key] = [count / total for count in kept[key].tolist()]
            plus, minus, *thinned = squares[key] or (0.0, 0.0)
            square = plus if sign[key] > 0 else minus
            if square:
                own_M = torch.tensor(thinned, dtype=torch.float64).sqrt()
                length_M = norms(job.gram.of(names)) if self.rescale == "norm" else own_M
                stretch[key] = float(length_M.mean()) / math.sqrt(square)
        return sign, stretch

    def _l1_kept(self) -> Thin:
        """Every thinned tensor stretched to the L1 norm it had before (what mergekit calls rescaling)."""
        sums = RowSums()
        for block in self.job.blocks(by_rows=self.by_rows):
            both = torch.cat([block.delta_ME, self.thin(block)]).abs_()
            sums.add(block.name, both, (block.shape[-1] if block.shape else 1) if self.by_rows else UNIT)
        factor = {}
        for name in self.job.names:
            before_M, after_M = torch.tensor(sums[name], dtype=torch.float64).chunk(2)
            factor[name] = torch.where(after_M > 0, before_M / after_M, 1.0)[:, None]
        return lambda block: self.thin(block) * factor[block.name]


def kept_count(density: float, total: int) -> int:
    """How many of `total` are kept: the whole part of the fraction, as elsewhere, but never none by rounding."""
    return min(total, max(1, int(density * total + 1e-9))) if density > 0 else 0


@merge_methods.register(
    "ties",
    formula="trim V_i; elect sign of sum_i w_i V'_i; mean of the V'_i that agree",
    source="TIES (Yadav et al. 2023, 2306.01708); rescale: 2410.15035, reconstructed",
)
@dataclass(frozen=True)
class Ties(Method):
    """Trim small entries, elect a sign for every element, average the entries that agree with it.

    `density`: the fraction of the largest |V_i| that is kept, of the whole group: `granularity: model` trims over the
    whole model (the paper), `tensor` each tensor for itself (mergekit).
    `threshold`: keep |V_i| >= threshold instead.
    `scale`: factor of the merged task vector.
    `election`: `mass` elects the sign of the weighted sum, `count` that of the weighted number of signs.
    `aggregate`: of the entries that agree, their weighted `mean`, their `sum`, or the largest (`max`).
    `rescale`: `norm` stretches the result to the mean norm of the task vectors, `trimmed_norm` to that of the trimmed
    ones; the paper 2410.15035 prints an average without saying of which, so both are reconstructed. `l1` gives every
    trimmed vector its tensor's former L1 norm back first (mergekit).
    `prenorm`: task vectors take part with equal norms.
    `normalize`: a `sum` is divided by the sum of the weights.

    A parent may have a `density` of its own. Entries of 0 neither vote nor count; where votes cancel, the majority sign
    of the group decides.
    """

    density: Density = 0.2
    threshold: NotNegative | None = None
    scale: Finite = 1.0
    election: Literal["mass", "count"] = "mass"
    aggregate: Literal["mean", "sum", "max"] = "mean"
    rescale: Literal["none", "norm", "trimmed_norm", "l1"] = "none"
    prenorm: bool = False
    normalize: bool = True

    thins: ClassVar[bool] = True

    def prepare(self, job: Job) -> Combine:
        if self.threshold is not None:
            least = dict.fromkeys(job.names, torch.full((len(job.parents), 1), self.threshold))
        else:
            least = job.thresholds(
                lambda names, total: [[kept_count(d, total)] for d in job.density_of_group(names, self.density)]
            )
        factor: dict[str, Tensor] = {}
        for names in job.groups.values() if self.prenorm else ():  # mean norm / norm: signs elected among equals
            length_M = norms(job.gram.of(names))
            stretch_M = torch.where(length_M > 0, length_M.mean() / length_M, 1.0)
            factor |= dict.fromkeys(names, stretch_M[:, None])

        def thin(block: Block) -> Tensor:
            delta_ME = block.delta_ME
            trimmed_ME = torch.where(delta_ME.abs().float() >= least[block.name], delta_ME, 0.0)
            return trimmed_ME * factor[block.name] if factor else trimmed_ME

        how = (self.scale, self.election, self.aggregate, self.rescale)
        return Fusion(job, thin, *how, normalize=self.normalize).combine()


@dataclass(frozen=True)
class Dropping(Method):
    """What the methods that drop entries share.

    `density`: the share of the entries that is kept; embedders carry everything in small differences, so start at 0.5
    or more. A parent may have one of its own. `scale`: factor of the merged task vector. `then`: the weighted mean of
    what is left (`linear`), or TIES' election of signs (`ties`). `normalize`: without it the sum a_i V'_i takes the
    place of the mean.
    """

    density: Density = 0.5
    scale: Finite = 1.0
    then: Literal["linear", "ties"] = "linear"
    normalize: bool = True

    thins: ClassVar[bool] = True
    rescale = "none"  # a setting where entries are dropped by chance

    @abstractmethod
    def thin(self, job: Job) -> Thin:
        """Which entries are kept, and how much they are enlarged."""

    def prepare(self, job: Job) -> Combine:
        election: Literal["mass"] | None = "mass" if self.then == "ties" else None
        rescale = "l1" if self.rescale == "l1" else "none"
        aggregate: Literal["mean", "sum"] = "mean" if self.normalize else "sum"
        how = (self.scale, election, aggregate, rescale)
        return Fusion(job, self.thin(job), *how, by_rows=self.by_rows, normalize=self.normalize).combine()


@merge_methods.register(
    "dare", formula="V'_i = V_i m_i / density, m_i ~ Bernoulli(density)", source="DARE (Yu et al. 2024, 2311.03099)"
)
@dataclass(frozen=True)
class Dare(Dropping):
    """Drop entries at random and enlarge the rest.

    `rescale`: `inverse` divides by the density (the paper; the mean is kept), `l1` restores the tensor's L1 norm
    (mergekit), `none`.

    The draw belongs to seed, tensor, element and parent, whatever the block size or order.
    """

    rescale: Literal["inverse", "l1", "none"] = "inverse"

    def thin(self, job: Job) -> Thin:
        density_M1 = {name: job.density_of(name, self.density)[:, None] for name in job.names}

        def thin(block: Block) -> Tensor:
            density = density_M1[block.name]
            kept_ME = torch.where(job.drawn(block) < density, block.delta_ME, 0.0)
            return kept_ME.div_(density) if self.rescale == "inverse" else kept_ME

        return thin


@merge_methods.register(
    "della",
    formula="V'_i = V_i m_i / p_i, p_i from density - eps to density + eps by rank in the row",
    source="DELLA (Deep et al. 2024, 2406.11617)",
)
@dataclass(frozen=True)
class Della(Dropping):
    """Drop entries at random, larger ones less often: the chance to be kept grows with the rank of |V| in its row.

    `epsilon`: chances go from density - epsilon for the smallest to density + epsilon for the largest. `rescale`:
    `inverse` divides each entry by its own chance (the paper), `l1` restores the tensor's L1 norm (mergekit), `none`.

    A row of one element has the chance `density`; a vector is one row.
    """

    by_rows: ClassVar[bool] = True

    epsilon: NotNegative = 0.15
    rescale: Literal["inverse", "l1", "none"] = "inverse"

    def __post_init__(self) -> None:
        if not (self.density - self.epsilon > 0 and self.density + self.epsilon <= 1):
            raise RecipeError(
                f"density {self.density} with epsilon {self.epsilon}",
                expected="0 < density - epsilon and density + epsilon <= 1",
            )

    def thin(self, job: Job) -> Thin:
        density_M = {name: job.density_of(name, self.density) for name in job.names}
        for name, density in density_M.items():
            if not (float(density.min()) - self.epsilon > 0 and float(density.max()) + self.epsilon <= 1):
                expected = "0 < density - epsilon and density + epsilon <= 1"
                what = f"densities {density.tolist()} with epsilon {self.epsilon}"
                raise RecipeError(what, where=name, expected=expected)

        def thin(block: Block) -> Tensor:
            delta_ME = block.delta_ME
            chance_ME = self.chances(delta_ME, block.shape, density_M[block.name])
            kept_ME = torch.where(job.drawn(block) < chance_ME, delta_ME, 0.0)
            return kept_ME.div_(chance_ME) if self.rescale == "inverse" else kept_ME

        return thin

    def chances(self, delta_ME: Tensor, shape: tuple[int, ...], density_M: Tensor | None = None) -> Tensor:
        """The chance of every entry to be kept, [M, E], for whole rows of a tensor of this shape."""
        width = shape[-1] if shape else 1
        rows = delta_ME.abs().view(len(delta_ME), -1, width)
        rank = rows.argsort(dim=-1, stable=True).argsort(dim=-1).double()
        lifted = rank / (width - 1) * 2 - 1 if width > 1 else torch.zeros_like(rank)
        density = self.density if density_M is None else density_M[:, None, None]
        return (density + self.epsilon * lifted).view_as(delta_ME)


@merge_methods.register(
    "breadcrumbs",
    formula="drop the top gamma and the smallest |V_i|, keep a fraction density between",
    source="Model Breadcrumbs (Davari and Belilovsky 2023, 2312.06795)",
)
@dataclass(frozen=True)
class Breadcrumbs(Dropping):
    """Drop the largest entries (outliers) and the smallest (noise) of every task vector.

    `gamma`: the fraction of the largest that is dropped, of the group; `density` is kept below them.

    Counts decide, so a small gamma on a small tensor drops nothing instead of everything.
    """

    gamma: Annotated[float, Range(ge=0, lt=1)] = 0.01

    def __post_init__(self) -> None:
        if self.gamma + self.density > 1:
            raise RecipeError(f"gamma {self.gamma}, density {self.density}", expected="gamma + density at most 1")

    def thin(self, job: Job) -> Thin:
        def ranks(names: tuple[str, ...], total: int) -> list[list[int]]:
            top = int(self.gamma * total)
            densities = job.density_of_group(names, self.density)
            return [[top, min(total, top + kept_count(density, total))] for density in densities]

        bounds = job.thresholds(ranks)

        def thin(block: Block) -> Tensor:
            delta_ME = block.delta_ME
            size_ME, bound_M2 = delta_ME.abs().float(), bounds[block.name]
            kept_ME = (size_ME < bound_M2[:, :1]) & (size_ME >= bound_M2[:, 1:])
            return torch.where(kept_ME, delta_ME, 0.0)

        return thin


@merge_methods.register(
    "sce",
    formula="select by variance; w_i ~ mean(V'_i^2); erase minority signs; weighted mean",
    source="SCE (2408.07990)",
)
@dataclass(frozen=True)
class Sce(Method):
    """Select the elements on which the parents disagree most, weigh by mean square, erase minority signs.

    `density`: the fraction of elements with the largest variance over the parents that is kept, of the group (the
    paper and mergekit: `granularity: tensor`). `scale`: factor of the merged task vector.

    The weight of a parent is a_i mean(V'_i^2) over the group, uniform only where nothing moved at all: no absolute
    epsilon.
    """

    density: Density = 1.0
    scale: Finite = 1.0

    def prepare(self, job: Job) -> Combine:
        whole = self.density == 1
        least = {} if whole else job.thresholds(lambda _, total: [[kept_count(self.density, total)]], _variance)

        def thin(block: Block) -> Tensor:
            delta_ME = block.delta_ME
            return delta_ME if whole else torch.where(_variance(block) >= least[block.name], delta_ME, 0.0)

        squares = RowSums()
        for block in job.blocks():
            squares.add(job.group_of[block.name], thin(block).square_())
        shares = {}
        for name, key in job.group_of.items():
            own_M = not_negative(job.weight_of(name))
            weighted_M = torch.tensor(squares[key], dtype=torch.float64) * own_M
            moved = bool(weighted_M.sum() > 0)
            shares[name] = weighted_M / weighted_M.sum() if moved else normalised(own_M)
        alike = not isinstance(job.weights, Mapping)
        told = {key: shares[names[0]] for key, names in job.groups.items()} if alike else shares
        job.report["weights"] = {key: share_M.tolist() for key, share_M in told.items()}
        return Fusion(job, thin, self.scale, shares=shares).combine()


def _variance(block: Block) -> Tensor:
    """[1, E] over the parents."""
    return block.delta_ME.var(0, unbiased=False, keepdim=True).float()
