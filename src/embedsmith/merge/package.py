"""What stands around the weights, so that the result is a whole embedder: configuration, modules, prompts, tokenizer,
card. Copied from one model (`like`), with what the merge decided written over it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

from embedsmith.core.markdown import block, code, row, without_folders, words
from embedsmith.core.settings import to_plain
from embedsmith.merge.folders import INDEX, WEIGHTS, dense_folders, module_entries
from embedsmith.merge.merge_plan import Plan
from embedsmith.merge.writer import Slot, index_of, shards
from embedsmith.models.folder import EMBEDDING_CONFIG, POOLER_FILE, read_json
from embedsmith.models.heads.splade import SPLADE_FILE
from embedsmith.models.heads.tokens import FILES

_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".h5", ".msgpack", ".gguf", ".ot", ".pkl", ".npz")
REPORT = "merge.json"
_OTHERS = ("README.md", REPORT, "adapter_config.json")
"""Files that speak of the model they were copied from."""


def homes(plan: Plan, dtype_of: Mapping[str, torch.dtype], shard_bytes: int | None) -> dict[Path, dict[str, Slot]]:
    """Where every tensor goes: file (relative to the result) to canonical name to its place in that file."""
    root = plan.like.model.folder
    backbone = backbone_place(plan)
    found: dict[Path, dict[str, Slot]] = {}
    inside: dict[str, Slot] = {}
    dense = dense_folders(root)
    for name in plan.names:
        shape = plan.holder(name).tensors[name].shape
        part, _, rest = name.partition(".")
        if part == "backbone":
            inside[name] = Slot(rest, shape, dtype_of[name])
        elif part == "projections":
            place, _, key = rest.partition(".")
            file = dense[int(place)].relative_to(root) / WEIGHTS
            found.setdefault(file, {})[name] = Slot(key, shape, dtype_of[name])
        elif part == "pooler":
            found.setdefault(Path(POOLER_FILE), {})[name] = Slot(rest, shape, dtype_of[name])
        elif rest.startswith("sparse.lm."):
            found.setdefault(backbone / SPLADE_FILE, {})[name] = Slot(
                rest.removeprefix("sparse."), shape, dtype_of[name]
            )
        else:
            head, _, key = rest.partition(".linear.")
            found.setdefault(backbone / FILES[head], {})[name] = Slot(key, shape, dtype_of[name])
    ordered = sorted(inside.items(), key=lambda item: -item[1].dtype.itemsize)  # stable: keeps every tensor aligned
    parts = shards(ordered, shard_bytes)
    names = [f"model-{place:05d}-of-{len(parts):05d}.safetensors" for place in range(1, len(parts) + 1)]
    names = names if len(parts) > 1 else [WEIGHTS]
    return {backbone / name: part for name, part in zip(names, parts, strict=True)} | found


def metadata_of(plan: Plan, file: Path, slots: Mapping[str, Slot]) -> dict[str, str]:
    """What a safetensors file says of itself; a SPLADE head's is that of the model it belongs to."""
    if file.name != SPLADE_FILE:
        return {"format": "pt"}
    model = plan.holder(next(iter(slots)))
    with safe_open(model.config_folder / SPLADE_FILE, framework="pt") as opened:
        return {**opened.metadata()}


def backbone_place(plan: Plan) -> Path:
    """The encoder's folder, relative to the result."""
    return plan.like.facts.backbone.resolve().relative_to(plan.like.model.folder.resolve())


def write_around(plan: Plan, folder: Path, report: Mapping[str, Any]) -> None:
    """Everything but the weights, into the folder that holds them."""
    source = plan.like.model.folder
    _copy(source, folder)
    for _, path in module_entries(source):
        (folder / path.relative_to(source)).mkdir(parents=True, exist_ok=True)
        if path != source and path.exists():  # git and wheels lose the empty folder of Normalize
            _copy(path, folder / path.relative_to(source))
    backbone = folder / backbone_place(plan)
    shutil.copyfile(plan.like.model.config_folder / "config.json", backbone / "config.json")
    _edit(folder / EMBEDDING_CONFIG, {"base": None}, only_if_there=True)
    shortened = {} if plan.positions is None else {"max_position_embeddings": plan.positions}
    _edit(backbone / "config.json", {"dtype": report["dtype"], **shortened})
    if plan.max_length is not None:
        for place in (backbone, folder):
            _edit(place / "sentence_bert_config.json", {"max_seq_length": plan.max_length}, only_if_there=True)
        _edit(backbone / "tokenizer_config.json", {"model_max_length": plan.max_length}, only_if_there=True)
    general = {"prompts": dict(plan.prompts), "default_prompt_name": plan.default_prompt}
    _edit(folder / "config_sentence_transformers.json", general, only_if_there=not plan.prompts)
    (folder / "README.md").write_text(card(plan, report), encoding="utf-8")
    (folder / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    """The files of one folder, but for weights and what belongs to them. Links are followed."""
    for file in sorted(source.iterdir()):
        skipped = file.suffix in _NOT_COPIED or file.name.endswith(".index.json") or file.name in _OTHERS
        if file.is_file() and not skipped and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)


def _edit(path: Path, changes: Mapping[str, Any], only_if_there: bool = False) -> None:
    if not path.exists() and only_if_there:
        return
    found = dict(read_json(path)) if path.exists() else {}
    if "dtype" in changes:
        found.pop("torch_dtype", None)  # the old name of the same key
    path.write_text(json.dumps(found | dict(changes), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def card(plan: Plan, report: Mapping[str, Any]) -> str:
    """The model card: how to use the result, and how it was made."""
    pooling = plan.like.facts.pooling
    pooled = f"with {pooling.replace('_', ' ')} pooling" if pooling else "that does not say how to pool"
    prompts = "".join(
        f"- {code(name)}: {code(json.dumps(text, ensure_ascii=False))}\n" for name, text in plan.prompts.items()
    )
    rows = [
        row(words(one["id"]), code(one["path"]), f"{one['weight']:g}", one["distance"], f"`{one['sha256'][:16]}`")
        for one in report["models"]
    ]
    notes = "".join(f"- {words(note)}\n" for note in report["notes"])
    recipe = yaml.safe_dump(without_folders(to_plain(plan.recipe)), sort_keys=False, allow_unicode=True)
    return _CARD.format(
        architecture=code((plan.like.config.get("architectures") or ["encoder"])[0]),
        pooled=pooled,
        prompts=prompts or "None: texts go in as they are.\n",
        method=report["method"],
        version=report["embedsmith"],
        models="\n".join(rows),
        notes=notes,
        recipe=block(recipe, "yaml"),
    )


_CARD = """\
---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- feature-extraction
- sentence-similarity
- merge
- embedsmith
---

# Merged text embedding model

A {architecture} {pooled}, merged from several models with embedsmith.

## Prompts

{prompts}
## Use

```python
import embedsmith as es

model = es.load("path/to/this/folder")
vectors = model.encode(["what is late interaction?"], role="query")
```

## How it was merged

By `{method}` with embedsmith {version}; all figures are in `merge.json`.

| model | from | weight | distance from the base | SHA-256 |
|---|---|---|---|---|
{models}

{notes}
{recipe}
"""


def write_index(folder: Path, files: Mapping[Path, Mapping[str, Slot]]) -> None:
    """The index of a backbone in several files."""
    parts = {path: slots for path, slots in files.items() if path.name.startswith("model-")}
    if parts:
        place = next(iter(parts)).parent
        text = index_of({path.name: slots.values() for path, slots in parts.items()})
        (folder / place / INDEX).write_text(text, encoding="utf-8")
