"""Weights to disk: the header first, then blocks at their places, so that memory holds one block.

A file is safetensors: 8 bytes of header length, the header (JSON, padded to 8 bytes), the tensors without gaps.
"""

import json
import math
import os
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from embedsmith.core.errors import CheckpointError, RecipeError
from embedsmith.merge.gram import block_of
from embedsmith.merge.parents import DTYPES
from embedsmith.merge.stream import Block, bits

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Slot:
    """One tensor to be written: its name in the file, its shape and its type on disk."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A safetensors file whose tensors arrive in pieces."""

    def __init__(self, path: Path, slots: Sequence[Slot], metadata: Mapping[str, str]) -> None:
        self.path = path
        header, self._offsets = layout(slots, metadata)
        self._dtypes = {slot.name: slot.dtype for slot in slots}
        self.size = len(header) + sum(slot.bytes for slot in slots)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        os.pwrite(self._descriptor, header, 0)
        os.ftruncate(self._descriptor, self.size)

    def write(self, name: str, start: int, values_E: Tensor) -> None:
        """Put elements [start, start + E) of tensor `name` in their place. `values_E` has the type of the slot."""
        assert values_E.dtype == self._dtypes[name], (name, values_E.dtype)
        data = memoryview(values_E.contiguous().view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
        place = self._offsets[name] + start * values_E.dtype.itemsize
        while len(data):
            done = os.pwrite(self._descriptor, data, place)
            data, place = data[done:], place + done

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def layout(slots: Sequence[Slot], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, and the byte of the file at which each tensor begins."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begins: dict[str, int] = {}
    place = 0
    for slot in slots:
        begins[slot.name] = place
        span = [place, place + slot.bytes]
        header[slot.name] = {"dtype": _NAMES[slot.dtype], "shape": list(slot.shape), "data_offsets": span}
        place += slot.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    before = struct.pack("<Q", len(text)) + text
    return before, {name: len(before) + begin for name, begin in begins.items()}


def shards(slots: Iterable[tuple[str, Slot]], most: int | None) -> list[dict[str, Slot]]:
    """Named slots in files of at most `most` bytes of tensors each (a larger tensor gets a file of its own)."""
    found: list[dict[str, Slot]] = [{}]
    for name, slot in slots:
        filled = sum(other.bytes for other in found[-1].values())
        if most is not None and found[-1] and filled + slot.bytes > most:
            found.append({})
        found[-1][name] = slot
    return found


def index_of(files: Mapping[str, Iterable[Slot]]) -> str:
    """`model.safetensors.index.json` of shards."""
    weight_map = {slot.name: file for file, slots in files.items() for slot in slots}
    total = sum(slot.bytes for slots in files.values() for slot in slots)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def parse_size(text: str) -> int:
    """`5GB` to bytes. Errors: `RecipeError` for a number without a unit: parameters or bytes, nobody knows."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B)\s*", text, re.IGNORECASE)
    if match is None:
        raise RecipeError(f"shard_size {text!r} is not a size", expected="a number and a unit of bytes, such as 5GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


# The last step to disk: 64-bit sums to the numbers of the file, and how much of the merge that costs.

_SIXTEEN = (torch.bfloat16, torch.float16)
LOSSY = 0.1
"""Above this share of |V| lost to rounding a warning asks for float32."""


def rounded(values_E: Tensor, dtype: torch.dtype, block: Block, stochastic_seed: int | None) -> Tensor:
    """To nearest, or (bfloat16) up or down with the probability that is right on average, keyed by the element.

    Errors: `CheckpointError` where a value is too large for the type.
    """
    if stochastic_seed is not None and dtype == torch.bfloat16:
        drawn_E = bits(stochastic_seed, f"round {block.name}", block.start, block.stop) & 0xFFFF
        pattern_E = values_E.float().view(torch.int32).to(torch.int64) + drawn_E
        return ((pattern_E >> 16) << 16).to(torch.int32).view(torch.float32).to(dtype)
    made_E = values_E.float().to(dtype) if dtype != torch.float64 else values_E.double()
    if dtype.itemsize < 4 and not torch.isfinite(made_E).all():
        raise CheckpointError(
            f"a weight of {block.name} is too large for {dtype}", where="merge", fix="set dtype to float32 or bfloat16"
        )
    return made_E


@dataclass
class RoundingLoss:
    """Sums a block of the model: error^2, |V|^2, unchanged elements, elements."""

    sums: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0, 0.0, 0.0]))

    def add(self, block: Block, exact_E: Tensor, written_E: Tensor) -> None:
        """Counts only where something can be lost: 16-bit numbers, and a base to measure the merge from."""
        if block.base_E is None or written_E.dtype not in _SIXTEEN:
            return
        base_E, written_E = block.base_E.double(), written_E.double()
        exact_E = exact_E.double()
        row = self.sums[block_of(block.name)]
        row[0] += float((written_E - exact_E).square().sum())
        row[1] += float((exact_E - base_E).square().sum())
        row[2] += float((written_E == base_E).sum())
        row[3] += len(exact_E)

    def report(self) -> dict[str, dict[str, float]]:
        """Block to `loss` (|error| / |V|, 0 where nothing moved) and `unchanged` (share of elements as in the base)."""
        return {
            name: {"loss": (row[0] / row[1]) ** 0.5 if row[1] else 0.0, "unchanged": row[2] / row[3]}
            for name, row in self.sums.items()
        }

    def total(self) -> float | None:
        """|error| / |V| of the whole model, `None` where nothing was rounded."""
        error, moved = (sum(row[place] for row in self.sums.values()) for place in (0, 1))
        return None if not self.sums else (error / moved) ** 0.5 if moved else 0.0
