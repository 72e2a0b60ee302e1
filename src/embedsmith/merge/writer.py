"""Weights to disk: the header first, then blocks at their places, so that memory holds one block and a killed merge
goes on where it was.

A file is safetensors: 8 bytes of header length, the header (JSON, padded to 8 bytes), the tensors without gaps.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from embedsmith.core.errors import RecipeError
from embedsmith.merge.tensors import DTYPES

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
    """A safetensors file whose tensors arrive in pieces. Opening one that is there keeps what it holds."""

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


def shards(slots: Sequence[Slot], most: int | None) -> list[list[Slot]]:
    """Slots in files of at most `most` bytes of tensors each (a larger tensor gets a file of its own)."""
    found: list[list[Slot]] = []
    for slot in slots:
        if not found or (most is not None and sum(other.bytes for other in found[-1]) + slot.bytes > most):
            found.append([])
        found[-1].append(slot)
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
