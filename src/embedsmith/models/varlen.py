"""Attention of texts that stand in one row, registered with transformers under the name `VARLEN`.

transformers looks an attention function up by the name in a model's config and hands it, layer by layer, the queries,
keys and values of the heads, the scale, the sliding window, and the keywords that the model was called with. Those of a
packed chunk say where each text ends and which kernel of row_kernels.py was proven on the model. In numbers that this
kernel does not take, and without one, the work is done by `attend_apart`.

A batch that is not packed is computed as under sdpa.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from embedsmith.models.row_kernels import ROW_KERNELS, Sight, TextRow, attend_apart

VARLEN = "embedsmith_varlen"
_FAMILY_TERMS = ("softcap", "s_aux", "position_bias")  # what some families add to the scores, and no kernel here knows


def attend(
    module: nn.Module,
    query_NXTD: Tensor,
    key_NYTD: Tensor,
    value_NYTD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    row_place_S: Tensor | None = None,
    row_kernel: str | None = None,
    row_blocks: dict[tuple[bool, int | None], Any] | None = None,
    sees_all: bool = False,
    **more: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls: [N, heads, T, D] to [N, T, heads, D]; under packing N is 1.

    `cu_seq_lens_q`, `max_length_q`, `row_place_S`, `row_blocks`: the `TextRow`. `row_kernel`: the one of `ROW_KERNELS`
    that was proven on this model. `sees_all`: every token sees its whole text, whatever the module says (attention
    through a mask).
    Errors: `ValueError` for families that change scores in a way that is not known here.
    """
    if cu_seq_lens_q is None or row_place_S is None:
        more |= {"sliding_window": sliding_window}
        out, _ = sdpa_attention_forward(
            module, query_NXTD, key_NYTD, value_NYTD, attention_mask, dropout, scaling, is_causal, **more
        )
        return out, None
    if found := [name for name in _FAMILY_TERMS if more.get(name) is not None]:
        raise ValueError(f"attention with {found[0]} cannot be packed")
    causal, reach = (False, None) if sees_all else _causal_and_reach(module, is_causal, sliding_window)
    query_SXD, key_SYD, value_SYD = (one[0].transpose(0, 1) for one in (query_NXTD, key_NYTD, value_NYTD))
    device = query_SXD.device.type
    if torch.is_autocast_enabled(device):  # as sdpa does: rotations and norms may have made fp32 of some of them
        dtype = torch.get_autocast_dtype(device)
        query_SXD, key_SYD, value_SYD = query_SXD.to(dtype), key_SYD.to(dtype), value_SYD.to(dtype)
    sight = Sight(causal, reach, query_SXD.shape[-1] ** -0.5 if scaling is None else scaling, dropout)
    row = TextRow(cu_seq_lens_q, max_length_q, row_place_S, {} if row_blocks is None else row_blocks)
    kernel = None if row_kernel is None else ROW_KERNELS[row_kernel]
    fits = kernel is not None and kernel.takes(query_SXD.dtype, dropout)
    compute = kernel.compute if kernel is not None and fits else attend_apart
    return compute(query_SXD, key_SYD, value_SYD, row, sight)[None], None


def _causal_and_reach(module: nn.Module, is_causal: bool | None, window: int | None) -> tuple[bool, int | None]:
    """Whether a layer is causal, and how many tokens away it sees.

    A window of w reaches w - 1 tokens back, in causal and in most bidirectional families. A family that the config
    alone made bidirectional gets a mask of transformers that reaches as many tokens as the config says.
    """
    causal = module.is_causal if is_causal is None else is_causal
    if window is None:
        return bool(causal), None
    by_config = is_causal is False
    return bool(causal), int(getattr(module.config, "sliding_window", window)) if by_config else window - 1


ALL_ATTENTION_FUNCTIONS.register(VARLEN, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(VARLEN, sdpa_mask)
