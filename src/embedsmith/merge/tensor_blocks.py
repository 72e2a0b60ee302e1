"""All models, block by block: the one loop every pass over the weights goes through."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from embedsmith.core.seeds import derive_seed
from embedsmith.merge.parents import Parent

UNIT = 8192
"""Elements summed at once, counted from the tensor's start. Blocks are multiples of it, so sums do not know them."""
BLOCK = 1 << 17
"""Elements of one model in one block: half a MiB in float32. Larger ones are no faster and leave larger holes in the
heap; no result depends on it."""
MOST = 1 << 23
"""64 MiB in float64: no block is larger."""


@dataclass(frozen=True)
class Block:
    """Elements [start, stop) of one tensor, of every model, flat and in float32 (float64 where stored so).

    `base_E` is `None` in a merge without a base. A block with `start == 0` is the first of its tensor; blocks of one
    tensor come in order.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    base_E: Tensor | None
    parents: tuple[Tensor, ...]

    @property
    def delta_ME(self) -> Tensor:
        """Task vectors V_i = theta_i - theta_0 in float64, so exact; one row a parent."""
        assert self.base_E is not None, "methods on task vectors are only prepared with a base"
        base_E = self.base_E.double()
        return torch.stack([parent_E.double() for parent_E in self.parents]).sub_(base_E)


def blocks(
    parents: Sequence[Parent], base: Parent | None, names: Sequence[str], *, size: int = BLOCK, by_rows: bool = False
) -> Iterator[Block]:
    """Blocks of the tensors `names`, in that order; the next block is read while one is used.

    `size`: elements in a block, rounded up to whole units. `by_rows`: a block is whole rows of a matrix (a vector is
    one row).
    Errors: `CheckpointError` naming tensor and model where a weight is NaN or infinite.
    """
    cuts: list[tuple[str, int, int]] = []
    for name in names:
        shape, total = parents[0].tensors[name].shape, parents[0].size(name)
        width = max(shape[-1] if shape else 1, 1)
        step = max(1, size // width) * width if by_rows else min(-(-size // UNIT) * UNIT, MOST)
        cuts += [(name, start, min(start + step, total)) for start in range(0, total, step)]

    def read(name: str, start: int, stop: int) -> Block:
        base_E = None if base is None else base.read(name, start, stop)
        parents_E = tuple(parent.read(name, start, stop) for parent in parents)
        return Block(name, parents[0].tensors[name].shape, start, stop, base_E, parents_E)

    if not cuts:
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(read, *cuts[0])
        for following in [*cuts[1:], None]:
            block = waiting.result()
            if following is not None:
                waiting = pool.submit(read, *following)
            yield block


class RowSums:
    """Sums of rows [K, E] that come block by block, by key, and do not depend on how they are cut: units of fixed size,
    added without rounding (Shewchuk's expansions), so that no order changes a sum.

    Nothing is kept but a few floats a sum. That matters for memory too: small arrays kept from every block would settle
    in the holes that large ones leave, and the heap would grow with the model.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[list[float]]] = defaultdict(list)

    def add(self, key: str, values_KE: Tensor, unit: int = UNIT) -> None:
        """Add a block that starts at a whole unit of its tensor (UNIT elements, or a row)."""
        values = values_KE.double().contiguous().numpy()
        missing = -values.shape[1] % unit  # the last unit may be short
        values = np.pad(values, ((0, 0), (0, missing))) if missing else values
        rows = self._parts[key]
        rows += [[] for _ in range(len(values) - len(rows))]
        # numpy adds every unit in one way, however many there are
        for parts, sums in zip(rows, values.reshape(len(values), -1, unit).sum(-1).tolist(), strict=True):
            for value in sums:
                count = 0
                for part in parts:
                    large, small = (value, part) if abs(value) >= abs(part) else (part, value)
                    total = large + small
                    lost = small - (total - large)
                    if lost:
                        parts[count] = lost
                        count += 1
                    value = total
                parts[count:] = [value]

    def __getitem__(self, key: str) -> list[float]:
        return [math.fsum(parts) for parts in self._parts[key]]


