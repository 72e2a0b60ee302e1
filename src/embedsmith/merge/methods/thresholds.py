"""Order statistics of task vectors that never lie in memory at once: exact, by two passes of histograms.

A magnitude is ranked by the bit pattern of its float32 value, which grows with it. The first pass counts the upper 19
of 31 bits, the second the lower 12 inside the bins that matter; ties at the threshold are all kept.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from embedsmith.merge.method import Job
from embedsmith.merge.stream import Block

_LOW = 12
_BINS = 1 << (31 - _LOW)
_IN_MEMORY = 1 << 20


def kept_count(density: float, total: int) -> int:
    """How many of `total` are kept: the whole part of the fraction, as elsewhere, but never none by rounding."""
    return min(total, max(1, int(density * total + 1e-9))) if density > 0 else 0


def thresholds(
    job: Job, ranks_of: Callable[[int], Sequence[int]], keys: Callable[[Block], Tensor] | None = None
) -> dict[str, Tensor]:
    """Tensor name to the values [M, R] at the ranks that `ranks_of` gives for the size of the tensor's group.

    `keys`: a block to what is ranked, rows [M, E] of values that are not negative; by default |V_i| in float32.
    """
    found: dict[str, Tensor] = {}
    for names in job.groups.values():
        total = sum(job.size(name) for name in names)

        def passes(names: tuple[str, ...] = names) -> Iterable[Tensor]:
            blocks = job.blocks(names)
            return (block.delta_ME.abs_().float() if keys is None else keys(block) for block in blocks)

        found |= dict.fromkeys(names, nth_largest(passes, ranks_of(total), total))
    return found


def nth_largest(passes: Callable[[], Iterable[Tensor]], ranks: Sequence[int], total: int) -> Tensor:
    """The values at `ranks` (1 is the largest) in every row, [M, R] float32; rank 0 is infinity.

    `passes` starts a pass over the rows [M, E], the same each time; `total`: elements in a row.
    """
    if total <= _IN_MEMORY:
        whole_ME = torch.cat(list(passes()), 1)
        infinite_M = torch.full((len(whole_ME),), torch.inf)
        return torch.stack(
            [infinite_M if not rank else whole_ME.kthvalue(total - rank + 1, 1).values for rank in ranks], 1
        )
    bins_MR, left_MR = _bins_of(passes(), ranks)
    return _inside(passes(), bins_MR, left_MR, ranks)


def _bins_of(rows: Iterable[Tensor], ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """For every row and rank: the bin of the value, and its rank among the values of that bin."""
    counted: Tensor | None = None
    for values_ME in rows:
        if counted is None:
            counted = torch.zeros(len(values_ME), _BINS, dtype=torch.int64)
        for row, upper_E in enumerate(_patterns(values_ME) >> _LOW):
            counted[row] += torch.bincount(upper_E, minlength=_BINS)
    assert counted is not None, "a group has at least one tensor"
    above_MB = counted.flip(1).cumsum(1)  # how many lie in this bin or above, from the top
    wanted_MR = torch.tensor(ranks).clamp_min(1).expand(len(counted), -1).contiguous()
    place_MR = torch.searchsorted(above_MB, wanted_MR)
    before_MR = torch.where(place_MR > 0, above_MB.gather(1, (place_MR - 1).clamp_min(0)), 0)
    return _BINS - 1 - place_MR, wanted_MR - before_MR


def _inside(rows: Iterable[Tensor], bins_MR: Tensor, left_MR: Tensor, ranks: Sequence[int]) -> Tensor:
    """The values at the ranks `left_MR` inside their bins."""
    counts = torch.zeros(*bins_MR.shape, 1 << _LOW, dtype=torch.int64)
    for values_ME in rows:
        for row, pattern_E in enumerate(_patterns(values_ME)):
            upper_E = pattern_E >> _LOW
            for column, wanted in enumerate(bins_MR[row].tolist()):
                low_E = pattern_E[upper_E == wanted] & ((1 << _LOW) - 1)
                counts[row, column] += torch.bincount(low_E, minlength=1 << _LOW)
    above = counts.flip(2).cumsum(2)
    low_MR = (1 << _LOW) - 1 - torch.searchsorted(above, left_MR[..., None])[..., 0]
    pattern_MR = (bins_MR << _LOW | low_MR).to(torch.int32)
    values_MR = pattern_MR.view(torch.float32)
    return torch.where(torch.tensor(ranks) == 0, torch.inf, values_MR)


def _patterns(values_ME: Tensor) -> Tensor:
    return values_ME.contiguous().view(torch.int32)
