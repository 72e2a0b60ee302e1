"""A model folder to a `Parent`: which file holds which tensor, under the names `Embedder` gives its parameters."""

import dataclasses
import hashlib
import json
import math
import pickle
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch

from embedsmith.core.errors import CheckpointError, ModelError, RecipeError
from embedsmith.core.files import write_cache
from embedsmith.core.progress import log
from embedsmith.merge.lora_parent import CONFIG, AdapterFolder
from embedsmith.merge.parents import Held, Parent, Weights, read_header
from embedsmith.merge.recipe import MergeRecipe, ParentSpec
from embedsmith.models.backbone import UNUSED, locate, shard_names, skeleton
from embedsmith.models.folder import POOLER_FILE, EmbeddingConfig, FolderFacts, listed_modules, read_folder_json
from embedsmith.models.heads.splade import SPLADE_FILE
from embedsmith.models.heads.token_states import FILES, head_state
from embedsmith.models.layers import LAYERS


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

    @classmethod
    def of(cls, folder: Path, trust_remote_code: bool = False, cache: Path | None = None) -> Self:
        """From the model built without weights, or from the `cache` where one of the same config.json was built before:
        the code of a family takes longer to import than half a gigabyte to merge. Foreign code is never remembered.

        Errors: `ModelError` for a missing config.json or an unknown architecture.
        """
        config = folder / "config.json"
        if cache is None or trust_remote_code or not config.is_file():
            return cls.built(folder, trust_remote_code)
        versions = [version(package) for package in ("embedsmith", "transformers", "torch")]
        key = hashlib.sha256("\n".join(versions).encode() + config.read_bytes()).hexdigest()[:32]
        file = cache / f"architecture-{key}.json"
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            fields: dict[str, Any] = {k: frozenset(v) if isinstance(v, list) else v for k, v in kept.items()}
            return cls(**fields)
        except (OSError, ValueError, AttributeError, TypeError):  # not there yet, or damaged: built again
            found = cls.built(folder, trust_remote_code)
        plain = {name: sorted(value) if isinstance(value, frozenset) else value for name, value in vars(found).items()}
        write_cache(file, json.dumps(plain).encode())
        return found

    @classmethod
    def built(cls, folder: Path, trust_remote_code: bool) -> Self:
        model: Any = skeleton(folder, trust_remote_code)
        by_identity: dict[int, list[str]] = defaultdict(list)
        for key, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
            by_identity[id(tensor)].append(f"backbone.{key}")
        canonical = {key: names[0] for names in by_identity.values() for key in names}
        table = model.get_input_embeddings()
        tables = (key for key, module in model.named_modules() if module is table)
        return cls(
            names=frozenset(canonical[f"backbone.{key}"] for key in model.state_dict()),
            canonical=canonical,
            buffers=frozenset(f"backbone.{key}" for key, _ in model.named_buffers()),
            token_tables=frozenset(canonical[f"backbone.{key}.weight"] for key in tables),
            prefix=f"backbone.{model.base_model_prefix}.",
        )

    def sort(self, found: Mapping[str, Weights], folder: Path) -> tuple[dict[str, Weights], list[str]]:
        """Tensors of files under their canonical names, and the names of those that the encoder does not have (other
        heads). Two stored copies of a tensor that the architecture ties must agree in shape and in their first four
        million elements, or one of them would be lost.

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
            elif tensors[name].shape != weights.shape or not torch.equal(
                *(one.read(0, min(1 << 22, math.prod(one.shape))) for one in (tensors[name], weights))
            ):
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


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED, _PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def open_folder(folder: Path, name: str, trust_remote_code: bool = False, cache: Path | None = None) -> Parent:
    """A transformers or sentence-transformers folder as a `Parent`, from headers alone.

    `cache`: a folder in which what is known of its architecture is kept.
    Errors: `CheckpointError` for missing, damaged or quantised weights; `ModelError` for a folder that is no embedder.
    """
    facts = FolderFacts.read(folder)
    _refuse_form(facts, folder)
    config = facts.backbone / "config.json"
    quantised = read_folder_json(config).get("quantization_config") if config.exists() else None
    if quantised:  # its numbers are codes, not weights
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ModelError(
            f"the weights are quantised ({method or 'unknown method'})",
            where=config,
            expected="float weights",
            fix="merge the unquantised model and quantise the result",
        )
    architecture = Architecture.of(facts.backbone, trust_remote_code, cache)
    files, found = _stored(facts.backbone)
    tensors, left_out = architecture.sort(found, facts.backbone)
    own_files, own = _heads(folder, facts.backbone)
    files += own_files
    tensors |= own
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


def _heads(folder: Path, backbone: Path) -> tuple[list[Path], dict[str, Weights]]:
    """The files of what lies beside the encoder (projections, token heads, a pooler), and their tensors."""
    dense = [
        (path / WEIGHTS, f"projections.{place}.")
        for place, (kind, path) in enumerate(layer_folders(folder))
        if kind in ("Dense", "LayerNorm")
    ]
    heads = [(backbone / file_name, f"token_heads.{head}.linear.") for head, file_name in FILES.items()]
    optional = [(folder / POOLER_FILE, "pooler."), *heads, (backbone / SPLADE_FILE, "token_heads.sparse.")]
    files: list[Path] = []
    tensors: dict[str, Weights] = {}
    for file, prefix in [*dense, *((file, prefix) for file, prefix in optional if file.exists())]:
        files.append(file)
        held: Mapping[str, Weights] = (
            {key: Held(tensor) for key, tensor in head_state(file).items()}
            if file.suffix == ".pt"
            else read_header(file)
        )
        tensors |= {f"{prefix}{key}": weights for key, weights in held.items()}
    return files, tensors


_ALONE = {
    "splade": "make it a folder that holds its head apart first: embedsmith convert {folder} OUT model.pooling=mean",
    "stanford": "make it a folder of modules first: embedsmith convert {folder} OUT",
    "router": "merge what reads documents and what reads queries apart, each with its like",
}


def _refuse_form(facts: FolderFacts, folder: Path) -> None:
    """Errors: `ModelError` for a kind of folder in which weights lie that a merge would lose."""
    inline = facts.form == "colbert" and not (folder / "modules.json").exists()
    form = "router" if facts.query is not None else "stanford" if inline else facts.form
    if form in ("splade", "stanford", "router", "csr", "sparse_static"):
        raise ModelError(
            f"a folder of the form {form} has weights that a merge would lose",
            where=folder,
            expected="a dense, static or multi-vector model, or one with its heads beside the backbone",
            fix=_ALONE.get(form, "leave it out").format(folder=folder),
        )


def module_folders(folder: Path) -> list[Path]:
    """The folder of every module, in order; none for a plain transformers folder."""
    return [path for _, path in _listed(folder)]


def layer_folders(folder: Path) -> list[tuple[str, Path]]:
    """Kind and folder of the layers behind the pooling, or over tokens, in their order: the model's projections."""
    layers = [(kind, path) for kind, path in _listed(folder) if kind in LAYERS]
    return layers[:-1] if layers and layers[-1][0] == "Normalize" else layers