# Random numbers that belong to an element: keyed by seed, tensor and place, so that no block size or order matters.

DRAW_UNIT = 1 << 14
"""Elements drawn at once, counted from the tensor's start."""


def drawn(seed: int, name: str, start: int, stop: int, bits: bool = False) -> Tensor:
    """Numbers in [0, 1) for elements [start, stop) of the tensor `name`, float32; or 32 random `bits` each, int64."""
    key = derive_seed(seed, name)
    first = start // DRAW_UNIT
    parts = []
    for unit in range(first, -(-stop // DRAW_UNIT)):
        source = np.random.Generator(np.random.Philox(key=key, counter=[0, unit, 0, 0]))
        values = source.integers(0, 1 << 32, DRAW_UNIT, np.int64) if bits else source.random(DRAW_UNIT, np.float32)
        parts.append(torch.from_numpy(values))
    return torch.cat(parts)[start - first * DRAW_UNIT : stop - first * DRAW_UNIT]


_LOW = 12
_BINS = 1 << (31 - _LOW)
_IN_MEMORY = 1 << 20


def nth_largest(passes: Callable[[], Iterable[Tensor]], ranks: Sequence[int], total: int) -> Tensor:
    """The values at `ranks` (1 is the largest) in every row, [M, R] float32; rank 0 is infinity.

    `passes` starts a pass over the rows [M, E], the same each time; `total`: elements in a row. Exact, although rows
    never lie in memory at once: a magnitude is ranked by the bit pattern of its float32 value, which grows with it. The
    first pass counts the upper 19 of 31 bits, the second the lower 12 inside the bins that matter.
    """
    if total <= _IN_MEMORY:
        whole_ME = torch.cat(list(passes()), 1)
        infinite_M = torch.full((len(whole_ME),), torch.inf)
        return torch.stack(
            [infinite_M if not rank else whole_ME.kthvalue(total - rank + 1, 1).values for rank in ranks], 1
        )
    counted_MB = torch.zeros(0, _BINS, dtype=torch.int64)
    for pattern_ME in map(_patterns, passes()):
        counted_MB = counted_MB if len(counted_MB) else torch.zeros(len(pattern_ME), _BINS, dtype=torch.int64)
        for row, pattern_E in enumerate(pattern_ME):
            counted_MB[row] += torch.bincount(pattern_E >> _LOW, minlength=_BINS)
    above_MB = counted_MB.flip(1).cumsum(1)  # how many lie in this bin or above, from the top
    wanted_MR = torch.tensor(ranks).clamp_min(1).expand(len(counted_MB), -1).contiguous()
    place_MR = torch.searchsorted(above_MB, wanted_MR)
    before_MR = torch.where(place_MR > 0, above_MB.gather(1, (place_MR - 1).clamp_min(0)), 0)
    bin_MR = _BINS - 1 - place_MR
    inside_MRL = torch.zeros(*bin_MR.shape, 1 << _LOW, dtype=torch.int64)
    for pattern_ME in map(_patterns, passes()):
        for row, pattern_E in enumerate(pattern_ME):
            upper_E, low_E = pattern_E >> _LOW, pattern_E & ((1 << _LOW) - 1)
            for column, wanted in enumerate(bin_MR[row].tolist()):
                inside_MRL[row, column] += torch.bincount(low_E[upper_E == wanted], minlength=1 << _LOW)
    above_MRL = inside_MRL.flip(2).cumsum(2)
    low_MR = (1 << _LOW) - 1 - torch.searchsorted(above_MRL, (wanted_MR - before_MR)[..., None])[..., 0]
    values_MR = (bin_MR << _LOW | low_MR).to(torch.int32).view(torch.float32)
    return torch.where(torch.tensor(ranks) == 0, torch.inf, values_MR)


def _patterns(values_ME: Tensor) -> Tensor:
    return values_ME.contiguous().view(torch.int32)
