"""All models, block by block: the one loop every pass over the weights goes through."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
    parents: Sequence[Parent],
    base: Parent | None,
    names: Sequence[str],
    *,
    size: int = BLOCK,
    by_rows: bool = False,
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


# Sums over weights that do not depend on how they are cut: units of fixed size, added without rounding.
# Nothing is kept but a few floats a sum. That matters for memory too: small arrays kept from every block would settle
# in the holes that large ones leave, and the heap would grow with the model.


class ExactSum:
    """A running sum without rounding (Shewchuk's expansions): no order changes its value."""

    def __init__(self) -> None:
        self._parts: list[float] = []

    def add(self, value: float) -> None:
        count = 0
        for part in self._parts:
            large, small = (value, part) if abs(value) >= abs(part) else (part, value)
            total = large + small
            lost = small - (total - large)
            if lost:
                self._parts[count] = lost
                count += 1
            value = total
        self._parts[count:] = [value]

    @property
    def value(self) -> float:
        return math.fsum(self._parts)


class RowSums:
    """Sums of rows [K, E] that come block by block, by key."""

    def __init__(self) -> None:
        self._found: dict[str, list[ExactSum]] = defaultdict(list)

    def add(self, key: str, values_KE: Tensor, unit: int = UNIT) -> None:
        """Add a block that starts at a whole unit of its tensor (UNIT elements, or a row)."""
        values = values_KE.double().contiguous().numpy()
        missing = -values.shape[1] % unit  # the last unit may be short
        values = np.pad(values, ((0, 0), (0, missing))) if missing else values
        # numpy adds every unit in one way, however many there are
        for row, parts in enumerate(values.reshape(len(values), -1, unit).sum(-1).tolist()):
            if row == len(self._found[key]):
                self._found[key].append(ExactSum())
            for part in parts:
                self._found[key][row].add(part)

    def __getitem__(self, key: str) -> list[float]:
        return [row.value for row in self._found[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)


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
