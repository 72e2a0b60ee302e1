"""Attention of texts that stand in one row, registered with transformers under the name `VARLEN`.

transformers looks an attention function up by the name in a model's config and hands it, layer by layer, the queries,
keys and values of the heads, the scale, the sliding window, and the keywords that the model was called with. Those of a
packed chunk say where each text ends. On a GPU the work is done by the flash kernels that torch ships
(`torch.nn.attention.varlen`, and the operator below it where dropout or the age of torch asks for it). In fp32, on
CPUs, and for heads that no kernel takes it is done by `attend_apart`, which pads nothing but the attention itself.

A batch that is not packed is computed as under sdpa.
"""

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

VARLEN = "embedsmith_varlen"
WIDEST_HEAD = 256
"""Numbers a head may have under the flash kernels."""
_FAMILY_TERMS = ("softcap", "s_aux", "position_bias")  # what some families add to the scores, and no kernel here knows
_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")

try:
    from torch.nn.attention.varlen import varlen_attn as _varlen_attn
except ImportError:  # before torch 2.10
    _varlen_attn = None  # type: ignore[assignment]
_KNOWN = frozenset() if _varlen_attn is None else frozenset(inspect.signature(_varlen_attn).parameters)
"""What this torch's function can be told."""


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
    row_kernel: bool = False,
    sees_all: bool = False,
    **more: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls: [N, heads, T, D] to [N, T, heads, D]; under packing N is 1.

    `cu_seq_lens_q`: where texts start in the row, and its end, as flash attention takes them. `max_length_q`: tokens of
    the longest text, or more. `row_place_S`: the place of every token in the padded chunk, `text * max_length_q +
    token`. `row_kernel`: the flash kernels may be used. `sees_all`: every token sees its whole text, whatever the
    module says (attention through a mask).
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
    causal, reach = (False, None) if sees_all else _sight(module, is_causal, sliding_window)
    query_SXD, key_SYD, value_SYD = (one[0].transpose(0, 1) for one in (query_NXTD, key_NYTD, value_NYTD))
    device = query_SXD.device.type
    if torch.is_autocast_enabled(device):  # as sdpa does: rotations and norms may have made fp32 of some of them
        dtype = torch.get_autocast_dtype(device)
        query_SXD, key_SYD, value_SYD = query_SXD.to(dtype), key_SYD.to(dtype), value_SYD.to(dtype)
    scale = query_SXD.shape[-1] ** -0.5 if scaling is None else scaling
    if row_kernel and query_SXD.dtype in (torch.float16, torch.bfloat16):
        out_SXD = _by_kernel(query_SXD, key_SYD, value_SYD, cu_seq_lens_q, max_length_q, causal, reach, scale, dropout)
    else:
        out_SXD = attend_apart(
            query_SXD, key_SYD, value_SYD, cu_seq_lens_q, max_length_q, row_place_S, causal, reach, scale, dropout
        )
    return out_SXD[None], None


def _sight(module: nn.Module, is_causal: bool | None, window: int | None) -> tuple[bool, int | None]:
    """Whether a layer is causal, and how many tokens away it sees.

    A window of w reaches w - 1 tokens back, in causal and in most bidirectional families. A family that the config
    alone made bidirectional gets a mask of transformers that reaches as many tokens as the config says.
    """
    causal = module.is_causal if is_causal is None else is_causal
    if window is None:
        return bool(causal), None
    by_config = is_causal is False
    return bool(causal), int(getattr(module.config, "sliding_window", window)) if by_config else window - 1


