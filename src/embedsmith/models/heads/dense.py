"""The dense head: linear layers between pooling and normalisation, in the shape of sentence-transformers' `Dense`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file
from torch import Tensor, nn

from embedsmith.core.device import check_fits
from embedsmith.core.errors import ModelError
from embedsmith.core.settings import Width, section
from embedsmith.core.shelf import heads
from embedsmith.models.heads.base import cpu_state

_NAMES = (
    "CELU ELU GELU Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish PReLU ReLU ReLU6 SELU Sigmoid SiLU"
    " Softplus Softsign Tanh Tanhshrink"
)
ACTIVATIONS: Mapping[str, type[nn.Module]] = {name: getattr(nn, name) for name in _NAMES.split(" ")}
"""Known by exact name. A name from a folder is looked up here and never imported."""


@section
@dataclass(frozen=True)
class HeadConfig:
    """A new dense head. All matrices start orthogonal (orthonormal rows or columns), so a head without activation keeps
    the geometry of the backbone as well as its width allows; the defaults of `mlp` are EmbeddingGemma's. Without a bias
    it also commutes with scaling.

    `out`: numbers in a text's vector.
    `type`: W x + b (`linear`), or W2 act(W1 x + b1) + b2 (`mlp`).
    `hidden`: width between the two layers of `mlp`, by default four times `out`.
    `activation`: by its name in torch.nn, such as `GELU`.
    `bias`: whether the layers have one.
    """

    out: Width
    type: Literal["linear", "mlp"] = "linear"
    hidden: Width | None = None
    activation: str = "Identity"
    bias: bool = False

    def build(self, width: int) -> list[Projection]:
        """Errors: `ModelError` for an unknown activation."""
        hidden = self.hidden or 4 * self.out
        if self.type == "linear":
            return [_orthogonal(Projection(width, self.out, self.bias, self.activation))]
        first = Projection(width, hidden, self.bias, self.activation)
        return [_orthogonal(first), _orthogonal(Projection(hidden, self.out, self.bias))]


@heads.register("dense", formula="normalise(W x + b) of the pooled state x, or x itself")
class Projection(nn.Module):
    """activation(W x + b), plus x (or R x, where widths differ) with `residual`. Kept in fp32 whatever the backbone is.

    `activation`: `Tanh`, or a full name such as `torch.nn.modules.activation.Tanh`.
    Errors: `ModelError` for an activation that is not in `ACTIVATIONS`.
    """

    def __init__(
        self, width_in: int, width_out: int, bias: bool = True, activation: str = "Identity", residual: bool = False
    ) -> None:
        super().__init__()
        self.use_residual = residual
        check_fits(4 * width_in * width_out, f"a layer from {width_in:,} to {width_out:,} numbers")
        self.linear = nn.Linear(width_in, width_out, bias=bias)
        module, _, short = activation.rpartition(".")
        if short not in ACTIVATIONS or (module and not module.startswith("torch.nn")):
            raise ModelError(f"unknown activation {activation!r}", expected=f"one of {', '.join(ACTIVATIONS)}")
        self.activation_function = ACTIVATIONS[short]()  # sentence-transformers' name in the weights file
        self.residual = nn.Linear(width_in, width_out, bias=False) if residual and width_in != width_out else None

    @property
    def activation(self) -> str:
        """The full name that sentence-transformers imports."""
        kind = type(self.activation_function)
        return f"{kind.__module__}.{kind.__qualname__}"

    @property
    def width_out(self) -> int:
        return self.linear.out_features

    @property
    def shape(self) -> tuple[object, ...]:
        """What two of them must share to be the same function of their weights."""
        return ("Dense", self.linear.in_features, self.linear.out_features, self.activation, self.use_residual)

    def forward(self, vector_ND: Tensor) -> Tensor:
        out_ND: Tensor = self.activation_function(self.linear(vector_ND))
        if not self.use_residual:
            return out_ND
        return out_ND + (vector_ND if self.residual is None else self.residual(vector_ND))

    def save(self, folder: Path, **more: object) -> None:
        """As sentence-transformers' `Dense`. The activation is always named: a Dense without one means Tanh. `more`
        goes into its config.json."""
        config: dict[str, object] = {
            "in_features": self.linear.in_features,
            "out_features": self.linear.out_features,
            "bias": self.linear.bias is not None,
            "activation_function": self.activation,
        }
        config |= ({"use_residual": True} if self.use_residual else {}) | more
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(cpu_state(self), folder / "model.safetensors")


def _orthogonal(projection: Projection) -> Projection:
    nn.init.orthogonal_(projection.linear.weight)
    if projection.linear.bias is not None:
        nn.init.zeros_(projection.linear.bias)
    return projection
