"""Unpadded execution: the texts of a chunk one behind another in a single row, so that no padding is computed.

Texts must not see each other. The masks of transformers do not keep them apart (bidirectional ones ignore positions,
causal ones lean on a cache that is not there), so the bounds are handed over: to flash attention as cumulative lengths,
to flex attention as a block mask, to sdpa and eager as a block-diagonal mask [1, 1, S, S], which is exact and saves no
time. What mixes tokens elsewhere (recurrence, convolution) would leak: a self-test on the model itself refuses it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from embedsmith.core.errors import ModelError
from embedsmith.core.tokens import PaddedTokens
from embedsmith.models.attention import Attention, as_mask
from embedsmith.models.backbone import takes, takes_positions
from embedsmith.models.self_test import SHORTER, example_ids, kernel_precision, states_agree


def packed(padded: PaddedTokens, attention: Attention, implementation: str, dtype: torch.dtype) -> dict[str, Any]:
    """The backbone's arguments for the real tokens of a chunk as one row; positions begin anew with every text."""
    mask_NT = padded.mask_NT
    text_S = mask_NT.nonzero()[:, 0]
    arguments: dict[str, Any] = {
        "input_ids": padded.id_NT[mask_NT][None],
        "position_ids": (mask_NT.cumsum(1) - 1)[mask_NT][None],
    }
    if implementation.startswith("flash"):
        length_N = mask_NT.sum(1)
        end_P, longest = F.pad(length_N.cumsum(0), (1, 0)).to(torch.int32), int(length_N.max())
        return arguments | dict(cu_seq_lens_q=end_P, cu_seq_lens_k=end_P, max_length_q=longest, max_length_k=longest)
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        def sees(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = text_S[query] == text_S[key]
            return same & (query >= key) if attention.causal else same

        size, device = len(text_S), text_S.device
        blocks = create_block_mask(sees, None, None, size, size, device=str(device), _compile=device.type == "cuda")
        return arguments | {"attention_mask": blocks}
    sees_SS = text_S[:, None] == text_S[None, :]
    sees_SS = sees_SS.tril() if attention.causal else sees_SS
    return arguments | {"attention_mask": as_mask(sees_SS[None, None], implementation, dtype)}


def unpacked(states: Any, mask_NT: Tensor) -> BaseModelOutput:
    """States of one row back in the rows of a padded chunk, zeros at the padding."""

    def rows(state_1SH: Tensor) -> Tensor:
        hidden_NTH = state_1SH.new_zeros(*mask_NT.shape, state_1SH.shape[-1])
        return hidden_NTH.masked_scatter(mask_NT[..., None], state_1SH[0])

    layers = getattr(states, "hidden_states", None)
    return BaseModelOutput(
        last_hidden_state=rows(states.last_hidden_state),
        hidden_states=None if layers is None else tuple(map(rows, layers)),
    )


def check_packing(backbone: Any, attention: Attention, max_length: int) -> None:
    """Prove on the model itself that two texts in one row have the states they have apart.

    Errors: `ModelError` for softmask training, for windows that a mask would lift, and where the states differ.
    """
    name, implementation = type(backbone).__name__, backbone.config._attn_implementation
    if attention.mode == "softmask":
        raise ModelError(
            "packing under attention=softmask: its mask is made of one text", fix="set model.packing=false"
        )
    text = backbone.config.get_text_config()
    names = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    bounds = [getattr(text, names[kind], None) for kind in getattr(text, "layer_types", None) or names if kind in names]
    window = min((bound for bound in bounds if bound is not None), default=max_length)
    lifted = not implementation.startswith("flash") and attention.how != "mask4d"
    if lifted and window < max_length:
        raise ModelError(
            f"packing: a token of {name} sees {window} tokens, and a mask for packed texts would lift that bound",
            fix=f"set model.packing=false, model.max_length={window}, or on a GPU "
            "model.attn_implementation=flash_attention_2",
        )
    if not takes_positions(backbone) or not _same_states(backbone, attention):
        raise ModelError(
            f"{name} cannot be packed: a text's states depend on what else is in its row",
            fix="set model.packing=false",
        )


def _same_states(backbone: Any, attention: Attention) -> bool:
    id_NT = example_ids(backbone, backbone.device)
    mask_NT = torch.ones_like(id_NT, dtype=torch.bool)
    mask_NT[0, SHORTER:] = False
    implementation, dtype = backbone.config._attn_implementation, backbone.dtype
    more: dict[str, Any] = {"return_dict": True} | ({"use_cache": False} if takes(backbone, "use_cache") else {})
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.inference_mode(), kernel_precision(backbone):
            apart: dict[str, Any] = {"attention_mask": attention.mask(mask_NT, implementation, dtype)}
            if attention.how == "mask4d":
                apart["position_ids"] = (mask_NT.cumsum(1) - 1).clamp_min(0)
            apart_NTH = backbone(input_ids=id_NT, **apart, **more).last_hidden_state
            row = packed(PaddedTokens(id_NT, mask_NT, mask_NT, mask_NT[:, 0]), attention, implementation, dtype)
            together_NTH = unpacked(backbone(**row, **more), mask_NT).last_hidden_state
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError):
        return False  # a family whose own code cannot take this mask or these positions
    finally:
        backbone.train(was_training)
    return states_agree(backbone, apart_NTH[mask_NT], together_NTH[mask_NT])
