"""Random numbers that belong to an element: keyed by seed, tensor and place, so that no block size or order matters."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from embedsmith.core.seeds import derive_seed

UNIT = 1 << 14
"""Elements drawn at once, counted from the tensor's start."""


def uniform(seed: int, name: str, start: int, stop: int) -> Tensor:
    """Numbers in [0, 1) for elements [start, stop) of the tensor `name`, float32."""
    return _drawn(seed, name, start, stop, real=True)


def bits(seed: int, name: str, start: int, stop: int) -> Tensor:
    """32 random bits an element, as int64."""
    return _drawn(seed, name, start, stop, real=False)


def _drawn(seed: int, name: str, start: int, stop: int, real: bool) -> Tensor:
    key = derive_seed(seed, name)
    first = start // UNIT
    units = range(first, -(-stop // UNIT))
    parts = []
    for unit in units:
        source = np.random.Generator(np.random.Philox(key=key, counter=[0, unit, 0, 0]))
        drawn = source.random(UNIT, np.float32) if real else source.integers(0, 1 << 32, UNIT, np.int64)
        parts.append(torch.from_numpy(drawn))
    return torch.cat(parts)[start - first * UNIT : stop - first * UNIT] if parts else torch.empty(0)
