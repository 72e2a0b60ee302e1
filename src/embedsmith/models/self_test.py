"""What a backbone's tokens really see, measured on the model itself: the self-test of the attention switch.

Flags hold what a model was asked for; transformers ignores some of them silently in some families, and differently for
padded and unpadded batches. So every layer is run again with one later token changed, and compared at an
earlier one; and a text alone must give the same states as in a padded batch.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Call = Callable[[Tensor, Tensor], Tensor]
"""(id_NT, mask_NT) -> hidden_NTH: a forward pass, with whatever mask is under test."""

LENGTH, SHORTER = 10, 7


@dataclass(frozen=True)
class Visibility:
    """`ahead_L`: whether each layer sees later tokens (one entry, for the whole, where layers cannot be distinguished),
    in an unpadded and in a padded batch alike; `None` entries contradict themselves. `steady`: a text alone gives the
    states it gives beside a longer one."""

    ahead_L: tuple[bool | None, ...]
    steady: bool

    @property
    def bidirectional(self) -> bool:
        return self.steady and all(ahead is True for ahead in self.ahead_L)

    @property
    def causal(self) -> bool:
        return self.steady and all(ahead is False for ahead in self.ahead_L)

    @property
    def causal_layers(self) -> tuple[int, ...]:
        return tuple(place for place, ahead in enumerate(self.ahead_L) if ahead is not True)


def probe(backbone: Any, call: Call) -> Visibility:
    """Two short random texts through `call`, in eval mode, without gradient. About four forward passes."""
    id_NT = example_ids(backbone, next(backbone.parameters()).device)
    whole_NT = torch.ones_like(id_NT, dtype=torch.bool)
    padded_NT = whole_NT.clone()
    padded_NT[1, SHORTER:] = False
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad(), kernel_precision(backbone):
            both = zip(_ahead(backbone, call, id_NT, whole_NT), _ahead(backbone, call, id_NT, padded_NT), strict=True)
            agreed = tuple(unpadded if unpadded == padded else None for unpadded, padded in both)
            alone_TH = call(id_NT[1:, :SHORTER], whole_NT[1:, :SHORTER])[0]
            together_TH = call(id_NT, padded_NT)[1, :SHORTER]
            return Visibility(agreed, steady=states_agree(backbone, alone_TH, together_TH))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError):
        return Visibility(
            (None,), steady=False
        )  # a family whose own code cannot take this mask, e.g. modernbert-decoder under eager
    finally:
        backbone.train(was_training)


def example_ids(backbone: Any, device: torch.device, rows: int = 2, length: int = LENGTH) -> Tensor:
    """id_NT of made-up texts, the same in every run; clear of the lowest ids, where padding and its like are."""
    vocabulary = len(backbone.get_input_embeddings().weight)  # an adapter around the table has no num_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(8, vocabulary // 2), vocabulary, (rows, length), generator=generator).to(device)


def _ahead(backbone: Any, call: Call, id_NT: Tensor, mask_NT: Tensor) -> list[bool]:
    """For every layer whether its first token notices a change of the second (near: any sliding window sees it)."""
    layers = layers_of(backbone)
    seen: dict[int, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}
    handles = []
    for place, layer in enumerate(layers):

        def note(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any, place: int = place) -> None:
            seen[place] = (inputs, named, output)

        handles.append(layer.register_forward_hook(note, with_kwargs=True))
    try:
        hidden_NTH = call(id_NT, mask_NT)
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) != len(layers) or not layers:
        changed_NT = id_NT.clone()
        changed_NT[:, 1] = id_NT.flip(0)[:, 1]
        return [_notices(hidden_NTH, call(changed_NT, mask_NT))]
    return [_layer_sees_ahead(layer, *seen[place]) for place, layer in enumerate(layers)]


def _layer_sees_ahead(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> bool:
    """The layer once more with the second token's state turned around."""
    by_name = not inputs
    hidden_NTH = named["hidden_states"] if by_name else inputs[0]
    changed_NTH = hidden_NTH.clone()
    changed_NTH[:, 1] = -2 * hidden_NTH[:, 1].flip(-1)
    again = layer(**(named | {"hidden_states": changed_NTH})) if by_name else layer(changed_NTH, *inputs[1:], **named)
    return _notices(_states(output), _states(again))


