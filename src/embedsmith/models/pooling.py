"""Token states to one vector a text. A pooling is a function of fp32 states and two masks; add one to `POOLINGS`.

`mask_NT` marks real tokens, `pool_NT` those that take part (a prompt may be left out). Both padding sides are right:
positions come from the masks, never from the ends of the row. Formulas: sentence-transformers' `Pooling`, which a
saved model must agree with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from embedsmith.core.errors import ModelError
from embedsmith.core.settings import section
from embedsmith.core.tokens import PaddedTokens

Pool = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden_NTH in fp32, pool_NT, mask_NT) -> pooled_NH"""


def cls(hidden_NTH: Tensor, pool_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """The first token that takes part."""
    return _at(hidden_NTH, first_index(pool_NT))


def last(hidden_NTH: Tensor, pool_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """The last token that takes part."""
    return _at(hidden_NTH, last_index(pool_NT))


def mean(hidden_NTH: Tensor, pool_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """sum_t m_t h_t / sum_t m_t."""
    return _weighted(hidden_NTH, pool_NT.to(hidden_NTH.dtype))


def weighted_mean(hidden_NTH: Tensor, pool_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """sum_t t m_t h_t / sum_t t m_t, t counted from 1 at the first real token, prompt included (SGPT)."""
    return _weighted(hidden_NTH, mask_NT.cumsum(1).masked_fill(~pool_NT, 0).to(hidden_NTH.dtype))


def maximum(hidden_NTH: Tensor, pool_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """The largest value of each coordinate; 0 for a row without tokens."""
    lowest = torch.finfo(hidden_NTH.dtype).min
    largest_NH = hidden_NTH.masked_fill(~pool_NT[..., None], lowest).amax(1)
    return largest_NH.masked_fill(~pool_NT.any(1, keepdim=True), 0.0)


POOLINGS: Mapping[str, Pool] = {
    "cls": cls,
    "mean": mean,
    "weighted_mean": weighted_mean,
    "last": last,
    "max": maximum,
}


def pool_mask(padded: PaddedTokens, include_prompt: bool, left_out_S: Tensor | None = None) -> Tensor:
    """pool_NT: the tokens that take part: real ones, of the body where the prompt is not included, and not in
    `left_out_S`. Where that leaves none (truncation cut the body, the text is empty), the last real token does."""
    part_NT = padded.mask_NT if include_prompt else padded.body_NT
    if left_out_S is not None:
        part_NT = part_NT & ~torch.isin(padded.id_NT, left_out_S)
    elif include_prompt:
        return part_NT
    column_T = torch.arange(padded.mask_NT.shape[1], device=padded.mask_NT.device)
    last_NT = padded.mask_NT & (column_T[None, :] == last_index(padded.mask_NT)[:, None])
    return part_NT | (last_NT & ~part_NT.any(1, keepdim=True))


def _weighted(hidden_NTH: Tensor, weight_NT: Tensor) -> Tensor:
    """Normalised first and multiplied as a matrix: no [N, T, H] product is made. Zero weights sum to zero, not NaN."""
    share_NT = weight_NT / weight_NT.sum(1, keepdim=True).clamp_min(1e-9)
    return torch.bmm(share_NT[:, None, :], hidden_NTH)[:, 0]


def first_index(mask_NT: Tensor) -> Tensor:
    """index_N of the first marked token; 0 where none is."""
    return mask_NT.int().argmax(1)


def last_index(mask_NT: Tensor) -> Tensor:
    """index_N of the last marked token; the last column where none is."""
    return mask_NT.shape[1] - 1 - mask_NT.flip(1).int().argmax(1)


def _at(hidden_NTH: Tensor, index_N: Tensor) -> Tensor:
    return hidden_NTH[torch.arange(len(index_N), device=index_N.device), index_N]


# Poolings with weights of their own. Both start close to the mean, so that training does not begin from a collapse.
# Kept in fp32; computed in fp32 even under autocast, like every pooling.

POOLERS = ("attention", "latent")


@section
@dataclass(frozen=True)
class PoolerConfig:
    """Shape of a trained pooling; `None` is derived from the backbone's width H.

    `heads`: attention heads (`None`: the largest of 8, 4, 2, 1 that divides the width). `width`: of the attention
    pooling's result, which may be smaller than H. `latents`, `ffn_mult`: of the latent attention.
    """

    heads: int | None = None
    width: int | None = None
    latents: int = 512
    ffn_mult: int = 4


class AttentionPooling(nn.Module):
    """One learned query looks at the token states (PMA with one seed, as in C2LLM):

        Q = s Wq, K = H Wk, V = H Wv;  A = softmax(Q K' / sqrt(d_head)) over the tokens that take part
        O = LN(Q + A V);  out = LN(O + relu(O Wo))

    Reconstructed from D2LLM's code and C2LLM's summary; there the scale is sqrt(width) and the mask multiplies after
    the softmax. s starts near 0 (even attention), Wv as an isometry, Wo small: the result starts as a normalised mean.
    """

    def __init__(self, hidden_size: int, config: PoolerConfig) -> None:
        super().__init__()
        self.width = config.width or hidden_size
        self.heads = head_count(self.width, config.heads)
        self.seed_D = nn.Parameter(torch.randn(self.width) * 0.02)
        self.query = nn.Linear(self.width, self.width, bias=False)
        self.key = nn.Linear(hidden_size, self.width, bias=False)
        self.value = nn.Linear(hidden_size, self.width, bias=False)
        self.out = nn.Linear(self.width, self.width, bias=False)
        self.norm_in, self.norm_out = nn.LayerNorm(self.width), nn.LayerNorm(self.width)
        for layer, gain in ((self.query, 1.0), (self.key, 1.0), (self.out, 0.1)):
            nn.init.xavier_uniform_(layer.weight, gain)
        near_identity_(self.value.weight)

    def forward(self, hidden_NTH: Tensor, pool_NT: Tensor) -> Tensor:
        query_D = self.query(self.seed_D)
        split = (self.heads, self.width // self.heads)
        key_NTHD = self.key(hidden_NTH).unflatten(-1, split)
        value_NTHD = self.value(hidden_NTH).unflatten(-1, split)
        score_NTH = torch.einsum("hd,nthd->nth", query_D.view(split), key_NTHD) / math.sqrt(split[1])
        share_NTH = score_NTH.masked_fill(~pool_NT[..., None], torch.finfo(score_NTH.dtype).min).softmax(1)
        seen_ND = torch.einsum("nth,nthd->nhd", share_NTH, value_NTHD).flatten(1)
        state_ND = self.norm_in(query_D + seen_ND)
        out_ND: Tensor = self.norm_out(state_ND + torch.relu(self.out(state_ND)))
        return out_ND


class LatentPooling(nn.Module):
    """Every token state looks at r learned latents, then the mean (NV-Embed):

        X = H + Attn(query LN(H), keys and values LN(Z));  X = X + GEGLU-FFN(LN(X));  out = masked mean of X

    The output projections start at zero: the result starts as the mean. Heads have H / heads numbers each (the
    published model has its own, wider heads). Cost O(T r) a text.
    """

    def __init__(self, hidden_size: int, config: PoolerConfig) -> None:
        super().__init__()
        self.width = hidden_size
        self.heads = head_count(hidden_size, config.heads)
        self.latent_RH = nn.Parameter(torch.randn(config.latents, hidden_size) * 0.02)
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.up = nn.Linear(hidden_size, 2 * config.ffn_mult * hidden_size)
        self.down = nn.Linear(config.ffn_mult * hidden_size, hidden_size)
        self.norm_tokens, self.norm_latents = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.norm_ffn = nn.LayerNorm(hidden_size)
        for parameter in (self.out.weight, self.down.weight, self.down.bias):
            nn.init.zeros_(parameter)

    def forward(self, hidden_NTH: Tensor, pool_NT: Tensor) -> Tensor:
        split = (self.heads, self.width // self.heads)
        query_NHTD = self.query(self.norm_tokens(hidden_NTH)).unflatten(-1, split).transpose(1, 2)
        key_value = self.key_value(self.norm_latents(self.latent_RH)).chunk(2, dim=-1)
        key_1HRD, value_1HRD = (tensor.unflatten(-1, split).transpose(0, 1)[None] for tensor in key_value)
        rows = len(hidden_NTH)
        seen_NHTD = F.scaled_dot_product_attention(
            query_NHTD, key_1HRD.expand(rows, -1, -1, -1), value_1HRD.expand(rows, -1, -1, -1)
        )
        state_NTH = hidden_NTH + self.out(seen_NHTD.transpose(1, 2).flatten(2))
        value_NTF, gate_NTF = self.up(self.norm_ffn(state_NTH)).chunk(2, dim=-1)
        state_NTH = state_NTH + self.down(value_NTF * F.gelu(gate_NTF))
        return mean(state_NTH, pool_NT, pool_NT)


def build_pooler(name: str, hidden_size: int, config: PoolerConfig) -> nn.Module | None:
    """The module of a pooling with weights, `None` for one without. Errors: `ModelError` for an impossible shape."""
    if name not in POOLERS:
        return None
    return (AttentionPooling if name == "attention" else LatentPooling)(hidden_size, config)


def head_count(width: int, asked: int | None) -> int:
    if asked is not None and (asked < 1 or width % asked):
        raise ModelError(f"{asked} heads for a width of {width}", expected="a divisor of the width")
    return asked or next(count for count in (8, 4, 2, 1) if width % count == 0)


def near_identity_(weight: Tensor) -> None:
    """The identity where the matrix is square, else orthonormal rows or columns: distances survive."""
    if weight.shape[0] == weight.shape[1]:
        nn.init.eye_(weight)
    else:
        nn.init.orthogonal_(weight)


def save_pooler(pooler: nn.Module, path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in pooler.state_dict().items()}, path)


def load_pooler(pooler: nn.Module, path: Path) -> None:
    """Errors: `ModelError` naming the file when it is missing, damaged or of another shape."""
    try:
        pooler.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ModelError(f"cannot read the weights of the pooling: {error}", where=path) from error
