"""Poolings with weights of their own. Both start close to the mean, so that training does not begin from a collapse.

Kept in fp32; computed in fp32 even under autocast, like every pooling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from embedsmith.core.errors import ModelError
from embedsmith.core.recipe import section
from embedsmith.models.pooling import mean

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
