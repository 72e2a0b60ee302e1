"""The kernels that compute attention of texts in one row, the best first, and what each of them wants.

Flash attention 3 and 2 where those packages are installed, the flash kernels that torch ships
(`torch.nn.attention.varlen`, and the operator below it where dropout or the age of torch asks for it), and flex
attention, which torch compiles, where none of these can. They are all held to `attend_apart`, which pads nothing but
the attention itself and runs everywhere.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from embedsmith.models.flex_rows import attend_by_flex, text_blocks

WIDEST_HEAD = 256
"""Numbers a head may have under the flash kernels."""
_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")

try:
    from torch.nn.attention.varlen import varlen_attn as _varlen_attn
except ImportError:  # before torch 2.10
    _varlen_attn = None  # type: ignore[assignment]
_KNOWN = frozenset() if _varlen_attn is None else frozenset(inspect.signature(_varlen_attn).parameters)
"""What this torch's function can be told."""


@dataclass(frozen=True)
class TextRow:
    """Texts in a row: `end_P` says where each starts, and where the last one ends; the longest has `longest` tokens or
    fewer; `place_S` is the place of every token in the padded chunk, `text * longest + token`. `blocks`: what flex
    attention made of that for a layer, kept for the layers after it."""

    end_P: Tensor
    longest: int
    place_S: Tensor
    blocks: dict[tuple[bool, int | None], BlockMask]


@dataclass(frozen=True)
class Sight:
    """What a layer's tokens see of their text: what lies behind them if `causal`, as far as `reach` tokens away
    (`None`: all of it), by scores of this `scale`, of which a share of `dropout` is left out."""

    causal: bool
    reach: int | None
    scale: float
    dropout: float = 0.0


_Attend = Callable[[Tensor, Tensor, Tensor, TextRow, Sight], Tensor]
"""out_SXD of query_SXD, key_SYD and value_SYD."""


def attend_apart(query_SXD: Tensor, key_SYD: Tensor, value_SYD: Tensor, row: TextRow, sight: Sight) -> Tensor:
    """out_SXD by sdpa of the texts in rows of their own, padded to the longest: what the kernels have to equal."""
    texts, groups, longest = len(row.end_P) - 1, query_SXD.shape[1] // key_SYD.shape[1], row.longest

    def rows(one_SYD: Tensor) -> Tensor:
        flat = one_SYD.new_zeros(texts * longest, *one_SYD.shape[1:]).index_copy(0, row.place_S, one_SYD)
        return flat.view(texts, longest, *one_SYD.shape[1:]).transpose(1, 2)

    key, value = (rows(one).repeat_interleave(groups, 1) if groups > 1 else rows(one) for one in (key_SYD, value_SYD))
    mask: dict[str, Any] = {"is_causal": True}  # enough where padding stands behind all that a token sees
    if not sight.causal or sight.reach is not None:
        mask = {"attn_mask": _sees(row, sight)[:, None]}
    mask |= {"dropout_p": sight.dropout, "scale": sight.scale}
    out_NXTD = F.scaled_dot_product_attention(rows(query_SXD), key, value, **mask)
    out_SXD: Tensor = out_NXTD.transpose(1, 2).reshape(texts * longest, *out_NXTD.shape[1::2])[row.place_S]
    return out_SXD


def _sees(row: TextRow, sight: Sight) -> Tensor:
    """sees_NTT: whether query i sees key j, padded to the longest text. Padding sees itself: it would be NaN."""
    column_T = torch.arange(row.longest, device=row.end_P.device)
    ahead_TT = column_T[None, :] - column_T[:, None]
    sees_NTT = (column_T[None, :] < (row.end_P[1:] - row.end_P[:-1])[:, None])[:, None, :]
    if sight.causal:
        sees_NTT = sees_NTT & (ahead_TT <= 0)
    if sight.reach is not None:
        sees_NTT = sees_NTT & (ahead_TT.abs() <= sight.reach)
    return sees_NTT | (ahead_TT == 0)


# Flash attention.

_WindowKernel = Callable[[Tensor, Tensor, Tensor, TextRow, tuple[int, int], Sight], Tensor]
"""A kernel that is told a window, how many tokens to the left and to the right a token sees, -1 for all."""


