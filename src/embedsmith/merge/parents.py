"""The models of a merge: folders, sentence-transformers models, LoRA adapters and checkpoints by pattern, one view."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from embedsmith.merge.tensors import Weights, size_of


@dataclass(frozen=True)
class Parent:
    """One model as named tensors that are read piece by piece.

    Names are those of `Embedder.named_parameters()`, whatever the files call them: `backbone.` and transformers' own
    name, `projections.0.linear.weight`, `token_heads.sparse.linear.weight`. A tied tensor has one name.

    folder: where modules, prompts and tokenizer are read from. config_folder: where the encoder's config.json is.
    files: every file whose bytes decide the weights. remark: what else does (a vocabulary's new order).
    trajectory: the run this is a checkpoint of, for two-level merges. examples: task to what it was trained on.
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
    examples: Mapping[str, float] | None = None
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

    @property
    def stamp(self) -> str:
        """A cheap stand-in for the contents: names, sizes and times of the files."""
        parts = [f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in self.files]
        return "\n".join([*parts, self.remark])


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, remembered while the process lives and the file stays as it is."""
    found = path.stat()
    return _file_hash(path.resolve(), found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1024)
def _file_hash(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def float_names(models: Sequence[Parent]) -> tuple[str, ...]:
    """Names of float tensors that every model has, in the first one's order (its file order)."""
    common = set.intersection(*(set(model.tensors) for model in models))
    return tuple(n for n in models[0].tensors if n in common and models[0].tensors[n].dtype.is_floating_point)