def _states(output: Any) -> Tensor:
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _notices(before_NTH: Tensor, after_NTH: Tensor) -> bool:
    """The first token of any row. Causal attention gives the same bits, up to the order of sums in a mixture."""
    return bool(_distance(before_NTH[:, 0], after_NTH[:, 0]) > 1e-2 * _rounding(before_NTH.dtype))


def states_agree(backbone: Any, left: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether states are equal, given the numbers the backbone computes with, or `dtype`."""
    return bool(_distance(left, right) < _rounding(dtype or _computes_in(backbone)))


def gradients_agree(backbone: Any, left: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether two gradients point the same way, given those numbers. (NaN agrees with nothing.)"""
    cosine = F.cosine_similarity(left.double().flatten(), right.double().flatten(), dim=0)
    near = 0.9999 if _rounding(dtype or _computes_in(backbone)) < 1e-3 else 0.99
    return bool(cosine >= near) or bool((left == 0).all() and (right == 0).all())


def _computes_in(backbone: Any) -> torch.dtype:
    dtype: torch.dtype = torch.bfloat16 if is_flash(backbone) else backbone.dtype
    return dtype


def first_layer_weight(backbone: Any) -> nn.Parameter | None:
    """The smallest trained matrix of the first layer, whose gradient comes through all the others; `None` if none is
    trained. (A vector may be a bias of keys, whose gradient is nothing but rounding.)"""
    layers = layers_of(backbone) or [backbone]
    trained = [one for one in layers[0].parameters() if one.requires_grad and one.is_floating_point() and one.dim() > 1]
    return min(trained, key=lambda one: one.numel(), default=None)


def _distance(left: Tensor, right: Tensor) -> Tensor:
    """The largest difference, in units of the largest value."""
    return (left.float() - right.float()).abs().max() / left.float().abs().max().clamp_min(1e-9)


def _rounding(dtype: torch.dtype) -> float:
    return 1e-4 if dtype == torch.float32 else 5e-2


def is_flash(backbone: Any) -> bool:
    return str(backbone.config._attn_implementation).startswith("flash")


def kernel_precision(backbone: Any) -> AbstractContextManager[Any]:
    """Flash kernels take numbers of 16 bits only: weights in fp32 compute in bf16 there, unless autocast is on."""
    device = backbone.device.type
    if not is_flash(backbone) or backbone.dtype != torch.float32 or torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.bfloat16)


def layers_of(backbone: Any) -> list[nn.Module]:
    """The transformer's layers in order; empty where they cannot be found."""
    config = backbone.config.get_text_config()
    counts = [
        getattr(config, name, None) for name in ("num_hidden_layers", "num_layers")
    ]  # LongCat counts halves first
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) in counts:
            return list(module)
    return []


def states_and_gradient(
    backbone: Any, arguments: Mapping[str, Any], place_S: Tensor | slice, weight: nn.Parameter | None
) -> tuple[Tensor, Tensor | None]:
    """The states [S, H] of some tokens, and what an uneven sum of them gives a weight."""
    with torch.inference_mode(False), torch.set_grad_enabled(weight is not None):
        state_SH = backbone(**arguments, return_dict=True).last_hidden_state.flatten(0, 1)[place_S]
        if weight is None:
            return state_SH, None
        share = torch.arange(state_SH.numel(), device=state_SH.device).remainder(7).sub(3).view_as(state_SH)
        gradient = torch.autograd.grad((state_SH.float() * share).sum(), weight)[0]
    return state_SH.detach(), gradient
