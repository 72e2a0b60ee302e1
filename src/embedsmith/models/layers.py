"""What may stand between pooling and the finished vector, in the forms of sentence-transformers' modules: `Dense`
(heads/dense.py), `LayerNorm`, `Dropout`, and a `Normalize` that is not the last.

A kind more is one class with these members and its place in `LAYERS`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from embedsmith.core import inputs
from embedsmith.core.errors import ModelError
from embedsmith.core.settings import Share, Width
from embedsmith.models.heads.base import cpu_state
from embedsmith.models.heads.dense import Projection

WEIGHTS = "model.safetensors"
S = TypeVar("S")
M = TypeVar("M", bound=nn.Module)


class Layer(nn.Module):
    """A layer of a kind that has no width of its own: [N, D] to [N, D], in fp32.

    `kind`: the name of the module in sentence-transformers. `width_out`: of its result, `None` for as wide as it came.
    `shape`: what two of them must share to be the same function of their weights.
    """

    kind: ClassVar[str]
    width_out: int | None = None

    @property
    def shape(self) -> tuple[object, ...]:
        return (self.kind,)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)


class LayerNorm(Layer):
    """(x - mean) / std, scaled and shifted by learned numbers."""

    kind = "LayerNorm"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)  # sentence-transformers' name in the weights file
        self.width_out = width

    @property
    def shape(self) -> tuple[object, ...]:
        return (self.kind, self.width_out)

    def forward(self, vector_ND: Tensor) -> Tensor:
        normed_ND: Tensor = self.norm(vector_ND)
        return normed_ND

    def save(self, folder: Path) -> None:
        super().save(folder)
        _write(folder, {"dimension": self.width_out})
        save_file(cpu_state(self), folder / WEIGHTS)


class Dropout(Layer):
    """Drops coordinates in training, and does nothing else."""

    kind = "Dropout"

    def __init__(self, share: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(share)

    @property
    def shape(self) -> tuple[object, ...]:
        return (self.kind, self.dropout.p)

    def forward(self, vector_ND: Tensor) -> Tensor:
        kept_ND: Tensor = self.dropout(vector_ND)
        return kept_ND

    def save(self, folder: Path) -> None:
        super().save(folder)
        _write(folder, {"dropout": self.dropout.p})


class UnitLength(Layer):
    """x / |x| before other layers; the last one of a model is the setting `normalize`."""

    kind = "Normalize"

    def forward(self, vector_ND: Tensor) -> Tensor:
        return F.normalize(vector_ND, dim=-1)


@dataclass(frozen=True)
class _DenseFile:
    """The config.json of a Dense."""

    in_features: Width
    out_features: Width
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"
    use_residual: bool = False


@dataclass(frozen=True)
class _NormFile:
    """The config.json of a LayerNorm."""

    dimension: Width


@dataclass(frozen=True)
class _DropoutFile:
    """The config.json of a Dropout."""

    dropout: Share = 0.2


def _dense(folder: Path) -> Projection:
    config = _config(folder, _DenseFile)
    widths = config.in_features, config.out_features
    try:
        projection = Projection(*widths, config.bias, config.activation_function, config.use_residual)
    except ModelError as error:
        raise ModelError(error.what, where=folder / "config.json", expected=error.expected) from error
    return _with_weights(projection, folder, "Dense")


LAYERS: Mapping[str, Callable[[Path], Any]] = {
    "Dense": _dense,
    "LayerNorm": lambda folder: _with_weights(LayerNorm(_config(folder, _NormFile).dimension), folder, "LayerNorm"),
    "Dropout": lambda folder: Dropout(_config(folder, _DropoutFile).dropout),
    "Normalize": lambda folder: UnitLength(),
}
"""By the name of the module: how it is read from its folder."""


def module_kind(layer: Any) -> str:
    """The name of its module in sentence-transformers."""
    return "Dense" if isinstance(layer, Projection) else str(layer.kind)


def width_after(layers: Iterable[Any], width: int) -> int:
    """The width of a vector that went through all layers."""
    for layer in layers:
        width = layer.width_out or width
    return width


def check_widths(layers: Iterable[Any], width: int, folder: Path) -> None:
    """Errors: `ModelError` for a layer that is not as wide as what it is given."""
    for place, layer in enumerate(layers):
        takes = layer.linear.in_features if isinstance(layer, Projection) else layer.width_out
        if takes not in (None, width):
            raise ModelError(
                f"layer {place + 1} ({module_kind(layer)}) takes {takes} numbers, and gets {width}",
                where=folder,
                expected="a module that belongs to this model",
                fix="copy the folder again, as a whole",
            )
        width = layer.width_out or width


def _config(folder: Path, schema: type[S]) -> S:
    fix = "copy the folder again, as a whole"
    path = folder / "config.json"
    if not path.exists():
        raise ModelError("this file is missing", where=path, fix=fix)
    return inputs.read_typed(path, schema, ModelError, fix=fix, strict=True)


def _with_weights(module: M, folder: Path, kind: str) -> M:
    weights = folder / WEIGHTS
    if not weights.exists():
        raise ModelError(
            f"the weights of a {kind} module are missing",
            where=weights,
            expected=WEIGHTS,
            fix="save the model again with a current sentence-transformers, or copy the missing file",
        )
    try:
        module.load_state_dict(load_file(weights))
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ModelError(f"cannot read the weights of a {kind} module: {error}", where=weights) from error
    return module


def _write(folder: Path, config: Mapping[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
