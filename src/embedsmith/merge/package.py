"""What stands around the weights, so that the result is a whole embedder: configuration, modules, prompts, tokenizer,
card. Copied from one model (`like`), with what the merge decided written over it."""

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from embedsmith.core.settings import to_plain
from embedsmith.merge.folders import INDEX, WEIGHTS, module_folders
from embedsmith.merge.merge_plan import Plan
from embedsmith.merge.writer import Slot
from embedsmith.models.folder import EMBEDDING_CONFIG, POOLER_FILE, read_json
from embedsmith.models.heads.splade import SPLADE_FILE
from embedsmith.models.heads.tokens import FILES

_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".h5", ".msgpack", ".gguf", ".ot", ".pkl", ".npz")
REPORT = "merge.json"
_OTHERS = ("README.md", REPORT, "adapter_config.json")
"""Files that speak of the model they were copied from."""


def homes(plan: Plan) -> dict[Path, dict[str, Slot]]:
    """Where every tensor goes: file (relative to the result) to canonical name to its place in that file. Files of the
    encoder hold at most the recipe's `shard_size` of tensors each; a larger tensor gets a file of its own."""
    root = plan.like.model.folder
    found: dict[Path, dict[str, Slot]] = defaultdict(dict)
    inside: dict[str, Slot] = {}
    dense = module_folders(root, "Dense")
    for name in plan.names:
        part, _, key = name.partition(".")
        home = inside
        if part == "projections":
            place, _, key = key.partition(".")
            home = found[dense[int(place)].relative_to(root) / WEIGHTS]
        elif part == "pooler":
            home = found[Path(POOLER_FILE)]
        elif key.startswith("sparse.lm."):
            key = key.removeprefix("sparse.")
            home = found[plan.like.backbone / SPLADE_FILE]
        elif part == "token_heads":
            head, _, key = key.partition(".linear.")
            home = found[plan.like.backbone / FILES[head]]
        home[name] = Slot(key, plan.holder(name).tensors[name].shape, plan.dtypes[name])
    most, shards = plan.recipe.shard_bytes, [dict[str, Slot]()]
    for name, slot in sorted(inside.items(), key=lambda item: -item[1].dtype.itemsize):  # keeps every tensor aligned
        filled = sum(other.bytes for other in shards[-1].values())
        if most is not None and shards[-1] and filled + slot.bytes > most:
            shards.append({})
        shards[-1][name] = slot
    names = [f"model-{place:05d}-of-{len(shards):05d}.safetensors" for place in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [WEIGHTS]
    return {plan.like.backbone / name: part for name, part in zip(names, shards, strict=True)} | found


def metadata_of(plan: Plan, file: Path, slots: Mapping[str, Slot]) -> dict[str, str]:
    """What a safetensors file says of itself; a SPLADE head's is that of the model it belongs to."""
    if file.name != SPLADE_FILE:
        return {"format": "pt"}
    model = plan.holder(next(iter(slots)))
    with safe_open(model.config_folder / SPLADE_FILE, framework="pt") as opened:
        return {**opened.metadata()}


def write_around(plan: Plan, folder: Path, files: Mapping[Path, Mapping[str, Slot]], report: Mapping[str, Any]) -> None:
    """Everything but the weights, into the folder that holds them in `files`."""
    source = plan.like.model.folder
    _copy(source, folder)
    for path in module_folders(source):
        (folder / path.relative_to(source)).mkdir(parents=True, exist_ok=True)
        if path != source and path.exists():  # git and wheels lose the empty folder of Normalize
            _copy(path, folder / path.relative_to(source))
    backbone = folder / plan.like.backbone
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
    shards = {path.name: slots.values() for path, slots in files.items() if path.name.startswith("model-")}
    if shards:
        total = sum(slot.bytes for slots in shards.values() for slot in slots)
        weight_map = {slot.name: file for file, slots in shards.items() for slot in slots}
        _edit(backbone / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / "README.md").write_text(_card(plan, report), encoding="utf-8")
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


def _card(plan: Plan, report: Mapping[str, Any]) -> str:
    """The model card: how to use the result, and how it was made."""
    pooling = plan.like.facts.pooling
    pooled = f"with {pooling.replace('_', ' ')} pooling" if pooling else "that does not say how to pool"
    prompts = "".join(f"- `{name}`: `{json.dumps(text, ensure_ascii=False)}`\n" for name, text in plan.prompts.items())
    rows = [
        f"| {entry['id']} | `{entry['path']}` | {entry['weight']:g} | {entry['distance']} | `{entry['sha256'][:16]}` |"
        for entry in report["models"]
    ]
    notes = "".join(f"- {note}\n" for note in report["notes"])
    return _CARD.format(
        architecture=(plan.like.config.get("architectures") or ["encoder"])[0],
        pooled=pooled,
        prompts=prompts or "None: texts go in as they are.\n",
        method=report["method"],
        version=report["embedsmith"],
        models="\n".join(rows),
        notes=notes,
        recipe=yaml.safe_dump(to_plain(plan.recipe), sort_keys=False, allow_unicode=True),
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

A `{architecture}` {pooled}, merged from several models with embedsmith.

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
```yaml
{recipe}```
"""
