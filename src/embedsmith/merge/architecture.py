"""What the code of an encoder says about its weights' names, without a weight."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from embedsmith.core.files import write_cache
from embedsmith.models.backbone import UNUSED, skeleton


@dataclass(frozen=True)
class Architecture:
    """`names` that a file must or may hold; `canonical`: every name, ties included, to the one used; `prefix`: what a
    model with a head of its own puts before them. All names begin with `backbone.`."""

    names: frozenset[str]
    canonical: Mapping[str, str]
    buffers: frozenset[str]
    token_tables: frozenset[str]
    prefix: str

    @property
    def unused(self) -> frozenset[str]:
        """Names no vector depends on."""
        return frozenset(name for name in self.canonical if UNUSED.search(name))


def architecture_of(folder: Path, trust_remote_code: bool = False, cache: Path | None = None) -> Architecture:
    """From the model built without weights, or from the `cache` where one of the same config.json was built before:
    the code of a family takes longer to import than half a gigabyte to merge. Foreign code is never remembered.

    Errors: `ModelError` for a missing config.json or an unknown architecture.
    """
    config = folder / "config.json"
    if cache is None or trust_remote_code or not config.is_file():
        return _built(folder, trust_remote_code)
    versions = [version(package) for package in ("embedsmith", "transformers", "torch")]
    key = hashlib.sha256("\n".join(versions).encode() + config.read_bytes()).hexdigest()[:32]
    file = cache / f"architecture-{key}.json"
    found = _load(file)
    if found is None:
        found = _built(folder, trust_remote_code)
        _save(found, file)
    return found


def _built(folder: Path, trust_remote_code: bool) -> Architecture:
    model: Any = skeleton(folder, trust_remote_code)
    by_identity: dict[int, list[str]] = defaultdict(list)
    for key, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        by_identity[id(tensor)].append(f"backbone.{key}")
    canonical = {key: names[0] for names in by_identity.values() for key in names}
    table = model.get_input_embeddings()
    return Architecture(
        names=frozenset(canonical[f"backbone.{key}"] for key in model.state_dict()),
        canonical=canonical,
        buffers=frozenset(f"backbone.{key}" for key, _ in model.named_buffers()),
        token_tables=frozenset(canonical[f"backbone.{key}.weight"] for key, m in model.named_modules() if m is table),
        prefix=f"backbone.{model.base_model_prefix}.",
    )


def _save(found: Architecture, file: Path) -> None:
    sets = {part: sorted(getattr(found, part)) for part in ("names", "buffers", "token_tables")}
    content = {**sets, "canonical": dict(found.canonical), "prefix": found.prefix}
    write_cache(file, json.dumps(content).encode())


def _load(file: Path) -> Architecture | None:
    """`None` where there is none, or a file that cannot be read: the model is then built again."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        sets = {part: frozenset(kept[part]) for part in ("names", "buffers", "token_tables")}
        return Architecture(**sets, canonical=kept["canonical"], prefix=kept["prefix"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
