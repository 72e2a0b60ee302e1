"""A model folder to a `Parent`: which file holds which tensor, under the names `Embedder` gives its parameters."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch

from embedsmith.core.errors import CheckpointError, ModelError
from embedsmith.merge.architecture import Architecture, architecture_of
from embedsmith.merge.parents import Parent
from embedsmith.merge.tensors import Held, Weights, read_header
from embedsmith.models.contract import POOLER_FILE, read_contract
from embedsmith.models.folder import read_folder, read_json
from embedsmith.models.splade import SPLADE_FILE
from embedsmith.models.token_heads import FILES, head_state

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED, _PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def open_folder(folder: Path, name: str, trust_remote_code: bool = False, cache: Path | None = None) -> Parent:
    """A transformers or sentence-transformers folder as a `Parent`, from headers alone.

    `cache`: a folder in which what is known of its architecture is kept.
    Errors: `CheckpointError` for missing, damaged or quantised weights; `ModelError` for a folder that is no embedder.
    """
    facts = read_folder(folder)
    refuse_quantised(facts.backbone)
    architecture = architecture_of(facts.backbone, trust_remote_code, cache)
    files = weight_files(facts.backbone)
    found = {key: weights for file in files for key, weights in file_tensors(file).items()}
    tensors, left_out = _named(found, architecture, facts.backbone)
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
    entries = read_contract(folder).modules or read_json(folder / "modules.json")
    return [(str(entry["type"]).rpartition(".")[2], folder / str(entry["path"])) for entry in entries]


def dense_folders(folder: Path) -> list[Path]:
    """Folders of the Dense modules, in their order."""
    return [path for kind, path in module_entries(folder) if kind == "Dense"]


def _named(
    found: Mapping[str, Weights], architecture: Architecture, folder: Path
) -> tuple[dict[str, Weights], list[str]]:
    """Tensors under their canonical names, and the names of those that the encoder does not have (other heads)."""
    tensors: dict[str, Weights] = {}
    left_out: list[str] = []
    for key, weights in found.items():
        name = _canonical(f"backbone.{key}", architecture)
        if name is None:
            left_out.append(key)
        elif name not in tensors:
            tensors[name] = weights
        else:
            _check_tied(name, tensors[name], weights, folder)
    missing = sorted(architecture.names - architecture.unused - tensors.keys())
    if missing:
        listing = ", ".join(name.removeprefix("backbone.") for name in missing[:3])
        raise CheckpointError(
            f"{len(missing)} weights of the architecture in config.json are missing: {listing}",
            where=folder,
            fix="use a folder that was saved with this architecture, as a whole",
        )
    return tensors, left_out


def _canonical(key: str, architecture: Architecture) -> str | None:
    if key in architecture.canonical:
        return architecture.canonical[key]
    return architecture.canonical.get("backbone." + key.removeprefix(architecture.prefix))


def _check_tied(name: str, first: Weights, second: Weights, folder: Path) -> None:
    """Two stored copies of a tensor that the architecture ties must agree, or one of them is lost."""
    total = min(1 << 22, torch.Size(first.shape).numel())
    if first.shape != second.shape or not torch.equal(first.read(0, total), second.read(0, total)):
        raise CheckpointError(
            f"{name.removeprefix('backbone.')} is stored twice with different values, but config.json ties the two",
            where=folder,
            fix="set tie_word_embeddings to false in config.json if they were trained apart, or save the model again",
        )


def weight_files(folder: Path) -> list[Path]:
    """The files of the encoder's weights. Errors: `CheckpointError` naming the missing file or shard."""
    for single, index in ((WEIGHTS, INDEX), (_PICKLED, _PICKLED_INDEX)):
        if (folder / single).exists():
            return [folder / single]
        if (folder / index).exists():
            names = sorted(set(read_json(folder / index).get("weight_map", {}).values()))
            missing = [name for name in names if not (folder / name).exists()]
            if missing:
                raise CheckpointError(
                    f"{len(missing)} of {len(names)} weight files are missing: {', '.join(missing)}",
                    where=folder,
                    fix="copy or download the folder again, as a whole",
                )
            return [folder / name for name in names]
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
        raise ModelError(
            f"the weights are quantised ({found.get('quant_method', 'unknown method')})",
            where=config,
            expected="float weights",
            fix="merge the unquantised model and quantise the result",
        )
