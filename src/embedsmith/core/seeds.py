"""Randomness: one place that seeds, derives seeds, and captures or restores generator states."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def derive_seed(*keys: object) -> int:
    """A 63-bit seed that depends on every key and on nothing else (not on the process or the platform)."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class TorchRandom:
    """The state of torch's generators: what dropout depends on."""

    cpu: Tensor
    cuda: tuple[Tensor, ...]

    @staticmethod
    def capture() -> TorchRandom:
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
        return TorchRandom(torch.get_rng_state(), cuda)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))


def random_state() -> dict[str, Any]:
    """Every generator's state, as values that `torch.save` and a `weights_only` load can carry."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state = TorchRandom.capture()
    version, python_keys, python_gauss = random.getstate()
    return {
        "torch": state.cpu,
        "cuda": list(state.cuda),
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, list(python_keys), python_gauss],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Inverse of `random_state`."""
    TorchRandom(state["torch"], tuple(state["cuda"])).restore()
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, python_keys, python_gauss = state["python"]
    random.setstate((version, tuple(python_keys), python_gauss))
