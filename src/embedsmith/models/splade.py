"""SPLADE-style sparse vectors: the weight of every word of the vocabulary, through the language-model head.

    w_v = log(1 + relu( max_t z_tv )),   z = W f(h) + b,   max over the tokens that take part

Sources: SPLADE v2 (Formal et al., 2021), max pooling. Of the V weights the `terms` largest are kept. [N, T, V] never
exists: words are scored block by block beside a running best, and the backward pass goes only to the words and tokens
that were chosen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embedsmith.core.errors import ModelError
from embedsmith.core.reps import Sparse, in_fp32
from embedsmith.core.tokens import PaddedTokens
from embedsmith.models.lm_head import LmHead, new_lm_head, read_lm_head, save_lm_head

SPLADE_FILE = "splade_head.safetensors"
TERMS = 256
"""Words a text may have, unless a recipe says otherwise."""
_NUMBERS = 2**23  # scores alive at once: 32 MB
_TERMS_AT_ONCE = 2048  # rows of W that the backward pass copies together


class SpladeHead(nn.Module):
    """`terms`: how many words a text may have."""

    def __init__(self, lm: LmHead, terms: int = TERMS) -> None:
        super().__init__()
        self.lm = lm
        self.terms = terms

    def forward(self, hidden_NTH: Tensor, padded: PaddedTokens, part_NT: Tensor) -> Sparse:
        score_NK, word_NK = top_words(
            self.lm.states(hidden_NTH), self.lm.output_VH, self.lm.bias_V, part_NT, self.terms
        )
        return Sparse(word_NK, torch.log1p(torch.relu(score_NK)))

    def save(self, root: Path) -> None:
        save_lm_head(root / SPLADE_FILE, {"lm": self.lm}, {"terms": str(self.terms)})


def build_splade(folder: Path, base: Path, backbone: Any, terms: int | None, trust_remote_code: bool) -> SpladeHead:
    """The head in `folder`, or a new one of the language model in `base`."""
    if terms is not None and terms < 1:
        raise ModelError(f"sparse_terms={terms}", expected="at least 1")
    if not (folder / SPLADE_FILE).exists():
        return SpladeHead(new_lm_head(base, backbone, trust_remote_code), terms or TERMS)
    lm, _, about = read_lm_head(folder / SPLADE_FILE, backbone)
    return SpladeHead(lm, terms or int(about.get("terms", TERMS)))


def top_words(
    state_NTH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, part_NT: Tensor, terms: int
) -> tuple[Tensor, Tensor]:
    """score_NK and word_NK of the K = min(terms, V) words with the largest max_t (W state_t + b)_v; -inf where a row
    has no tokens. The gradient goes to the token that had the maximum (the first of equal ones)."""
    bias_V = state_NTH.new_zeros(len(weight_VH)) if bias_V is None else bias_V
    score_NK, word_NK = _TopWords.apply(state_NTH, weight_VH, bias_V, part_NT, terms)  # type: ignore[no-untyped-call]
    return score_NK, word_NK


class _TopWords(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, state_NTH: Tensor, weight_VH: Tensor, bias_V: Tensor, part_NT: Tensor, terms: int
    ) -> tuple[Tensor, Tensor]:
        score_NK, word_NK, token_NK = _search(state_NTH, weight_VH, bias_V, part_NT, terms)
        ctx.save_for_backward(state_NTH, weight_VH, bias_V, word_NK, token_NK)
        ctx.mark_non_differentiable(word_NK)
        return score_NK, word_NK

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        state_NTH, weight_VH, bias_V, word_NK, token_NK = ctx.saved_tensors
        pull_NK = gradients[0]
        to_state = torch.zeros_like(state_NTH) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight_VH) if ctx.needs_input_grad[1] else None
        to_bias = None
        if ctx.needs_input_grad[2]:
            to_bias = torch.zeros_like(bias_V).index_add_(0, word_NK.flatten(), pull_NK.flatten())
        for row in range(len(state_NTH)):
            chosen_K = pull_NK[row].nonzero()[:, 0]
            for some_K in chosen_K.split(_TERMS_AT_ONCE):
                word_K, token_K, pull_K1 = word_NK[row, some_K], token_NK[row, some_K], pull_NK[row, some_K, None]
                if to_state is not None:
                    to_state[row].index_add_(0, token_K, pull_K1 * in_fp32(weight_VH[word_K]))
                if to_weight is not None:
                    to_weight.index_add_(0, word_K, (pull_K1 * state_NTH[row, token_K]).to(weight_VH.dtype))
        return to_state, to_weight, to_bias, None, None


def _search(
    state_NTH: Tensor, weight_VH: Tensor, bias_V: Tensor, part_NT: Tensor, terms: int
) -> tuple[Tensor, Tensor, Tensor]:
    """score_NK, word_NK, token_NK of the best words, a block of the vocabulary at a time."""
    rows, tokens = part_NT.shape
    size = max(_NUMBERS // max(rows * tokens, 1), 64)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for start in range(0, len(weight_VH), size):
        score_NTB = state_NTH @ in_fp32(weight_VH[start : start + size]).T
        score_NTB.masked_fill_(~part_NT[..., None], float("-inf"))
        score_NB, token_NB = score_NTB.max(1)
        score_NB += bias_V[start : start + size]
        word_NB = torch.arange(start, start + score_NB.shape[1], device=token_NB.device).expand_as(token_NB)
        found = (score_NB, word_NB, token_NB)
        joined = found if best is None else tuple(torch.cat(pair, 1) for pair in zip(best, found, strict=True))
        score_NK, place_NK = joined[0].topk(min(terms, joined[0].shape[1]), dim=1)
        best = score_NK, joined[1].gather(1, place_NK), joined[2].gather(1, place_NK)
    assert best is not None
    return best
