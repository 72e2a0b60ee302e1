"""The folder a merge leaves. Weights to disk: the header first, then blocks at their places, so that memory holds one
block. And what stands around them, so that the result is a whole embedder: configuration, modules, prompts, tokenizer,
card. Copied from one model (`like`), with what the merge decided written over it.
"""

import json
import math
import os
import shutil
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from embedsmith.core.errors import CheckpointError
from embedsmith.core.markdown import block, code, in_line, row, without_folders
from embedsmith.core.settings import to_plain
from embedsmith.merge.folders import INDEX, WEIGHTS, layer_folders, module_folders
from embedsmith.merge.merge_plan import Plan
from embedsmith.merge.method import block_of
from embedsmith.merge.parents import DTYPES
from embedsmith.merge.tensor_blocks import Block, drawn
from embedsmith.models.folder import EMBEDDING_CONFIG, POOLER_FILE, read_folder_json, write_json
from embedsmith.models.heads.splade import SPLADE_FILE
from embedsmith.models.heads.token_states import FILES

_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".h5", ".msgpack", ".gguf", ".ot", ".pkl", ".npz")
REPORT = "merge.json"
_OTHERS = ("README.md", REPORT, "adapter_config.json")
"""Files that speak of the model they were copied from."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SIXTEEN = (torch.bfloat16, torch.float16)
LOSSY = 0.1
"""Above this share of |V| lost to rounding a warning asks for float32."""


@dataclass(frozen=True)
class Slot:
    """One tensor to be written: its name in the file, its shape and its type on disk."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A safetensors file whose tensors arrive in pieces; on disk for good when its `with` block ends well.

    8 bytes of header length, the header (JSON, padded to 8 bytes), the tensors without gaps.
    """

    def __init__(self, path: Path, slots: Iterable[Slot], metadata: Mapping[str, str]) -> None:
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        self._slots: dict[str, tuple[int, torch.dtype]] = {}
        place = 0
        for slot in slots:
            self._slots[slot.name] = place, slot.dtype
            span = [place, place + slot.bytes]
            header[slot.name] = {"dtype": _NAMES[slot.dtype], "shape": list(slot.shape), "data_offsets": span}
            place += slot.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        os.pwrite(self._descriptor, struct.pack("<Q", len(text)) + text, 0)
        os.ftruncate(self._descriptor, self._data + place)

    def write(self, name: str, start: int, values_E: Tensor) -> None:
        """Put elements [start, start + E) of tensor `name` in their place. `values_E` has the type of the slot."""
        begin, dtype = self._slots[name]
        assert values_E.dtype == dtype, (name, values_E.dtype)
        data = memoryview(values_E.contiguous().view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
        place = self._data + begin + start * values_E.dtype.itemsize
        while len(data):
            done = os.pwrite(self._descriptor, data, place)
            data, place = data[done:], place + done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            os.fsync(self._descriptor)
        os.close(self._descriptor)


@dataclass
class Rounding:
    """Rounds values to the numbers of the file. With a `seed` they are rounded to bfloat16 at random, up or down with
    the probability that makes the mean right, and the random number is keyed by the element. The loss is summed by
    block of the model: error^2, |V|^2, unchanged elements, elements.
    """

    seed: int | None = None
    sums: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0, 0.0, 0.0]))

    def __call__(self, exact_E: Tensor, dtype: torch.dtype, block: Block) -> Tensor:
        """Errors: `CheckpointError` where a value is too large for the type."""
        if self.seed is not None and dtype == torch.bfloat16:
            drawn_E = drawn(self.seed, f"round {block.name}", block.start, block.stop, bits=True) & 0xFFFF
            pattern_E = exact_E.float().view(torch.int32).to(torch.int64) + drawn_E
            written_E = ((pattern_E >> 16) << 16).to(torch.int32).view(torch.float32).to(dtype)
        else:
            written_E = exact_E.float().to(dtype) if dtype != torch.float64 else exact_E.double()
            if dtype.itemsize < 4 and not torch.isfinite(written_E).all():
                fix = "set dtype to float32 or bfloat16"
                raise CheckpointError(f"a weight of {block.name} is too large for {dtype}", where="merge", fix=fix)
        if block.base_E is not None and dtype in _SIXTEEN:  # something can be lost, and measured
            base_E, made_E = block.base_E.double(), written_E.double()
            exact_E = exact_E.double()
            row = self.sums[block_of(block.name)]
            row[0] += float((made_E - exact_E).square().sum())
            row[1] += float((exact_E - base_E).square().sum())
            row[2] += float((made_E == base_E).sum())
            row[3] += len(exact_E)
        return written_E

    def report(self) -> dict[str, Any]:
        """`total`: |error| / |V| of the whole model, `None` where nothing was rounded. `blocks`: of each its `loss`
        (alike, 0 where nothing moved) and `unchanged` (share of elements as in the base)."""
        error, moved = (sum(row[place] for row in self.sums.values()) for place in (0, 1))
        blocks = {
            name: {"loss": (row[0] / row[1]) ** 0.5 if row[1] else 0.0, "unchanged": row[2] / row[3]}
            for name, row in self.sums.items()
        }
        total = None if not self.sums else (error / moved) ** 0.5 if moved else 0.0
        return {"total": total, "blocks": blocks}


def homes(plan: Plan) -> dict[Path, dict[str, Slot]]:
    """Where every tensor goes: file (relative to the result) to canonical name to its place in that file. Files of the
    encoder hold at most the recipe's `shard_size` of tensors each; a larger tensor gets a file of its own."""
    root = plan.like.model.folder
    found: dict[Path, dict[str, Slot]] = defaultdict(dict)
    inside: dict[str, Slot] = {}
    dense = [path for _, path in layer_folders(root)]
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
    """Write everything but the weights into the folder that holds the weights in `files`."""
    source = plan.like.model.folder
    _copy(source, folder)
    for path in module_folders(source):
        (folder / path.relative_to(source)).mkdir(parents=True, exist_ok=True)
        if path != source and path.exists():  # git and wheels lose the empty folder of Normalize
            _copy(path, folder / path.relative_to(source))
    backbone = folder / plan.like.backbone
    config = plan.like.model.config_folder / "config.json"
    if config.exists():  # a static table has none
        shutil.copyfile(config, backbone / "config.json")
    _edit(folder / EMBEDDING_CONFIG, {"base": None}, only_if_there=True)
    shortened = {} if plan.positions is None else {"max_position_embeddings": plan.positions}
    _edit(backbone / "config.json", {"dtype": report["dtype"], **shortened}, only_if_there=True)
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
    """Copy the files of one folder, except weights and what belongs to them. Links are followed."""
    for file in sorted(source.iterdir()):
        skipped = file.suffix in _NOT_COPIED or file.name.endswith(".index.json") or file.name in _OTHERS
        if file.is_file() and not skipped and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)


def _edit(path: Path, changes: Mapping[str, Any], only_if_there: bool = False) -> None:
    if path.exists() or not only_if_there:
        found = dict(read_folder_json(path)) if path.exists() else {}
        if "dtype" in changes:
            found.pop("torch_dtype", None)  # the old name of the same key
        write_json(path, found | dict(changes))


def _card(plan: Plan, report: Mapping[str, Any]) -> str:
    """The model card: how to use the result, and how it was made."""
    pooling = plan.like.facts.pooling
    pooled = f"with {pooling.replace('_', ' ')} pooling" if pooling else "that does not say how to pool"
    if plan.like.facts.main != "dense":
        pooled = f"for its {plan.like.facts.main} output"
    prompts = "".join(
        f"- {code(name)}: {code(json.dumps(text, ensure_ascii=False))}\n" for name, text in plan.prompts.items()
    )
    rows = []
    for one in report["models"]:
        weight = f"{one['weight']:g}" if isinstance(one["weight"], int | float) else "varies: see below"
        rows.append(row(in_line(one["id"]), code(one["path"]), weight, one["distance"], f"`{one['sha256'][:16]}`"))
    notes = "".join(f"- {in_line(note)}\n" for note in report["notes"])
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
