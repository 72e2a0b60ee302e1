"""The recipe of a merge. These dataclasses are the only schema; what can be computed defaults to None."""

import glob
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from embedsmith.core.errors import RecipeError
from embedsmith.core.settings import Count, NotNegative, Share, Word, section
from embedsmith.core.shelf import merge_methods
from embedsmith.merge.varying import Varying, check_numbers, numbers_of

Granularity = Literal["model", "block", "module", "tensor"]
REMOVED: Mapping[str, str] = {
    "magmax": "use ties with density: 1 and aggregate: max, which elects the sign of every element first",
    "nan": "use average, with a weight of 1 / length for every parent (merge --explain prints the lengths)",
    "warp": "use slerp with scale: ETA, which is the same merge",
    "parent_matching": "use self_positioning, or regmean where there are no labels",
    "regmean.sequential": "leave it out: regmean measures every layer on the parents themselves",
    "fisher.definition=detached": "use definition: isolated, which gives every query its own candidates",
    "fisher.definition=shared": "use definition: isolated, which gives every query its own candidates",
    "search.searcher=halving": "use searcher: grid, or cma for more than a few parents",
    "search.points": "set evaluations, the number of merges that are scored",
    "search.keep": "leave it out: every merge is scored on all items of the goal",
    "parents.examples": "leave it out: python -m bench.merging --parts growth fits length against data",
}
"""Names and settings that merging once had: a method, METHOD.SETTING, METHOD.SETTING=VALUE or a key of the recipe, to
what to use instead, which the error says."""


def refuse_removed(value: Any) -> Any:
    """Give back a method, or a list of parents, as it stands in a recipe. Errors: `RecipeError` for a name, a setting,
    a value or a key that was removed from embedsmith."""
    found: list[tuple[Any, str]] = []
    for one in value if isinstance(value, list | tuple) else []:
        found += [(f"parents.{key}", f"key {key} of a parent") for key in (one if isinstance(one, Mapping) else ())]
    settings = {"type": value} if isinstance(value, str) else value
    if isinstance(settings, Mapping):
        kind = settings.get("type")
        names = [kind, *(f"{kind}.{key}" for key in settings), *(f"{kind}.{k}={v}" for k, v in settings.items())]
        found += [(name, f"merge method {name}") for name in names]
    for name, what in found:
        if isinstance(name, str) and name in REMOVED:
            raise RecipeError(f"the {what} is no longer there", fix=REMOVED[name])
    return value


AnyMethod = Annotated[Any, merge_methods, BeforeValidator(refuse_removed)]


@section
@dataclass(frozen=True)
class ParentSpec:
    """One model, or several checkpoints, to merge.

    `path`: a folder (transformers, sentence-transformers, or a LoRA adapter), a hub id, or a pattern such as
    `runs/a/checkpoints/step-*/model` that stands for every folder it matches, in natural order. `id`: its name in
    reports, by default the end of its path. `weight`: a_i, each checkpoint's own: a number, several spread over the
    layers (`[0, 0.5, 1]`), or entries by a part of a tensor's name (`[{filter: attention, value: 1}, {value: 0.5}]`).
    `density`: the share of its entries that is kept, alike, in the place of the method's. `adapter`: a LoRA folder on
    top of the model at `path`. `trajectory`: the run a checkpoint belongs to; methods that merge in two levels merge
    each run first. `last`: keep only the last so many folders of a pattern. `revision`: branch, tag or commit of a hub
    id.
    """

    path: str
    id: str | None = None
    weight: Varying = 1.0
    density: Varying | None = None
    adapter: str | None = None
    trajectory: str | None = None
    last: Count | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        check_numbers("weight", self.weight)
        if self.density is not None:
            check_numbers("density", self.density, 0.0, 1.0)
            if not all(numbers_of(self.density)):
                raise RecipeError(f"density is {self.density!r}", where=self.path, expected="more than 0")

    def expanded(self) -> "list[ParentSpec]":
        """One entry for every folder a pattern matches, in natural order (step-20 before step-100), the `last` so many.

        The checkpoints of a pattern are one trajectory unless the recipe names another. Errors: `RecipeError` for a
        pattern that matches nothing.
        """
        if not any(mark in self.path for mark in "*?["):
            return [self]

        def natural(path: str) -> list[tuple[int, int | str]]:
            return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path) if part]

        matches = sorted(filter(os.path.isdir, glob.glob(os.path.expanduser(self.path))), key=natural)
        if not matches:
            raise RecipeError(f"no folder matches the pattern {self.path!r}", fix="check the path")
        columns = list(zip(*(Path(match).parts for match in matches), strict=False))
        differing = [place for place, column in enumerate(columns) if len(set(column)) > 1]
        found = []
        for path in matches[-self.last :] if self.last is not None else matches:
            parts = Path(path).parts
            own = "/".join(parts[place] for place in differing) or parts[-1]
            name, run = f"{self.id}/{own}" if self.id else None, self.trajectory or self.id or self.path
            found.append(replace(self, path=path, id=name, trajectory=run, last=None))
        return found


