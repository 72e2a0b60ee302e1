"""The models of a merge in one view, whatever their files: named tensors that are read piece by piece.

Headers are read first, data in blocks, and nothing is memory-mapped.
"""

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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedsmith.core.errors import CheckpointError
from embedsmith.core.inputs import local_path
from embedsmith.merge.varying import Varying

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
MISSING = -1
"""The number of a row that a reordered table lacks."""


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

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

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


@dataclass(frozen=True)
class View:
    """Another tensor, of the same shape and type unless a subclass says otherwise, whose elements are read changed."""

    whole: Weights

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype


@dataclass(frozen=True)
class Reordered(View):
    """Rows of a table in a new order; a row numbered -1 comes from `instead` (zeros without it)."""

    row_V: NDArray[np.int64]
    instead: Weights | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.row_V), self.whole.shape[1])

    def read(self, start: int, stop: int) -> Tensor:
        """Rows that lie side by side in the table, and rows that are all missing, are read together."""
        width = self.shape[1]
        first, last = start // width, -(-stop // width)
        row = self.row_V[first:last]
        goes_on = np.where(row[1:] == MISSING, row[:-1] == MISSING, (row[1:] == row[:-1] + 1) & (row[:-1] != MISSING))
        found = []
        for run in np.split(np.arange(first, last), np.flatnonzero(~goes_on) + 1):
            begin, count, own = int(run[0]), len(run), int(self.row_V[run[0]])
            if own != MISSING:
                found.append(self.whole.read(own * width, (own + count) * width))
            elif self.instead is None:
                found.append(torch.zeros(count * width))
            else:
                found.append(self.instead.read(begin * width, (begin + count) * width))
        return torch.cat(found)[start - first * width : stop - first * width]


@dataclass(frozen=True)
class MeanOfOwners:
    """Row by row the mean over the tables that have it: the ancestor of a token the base does not know."""

    tables: tuple[Reordered, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tables[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def read(self, start: int, stop: int) -> Tensor:
        width = self.shape[1]
        row_E = torch.arange(start, stop) // width
        total_E = torch.zeros(stop - start, dtype=torch.float64)
        owners_E = torch.zeros(stop - start, dtype=torch.float64)
        for table in self.tables:
            has_E = torch.from_numpy(table.row_V != MISSING)[row_E]
            total_E += torch.where(has_E, table.read(start, stop).double(), 0.0)
            owners_E += has_E
        return (total_E / owners_E.clamp_min(1)).float()


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, without reading their data.

    Errors: `CheckpointError` naming the file when it is missing, cut off, padded, or no safetensors file.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        found: dict[str, Stored] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, (begin, end) = str(entry["dtype"]), map(int, entry["data_offsets"])
            if dtype not in DTYPES:
                raise ValueError(f"numbers of type {dtype} cannot be merged")
            found[name] = Stored(tuple(map(int, entry["shape"])), DTYPES[dtype], path, 8 + length + begin)
            if begin < 0 or min(found[name].shape, default=0) < 0 or end - begin != found[name].bytes:
                raise ValueError("a tensor's bytes do not fit its shape")
    except FileNotFoundError as error:
        raise CheckpointError("this file of weights is missing", where=path, fix="copy the folder again") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"not a readable safetensors file ({error})", where=path) from error
    end = max((item.offset + item.bytes for item in found.values()), default=8 + length)
    if end != path.stat().st_size:
        raise CheckpointError(
            f"the file has {path.stat().st_size} bytes, its header speaks of {end}",
            where=path,
            fix="the file is cut off or padded: copy or download it again",
        )
    return found


@dataclass(frozen=True)
class Parent:
    """One model as named tensors that are read piece by piece.

    Names are those of `Embedder.named_parameters()`, whatever the files call them: `backbone.` and transformers' own
    name, `projections.0.linear.weight`, `token_heads.sparse.linear.weight`. A tied tensor has one name.

    folder: where modules, prompts and tokenizer are read from. config_folder: where the encoder's config.json is.
    files: every file whose bytes decide the weights. remark: what else does (a vocabulary's new order).
    weight, density: as the recipe has them. trajectory: the run this is a checkpoint of, for two-level merges.
    unused: names no vector depends on (a pooler). buffers: float tensors that are no weights.
    token_tables: names whose rows belong to tokens. left_out: tensors of the files that the encoder does not have.
    """

    id: str
    folder: Path
    config_folder: Path
    tensors: Mapping[str, Weights]
    files: tuple[Path, ...]
    weight: Varying = 1.0
    density: Varying | None = None
    trajectory: str | None = None
    remark: str = ""
    unused: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()
    token_tables: frozenset[str] = frozenset()
    left_out: tuple[str, ...] = ()

    def size(self, name: str) -> int:
        """Number of elements of a tensor."""
        return math.prod(self.tensors[name].shape)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a float tensor, flat, in float32 (float64 where it is stored so).

        Errors: `CheckpointError` naming tensor and element where a weight is NaN or infinite.
        """
        values_E = self.tensors[name].read(start, stop)
        values_E = values_E if values_E.dtype == torch.float64 else values_E.float()
        if not torch.isfinite(values_E.sum()) and not torch.isfinite(values_E).all():
            place = start + int((~torch.isfinite(values_E)).nonzero()[0])
            raise CheckpointError(
                f"the weight {name} holds NaN or infinity (element {place})",
                where=self.id,
                fix="leave this parent out; its training diverged or its file is damaged",
            )
        return values_E

    def tensor(self, name: str) -> Tensor:
        """A whole float tensor in its shape. For small tensors, and for methods that need a matrix at once."""
        return self.read(name, 0, self.size(name)).view(self.tensors[name].shape)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over the contents of `files`: the same for a copy under another name."""
        with ThreadPoolExecutor() as pool:
            hashes = list(pool.map(file_hash, self.files))
        return hashlib.sha256("\n".join([*hashes, self.remark]).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, remembered while the process lives and the file stays as it is."""
    found = local_path(path, CheckpointError).stat()
    return _file_hash(path.resolve(), found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1024)
def _file_hash(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