def _flash(
    kernel: _WindowKernel, query_SXD: Tensor, key_SYD: Tensor, value_SYD: Tensor, row: TextRow, sight: Sight
) -> Tensor:
    """out_SXD by flash attention. Heads are filled up with zeros to a multiple of 8 numbers, as the kernels want."""
    width = value_SYD.shape[-1]
    wide = -(-max(query_SXD.shape[-1], width) // 8) * 8
    query, key, value = (
        one if one.shape[-1] == wide else F.pad(one, (0, wide - one.shape[-1]))
        for one in (query_SXD.contiguous(), key_SYD.contiguous(), value_SYD.contiguous())
    )
    reach = -1 if sight.reach is None else sight.reach
    return kernel(query, key, value, row, (reach, 0 if sight.causal else reach), sight)[..., :width]


def _by_torch(query: Tensor, key: Tensor, value: Tensor, row: TextRow, window: tuple[int, int], sight: Sight) -> Tensor:
    if sight.dropout or not _KNOWN or (sight.reach is not None and "window_size" not in _KNOWN):
        return _torch_operator(query, key, value, row, window, sight)
    return _public_function(query, key, value, row, window, sight)


def _public_function(
    query: Tensor, key: Tensor, value: Tensor, row: TextRow, window: tuple[int, int], sight: Sight
) -> Tensor:
    """torch's `varlen_attn`, however old: 2.10 has `is_causal`, later ones `window_size` and then `enable_gqa`."""
    more: dict[str, Any] = {"window_size": window} if "window_size" in _KNOWN else {"is_causal": window == (-1, 0)}
    groups = query.shape[1] // key.shape[1]
    if "enable_gqa" in _KNOWN:
        more["enable_gqa"] = groups > 1
    elif groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if "scale" in _KNOWN:
        more["scale"] = sight.scale
    else:
        query = query * (sight.scale * query.shape[-1] ** 0.5)
    out: Any = _varlen_attn(query, key, value, row.end_P, row.end_P, row.longest, row.longest, **more)
    return cast(Tensor, out)


def _torch_operator(
    query: Tensor, key: Tensor, value: Tensor, row: TextRow, window: tuple[int, int], sight: Sight
) -> Tensor:
    """The operator below `varlen_attn`, which takes dropout too and is what nested tensors call."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bounds = (row.end_P, row.end_P, row.longest, row.longest)
    left, right = window
    out: Tensor = torch.ops.aten._flash_attention_forward(
        *(query, key, value, *bounds, sight.dropout, window == (-1, 0), False),
        scale=sight.scale,
        window_size_left=left,
        window_size_right=right,
    )[0]
    return out


def _by_package(
    package: str, query: Tensor, key: Tensor, value: Tensor, row: TextRow, window: tuple[int, int], sight: Sight
) -> Tensor:
    """Flash attention 2 (`flash_attn`) or 3 (`flash_attn_interface`): the same function but for dropout."""
    bounds = (row.end_P, row.end_P, row.longest, row.longest)
    more: dict[str, Any] = {"softmax_scale": sight.scale, "causal": window[1] == 0, "window_size": window}
    if package == FLASH_2:
        more["dropout_p"] = sight.dropout
    made: Any = _function_of(package)(query, key, value, *bounds, **more)
    return cast(Tensor, made[0] if isinstance(made, tuple) else made)  # some of the third also give the sums


FLASH_2, FLASH_3 = "flash_attn", "flash_attn_interface"


@cache
def _function_of(package: str) -> Any:
    return import_module(package).flash_attn_varlen_func


def _lacks_package(package: str, oldest: int, newest: int, backbone: Any) -> str | None:
    """What flash attention of a package lacks for a model where it stands; `oldest` and `newest`: kinds of cards."""
    try:
        _function_of(package)
    except ModuleNotFoundError:
        return NOT_INSTALLED
    except (ImportError, AttributeError, OSError, RuntimeError) as error:  # built for another torch, or another thing
        return f"{package} cannot be imported ({(str(error).strip().splitlines() or [type(error).__name__])[0]})"
    if (lacking := flash_lacks(backbone)) is not None:
        return lacking
    fits = oldest <= torch.cuda.get_device_capability(backbone.device)[0] <= newest
    return None if fits else "it is made for other cards"


NOT_INSTALLED = "it is not installed"
"""A reason that is none: nobody has to install a package for what torch does as well."""


def flash_lacks(backbone: Any) -> str | None:
    """Why attention of this model has no flash kernel where it stands, in words; `None` where it has one."""
    device: torch.device = backbone.device
    if device.type != "cuda":
        return "there is no GPU"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "the GPU is older than Ampere"
    head = _head_width(backbone)
    return f"heads of {head} numbers are wider than {WIDEST_HEAD}" if head > WIDEST_HEAD else None


def _head_width(backbone: Any) -> int:
    text = backbone.config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


# Flex attention.


def _flex(query_SXD: Tensor, key_SYD: Tensor, value_SYD: Tensor, row: TextRow, sight: Sight) -> Tensor:
    known = (sight.causal, sight.reach)
    if known not in row.blocks:
        row.blocks[known] = text_blocks(row.place_S // row.longest, *known)
    return attend_by_flex(query_SXD, key_SYD, value_SYD, row.blocks[known], sight.scale)


def _flex_lacks(backbone: Any) -> str | None:
    return None if backbone.device.type == "cuda" else "there is no GPU"


# Which one.


@dataclass(frozen=True)
class RowKernel:
    """A way to compute attention of a row. `words`: what it is called. `lacks`: what it lacks for a model where that
    stands, in words; `None`: nothing. `in_fp32`: whether it takes numbers of 32 bits. `drops`: whether it can leave out
    a share of the scores."""

    words: str
    compute: _Attend
    lacks: Callable[[Any], str | None]
    in_fp32: bool = False
    drops: bool = True

    def takes(self, dtype: torch.dtype, dropout: float) -> bool:
        half = dtype in (torch.float16, torch.bfloat16)
        return (half or self.in_fp32) and (self.drops or not dropout)


ROW_KERNELS: Mapping[str, RowKernel] = {
    "flash3": RowKernel(
        "flash attention 3", partial(_flash, partial(_by_package, FLASH_3)), partial(_lacks_package, FLASH_3, 9, 9),
        drops=False,
    ),
    "flash2": RowKernel(
        "flash attention 2", partial(_flash, partial(_by_package, FLASH_2)), partial(_lacks_package, FLASH_2, 8, 12)
    ),
    "torch": RowKernel("torch's varlen attention", partial(_flash, _by_torch), flash_lacks),
    "flex": RowKernel("flex attention", _flex, _flex_lacks, in_fp32=True, drops=False),
}  # fmt: skip
"""By the names under which a backbone's call is told them, the best first."""


def half_of(device: torch.device) -> torch.dtype:
    """Numbers of 16 bits that a device multiplies itself."""
    lacking = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if lacking else torch.bfloat16


def drops_attention(backbone: Any) -> bool:
    """Whether the model leaves out a share of its attention while it trains."""
    return any(getattr(backbone.config.get_text_config(), name, None) for name in _DROPOUTS)


def dropout_agrees(backbone: Any, kernel: RowKernel) -> bool:
    """Whether a kernel computes what it should with a share of dropout that drops next to nothing, on numbers made up
    in the shape of this model's heads, forward and backward; true of a model without."""
    if not drops_attention(backbone):
        return True
    text, device, width = backbone.config.get_text_config(), backbone.device, _head_width(backbone)
    generator = torch.Generator().manual_seed(0)
    end_P = torch.tensor([0, 7, 17], dtype=torch.int32, device=device)
    place_S = torch.tensor([*range(7), *range(10, 20)], device=device)
    row = TextRow(end_P, 10, place_S, {})
    given = torch.randn(3, 17, text.num_attention_heads, width, generator=generator).to(device, half_of(device))
    made: list[Tensor] = []
    with torch.enable_grad():
        for one in (given.clone().requires_grad_(), given.float().requires_grad_()):
            whole = one.dtype == torch.float32
            sight = Sight(False, None, width**-0.5, 0.0 if whole else 1e-6)
            query_SXD, key_SXD, value_SXD = one.unbind()
            out_SXD = (attend_apart if whole else kernel.compute)(query_SXD, key_SXD, value_SXD, row, sight)
            (pull,) = torch.autograd.grad((out_SXD.float() * given[0].float()).sum(), one)
            made += [out_SXD.detach().float(), pull.float()]
    flat = [one.flatten() for one in made]
    return all(bool(F.cosine_similarity(flat[at], flat[at + 2], dim=0) > 0.97) for at in (0, 1))
