"""The models of a merge in one view, whatever their files: named tensors that are read piece by piece.

Headers are read first, data in blocks, and nothing is memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from embedsmith.core.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""safetensors' names of number types."""


class Weights(Protocol):
    """A tensor that is read piece by piece; `start` and `stop` count elements in row-major order."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop), flat, in the type they are stored in (or float32 where they are computed)."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: its first byte is byte `offset` of the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int

    @staticmethod
    def of_header(path: Path, data: int, entry: Mapping[str, object]) -> Stored:
        """From a tensor's entry in the header of a file whose data begin at byte `data`. Errors: `ValueError`."""
        kind = str(entry["dtype"])
        if kind not in DTYPES:
            raise ValueError(f"numbers of type {kind} cannot be merged")
        shape = tuple(int(size) for size in entry["shape"])  # type: ignore[attr-defined]
        begin, end = (int(place) for place in entry["data_offsets"])  # type: ignore[attr-defined]
        if begin < 0 or min(shape, default=0) < 0 or end - begin != math.prod(shape) * DTYPES[kind].itemsize:
            raise ValueError("a tensor's bytes do not fit its shape")
        return Stored(shape, DTYPES[kind], path, data + begin)

    def read(self, start: int, stop: int) -> Tensor:
        """Errors: `CheckpointError` when the file ends early (it is damaged or was changed meanwhile)."""
        width = self.dtype.itemsize
        values_E = torch.empty(stop - start, dtype=self.dtype)  # a bytearray would be filled with zeros first
        buffer: memoryview = memoryview(values_E.view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.offset + start * width)
                while len(buffer):
                    count = file.readinto(buffer)
                    if not count:
                        raise CheckpointError(
                            "the file ends before its tensors do", where=self.file, fix="copy or download it again"
                        )
                    buffer = buffer[count:]
        except OSError as error:
            raise CheckpointError(f"cannot read the weights ({error.strerror})", where=self.file) from error
        return values_E


@dataclass(frozen=True)
class Held:
    """A small tensor in memory (heads kept as torch.save files), or one that torch maps from such a file."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, start: int, stop: int) -> Tensor:
        return self.tensor.contiguous().view(-1)[start:stop]


def size_of(weights: Weights) -> int:
    """Number of elements."""
    return math.prod(weights.shape)


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, without reading their data.

    Errors: `CheckpointError` naming the file when it is missing, cut off, or no safetensors file.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        found = {name: Stored.of_header(path, 8 + length, entry) for name, entry in entries.items()}
    except FileNotFoundError as error:
        raise CheckpointError("this file of weights is missing", where=path, fix="copy the folder again") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"not a readable safetensors file ({error})", where=path) from error
    end = max((item.offset + size_of(item) * item.dtype.itemsize for item in found.values()), default=0)
    if end > path.stat().st_size:
        raise CheckpointError(
            f"the file has {path.stat().st_size} bytes, its header speaks of {end}",
            where=path,
            fix="the file is cut off: copy or download it again",
        )
    return found


@dataclass(frozen=True)
class Parent:
    """One model as named tensors that are read piece by piece.

    Names are those of `Embedder.named_parameters()`, whatever the files call them: `backbone.` and transformers' own
    name, `projections.0.linear.weight`, `token_heads.sparse.linear.weight`. A tied tensor has one name.

    folder: where modules, prompts and tokenizer are read from. config_folder: where the encoder's config.json is.
    files: every file whose bytes decide the weights. remark: what else does (a vocabulary's new order).
    trajectory: the run this is a checkpoint of, for two-level merges.
    unused: names no vector depends on (a pooler). buffers: float tensors that are no weights.
    token_tables: names whose rows belong to tokens. left_out: tensors of the files that the encoder does not have.
    """

    id: str
    folder: Path
    config_folder: Path
    tensors: Mapping[str, Weights]
    files: tuple[Path, ...]
    weight: float = 1.0
    trajectory: str | None = None
    remark: str = ""
    unused: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()
    token_tables: frozenset[str] = frozenset()
    left_out: tuple[str, ...] = ()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a float tensor, flat, in float32 (float64 where it is stored so)."""
        values = self.tensors[name].read(start, stop)
        return values if values.dtype == torch.float64 else values.float()

    def tensor(self, name: str) -> Tensor:
        """A whole float tensor in its shape. For small tensors, and for methods that need a matrix at once."""
        return self.read(name, 0, size_of(self.tensors[name])).view(self.tensors[name].shape)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over the contents of `files`: the same for a copy under another name."""
        with ThreadPoolExecutor() as pool:
            hashes = list(pool.map(file_hash, self.files))
        return hashlib.sha256("\n".join([*hashes, self.remark]).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, remembered while the process lives and the file stays as it is."""
    found = path.stat()
    return _file_hash(path.resolve(), found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1024)
def _file_hash(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
