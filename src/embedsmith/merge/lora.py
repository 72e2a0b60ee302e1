"""LoRA adapters as parents: W + scale B A, computed piece by piece in float64, never merged to disk first.

Averaging A and B apart would be wrong: mean(B) mean(A) is not mean(B A).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedsmith.core.errors import ModelError
from embedsmith.merge.parents import Held, Parent, Weights, read_header, size_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KINDS = re.compile(
    r"^(?P<module>.+?)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|(?:token_adapter\.)?trainable_tokens_delta|(?:base_layer\.|modules_to_save\.)?(?:weight|bias))(?:\.weight)?$"
)
_ROWS = 1 << 18
"""Elements computed at once. Rows are grouped from the tensor's start, so results do not know the blocks."""


@dataclass(frozen=True)
class LowRank:
    """`whole` plus left [rows, r] times right [r, cols]; with `magnitude` [rows] (DoRA) every row gets that norm."""

    whole: Weights
    left_RK: Tensor
    right_KC: Tensor
    magnitude_R: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    def read(self, start: int, stop: int) -> Tensor:
        rows, width = self.shape
        group = max(1, _ROWS // width)
        first = start // width // group * group
        last = min(-(-stop // width), rows)
        found = [self._rows(row, min(row + group, rows)) for row in range(first, last, group)]
        return torch.cat(found)[start - first * width : stop - first * width]

    def _rows(self, first: int, last: int) -> Tensor:
        width = self.shape[1]
        whole_RC = self.whole.read(first * width, last * width).double().view(-1, width)
        sum_RC = whole_RC + self.left_RK[first:last] @ self.right_KC
        if self.magnitude_R is not None:
            sum_RC *= (self.magnitude_R[first:last] / sum_RC.norm(dim=1))[:, None]
        return sum_RC.float().view(-1)


@dataclass(frozen=True)
class NewRows:
    """`whole` with some rows replaced: tokens that were trained by themselves."""

    whole: Weights
    places: tuple[int, ...]
    row_RC: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    def read(self, start: int, stop: int) -> Tensor:
        values_E = self.whole.read(start, stop).float().clone()
        width = self.shape[1]
        for place, row_C in zip(self.places, self.row_RC, strict=True):
            begin, end = max(start, place * width), min(stop, (place + 1) * width)
            if begin < end:
                values_E[begin - start : end - start] = row_C[begin - place * width : end - place * width]
        return values_E


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).exists()


def read_config(folder: Path) -> dict[str, Any]:
    """Errors: `ModelError` for an unreadable file, another kind of adapter, or a base that was quantised."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read this file: {error}", where=folder / CONFIG) from error
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"an adapter of the kind {config.get('peft_type')}", where=folder / CONFIG, expected="a LoRA adapter"
        )
    return config


def with_adapter(base: Parent, folder: Path, name: str) -> Parent:
    """The base model with an adapter on top, as one more parent.

    Errors: `ModelError` for weights that do not fit the base or are of a kind this cannot add; `CheckpointError` for a
    missing or damaged file.
    """
    config = read_config(folder)
    header = read_header(folder / WEIGHTS)
    by_module: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, stored in header.items():
        match = _KINDS.match(key.removeprefix("base_model.model."))
        if match is None:
            raise ModelError(f"{key} is not a weight this knows how to add", where=folder, fix=_MERGE_FIRST)
        tensor = stored.read(0, size_of(stored)).view(stored.shape).float()
        by_module[match["module"]][match["kind"].rpartition(".")[2]] = tensor
    tensors = dict(base.tensors)
    for module, parts in by_module.items():
        if _is_unused(module, base):
            continue
        _add(tensors, _found(module, tensors, folder), parts, _Settings(config, module, folder))
    files = (*base.files, folder / CONFIG, folder / WEIGHTS)
    around = folder if (folder / "modules.json").exists() else base.folder
    return dataclasses.replace(base, id=name, folder=around, tensors=tensors, files=files)


_MERGE_FIRST = "merge the adapter into its base with peft (merge_and_unload), then give that folder"


@dataclass(frozen=True)
class _Settings:
    """adapter_config.json as it applies to one module."""

    config: Mapping[str, Any]
    module: str
    folder: Path

    def pattern(self, key: str, default: float) -> float:
        """`alpha_pattern` and `rank_pattern`: a regular expression on the end of the module's name."""
        for pattern, value in (self.config.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", self.module):
                return float(value)
        return default

    def scale(self, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
        alpha = self.pattern("alpha_pattern", float(self.config.get("lora_alpha") or 8))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _is_unused(module: str, base: Parent) -> bool:
    """A part no vector depends on, which the base was saved without (adapters on every `dense` reach the pooler)."""
    return any(f"{name}.weight" in base.unused and f"{name}.weight" not in base.tensors for name in _places_of(module))


def _places_of(module: str) -> list[str]:
    """Names the module may have in the encoder: adapters are trained on it, or on a model that holds it."""
    parts = module.split(".")
    return ["backbone." + ".".join(parts[skip:]) for skip in range(len(parts))]


def _found(module: str, tensors: Mapping[str, Weights], folder: Path) -> str:
    """The module's canonical name."""
    for name in _places_of(module):
        if f"{name}.weight" in tensors or name in tensors:
            return name
    raise ModelError(
        f"the adapter changes {module}, which the base does not have",
        where=folder,
        fix="give the model the adapter was trained on as its base",
    )


def _add(tensors: dict[str, Weights], name: str, parts: Mapping[str, Tensor], how: _Settings) -> None:
    """Put one module's adapter weights over the base's."""
    key = f"{name}.weight"
    if "lora_A" in parts:
        tensors[key] = _low_rank(tensors[key], parts["lora_B"], parts["lora_A"], parts, how)
    if "lora_embedding_A" in parts:
        left, right = parts["lora_embedding_A"].T, parts["lora_embedding_B"].T
        if "lora_magnitude_vector" in parts:
            raise ModelError(f"DoRA on the token table {name}", where=how.folder, fix=_MERGE_FIRST)
        tensors[key] = _checked(tensors[key], left.double() * how.scale(left.shape[1]), right.double(), None, how)
    if "trainable_tokens_delta" in parts:
        tensors[key] = NewRows(tensors[key], _places(how), parts["trainable_tokens_delta"])
    for leaf in ("weight", "bias"):
        if leaf in parts:  # modules_to_save and trained biases stand for the base's
            tensors[f"{name}.{leaf}"] = Held(parts[leaf])


def _low_rank(whole: Weights, b: Tensor, a: Tensor, parts: Mapping[str, Tensor], how: _Settings) -> LowRank:
    scale = how.scale(a.shape[0])
    magnitude = parts.get("lora_magnitude_vector")
    if how.config.get("fan_in_fan_out"):
        if magnitude is not None:
            raise ModelError(f"DoRA on the transposed layer {how.module}", where=how.folder, fix=_MERGE_FIRST)
        return _checked(whole, a.T.double() * scale, b.T.double(), None, how)
    return _checked(whole, b.double() * scale, a.double(), None if magnitude is None else magnitude.double(), how)


def _checked(whole: Weights, left: Tensor, right: Tensor, magnitude: Tensor | None, how: _Settings) -> LowRank:
    came = (left.shape[0], right.shape[1])
    if left.dim() != 2 or tuple(whole.shape) != came:
        raise ModelError(
            f"the adapter of {how.module} is for a weight {came}, the base has {tuple(whole.shape)}",
            where=how.folder,
            fix="give the model the adapter was trained on as its base",
        )
    return LowRank(whole, left.contiguous(), right.contiguous(), magnitude)


def _places(how: _Settings) -> tuple[int, ...]:
    said = how.config.get("trainable_token_indices") or ()
    if isinstance(said, Mapping):
        said = next((ids for key, ids in said.items() if how.module.endswith(key)), ())
    return tuple(int(place) for place in said)