@section
@dataclass(frozen=True)
class Override:
    """Another method for some tensors.

    `match`: a regular expression; the first override that finds one in a tensor's name counts. `method`: a name, or a
    mapping with `type` and settings.
    """

    match: str
    method: AnyMethod

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
    the parents' differ. `max_length`: in tokens, by default the smallest. `vocabulary`: `same` refuses differing
    vocabularies, `align` matches token by token. `heads`: what happens to a token head that some parents lack: `error`,
    `drop`, or `copy` from those that have it.
    """

    like: str | None = None
    prompts: str | Mapping[str, str] | None = None
    max_length: Count | None = None
    vocabulary: Literal["same", "align"] = "same"
    heads: Literal["error", "drop", "copy"] = "error"


@section
@dataclass(frozen=True)
class Adapter:
    """The result as a LoRA adapter on the base.

    `rank`: of a matrix at most; by default exact, for sums of adapters.
    """

    rank: Count | None = None


@section
@dataclass(frozen=True)
class Bounds:
    """What `--verify` and `--strict` hold a merge to.

    `cka`: the least linear CKA that a merge has with at least one parent on that parent's texts. `overlap`: the least
    share of nearest neighbours in common, alike. `slack`: how much worse than the worst parent a geometric figure may
    be: anisotropy, prompt and length sensitivity in cosines, uniformity in its logarithm, effective rank and margin
    as a share. `dims`: widths whose Matryoshka retention is compared; those from the model's own on are left out.
    `neighbours`: how many of a text are compared. `same`: largest difference of vectors after saving and loading.
    """

    cka: Share = 0.5
    overlap: Share = 0.2
    slack: NotNegative = 0.15
    dims: tuple[Count, ...] = (64, 128, 256, 512)
    neighbours: Count = 10
    same: NotNegative = 1e-5


@section
@dataclass(frozen=True)
class MergeRecipe:
    """Everything a merge depends on.

    `parents`: the models to merge, each a path or a mapping. `output`: folder of the result.
    `method`: a name, or a mapping with `type` and settings.
    `base`: theta_0, the model all parents were trained from. `granularity`: what shares one set of coefficients.
    `overrides`: other methods for some tensors.
    `dtype`: numbers on disk, by default the widest among the parents. `rounding`: to 16 bits is to the `nearest` or
    `stochastic` (right on average, the same for the same seed). `packaging`: what stands around the weights.
    `shard_size`: bytes a file, such as 5GB; by default one file.
    `seed`: of methods that draw, and of stochastic rounding. `unrelated`: merge although a parent does not look like a
    descendant of the base. `trust_remote_code`: run code that lies in the models' folders. `cache`: where statistics
    and architectures are kept; `null` keeps none. `verify`: the bounds of `--verify` and `--strict`. `adapter`: write
    an adapter instead of a whole model.
    """

    parents: Annotated[tuple[ParentSpec | str, ...], BeforeValidator(refuse_removed)]
    output: Word
    method: AnyMethod
    base: ParentSpec | str | None = None
    granularity: Granularity = "model"
    overrides: tuple[Override, ...] = ()
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
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
    def shard_bytes(self) -> int | None:
        """`5GB` as bytes. Errors: `RecipeError` for a number without a unit: parameters or bytes, nobody knows."""
        if self.shard_size is None:
            return None
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?)(i?)B\s*", self.shard_size, re.IGNORECASE)
        if match is None:
            raise RecipeError(
                f"shard_size {self.shard_size!r} is not a size", expected="a number and a unit of bytes, such as 5GB"
            )
        return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMG".index(match[2].upper() or " "))

    @property
    def base_spec(self) -> ParentSpec | None:
        return ParentSpec(path=self.base) if isinstance(self.base, str) else self.base

    @property
    def specs(self) -> list[ParentSpec]:
        """The parents; a bare path is a parent of weight 1."""
        return [ParentSpec(path=entry) if isinstance(entry, str) else entry for entry in self.parents]
