"""All models, block by block: the one loop every pass over the weights goes through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from embedsmith.core.errors import CheckpointError
from embedsmith.merge.parents import Parent
from embedsmith.merge.tensors import size_of

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
    skip: int = 0,
) -> Iterator[Block]:
    """Blocks of the tensors `names`, in that order; the next block is read while one is used.

    `size`: elements in a block, rounded up to whole units. `by_rows`: a block is whole rows of a matrix (a vector is
    one row). `skip`: leave out this many blocks at the front (what a continued merge has already written).
    Errors: `CheckpointError` naming tensor and model where a weight is NaN or infinite.
    """
    models = [*parents, *([] if base is None else [base])]
    ranges = [piece for name in names for piece in pieces(name, models[0], size, by_rows)][skip:]
    if not ranges:
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(_read, parents, base, *ranges[0])
        for following in [*ranges[1:], None]:
            block = waiting.result()
            if following is not None:
                waiting = pool.submit(_read, parents, base, *following)
            yield block


def pieces(name: str, model: Parent, size: int, by_rows: bool) -> list[tuple[str, int, int]]:
    """How a tensor is cut: (name, start, stop)."""
    weights = model.tensors[name]
    total = size_of(weights)
    step = min(-(-size // UNIT) * UNIT, MOST)
    if by_rows:
        width = weights.shape[-1] if weights.shape else 1
        step = max(1, size // max(width, 1)) * max(width, 1)
    return [(name, start, min(start + step, total)) for start in range(0, total, step)]


def _read(parents: Sequence[Parent], base: Parent | None, name: str, start: int, stop: int) -> Block:
    shape = parents[0].tensors[name].shape
    base_E = None if base is None else read_finite(base, name, start, stop)
    return Block(name, shape, start, stop, base_E, tuple(read_finite(parent, name, start, stop) for parent in parents))


def read_finite(model: Parent, name: str, start: int, stop: int) -> Tensor:
    """`Parent.read`. Errors: `CheckpointError` naming tensor and element where a weight is NaN or infinite."""
    values_E = model.read(name, start, stop)
    if not torch.isfinite(values_E.sum()) and not torch.isfinite(values_E).all():
        place = start + int((~torch.isfinite(values_E)).nonzero()[0])
        raise CheckpointError(
            f"the weight {name} holds NaN or infinity (element {place})",
            where=model.id,
            fix="leave this parent out; its training diverged or its file is damaged",
        )
    return values_E