def attend_apart(
    query_SXD: Tensor,
    key_SYD: Tensor,
    value_SYD: Tensor,
    end_P: Tensor,
    longest: int,
    place_S: Tensor,
    causal: bool,
    reach: int | None,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """out_SXD by sdpa of the texts in rows of their own, padded to the longest: what the kernels have to equal."""
    texts, groups = len(end_P) - 1, query_SXD.shape[1] // key_SYD.shape[1]

    def rows(one_SYD: Tensor) -> Tensor:
        flat = one_SYD.new_zeros(texts * longest, *one_SYD.shape[1:]).index_copy(0, place_S, one_SYD)
        return flat.view(texts, longest, *one_SYD.shape[1:]).transpose(1, 2)

    key, value = (rows(one).repeat_interleave(groups, 1) if groups > 1 else rows(one) for one in (key_SYD, value_SYD))
    mask: dict[str, Any] = {"is_causal": True}  # enough where padding stands behind all that a token sees
    if not causal or reach is not None:
        mask = {"attn_mask": _sees(end_P, longest, causal, reach)[:, None]}
    out_NXTD = F.scaled_dot_product_attention(rows(query_SXD), key, value, dropout_p=dropout, scale=scale, **mask)
    out_SXD: Tensor = out_NXTD.transpose(1, 2).reshape(texts * longest, *out_NXTD.shape[1::2])[place_S]
    return out_SXD


def _sees(end_P: Tensor, longest: int, causal: bool, reach: int | None) -> Tensor:
    """sees_NTT: whether query i sees key j, padded to the longest text. Padding sees itself: it would be NaN."""
    column_T = torch.arange(longest, device=end_P.device)
    ahead_TT = column_T[None, :] - column_T[:, None]
    sees_NTT = (column_T[None, :] < (end_P[1:] - end_P[:-1])[:, None])[:, None, :]
    if causal:
        sees_NTT = sees_NTT & (ahead_TT <= 0)
    if reach is not None:
        sees_NTT = sees_NTT & (ahead_TT.abs() <= reach)
    return sees_NTT | (ahead_TT == 0)


def _by_kernel(
    query_SXD: Tensor,
    key_SYD: Tensor,
    value_SYD: Tensor,
    end_P: Tensor,
    longest: int,
    causal: bool,
    reach: int | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """out_SXD by flash attention. Heads are filled up with zeros to a multiple of 8 numbers, as the kernels want."""
    width = value_SYD.shape[-1]
    wide = -(-max(query_SXD.shape[-1], width) // 8) * 8
    query, key, value = (
        one if one.shape[-1] == wide else F.pad(one, (0, wide - one.shape[-1]))
        for one in (query_SXD.contiguous(), key_SYD.contiguous(), value_SYD.contiguous())
    )
    window = (-1 if reach is None else reach, 0 if causal else -1 if reach is None else reach)
    if dropout or not _KNOWN or (reach is not None and "window_size" not in _KNOWN):
        out_SXD = _torch_operator(query, key, value, end_P, longest, window, scale, dropout)
    else:
        out_SXD = _public_function(query, key, value, end_P, longest, window, scale)
    return out_SXD[..., :width]


def _public_function(
    query: Tensor, key: Tensor, value: Tensor, end_P: Tensor, longest: int, window: tuple[int, int], scale: float
) -> Tensor:
    """torch's `varlen_attn`, however old: 2.10 has `is_causal`, later ones `window_size` and then `enable_gqa`."""
    more: dict[str, Any] = {"window_size": window} if "window_size" in _KNOWN else {"is_causal": window == (-1, 0)}
    groups = query.shape[1] // key.shape[1]
    if "enable_gqa" in _KNOWN:
        more["enable_gqa"] = groups > 1
    elif groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if "scale" in _KNOWN:
        more["scale"] = scale
    else:
        query = query * (scale * query.shape[-1] ** 0.5)
    out: Any = _varlen_attn(query, key, value, end_P, end_P, longest, longest, **more)
    return cast(Tensor, out)


def _torch_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    end_P: Tensor,
    longest: int,
    window: tuple[int, int],
    scale: float,
    dropout: float,
) -> Tensor:
    """The operator below `varlen_attn`, which takes dropout too and is what nested tensors call."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bounds = (end_P, end_P, longest, longest)
    left, right = window
    out: Tensor = torch.ops.aten._flash_attention_forward(
        *(query, key, value, *bounds, dropout, window == (-1, 0), False),
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )[0]
    return out


def kernels_missing(backbone: Any) -> str | None:
    """Why attention of this model has no flash kernel where it stands, in words; `None` where it has one."""
    device: torch.device = backbone.device
    if device.type != "cuda":
        return "there is no GPU"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "the GPU is older than Ampere"
    text = backbone.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return f"heads of {head} numbers are wider than {WIDEST_HEAD}" if head > WIDEST_HEAD else None


def dropout_agrees(backbone: Any) -> bool:
    """Whether the operator that takes dropout computes what it should, with a share of dropout that drops next to
    nothing, on numbers made up in the shape of this model's heads, forward and backward; true of a model without."""
    text, device = backbone.config.get_text_config(), backbone.device
    if not any(getattr(text, name, None) for name in _DROPOUTS):
        return True
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    generator = torch.Generator().manual_seed(0)
    end_P = torch.tensor([0, 7, 17], dtype=torch.int32, device=device)
    place_S = torch.tensor([*range(7), *range(10, 20)], device=device)
    given = torch.randn(3, 17, heads, width, generator=generator).to(device, torch.bfloat16)
    scale = width**-0.5
    made: list[Tensor] = []
    with torch.enable_grad():
        for one in (given.clone().requires_grad_(), given.float().requires_grad_()):
            query, key, value = one.unbind()
            if one.dtype == torch.float32:
                out_SXD = attend_apart(query, key, value, end_P, 10, place_S, False, None, scale)
            else:
                out_SXD = _by_kernel(query, key, value, end_P, 10, False, None, scale, 1e-6)
            (pull,) = torch.autograd.grad((out_SXD.float() * given[0].float()).sum(), one)
            made += [out_SXD.detach().float(), pull.float()]
    flat = [one.flatten() for one in made]
    return all(bool(F.cosine_similarity(flat[at], flat[at + 2], dim=0) > 0.97) for at in (0, 1))


ALL_ATTENTION_FUNCTIONS.register(VARLEN, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(VARLEN, sdpa_mask)
