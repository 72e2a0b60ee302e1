"""Attention masks of four dimensions, for what a transformer's own mask cannot say.

Every mask builder of transformers hands a 4-D mask through untouched: `sdpa` takes booleans (True: sees) or an added
bias, `eager` an added bias. Neither limits of a sliding window nor of a chunk survive such a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from embedsmith.core.errors import ModelError
from embedsmith.core.recipe import section


@section
@dataclass(frozen=True)
class SoftMask:
    """Conan v2's way from causal to bidirectional attention: with progress t and alpha(t) rising from 0 to 1,

        M_ij = 1 for j <= i, else min(alpha * l / i, 1)     `axis: row`, the printed equation
        M_ij = 1 for j <= i, else min(alpha * l / j, 1)     `axis: col`, in which the front columns saturate first

    for query i, key j (both from 1) of a text of l tokens. M = causal mask at 0, all ones at 1; its rank never rises.
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


def full_mask(mask_NT: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """mask_N1TT in which every token sees every real token: booleans for `sdpa`, an added bias for `eager`.

    Errors: `ModelError` for an attention that takes no such mask.
    """
    return as_mask(mask_NT[:, None, None, :].expand(-1, 1, mask_NT.shape[1], -1), implementation, dtype)


def as_mask(sees_N1TT: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """What query i sees of key j, in the form an implementation takes. Errors: `ModelError` as for `full_mask`."""
    check_takes_masks(implementation)
    if implementation == "sdpa":
        return sees_N1TT
    return torch.zeros_like(sees_N1TT, dtype=dtype).masked_fill(~sees_N1TT, torch.finfo(dtype).min)


def check_takes_masks(implementation: str) -> None:
    if implementation not in ("sdpa", "eager"):
        raise ModelError(
            f"the attention {implementation!r} takes no mask of its own",
            expected="sdpa or eager",
            fix="load with attn_implementation=sdpa",
        )
