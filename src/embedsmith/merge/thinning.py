"""What element methods share: thinned task vectors, an election of signs, an aggregate, and a length.

theta_m = theta_0 + scale * rescaled( aggregate of the entries that agree with the elected sign )
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from embedsmith.core.progress import progress_bar
from embedsmith.merge.coefficients import normalised, norms
from embedsmith.merge.method import Combine, Job
from embedsmith.merge.stream import Block
from embedsmith.merge.sums import RowSums

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
