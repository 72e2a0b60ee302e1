"""The recipe of a merge. These dataclasses are the only schema; what can be computed defaults to None."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from embedsmith.core.errors import RecipeError
from embedsmith.core.settings import section
from embedsmith.core.shelf import merge_methods

OutType = Literal["float32", "bfloat16", "float16"]


@section
@dataclass(frozen=True)
class ParentSpec:
    """One model, or several checkpoints, to merge.

    `path`: a folder (transformers, sentence-transformers, or a LoRA adapter), a hub id, or a pattern such as
    `runs/a/checkpoints/step-*/model` that stands for every folder it matches, in natural order; `last` keeps the last
    so many of them. `adapter`: a LoRA folder on top of the model at `path`. `weight`: a_i, each checkpoint's own.
    `trajectory`: the run a checkpoint belongs to; methods that merge in two levels merge each run first.
    `examples`: task to the number of examples it was trained on, for the curves of `--explain`; with a pattern, of one
    step: a checkpoint's own is that times the last number in its path.
    """

    path: str
    id: str | None = None
    weight: float = 1.0
    adapter: str | None = None
    trajectory: str | None = None
    last: int | None = None
    revision: str | None = None
    examples: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise RecipeError(f"last is {self.last}", expected="at least 1")


@section
@dataclass(frozen=True)
class Override:
    """Another method for the tensors whose name `match` (a regular expression) finds. The first match counts."""

    match: str
    method: Annotated[Any, merge_methods]

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            raise RecipeError(f"match {self.match!r} is not a regular expression: {error}") from error


@section
@dataclass(frozen=True)
class Packaging:
    """What stands around the weights.

    `like`: id of the model whose configuration, modules and tokenizer the result gets (by default the base where it
    is a whole embedder, else the heaviest parent). `prompts`: a parent's id, or the prompts themselves; needed where
    the parents' differ. `max_length`: by default the smallest. `vocabulary`: `same` refuses differing vocabularies,
    `align` matches token by token. `heads`: what happens to a token head that some parents lack: `error`, `drop`, or
    `copy` from those that have it.
    """

    like: str | None = None
    prompts: str | Mapping[str, str] | None = None
    max_length: int | None = None
    vocabulary: Literal["same", "align"] = "same"
    heads: Literal["error", "drop", "copy"] = "error"


@section
@dataclass(frozen=True)
class Adapter:
    """The result as a LoRA adapter on the base. `rank`: of a matrix at most; `None` is exact, for sums of adapters."""

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"rank is {self.rank}", where="adapter", expected="at least 1")


@section
@dataclass(frozen=True)
class Bounds:
    """What `--verify` and `--strict` hold a merge to.

    `cka`, `overlap`: the least linear CKA, and the least share of the `neighbours` nearest neighbours, that a merge has
    in common with at least one parent on that parent's texts. `slack`: how much worse than the worst parent a geometric
    figure may be: anisotropy and prompt sensitivity in cosines, uniformity in its logarithm, effective rank and margin
    as a share. `dims`: widths whose Matryoshka retention is compared; those from the model's own on are left out.
    `same`: largest difference of vectors after saving and loading.
    """

    cka: float = 0.5
    overlap: float = 0.2
    slack: float = 0.15
    dims: tuple[int, ...] = (64, 128, 256, 512)
    neighbours: int = 10
    same: float = 1e-5

    def __post_init__(self) -> None:
        if not (0 <= self.cka <= 1 and 0 <= self.overlap <= 1 and self.slack >= 0 and self.neighbours >= 1):
            expected = "cka and overlap from 0 to 1, slack from 0, neighbours from 1"
            raise RecipeError(f"these bounds cannot be kept: {self}", where="verify", expected=expected)


@section
@dataclass(frozen=True)
class MergeRecipe:
    """Everything a merge depends on.

    `base`: theta_0, the model all parents were trained from. `granularity`: what shares one set of coefficients.
    `dtype`: numbers on disk, by default the widest among the parents; `rounding` to 16 bits is to the `nearest` or
    `stochastic` (right on average, the same for the same seed). `shard_size`: bytes a file, such as 5GB. `unrelated`:
    merge although a parent does not look like a descendant of the base. `cache`: where statistics and architectures are
    kept; `null` keeps none. `verify`: the bounds of `--verify` and `--strict`. `adapter`: write an adapter instead of a
    whole model.
    """

    parents: tuple[ParentSpec | str, ...]
    output: str
    method: Annotated[Any, merge_methods]
    base: ParentSpec | str | None = None
    granularity: Granularity = "model"
    overrides: tuple[Override, ...] = ()
    dtype: OutType | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    packaging: Packaging = field(default_factory=Packaging)
    shard_size: str | None = None
    seed: int = 0
    unrelated: bool = False
    trust_remote_code: bool = False
    cache: str | None = "~/.cache/embedsmith/merge"
    verify: Bounds = field(default_factory=Bounds)
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        if not self.parents:
            raise RecipeError("parents: at least one is needed")
        if self.rounding == "stochastic" and self.dtype != "bfloat16":
            raise RecipeError("stochastic rounding is for bfloat16", fix="set dtype: bfloat16, or rounding: nearest")

    @property
    def cache_folder(self) -> Path | None:
        return None if self.cache is None else Path(self.cache).expanduser()

    @property
    def base_spec(self) -> ParentSpec | None:
        return ParentSpec(path=self.base) if isinstance(self.base, str) else self.base

    @property
    def specs(self) -> list[ParentSpec]:
        """The parents; a bare path is a parent of weight 1."""
        return [ParentSpec(path=entry) if isinstance(entry, str) else entry for entry in self.parents]


Granularity = Literal["model", "block", "module", "tensor"]
