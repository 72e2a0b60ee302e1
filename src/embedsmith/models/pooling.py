"""Token states to one vector a text. A pooling is a function of fp32 states and two masks; add one to `POOLINGS`.

`mask_NT` marks real tokens, `pool_NT` those that take part (a prompt may be left out). Both padding sides are right:
positions come from the masks, never from the ends of the row. Formulas: sentence-transformers' `Pooling`, which a
saved model must agree with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

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
