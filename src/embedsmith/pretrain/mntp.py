"""Masked next-token prediction: a decoder made bidirectional learns to use what comes after, an output `mntp`.

A fifth of a text's words are hidden by BERT's rule (80 % the mask token, 10 % another word, 10 % as they are), and each
is predicted from the state one place before it, where a decoder is used to predict it:

    number_N2 = (sum over hidden tokens i of -log softmax(W h_{i-1})_{id_i}, number of hidden tokens)

so that the loss `mntp` is exact over chunks and ranks. W is the language model's own output layer. Tokenizers without a
mask token lend "_". The head serves one stage: loading the folder without naming it leaves it out.

Source: LLM2Vec (BehnamGhader et al., 2024), section 2.1; a fifth is its code's share for most families (Mistral: 80 %,
always the mask token).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedsmith.core.errors import ModelError
from embedsmith.core.reps import Dense, in_fp32
from embedsmith.core.shelf import heads
from embedsmith.core.tokens import PaddedTokens
from embedsmith.models.heads.base import Head, HeadSource, ModelForHead
from embedsmith.models.heads.splade import LmHead
from embedsmith.pretrain.whole_words import shown_by_bert

SHARE = 0.2


@heads.register("mntp", source="LLM2Vec (2404.05961)")
class MntpHead(Head):
    """The language model's output layer, and what hides a word."""

    file = "mntp_head.safetensors"
    own_pass = True
    reads_words = True
    special_S: Tensor

    def __init__(self, lm: LmHead, tokenizer: Any) -> None:
        super().__init__()
        self.lm = lm
        mask_id = tokenizer.get_vocab().get("_") if tokenizer.mask_token_id is None else tokenizer.mask_token_id
        if mask_id is None:
            raise ModelError(
                "the tokenizer has neither a mask token nor the word '_'", expected="one of them, for mntp"
            )
        self.mask_id = int(mask_id)
        self.register_buffer("special_S", torch.tensor(sorted(tokenizer.all_special_ids)), persistent=False)

    @classmethod
    def build(cls, source: HeadSource) -> MntpHead:
        """The head in the folder, else that of the language model in the base."""
        file = source.folder / cls.file
        lm = LmHead.read(file, source.backbone)[0] if file.exists() else LmHead.new(source)
        head = cls(lm, source.tokenizer)
        if source.adapted:  # as the backbone's own words are
            head.requires_grad_(False)
        return head

    def forward(self, model: ModelForHead, padded: PaddedTokens) -> Dense:
        """number_N2: the sum of the hidden tokens' cross-entropies, and how many there are."""
        hidden_NT = hidden_words(padded, self.special_S)
        shown = replace(padded, id_NT=shown_by_bert(padded.id_NT, hidden_NT, self.mask_id, len(self.lm.output_VH)))
        before_NTH = model.states(shown).last_hidden_state[:, :-1]
        chosen_NT = hidden_NT[:, 1:]
        with torch.autocast(before_NTH.device.type, enabled=False):
            value_S = self.lm.cross_entropies(before_NTH[chosen_NT], padded.id_NT[:, 1:][chosen_NT])
            total_N = 0.0 * in_fp32(before_NTH).sum((1, 2))  # connected where nothing is hidden
            total_N = total_N.index_add(0, chosen_NT.nonzero()[:, 0], value_S)
            return Dense(torch.stack([total_N, chosen_NT.sum(1).to(total_N.dtype)], 1))

    def save(self, folder: Path) -> None:
        self.lm.save(folder / self.file, {})


def hidden_words(padded: PaddedTokens, special_S: Tensor) -> Tensor:
    """hidden_NT: each word with chance `SHARE`; never a special token, nor the first token, which nothing precedes."""
    word_NT = padded.mask_NT & ~torch.isin(padded.id_NT, special_S)
    word_NT[:, 0] = False
    word_NT[:, 1:] &= padded.mask_NT[:, :-1]
    return word_NT & (torch.rand(word_NT.shape, device=word_NT.device) < SHARE)
