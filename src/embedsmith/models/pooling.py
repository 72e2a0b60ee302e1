"""Token states to one vector a text. A pooling is called with fp32 states and two masks, and stands on the shelf:

    @poolings.register("first_two")
    def first_two(hidden_NTH: Tensor, pool_NT: Tensor, mask_NT: Tensor) -> Tensor: ...

`mask_NT` marks real tokens, `pool_NT` those that take part (a prompt may be left out). Both padding sides are right:
positions come from the masks, never from the ends of the row. Sizes are read from `shape` and not by `len`, which a
graph that is exported would keep for ever (exports/trace.py). Formulas: sentence-transformers' `Pooling`, which a
saved model must agree with; a pooling that sentence-transformers lacks is loaded there through embedsmith.

A pooling with weights of its own is an `nn.Module` made from the backbone's width and a `PoolerConfig`, with the width
of its result in `width`. Those here start close to the mean, so that training does not begin from a collapse. Weights
are kept in fp32; every pooling is computed in fp32, even under autocast.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedsmith.core.errors import ModelError
from embedsmith.core.settings import Count, Range, Width, section
from embedsmith.core.shelf import poolings
from embedsmith.core.tokens import PaddedTokens, one_of
from embedsmith.core.transfer import to_device


@poolings.register("cls")
def cls(hidden_NTH: Tensor, pool_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """The first token that takes part."""
    return hidden_NTH[torch.arange(hidden_NTH.shape[0], device=hidden_NTH.device), first_index(pool_NT)]


@poolings.register("last")
def last(hidden_NTH: Tensor, pool_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """The last token that takes part."""
    return hidden_NTH[torch.arange(hidden_NTH.shape[0], device=hidden_NTH.device), last_index(pool_NT)]


@poolings.register("mean", formula="sum_t m_t h_t / sum_t m_t")
def mean(hidden_NTH: Tensor, pool_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """sum_t m_t h_t / sum_t m_t."""
    # The weights are normalised first and multiplied as a matrix: no [N, T, H] product is made. Zero weights sum to
    # zero, not NaN.
    weight_NT = pool_NT.to(hidden_NTH.dtype)
    share_NT = weight_NT / weight_NT.sum(1, keepdim=True).clamp_min(1e-9)
    return torch.bmm(share_NT[:, None, :], hidden_NTH)[:, 0]


@poolings.register("mean_sqrt_len", formula="sum_t m_t h_t / sqrt(sum_t m_t)")
def mean_sqrt_len(hidden_NTH: Tensor, pool_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """sum_t m_t h_t / sqrt(sum_t m_t): the mean times the root of the number of tokens."""
    mean_NH: Tensor = mean(hidden_NTH, pool_NT, mask_NT)
    return mean_NH * _root_of_count(pool_NT)


def _root_of_count(pool_NT: Tensor) -> Tensor:
    return pool_NT.sum(1, keepdim=True).float().sqrt()


@poolings.register("weighted_mean", formula="sum_t t m_t h_t / sum_t t m_t", source="SGPT")
def weighted_mean(hidden_NTH: Tensor, pool_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """sum_t t m_t h_t / sum_t t m_t, t counted from 1 at the first real token, prompt included (SGPT)."""
    weight_NT = mask_NT.cumsum(1).masked_fill(~pool_NT, 0).to(hidden_NTH.dtype)
    share_NT = weight_NT / weight_NT.sum(1, keepdim=True).clamp_min(1e-9)
    return torch.bmm(share_NT[:, None, :], hidden_NTH)[:, 0]


@poolings.register("max")
def maximum(hidden_NTH: Tensor, pool_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """The largest value of each coordinate; 0 for a row without tokens."""
    lowest = torch.finfo(hidden_NTH.dtype).min
    largest_NH = hidden_NTH.masked_fill(~pool_NT[..., None], lowest).amax(1)
    return largest_NH.masked_fill(~pool_NT.any(1, keepdim=True), 0.0)


def _at(state_SH: Tensor, index_N: Tensor, padded: PaddedTokens) -> Tensor:
    """The state of one token of every text, by its column in the padded chunk; 0 where padding stands there."""
    real_NT = padded.mask_NT.flatten()
    place_N = torch.arange(len(index_N), device=index_N.device) * padded.mask_NT.shape[1] + index_N
    row_N = (real_NT.cumsum(0) - 1)[place_N].clamp_min(0)
    return state_SH[row_N] * real_NT[place_N, None].to(state_SH.dtype)


def _sums(state_SH: Tensor, share_NT: Tensor, padded: PaddedTokens) -> Tensor:
    """sum_t share_nt state_nt of every text."""
    texts, size = padded.mask_NT.shape
    place_S = padded.place_S
    weighted_SH = share_NT.flatten()[place_S, None] * state_SH
    return state_SH.new_zeros(texts, state_SH.shape[1]).index_add(0, place_S // size, weighted_SH)


def _packed_mean(state_SH: Tensor, pool_NT: Tensor, padded: PaddedTokens) -> Tensor:
    weight_NT = pool_NT.to(state_SH.dtype)
    return _sums(state_SH, weight_NT / weight_NT.sum(1, keepdim=True).clamp_min(1e-9), padded)


def _packed_weighted_mean(state_SH: Tensor, pool_NT: Tensor, padded: PaddedTokens) -> Tensor:
    weight_NT = padded.mask_NT.cumsum(1).masked_fill(~pool_NT, 0).to(state_SH.dtype)
    return _sums(state_SH, weight_NT / weight_NT.sum(1, keepdim=True).clamp_min(1e-9), padded)


def _packed_maximum(state_SH: Tensor, pool_NT: Tensor, padded: PaddedTokens) -> Tensor:
    texts, size = padded.mask_NT.shape
    lowest, place_S = torch.finfo(state_SH.dtype).min, padded.place_S
    part_SH = state_SH.masked_fill(~pool_NT.flatten()[place_S, None], lowest)
    text_SH = (place_S // size)[:, None].expand_as(part_SH)
    start_NH = state_SH.new_full((texts, state_SH.shape[1]), lowest)
    largest_NH = start_NH.scatter_reduce(0, text_SH, part_SH, "amax", include_self=False)
    return largest_NH.masked_fill(~pool_NT.any(1, keepdim=True), 0.0)


_PACKED: Mapping[Any, Callable[[Tensor, Tensor, PaddedTokens], Tensor]] = {
    cls: lambda state_SH, pool_NT, padded: _at(state_SH, first_index(pool_NT), padded),
    last: lambda state_SH, pool_NT, padded: _at(state_SH, last_index(pool_NT), padded),
    mean: _packed_mean,
    mean_sqrt_len: lambda state_SH, pool_NT, padded: _packed_mean(state_SH, pool_NT, padded) * _root_of_count(pool_NT),
    weighted_mean: _packed_weighted_mean,
    maximum: _packed_maximum,
}


@dataclass(frozen=True)
class SideBySide:
    """Several poolings side by side: their vectors one behind the other."""

    parts: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...]

    def __call__(self, hidden_NTH: Tensor, pool_NT: Tensor, mask_NT: Tensor) -> Tensor:
        return torch.cat([part(hidden_NTH, pool_NT, mask_NT) for part in self.parts], dim=-1)


def pooling_named(name: str) -> Any:
    """The pooling of a name, or of several joined by `+`.

    Errors: `RecipeError` for a name that is not on the shelf; `ModelError` for one with weights among several.
    """
    parts = tuple(poolings.get(part) for part in name.split("+"))
    if len(parts) == 1:
        return parts[0]
    if trained := [one for one, part in zip(name.split("+"), parts, strict=True) if isinstance(part, type)]:
        raise ModelError(
            f"pooling {name}: {trained[0]} has weights, and stands alone", fix=f"use {trained[0]}, or leave it out"
        )
    return SideBySide(parts)


def pooled_width(name: str | None, pooler: nn.Module | None, hidden_size: int) -> int:
    """Numbers that a pooling of states of this width gives."""
    if pooler is not None:
        return int(pooler.width)  # type: ignore[arg-type]
    return hidden_size * (1 if name is None else name.count("+") + 1)


def pooled(pooling: Any, hidden: Tensor, pool_NT: Tensor, padded: PaddedTokens) -> Tensor:
    """A pooling of states [N, T, H], or of those of a packed chunk, [S, H]: without a padded copy of these where the
    pooling stands above, with one for any other."""
    if isinstance(pooling, SideBySide):
        return torch.cat([pooled(part, hidden, pool_NT, padded) for part in pooling.parts], dim=-1)
    if hidden.dim() == 2 and pooling in _PACKED:
        return _PACKED[pooling](hidden, pool_NT, padded)
    vector_ND: Tensor = pooling(padded.spread(hidden) if hidden.dim() == 2 else hidden, pool_NT, padded.mask_NT)
    return vector_ND


def pool_mask(padded: PaddedTokens, include_prompt: bool, left_out_S: Tensor | None = None) -> Tensor:
    """pool_NT: the tokens that take part: real ones, of the body where the prompt is not included, and not in
    `left_out_S`. Where that leaves none (truncation cut the body, the text is empty), the last real token does."""
    part_NT = padded.mask_NT if include_prompt else padded.body_NT
    if left_out_S is not None:
        part_NT = part_NT & ~one_of(padded.id_NT, to_device(left_out_S, padded.id_NT.device))
    elif include_prompt:
        return part_NT
    column_T = torch.arange(padded.mask_NT.shape[1], device=padded.mask_NT.device)
    last_NT = padded.mask_NT & (column_T[None, :] == last_index(padded.mask_NT)[:, None])
    return part_NT | (last_NT & ~part_NT.any(1, keepdim=True))


def first_index(mask_NT: Tensor) -> Tensor:
    """index_N of the first marked token; 0 where none is."""
    return mask_NT.int().argmax(1)


def last_index(mask_NT: Tensor) -> Tensor:
    """index_N of the last marked token; the last column where none is."""
    return mask_NT.shape[1] - 1 - mask_NT.flip(1).int().argmax(1)


@section
@dataclass(frozen=True)
class PoolerConfig:
    """Shape of a trained pooling; `None` is derived from the backbone's width H.

    `heads`: attention heads (`None`: the largest of 8, 4, 2, 1 that divides the width).
    `width`: numbers in the attention pooling's result, which may be fewer than H (`None`: H).
    `latents`: learned vectors that the latent pooling compares the states with.
    `ffn_mult`: inner width of the latent pooling's feed-forward layer, in multiples of H.
    """

    heads: Count | None = None
    width: Width | None = None
    latents: Width = 512
    ffn_mult: Annotated[int, Range(gt=0, le=64)] = 4

    def head_count(self, width: int) -> int:
        """Attention heads of a pooling. Errors: `ModelError` for a number that does not divide the width."""
        if self.heads is not None and width % self.heads:
            raise ModelError(f"{self.heads} heads for a width of {width}", expected="a divisor of the width")
        return self.heads or next(count for count in (8, 4, 2, 1) if width % count == 0)


@poolings.register("attention", formula="LN(O + relu(O Wo)), O = LN(Q + A V)", source="D2LLM, C2LLM")
class AttentionPooling(nn.Module):
    """One learned query attends to the token states (PMA with one seed, as in C2LLM):

        Q = s Wq, K = H Wk, V = H Wv;  A = softmax(Q K' / sqrt(d_head)) over the tokens that take part
        O = LN(Q + A V);  out = LN(O + relu(O Wo))

    Reconstructed from D2LLM's code and C2LLM's summary; there the scale is sqrt(width) and the mask multiplies after
    the softmax. s starts near 0 (even attention), Wv as an isometry, Wo small: the result starts as a normalised mean.
    """

    def __init__(self, hidden_size: int, config: PoolerConfig) -> None:
        super().__init__()
        self.width = config.width or hidden_size
        self.heads = config.head_count(self.width)
        self.seed_D = nn.Parameter(torch.randn(self.width) * 0.02)
        self.query = nn.Linear(self.width, self.width, bias=False)
        self.key = nn.Linear(hidden_size, self.width, bias=False)
        self.value = nn.Linear(hidden_size, self.width, bias=False)
        self.out = nn.Linear(self.width, self.width, bias=False)
        self.norm_in, self.norm_out = nn.LayerNorm(self.width), nn.LayerNorm(self.width)
        for layer, gain in ((self.query, 1.0), (self.key, 1.0), (self.out, 0.1)):
            nn.init.xavier_uniform_(layer.weight, gain)
        # The identity where the matrix is square, else orthonormal rows or columns: distances survive.
        (nn.init.eye_ if self.width == hidden_size else nn.init.orthogonal_)(self.value.weight)

    def forward(self, hidden_NTH: Tensor, pool_NT: Tensor, mask_NT: Tensor) -> Tensor:
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


@poolings.register("latent", formula="mean_t of H + Attn(H, latents), then a GEGLU layer", source="NV-Embed")
class LatentPooling(nn.Module):
    """Every token state attends to r learned latents, then the mean (NV-Embed):

        X = H + Attn(query LN(H), keys and values LN(Z));  X = X + GEGLU-FFN(LN(X));  out = masked mean of X

    The output projections start at zero: the result starts as the mean. Heads have H / heads numbers each (the
    published model has its own, wider heads). Cost O(T r) a text.
    """

    def __init__(self, hidden_size: int, config: PoolerConfig) -> None:
        super().__init__()
        self.width = hidden_size
        self.heads = config.head_count(hidden_size)
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

    def forward(self, hidden_NTH: Tensor, pool_NT: Tensor, mask_NT: Tensor) -> Tensor:
        split = (self.heads, self.width // self.heads)
        query_NHTD = self.query(self.norm_tokens(hidden_NTH)).unflatten(-1, split).transpose(1, 2)
        key_value = self.key_value(self.norm_latents(self.latent_RH)).chunk(2, dim=-1)
        key_1HRD, value_1HRD = (tensor.unflatten(-1, split).transpose(0, 1)[None] for tensor in key_value)
        rows = hidden_NTH.shape[0]
        seen_NHTD = F.scaled_dot_product_attention(
            query_NHTD, key_1HRD.expand(rows, -1, -1, -1), value_1HRD.expand(rows, -1, -1, -1)
        )
        state_NTH = hidden_NTH + self.out(seen_NHTD.transpose(1, 2).flatten(2))
        value_NTF, gate_NTF = self.up(self.norm_ffn(state_NTH)).chunk(2, dim=-1)
        state_NTH = state_NTH + self.down(value_NTF * F.gelu(gate_NTF))
        mean_NH: Tensor = mean(state_NTH, pool_NT, mask_NT)
        return mean_NH
