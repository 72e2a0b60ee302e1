"""Pieces of a sentence-transformers folder that several forms write: its list of modules, a layer over tokens, what the
model is called, and a root without what only the dense form needs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedsmith.models.folder import EMBEDDING_CONFIG, read_folder_file, read_folder_json, write_json
from embedsmith.models.heads.base import known_heads

ST = "sentence_transformers."
"""What the names of its modules begin with."""


def clear(root: Path) -> None:
    """Take away what belongs to the dense form and to heads: folders of modules, heads' files, our own config."""
    files = {EMBEDDING_CONFIG, *(head.file for head in known_heads().values())}
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
        elif (
            path.parent != root or path.suffix == ".pt" or path.name in files or path.name.endswith("_head.safetensors")
        ):
            path.unlink()


def modules_in(root: Path) -> tuple[dict[str, Any], ...]:
    return read_folder_file(tuple[dict[str, Any], ...], root / "modules.json")


def write_modules(root: Path, types: Mapping[str, str]) -> None:
    """`types`: the class of each module by its folder, in their order."""
    entries = [{"idx": n, "name": str(n), "path": path, "type": kind} for n, (path, kind) in enumerate(types.items())]
    write_json(root / "modules.json", entries)


def name_model(root: Path, kind: str, similarity: str, **more: Any) -> None:
    """What sentence-transformers is to make of the folder."""
    path = root / "config_sentence_transformers.json"
    write_json(path, {**read_folder_json(path), "model_type": kind, "similarity_fn_name": similarity, **more})
