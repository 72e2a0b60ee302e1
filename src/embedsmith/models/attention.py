"""The attention switch: `native`, `causal`, `bidirectional` or `softmask`, for any family transformers knows.

No model class is copied or patched. In order: the config's flags, then the modules' flags, then a mask of four
dimensions; after each the self-test of self_test.py decides whether it worked. What was achieved is recorded.

Masks of four dimensions are for what a transformer's own mask cannot express. Every mask builder of transformers hands
a 4-D mask through untouched: `sdpa` takes booleans (True: sees) or an added bias, `eager` an added bias. Neither limits
of a sliding window nor of a chunk survive such a mask.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from embedsmith.core.errors import ModelError
from embedsmith.core.progress import log
from embedsmith.core.settings import section
from embedsmith.models.self_test import Visibility, probe
from embedsmith.models.varlen import VARLEN


@section
@dataclass(frozen=True)
class SoftMask:
    """Conan v2's way from causal to bidirectional attention: with progress t and alpha(t) rising from 0 to 1,

        M_ij = 1 for j <= i, else min(alpha * l / i, 1)     `axis: row`, the printed equation
        M_ij = 1 for j <= i, else min(alpha * l / j, 1)     `axis: col`, in which the front columns saturate first

    for query i, key j (both from 1) of a text of l tokens. M = causal mask at 0, all ones at 1; its rank never rises.

    `axis`: whether l is divided by i (`row`) or by j (`col`).
    `schedule`: alpha = t, t^2 (`accelerating`) or 1 - (1 - t)^2 (`decelerating`).

    How M enters attention is reconstructed: log M is added to the scores, which weighs the exponentials by M.
    Source: Conan-embedding-v2 (2509.12892); two renderings disagree on l/i, see docs/decoders.md.
    """

    axis: Literal["row", "col"] = "row"
    schedule: Literal["linear", "accelerating", "decelerating"] = "linear"

    def alpha(self, fraction: float) -> float:
        """alpha at this share of the run, which must lie in 0..1."""
        if not 0 <= fraction <= 1:
            raise ModelError(f"softmask at {fraction} of the run", expected="a share from 0 to 1")
        return {"linear": fraction, "accelerating": fraction**2, "decelerating": 1 - (1 - fraction) ** 2}[self.schedule]

    def weight(self, mask_NT: Tensor, alpha: float) -> Tensor:
        """M_NTT in fp32; positions count real tokens only, so both padding sides are right."""
        place_NT = mask_NT.cumsum(1).float()
        length_N11 = mask_NT.sum(1).float()[:, None, None]
        i_NT1, j_N1T = place_NT[:, :, None], place_NT[:, None, :]
        divisor = i_NT1 if self.axis == "row" else j_N1T
        ahead_NTT = (alpha * length_N11 / divisor.clamp_min(1.0)).clamp_max(1.0)
        return torch.where(j_N1T <= i_NT1, torch.ones_like(ahead_NTT), ahead_NTT)

    def bias(self, mask_NT: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
        """bias_N1TT = log M, the lowest number where M is 0 and at padding."""
        lowest = torch.finfo(dtype).min
        bias_NTT = self.weight(mask_NT, alpha).log().clamp_min(lowest)
        return bias_NTT.masked_fill(~mask_NT[:, None, :], lowest).to(dtype)[:, None]


TAKES_MASKS = ("sdpa", "eager", VARLEN)
"""Attention that takes masks of four dimensions."""


def as_mask(sees_N1TT: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """What query i sees of key j, in the form an implementation takes: booleans for `sdpa`, an added bias for `eager`.

    Errors: `ModelError` for an attention that takes no such mask.
    """
    check_takes_masks(implementation)
    if implementation in ("sdpa", VARLEN):
        return sees_N1TT
    return torch.zeros_like(sees_N1TT, dtype=dtype).masked_fill(~sees_N1TT, torch.finfo(dtype).min)


def check_takes_masks(implementation: str) -> None:
    if implementation not in TAKES_MASKS:
        raise ModelError(
            f"the attention {implementation!r} takes no mask of its own",
            expected="sdpa or eager",
            fix="load with model.attn_implementation=sdpa",
        )


Mode = Literal["native", "causal", "bidirectional", "softmask"]
How = Literal["native", "config", "modules", "mask4d"]
FLOOR = "5.2"
"""transformers from which `config.is_causal` is honoured; before, models stay causal without a word."""


@section
@dataclass(frozen=True)
class Attention:
    """What was asked of a backbone and how it was achieved; saved with the model.

    `mode`: what was asked for; `native` is the family's own attention.
    `how`: `config` (its flags are enough, so plain transformers and servers see it too), `modules` (flags on modules
        too, set by embedsmith at every load), `mask4d` (embedsmith hands over a mask; lifts sliding windows).
    `causal`: whether every layer was measured to be causal.
    `causal_layers`: layers that stayed causal though bidirectional was asked for.
    """

    mode: Mode = "native"
    how: How = "native"
    causal: bool = False
    causal_layers: tuple[int, ...] = ()

    @property
    def in_config(self) -> bool:
        """Whether config.json alone brings it about, in any program that reads it with transformers."""
        return self.how in ("native", "config")

    def mask(self, mask_NT: Tensor, implementation: str, dtype: torch.dtype) -> Tensor | None:
        """The mask to hand to the backbone. `None` where causal attention on the left end needs none: real tokens
        cannot see padding at the right, and without a mask the fast kernels are free to run. Under `mask4d` every token
        sees every real token: mask_N1TT, as `as_mask` gives it."""
        if self.how == "mask4d":
            return as_mask(mask_NT[:, None, None, :].expand(-1, 1, mask_NT.shape[1], -1), implementation, dtype)
        return None if self.causal and bool(mask_NT[:, 0].all()) else mask_NT.long()


def prepare_config(model_config: Any, mode: Mode) -> Any:
    """The transformers config to build a backbone from: what has to be set before it is built.

    Errors: `ModelError` under a transformers that would ignore it.
    """
    if mode == "native":
        return model_config
    if Version(transformers.__version__) < Version(FLOOR):
        raise ModelError(
            f"transformers {transformers.__version__} cannot switch attention and would ignore it silently",
            expected=f"transformers {FLOOR} or newer",
            fix=f'pip install "transformers>={FLOOR}"',
        )
    bidirectional = mode != "causal"
    tree = model_config.to_dict()
    if bidirectional and "use_bidirectional_attention" in tree and not tree["use_bidirectional_attention"]:
        # Gemma computes its window from this flag, in the constructor and only there
        flag = "all" if model_config.model_type.startswith("gemma4") else True
        model_config = type(model_config).from_dict({**tree, "use_bidirectional_attention": flag})
    model_config.get_text_config().is_causal = not bidirectional
    model_config.is_causal = not bidirectional
    return model_config


def switch_attention(backbone: Any, mode: Mode, allow_partial: bool = False) -> Attention:
    """Bring a backbone built from `prepare_config` to `mode` and prove it; a `native` one is only measured.

    `allow_partial` accepts a family some of whose layers are causal by construction (recurrent, convolutional).
    Errors: `ModelError` naming the layers that stay causal; for an attention that takes no mask where one is needed.
    """
    if mode == "native":
        # Only worth measuring where modules claim it: an encoder's do not.
        claim = getattr(backbone.config.get_text_config(), "is_causal", True)
        claimed = claim is not False and any(getattr(one, "is_causal", False) is True for one in backbone.modules())
        return Attention(causal=claimed and probe(backbone, _call(backbone, Attention())).causal)
    if mode == "causal":
        _set_module_flags(backbone, True)
        if not probe(backbone, _call(backbone, Attention("causal", "config"))).causal:
            raise ModelError(
                f"{type(backbone).__name__} cannot be made causal",
                fix="use model.attention=native; an encoder has no causal form",
            )
        return Attention("causal", "config", causal=True)
    attempts: dict[How, Visibility] = {}
    takes_mask = backbone.config._attn_implementation in TAKES_MASKS
    ways: tuple[How, ...] = ("config", "modules", "mask4d") if takes_mask else ("config", "modules")
    for how in ways:
        if how == "modules":
            _set_module_flags(backbone, False)
        attempts[how] = probe(backbone, _call(backbone, Attention(mode, how)))
        if attempts[how].bidirectional:
            achieved = Attention(mode, how)
            break
    else:
        achieved = _partial(backbone, mode, attempts, allow_partial)
    if mode == "softmask":
        check_takes_masks(backbone.config._attn_implementation)
    if achieved.how == "mask4d" and getattr(backbone.config.get_text_config(), "sliding_window", None):
        log.info("bidirectional attention through a mask: the sliding window of this family no longer limits it")
    return achieved


def _partial(backbone: Any, mode: Mode, attempts: Mapping[How, Visibility], allowed: bool) -> Attention:
    """The most that was reached, where that is allowed."""
    steady = {how: found for how, found in attempts.items() if found.steady}
    best = min(steady, key=lambda how: len(steady[how].causal_layers), default=None)
    name = type(backbone).__name__
    if best is None:
        raise ModelError(
            f"{name} cannot be made bidirectional: a text's states depend on how its batch is padded",
            fix="use model.attention=causal, or model.attn_implementation=sdpa or eager",
        )
    layers = steady[best].causal_layers
    if not allowed or len(layers) == len(steady[best].ahead_L):
        types = getattr(backbone.config.get_text_config(), "layer_types", None) or []
        kinds = sorted({types[place] for place in layers if place < len(types)})
        fix = "use model.attention=causal"
        if len(layers) < len(steady[best].ahead_L):
            fix += ", or model.partial_attention=true to accept it"
        raise ModelError(
            f"{name} cannot be made bidirectional: the layers {', '.join(map(str, layers))} stay causal"
            + (f" ({', '.join(kinds)})" if kinds else ""),
            fix=fix,
        )
    log.warning("bidirectional in part: layers %s stay causal", ", ".join(map(str, layers)))
    return Attention(mode, best, causal_layers=layers)


def _set_module_flags(backbone: nn.Module, causal: bool) -> None:
    for module in backbone.modules():
        if isinstance(getattr(module, "is_causal", None), bool):
            module.is_causal = causal  # type: ignore[assignment]


def _call(backbone: Any, attention: Attention) -> Any:
    """A forward pass under `attention`, with an ordinary mask wherever none has to be made: the self-test must not
    lean on what it is to prove."""

    def call(id_NT: Tensor, mask_NT: Tensor) -> Tensor:
        asked = replace(attention, causal=False)
        mask = asked.mask(mask_NT, backbone.config._attn_implementation, backbone.dtype)
        states: Tensor = backbone(input_ids=id_NT, attention_mask=mask, use_cache=False).last_hidden_state
        return states

    return call