def _listed(folder: Path) -> list[tuple[str, Path]]:
    if not (folder / "modules.json").exists():
        return []
    entries = listed_modules(EmbeddingConfig.read(folder), folder)
    return [(entry.type.rpartition(".")[2], folder / entry.path) for entry in entries]


def _stored(folder: Path) -> tuple[list[Path], dict[str, Weights]]:
    """The files of the encoder's weights and their tensors: safetensors by its header, a torch.save file mapped from
    disk and never unpickled freely.

    Errors: `ModelError` for a damaged index and missing shards; `CheckpointError` for a folder without weights, or a
    damaged file.
    """
    files: list[Path] = []
    for single, index in ((WEIGHTS, INDEX), (_PICKLED, _PICKLED_INDEX)):
        if not files and (folder / single).exists():
            files = [folder / single]
        elif not files and (folder / index).exists():
            files = [folder / name for name in shard_names(folder / index)]
    if not files:
        raise CheckpointError("no weights in this folder", where=folder, expected=f"{WEIGHTS} or {_PICKLED}")
    found: dict[str, Weights] = {}
    for path in files:
        if path.suffix == ".safetensors":
            found |= read_header(path)
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"cannot read the weights ({str(error).splitlines()[0]})",
                where=path,
                fix="save the model as safetensors with a current transformers",
            ) from error
        found |= {key: Held(tensor) for key, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    return files, found


Opener = Callable[[Path, str], Parent]
"""A folder that is no adapter, under a name."""


def open_models(recipe: MergeRecipe) -> tuple[tuple[Parent, ...], Parent | None]:
    """Parents and base as tensors to be read, from headers and configurations alone. A parent's id is what the recipe
    says, else the shortest end of its path that no other parent shares.

    Errors: `RecipeError` for a pattern that matches nothing or ids that are not unique; `ModelError` and
    `CheckpointError` for folders that cannot be read.
    """
    opener = partial(open_folder, trust_remote_code=recipe.trust_remote_code, cache=recipe.cache_folder)
    base, base_spec = None, recipe.base_spec
    if base_spec is not None:
        base = _open(base_spec, base_spec.id or "base", None, opener)
    specs = [found for spec in recipe.specs for found in spec.expanded()]
    paths = [Path(spec.adapter or spec.path).parts for spec in specs]
    named: dict[str, ParentSpec] = {}
    for spec, parts in zip(specs, paths, strict=True):
        length = 1
        while length < len(parts) and sum(other[-length:] == parts[-length:] for other in paths) > 1:
            length += 1
        name = spec.id or "/".join(parts[-length:])
        if name in named:
            fix = "give every parent an id of its own, or leave one out"
            raise RecipeError(f"two parents are called {name!r}", fix=fix)
        named[name] = spec
    if base is not None and base.id in named:
        base = dataclasses.replace(base, id="theta_0")
    opened = {name: _open(spec, name, base, opener) for name, spec in named.items()}
    return tuple(
        dataclasses.replace(parent, **{key: getattr(named[name], key) for key in ("weight", "density", "trajectory")})
        for name, parent in opened.items()
    ), base


def _open(spec: ParentSpec, name: str, base: Parent | None, opener: Opener) -> Parent:
    folder = locate(spec.path, spec.revision)
    if (folder / CONFIG).exists():
        if spec.adapter is not None:
            raise RecipeError(f"{spec.path} is an adapter, and adapter {spec.adapter} is given on top", where=name)
        adapter = AdapterFolder.read(folder)
        return _with_its_heads(adapter.on(_base_of(adapter, base, opener), name), folder)
    opened = opener(folder, name)
    if spec.adapter is None:
        return opened
    folder = locate(spec.adapter)
    return _with_its_heads(AdapterFolder.read(folder).on(opened, name), folder)


def _with_its_heads(parent: Parent, folder: Path) -> Parent:
    """A base with an adapter, and what was trained beside the encoder: it lies in the adapter's folder, and takes the
    place of the base's."""
    if not (folder / "modules.json").exists():
        return parent
    files, heads = _heads(folder, folder)
    tensors = {key: weights for key, weights in parent.tensors.items() if key.startswith("backbone.")}
    return dataclasses.replace(parent, tensors=tensors | heads, files=(*parent.files, *files))


def _base_of(adapter: AdapterFolder, base: Parent | None, opener: Opener) -> Parent:
    """The model an adapter lies on: where its configuration says, else the merge's base."""
    named = adapter.config.base_model_name_or_path
    try:
        folder = locate(str(named)) if named else None
    except ModelError:
        if base is None:
            raise
        log.warning("%s: its base %s is not here; the merge's base stands in", adapter.folder, named)
        return base
    if base is not None and (folder is None or folder.resolve() == base.folder.resolve()):
        return base
    if folder is None:
        raise ModelError(
            "the adapter does not say which model it belongs to", where=adapter.folder, fix="give the merge a base"
        )
    return opener(folder, str(named))
