"""TSDAE: denoising auto-encoding as unsupervised training of an embedder, an output `tsdae` of a BERT-like encoder.

Most words of a text are deleted; the encoder makes the vector c of what is left, as the model pools it; a decoder that
sees nothing but c and the words before says the whole text:

    c = pooling(encoder(words with 60 % deleted))
    decoder: the encoder's own layers under causal attention (tied weights), and in each of them c is added
    loss of a text = sum over its tokens but the first of -log softmax(W f(h_{t-1}))_{id_t}

Attention to a single vector gives it the weight 1 whatever the query is, so cross-attention to c is a projection of c,
the same at every position: LN(x + W_o W_v c), one W a layer. The output holds the sum of the cross-entropies and the
number of tokens, so that the loss `tsdae` is exact over chunks and ranks. The layers of the decoder are dropped when
the folder is loaded without naming the head.

Source: TSDAE (Wang, Reimers and Gurevych, 2021), section 3, with tied weights and a deletion ratio of 0.6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedsmith.core.errors import ModelError
from embedsmith.core.reps import Dense
from embedsmith.core.shelf import heads
from embedsmith.core.tokens import PaddedTokens
from embedsmith.models.heads.base import Head, HeadSource, ModelForHead
from embedsmith.models.heads.splade import LmHead
from embedsmith.pretrain.whole_words import WholeWords

DELETED = 0.6


@heads.register("tsdae", source="TSDAE (2104.06979)")
class TsdaeHead(Head):
    """The language-model head, and how each layer of the decoder takes up the vector."""

    file = "tsdae_head.safetensors"
    own_pass = True
    reads_words = True

    def __init__(self, lm: LmHead, config: Any, tokenizer: Any) -> None:
        super().__init__()
        self.lm = lm
        self.cross = nn.ModuleList(TakenUp(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.whole = WholeWords(tokenizer, len(lm.output_VH))

    @classmethod
    def build(cls, source: HeadSource) -> TsdaeHead:
        """The head in the folder, or a new one. Errors: `ModelError` for a family whose layers cannot be used, and for
        a file of another model."""
        backbone, file = source.backbone, source.folder / cls.file
        if backbone.config.model_type not in ("bert", "roberta", "xlm-roberta", "camembert"):
            raise ModelError(
                f"tsdae of {type(backbone).__name__}",
                expected="a BERT, RoBERTa or XLM-RoBERTa, whose layers can be a decoder's",
                fix="leave this stage out, or train by SimCSE (recipes/simcse.yaml), which any model with dropout can",
            )
        if not file.exists():
            return cls(LmHead.new(source), backbone.config, source.tokenizer)
        lm, tensors, _ = LmHead.read(file, backbone)
        head = cls(lm, backbone.config, source.tokenizer)
        try:
            head.cross.load_state_dict({name.removeprefix("cross."): tensor for name, tensor in tensors.items()})
        except RuntimeError as error:
            raise ModelError(f"this decoder belongs to another model: {error}", where=file) from error
        return head

    def forward(self, model: ModelForHead, padded: PaddedTokens) -> Dense:
        """number_N2: the sum of the cross-entropies of a text's tokens, and how many there are."""
        shown = self._thinned(padded)
        sentence_NH = model.pooled_states(shown)
        state_NTH = self._decoded(model.backbone, padded, sentence_NH)[:, :-1]
        said_NT = padded.mask_NT[:, 1:] & padded.mask_NT[:, :-1]
        with torch.autocast(state_NTH.device.type, enabled=False):
            value_S = self.lm.cross_entropies(state_NTH[said_NT], padded.id_NT[:, 1:][said_NT])
            total_N = value_S.new_zeros(len(state_NTH)).index_add(0, said_NT.nonzero()[:, 0], value_S)
            return Dense(torch.stack([total_N, said_NT.sum(1).to(total_N.dtype)], 1))

    def _thinned(self, padded: PaddedTokens) -> PaddedTokens:
        """The texts without most of their words, each with all its pieces; of a text one word stays at least."""
        word_NT, group_NT = self.whole.words(padded), self.whole.groups(padded.id_NT)
        dice_NG = torch.rand(len(group_NT), group_NT.shape[1] + 1, device=group_NT.device)
        value_NT = dice_NG.gather(1, group_NT).masked_fill(~word_NT, -1.0)
        kept_NT = (value_NT >= DELETED) | (value_NT == value_NT.amax(1, keepdim=True))
        kept_NT = padded.mask_NT & (kept_NT | ~word_NT)
        order_NT = (~kept_NT).long().argsort(dim=1, stable=True)[:, : max(int(kept_NT.sum(1).max()), 1)]
        whole = (padded.id_NT, kept_NT, padded.body_NT & kept_NT)
        id_NT, mask_NT, body_NT = (tensor.gather(1, order_NT) for tensor in whole)
        return PaddedTokens(id_NT, mask_NT, body_NT, padded.is_query_N)

    def _decoded(self, backbone: Any, padded: PaddedTokens, sentence_NH: Tensor) -> Tensor:
        """state_NTH of the decoder: at each token it has seen that token, those before, and the vector."""
        length = padded.id_NT.shape[1]
        causal_TT = torch.ones(length, length, dtype=torch.bool, device=padded.id_NT.device).tril()
        see_NTU = causal_TT & padded.mask_NT[:, None, :] | torch.eye(length, dtype=torch.bool, device=causal_TT.device)
        state_NTH: Tensor = backbone.embeddings(input_ids=padded.id_NT)
        for layer, cross in zip(backbone.encoder.layer, self.cross, strict=True):
            own = layer.attention.self
            parts = [part(state_NTH) for part in (own.query, own.key, own.value)]
            split = [part.unflatten(-1, (own.num_attention_heads, -1)).transpose(1, 2) for part in parts]
            mixed = F.scaled_dot_product_attention(split[0], split[1], split[2], attn_mask=see_NTU[:, None])
            state_NTH = layer.attention.output(mixed.transpose(1, 2).flatten(2), state_NTH)
            state_NTH = cross(state_NTH, sentence_NH)
            state_NTH = layer.output(layer.intermediate(state_NTH), state_NTH)
        return state_NTH

    def save(self, folder: Path) -> None:
        self.lm.save(folder / self.file, {}, cross=self.cross)


class TakenUp(nn.Module):
    """LN(x + W_o (W_v c)): cross-attention to one vector, initialised as BERT's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value, self.out, self.norm = nn.Linear(width, width), nn.Linear(width, width), nn.LayerNorm(width)
        for linear in (self.value, self.out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, state_NTH: Tensor, sentence_NH: Tensor) -> Tensor:
        made: Tensor = self.norm(state_NTH + self.out(self.value(sentence_NH))[:, None])
        return made
