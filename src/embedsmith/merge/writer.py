"""Weights to disk: the header first, then blocks at their places, so that memory holds one block.

A file is safetensors: 8 bytes of header length, the header (JSON, padded to 8 bytes), the tensors without gaps.
"""

import json
import math
import os
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from embedsmith.core.errors import CheckpointError
from embedsmith.merge.gram import block_of
from embedsmith.merge.parents import DTYPES
from embedsmith.merge.stream import Block, drawn

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
    """A safetensors file whose tensors arrive in pieces; on disk for good when its `with` block ends well."""

    def __init__(self, path: Path, slots: Iterable[Slot], metadata: Mapping[str, str]) -> None:
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        self._slots: dict[str, tuple[int, torch.dtype]] = {}
        place = 0
        for slot in slots:
            self._slots[slot.name] = place, slot.dtype
            span = [place, place + slot.bytes]
            header[slot.name] = {"dtype": _NAMES[slot.dtype], "shape": list(slot.shape), "data_offsets": span}
            place += slot.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        os.pwrite(self._descriptor, struct.pack("<Q", len(text)) + text, 0)
        os.ftruncate(self._descriptor, self._data + place)

    def write(self, name: str, start: int, values_E: Tensor) -> None:
        """Put elements [start, start + E) of tensor `name` in their place. `values_E` has the type of the slot."""
        begin, dtype = self._slots[name]
        assert values_E.dtype == dtype, (name, values_E.dtype)
        data = memoryview(values_E.contiguous().view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
        place = self._data + begin + start * values_E.dtype.itemsize
        while len(data):
            done = os.pwrite(self._descriptor, data, place)
            data, place = data[done:], place + done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            os.fsync(self._descriptor)
        os.close(self._descriptor)


# The last step to disk: 64-bit sums to the numbers of the file, and how much of the merge that costs.

_SIXTEEN = (torch.bfloat16, torch.float16)
LOSSY = 0.1
"""Above this share of |V| lost to rounding a warning asks for float32."""


@dataclass
class Rounding:
    """To the numbers of the file; with a `seed`, to bfloat16, up or down with the probability that is right on average,
    keyed by the element. What that costs is summed by block of the model: error^2, |V|^2, unchanged elements, elements.
    """

    seed: int | None = None
    sums: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0, 0.0, 0.0]))

    def __call__(self, exact_E: Tensor, dtype: torch.dtype, block: Block) -> Tensor:
        """Errors: `CheckpointError` where a value is too large for the type."""
        if self.seed is not None and dtype == torch.bfloat16:
            drawn_E = drawn(self.seed, f"round {block.name}", block.start, block.stop, bits=True) & 0xFFFF
            pattern_E = exact_E.float().view(torch.int32).to(torch.int64) + drawn_E
            written_E = ((pattern_E >> 16) << 16).to(torch.int32).view(torch.float32).to(dtype)
        else:
            written_E = exact_E.float().to(dtype) if dtype != torch.float64 else exact_E.double()
            if dtype.itemsize < 4 and not torch.isfinite(written_E).all():
                fix = "set dtype to float32 or bfloat16"
                raise CheckpointError(f"a weight of {block.name} is too large for {dtype}", where="merge", fix=fix)
        if block.base_E is not None and dtype in _SIXTEEN:  # something can be lost, and measured
            base_E, made_E = block.base_E.double(), written_E.double()
            exact_E = exact_E.double()
            row = self.sums[block_of(block.name)]
            row[0] += float((made_E - exact_E).square().sum())
            row[1] += float((exact_E - base_E).square().sum())
            row[2] += float((made_E == base_E).sum())
            row[3] += len(exact_E)
        return written_E

    def report(self) -> dict[str, Any]:
        """`total`: |error| / |V| of the whole model, `None` where nothing was rounded. `blocks`: of each its `loss`
        (alike, 0 where nothing moved) and `unchanged` (share of elements as in the base)."""
        error, moved = (sum(row[place] for row in self.sums.values()) for place in (0, 1))
        blocks = {
            name: {"loss": (row[0] / row[1]) ** 0.5 if row[1] else 0.0, "unchanged": row[2] / row[3]}
            for name, row in self.sums.items()
        }
        total = None if not self.sums else (error / moved) ** 0.5 if moved else 0.0
        return {"total": total, "blocks": blocks}
