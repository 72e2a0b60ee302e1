"""LoRA adapters as parents: W + scale B A, computed piece by piece in float64, never merged to disk first.

Averaging A and B apart would be wrong: mean(B) mean(A) is not mean(B A).
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from embedsmith.core.errors import ModelError
from embedsmith.merge.parents import Held, Parent, View, Weights, read_header
from embedsmith.models.folder import AdapterFile, read_folder_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KINDS = re.compile(
    r"^(?P<module>.+?)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|(?:token_adapter\.)?trainable_tokens_delta|(?:base_layer\.|modules_to_save\.)?(?:weight|bias))(?:\.weight)?$"
)
_ROWS = 1 << 18
"""Elements computed at once. Rows are grouped from the tensor's start, so results do not know the blocks."""


@dataclass(frozen=True)
class LowRank(View):
    """`whole` plus left [rows, r] times right [r, cols]; with `magnitude` [rows] (DoRA) every row gets that norm."""

    left_RK: Tensor
    right_KC: Tensor
    magnitude_R: Tensor | None = None

    def read(self, start: int, stop: int) -> Tensor:
        rows, width = self.shape
        group = max(1, _ROWS // width)
        first = start // width // group * group
        last = min(-(-stop // width), rows)
        found = []
        for row in range(first, last, group):
            end = min(row + group, rows)
            whole_RC = self.whole.read(row * width, end * width).double().view(-1, width)
            sum_RC = whole_RC + self.left_RK[row:end] @ self.right_KC
            if self.magnitude_R is not None:
                sum_RC *= (self.magnitude_R[row:end] / sum_RC.norm(dim=1))[:, None]
            found.append(sum_RC.float().view(-1))
        return torch.cat(found)[start - first * width : stop - first * width]


@dataclass(frozen=True)
class NewRows(View):
    """`whole` with some rows replaced: tokens that were trained by themselves."""

    places: tuple[int, ...]
    row_RC: Tensor

    def read(self, start: int, stop: int) -> Tensor:
        values_E = self.whole.read(start, stop).float().clone()
        width = self.shape[1]
        for place, row_C in zip(self.places, self.row_RC, strict=True):
            begin, end = max(start, place * width), min(stop, (place + 1) * width)
            if begin < end:
                values_E[begin - start : end - start] = row_C[begin - place * width : end - place * width]
        return values_E


_MERGE_FIRST = "merge the adapter into its base with peft (merge_and_unload), then give that folder"
_ITS_OWN_BASE = "give the model the adapter was trained on as its base"


@dataclass(frozen=True)
class AdapterFolder:
    """A folder with a LoRA adapter, and what its adapter_config.json says."""

    folder: Path
    config: AdapterFile

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Errors: `ModelError` for an unreadable file or another kind of adapter."""
        config = read_folder_file(AdapterFile, folder / CONFIG)
        if config.peft_type != "LORA":
            raise ModelError(
                f"an adapter of the kind {config.peft_type}", where=folder / CONFIG, expected="a LoRA adapter"
            )
        return cls(folder, config)

    def on(self, base: Parent, name: str) -> Parent:
        """The base model with the adapter on top, as one more parent.

        Errors: `ModelError` for weights that do not fit the base or are of a kind this cannot add; `CheckpointError`
        for a missing or damaged file.
        """
        by_module: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, stored in read_header(self.folder / WEIGHTS).items():
            match = _KINDS.match(key.removeprefix("base_model.model."))
            if match is None:
                raise ModelError(f"{key} is not a weight this knows how to add", where=self.folder, fix=_MERGE_FIRST)
            tensor = stored.read(0, math.prod(stored.shape)).view(stored.shape).float()
            by_module[match["module"]][match["kind"].rpartition(".")[2]] = tensor
        tensors = dict(base.tensors)
        for module, parts in by_module.items():
            # adapters are trained on the encoder, or on a model that holds it
            words = module.split(".")
            places = ["backbone." + ".".join(words[skip:]) for skip in range(len(words))]
            # a part no vector depends on, which the base was saved without (adapters on every `dense` reach the pooler)
            if any(f"{place}.weight" in base.unused and f"{place}.weight" not in base.tensors for place in places):
                continue
            canonical = next((place for place in places if f"{place}.weight" in tensors or place in tensors), None)
            if canonical is None:
                raise ModelError(
                    f"the adapter changes {module}, which the base does not have", where=self.folder, fix=_ITS_OWN_BASE
                )
            self._add(tensors, canonical, module, parts)
        files = (*base.files, self.folder / CONFIG, self.folder / WEIGHTS)
        around = self.folder if (self.folder / "modules.json").exists() else base.folder
        return dataclasses.replace(base, id=name, folder=around, tensors=tensors, files=files)

    def _add(self, tensors: dict[str, Weights], name: str, module: str, parts: Mapping[str, Tensor]) -> None:
        """Put a module's adapter weights over the base's, which are called `name`. Errors: `ModelError`."""
        key = f"{name}.weight"
        magnitude = parts.get("lora_magnitude_vector")
        if "lora_A" in parts:
            a, b = parts["lora_A"], parts["lora_B"]
            left, right = (a.T, b.T) if self.config.fan_in_fan_out else (b, a)
            if self.config.fan_in_fan_out and magnitude is not None:
                raise ModelError(f"DoRA on the transposed layer {module}", where=self.folder, fix=_MERGE_FIRST)
            tensors[key] = self._low_rank(tensors[key], module, left, right, len(a), magnitude)
        if "lora_embedding_A" in parts:
            if magnitude is not None:
                raise ModelError(f"DoRA on the token table {name}", where=self.folder, fix=_MERGE_FIRST)
            left, right = parts["lora_embedding_A"].T, parts["lora_embedding_B"].T
            tensors[key] = self._low_rank(tensors[key], module, left, right, left.shape[1])
        if "trainable_tokens_delta" in parts:
            ids = self.config.trainable_token_indices or ()
            if isinstance(ids, Mapping):
                ids = next((own for end, own in ids.items() if module.endswith(end)), ())
            tensors[key] = NewRows(tensors[key], tuple(int(place) for place in ids), parts["trainable_tokens_delta"])
        for leaf in ("weight", "bias"):
            if leaf in parts:  # modules_to_save and trained biases stand for the base's
                tensors[f"{name}.{leaf}"] = Held(parts[leaf])

    def _low_rank(
        self, whole: Weights, module: str, left: Tensor, right: Tensor, rank: int, magnitude: Tensor | None = None
    ) -> LowRank:
        """With the module's scale on the left. Errors: `ModelError` where the factors do not fit the base's weight."""
        came = (left.shape[0], right.shape[1])
        if left.dim() != 2 or tuple(whole.shape) != came:
            raise ModelError(
                f"the adapter of {module} is for a weight {came}, the base has {tuple(whole.shape)}",
                where=self.folder,
                fix=_ITS_OWN_BASE,
            )
        magnitude = None if magnitude is None else magnitude.double()
        return LowRank(
            whole, (left.double() * self._scale(module, rank)).contiguous(), right.double().contiguous(), magnitude
        )

    def _scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA. A key of `alpha_pattern` is a regular expression on
        the end of the module's name."""
        alpha = self.config.lora_alpha or 8.0
        for pattern, value in (self.config.alpha_pattern or {}).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    alpha = value
                    break
            except re.error as error:
                raise ModelError(
                    f"alpha_pattern: {pattern!r} is no regular expression ({error})", where=self.folder / CONFIG
                ) from error
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)
