"""A model folder to a `Parent`: which file holds which tensor, under the names `Embedder` gives its parameters."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import pickle
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from embedsmith.core.errors import CheckpointError, ModelError, RecipeError
from embedsmith.core.files import write_cache
from embedsmith.core.progress import log
from embedsmith.merge.lora_parent import is_adapter, read_config, with_adapter
from embedsmith.merge.parents import Held, Parent, Weights, read_header
from embedsmith.merge.recipe import MergeRecipe, ParentSpec
from embedsmith.models.backbone import UNUSED, locate, shard_names, skeleton
from embedsmith.models.folder import POOLER_FILE, EmbeddingConfig, FolderFacts, listed_modules, read_json
from embedsmith.models.heads.splade import SPLADE_FILE
from embedsmith.models.heads.tokens import FILES, head_state


@dataclass(frozen=True)
class Architecture:
    """What the code of an encoder says about its weights' names, without a weight.

    `names` that a file must or may hold; `canonical`: every name, ties included, to the one used; `prefix`: what a
    model with a head of its own puts before them. All names begin with `backbone.`.
    """

    names: frozenset[str]
    canonical: Mapping[str, str]
    buffers: frozenset[str]
    token_tables: frozenset[str]
    prefix: str

    @property
    def unused(self) -> frozenset[str]:
        """Names no vector depends on."""
        return frozenset(name for name in self.canonical if UNUSED.search(name))

    @staticmethod
    def of(folder: Path, trust_remote_code: bool = False, cache: Path | None = None) -> Architecture:
        """From the model built without weights, or from the `cache` where one of the same config.json was built before:
        the code of a family takes longer to import than half a gigabyte to merge. Foreign code is never remembered.

        Errors: `ModelError` for a missing config.json or an unknown architecture.
        """
        config = folder / "config.json"
        if cache is None or trust_remote_code or not config.is_file():
            return Architecture.built(folder, trust_remote_code)
        versions = [version(package) for package in ("embedsmith", "transformers", "torch")]
        key = hashlib.sha256("\n".join(versions).encode() + config.read_bytes()).hexdigest()[:32]
        file = cache / f"architecture-{key}.json"
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            sets = {part: frozenset(kept[part]) for part in ("names", "buffers", "token_tables")}
            return Architecture(**sets, canonical=kept["canonical"], prefix=kept["prefix"])
        except (OSError, ValueError, KeyError, TypeError):  # not there yet, or damaged: built again
            found = Architecture.built(folder, trust_remote_code)
        lists = {part: sorted(getattr(found, part)) for part in ("names", "buffers", "token_tables")}
        content = {**lists, "canonical": dict(found.canonical), "prefix": found.prefix}
        write_cache(file, json.dumps(content).encode())
        return found

    @staticmethod
    def built(folder: Path, trust_remote_code: bool) -> Architecture:
        model: Any = skeleton(folder, trust_remote_code)
        by_identity: dict[int, list[str]] = defaultdict(list)
        for key, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
            by_identity[id(tensor)].append(f"backbone.{key}")
        canonical = {key: names[0] for names in by_identity.values() for key in names}
        table = model.get_input_embeddings()
        tables = (key for key, module in model.named_modules() if module is table)
        return Architecture(
            names=frozenset(canonical[f"backbone.{key}"] for key in model.state_dict()),
            canonical=canonical,
            buffers=frozenset(f"backbone.{key}" for key, _ in model.named_buffers()),
            token_tables=frozenset(canonical[f"backbone.{key}.weight"] for key in tables),
            prefix=f"backbone.{model.base_model_prefix}.",
        )

    def sort(self, found: Mapping[str, Weights], folder: Path) -> tuple[dict[str, Weights], list[str]]:
        """Tensors of files under their canonical names, and the names of those that the encoder does not have (other
        heads). Two stored copies of a tensor that the architecture ties must agree, or one of them would be lost.

        Errors: `CheckpointError` for copies that differ, and for missing weights.
        """
        tensors: dict[str, Weights] = {}
        left_out: list[str] = []
        for key, weights in found.items():
            stored = f"backbone.{key}"
            name = self.canonical.get(stored) or self.canonical.get("backbone." + stored.removeprefix(self.prefix))
            if name is None:
                left_out.append(key)
            elif name not in tensors:
                tensors[name] = weights
            elif not _start_alike(tensors[name], weights):
                raise CheckpointError(
                    f"{name.removeprefix('backbone.')} is stored twice with different values, but config.json ties"
                    " the two",
                    where=folder,
                    fix="set tie_word_embeddings to false in config.json if they were trained apart, or save the model"
                    " again",
                )
        missing = sorted(self.names - self.unused - tensors.keys())
        if missing:
            listing = ", ".join(name.removeprefix("backbone.") for name in missing[:3])
            raise CheckpointError(
                f"{len(missing)} weights of the architecture in config.json are missing: {listing}",
                where=folder,
                fix="use a folder that was saved with this architecture, as a whole",
            )
        return tensors, left_out


def _start_alike(first: Weights, second: Weights) -> bool:
    """Whether two tensors have one shape and agree in their first four million elements."""
    total = min(1 << 22, torch.Size(first.shape).numel())
    return first.shape == second.shape and torch.equal(first.read(0, total), second.read(0, total))


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED, _PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def open_folder(folder: Path, name: str, trust_remote_code: bool = False, cache: Path | None = None) -> Parent:
    """A transformers or sentence-transformers folder as a `Parent`, from headers alone.

    `cache`: a folder in which what is known of its architecture is kept.
    Errors: `CheckpointError` for missing, damaged or quantised weights; `ModelError` for a folder that is no embedder.
    """
    facts = FolderFacts.read(folder)
    refuse_quantised(facts.backbone)
    architecture = Architecture.of(facts.backbone, trust_remote_code, cache)
    files = weight_files(facts.backbone)
    found = {key: weights for file in files for key, weights in file_tensors(file).items()}
    tensors, left_out = architecture.sort(found, facts.backbone)
    for place, path in enumerate(dense_folders(folder)):
        files.append(path / WEIGHTS)
        tensors |= {f"projections.{place}.{key}": held for key, held in read_header(path / WEIGHTS).items()}
    if (folder / POOLER_FILE).exists():
        files.append(folder / POOLER_FILE)
        tensors |= {f"pooler.{key}": held for key, held in read_header(folder / POOLER_FILE).items()}
    for head, file_name in FILES.items():
        if (facts.backbone / file_name).exists():
            files.append(facts.backbone / file_name)
            state = head_state(facts.backbone / file_name)
            tensors |= {f"token_heads.{head}.linear.{key}": Held(tensor) for key, tensor in state.items()}
    splade = facts.backbone / SPLADE_FILE
    if splade.exists():
        files.append(splade)
        tensors |= {f"token_heads.sparse.{key}": held for key, held in read_header(splade).items()}
    return Parent(
        id=name,
        folder=folder,
        config_folder=facts.backbone,
        tensors=tensors,
        files=tuple(files),
        unused=architecture.unused,
        buffers=architecture.buffers,
        token_tables=architecture.token_tables,
        left_out=tuple(left_out),
    )


def module_entries(folder: Path) -> list[tuple[str, Path]]:
    """Kind and folder of every module, in order; none for a plain transformers folder."""
    if not (folder / "modules.json").exists():
        return []
    entries = listed_modules(EmbeddingConfig.read(folder), folder)
    return [(entry.type.rpartition(".")[2], folder / entry.path) for entry in entries]


def dense_folders(folder: Path) -> list[Path]:
    """Folders of the Dense modules, in their order."""
    return [path for kind, path in module_entries(folder) if kind == "Dense"]


def weight_files(folder: Path) -> list[Path]:
    """The files of the encoder's weights.

    Errors: `ModelError` for a damaged index and missing shards, `CheckpointError` for a folder without weights.
    """
    for single, index in ((WEIGHTS, INDEX), (_PICKLED, _PICKLED_INDEX)):
        if (folder / single).exists():
            return [folder / single]
        if (folder / index).exists():
            return [folder / name for name in shard_names(folder / index)]
    raise CheckpointError("no weights in this folder", where=folder, expected=f"{WEIGHTS} or {_PICKLED}")


def file_tensors(path: Path) -> Mapping[str, Weights]:
    """Tensors of one file: safetensors by its header, a torch.save file mapped from disk and never unpickled freely."""
    if path.suffix == ".safetensors":
        return read_header(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"cannot read the weights ({str(error).splitlines()[0]})",
            where=path,
            fix="save the model as safetensors with a current transformers",
        ) from error
    return {key: Held(tensor) for key, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def refuse_quantised(folder: Path) -> None:
    """Errors: `ModelError` for weights that were quantised: their numbers are codes, not weights."""
    config = folder / "config.json"
    found = read_json(config).get("quantization_config") if config.exists() else None
    if found:
        method = found.get("quant_method") if isinstance(found, dict) else None
        raise ModelError(
            f"the weights are quantised ({method or 'unknown method'})",
            where=config,
            expected="float weights",
            fix="merge the unquantised model and quantise the result",
        )


Opener = Callable[[Path, str], Parent]
"""A folder that is no adapter, under a name."""


def open_models(recipe: MergeRecipe) -> tuple[tuple[Parent, ...], Parent | None]:
    """Parents and base as tensors to be read, from headers and configurations alone.

    Errors: `RecipeError` for a pattern that matches nothing or ids that are not unique; `ModelError` and
    `CheckpointError` for folders that cannot be read.
    """
    opener = partial(open_folder, trust_remote_code=recipe.trust_remote_code, cache=recipe.cache_folder)
    base, spec = None, recipe.base_spec
    if spec is not None:
        base = _open(spec, spec.id or "base", None, opener)
    specs = [found for spec in recipe.specs for found in expand(spec)]
    names = unique_names(specs)
    if base is not None and base.id in names:
        base = dataclasses.replace(base, id="theta_0")
    parents = [
        dataclasses.replace(
            _open(spec, name, base, opener),
            weight=spec.weight,
            trajectory=spec.trajectory,
        )
        for spec, name in zip(specs, names, strict=True)
    ]
    return tuple(parents), base


def expand(spec: ParentSpec) -> list[ParentSpec]:
    """One entry for every folder a pattern matches, in natural order (step-20 before step-100), the `last` so many.

    The checkpoints of a pattern are one trajectory unless the recipe names another.
    """
    if not any(mark in spec.path for mark in "*?["):
        return [spec]

    def natural(path: str) -> list[tuple[int, int | str]]:
        return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path) if part]

    matches = sorted(filter(os.path.isdir, glob.glob(str(Path(spec.path).expanduser()))), key=natural)
    if not matches:
        raise RecipeError(f"no folder matches the pattern {spec.path!r}", fix="check the path")
    chosen = matches[-spec.last :] if spec.last is not None else matches
    columns = list(zip(*(Path(match).parts for match in matches), strict=False))
    differing = [place for place, column in enumerate(columns) if len(set(column)) > 1]

    def own_part(path: str) -> str:
        parts = Path(path).parts
        return "/".join(parts[place] for place in differing) or parts[-1]

    return [
        dataclasses.replace(
            spec,
            path=path,
            id=f"{spec.id}/{own_part(path)}" if spec.id else None,
            trajectory=spec.trajectory or spec.id or spec.path,
            last=None,
        )
        for path in chosen
    ]


def unique_names(specs: Sequence[ParentSpec]) -> list[str]:
    """Every parent's id: what the recipe says, else the shortest end of its path that no other parent shares.

    Errors: `RecipeError` when the recipe gives two parents one id.
    """
    paths = [Path(spec.adapter or spec.path).parts for spec in specs]
    names: list[str] = []
    for spec, parts in zip(specs, paths, strict=True):
        length = 1
        while length < len(parts) and sum(other[-length:] == parts[-length:] for other in paths) > 1:
            length += 1
        names.append(spec.id or "/".join(parts[-length:]))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(
            f"two parents are called {twice[0]!r}", fix="give every parent an id of its own, or leave one out"
        )
    return names


def _open(spec: ParentSpec, name: str, base: Parent | None, opener: Opener) -> Parent:
    folder = locate(spec.path, spec.revision)
    if is_adapter(folder):
        if spec.adapter is not None:
            raise RecipeError(f"{spec.path} is an adapter, and adapter {spec.adapter} is given on top", where=name)
        return with_adapter(_base_of(folder, base, opener), folder, name)
    opened = opener(folder, name)
    if spec.adapter is None:
        return opened
    return with_adapter(opened, locate(spec.adapter), name)


def _base_of(adapter: Path, base: Parent | None, opener: Opener) -> Parent:
    """The model an adapter lies on: where its configuration says, else the merge's base."""
    named = read_config(adapter).base_model_name_or_path
    try:
        folder = locate(str(named)) if named else None
    except ModelError:
        if base is None:
            raise
        log.warning("%s: its base %s is not here; the merge's base stands in", adapter, named)
        folder = None
    if folder is None:
        if base is None:
            raise ModelError(
                "the adapter does not say which model it belongs to", where=adapter, fix="give the merge a base"
            )
        return base
    refuse_quantised(folder)
    if base is not None and folder.resolve() == base.folder.resolve():
        return base
    return opener(folder, str(named))
