"""Sums over weights that do not depend on how they are cut: units of fixed size, added without rounding.

Nothing is kept but a few floats a sum. That matters for memory too: small arrays kept from every block would settle in
the holes that large ones leave, and the heap would grow with the model.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from embedsmith.merge.stream import UNIT


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
        sums = self._found[key]
        sums += [ExactSum() for _ in range(len(values_KE) - len(sums))]
        for row, parts in zip(sums, unit_sums(values_KE, unit).tolist(), strict=True):
            for part in parts:
                row.add(part)

    def __getitem__(self, key: str) -> list[float]:
        return [row.value for row in self._found[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)


def unit_sums(values_KE: Tensor, unit: int = UNIT) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """[K, units] in float64; the last unit may be short. numpy adds every unit in one way, however many there are."""
    array = values_KE.double().contiguous().numpy()
    missing = -array.shape[1] % unit
    if missing:
        array = np.pad(array, ((0, 0), (0, missing)))
    sums: np.ndarray[tuple[int, int], np.dtype[np.float64]] = array.reshape(len(array), -1, unit).sum(-1)
    return sums
