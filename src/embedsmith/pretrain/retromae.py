"""RetroMAE: masked auto-encoding as pre-training for retrieval, an output `retromae` of a BERT-like encoder.

The encoder reads a text with 30 % of its words masked and predicts them (MLM). The state c of its CLS goes to a decoder
of one layer, which must say the whole text from it:

    queries: embedding layer of c at every position        keys and values: c, then the clean word embeddings
    position i sees c and its own random half of the words, never itself
    loss of a text = MLM cross-entropy + decoder cross-entropy over every token but the first and the last

The output holds the sums of both cross-entropies and the numbers of tokens, so that the loss `retromae` is exact over
chunks and ranks. The decoder is kept in checkpoints; loading the folder without naming the head drops it.

Sources: RetroMAE (Xiao et al., 2022) with enhanced decoding, as in FlagEmbedding's code, by which M3-Embedding was
pre-trained; ratios are that code's defaults (M3's own are not published).
"""

from __future__ import annotations

from dataclasses import replace
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
from embedsmith.models.pooling import first_index, last_index
from embedsmith.pretrain.whole_words import WholeWords, shown_by_bert

ENCODER_SHARE, DECODER_SHARE = 0.3, 0.5
_POOL = 128  # masks of a text from which positions draw theirs


@heads.register("retromae", source="RetroMAE (2205.12035), FlagEmbedding's code")
class RetroMaeHead(Head):
    """The language-model head, and the decoder with its weights."""

    file = "retromae_head.safetensors"
    own_pass = True
    reads_words = True

    def __init__(self, lm: LmHead, config: Any, tokenizer: Any) -> None:
        super().__init__()
        self.lm = lm
        self.decoder = DecoderLayer(config.hidden_size, config.num_attention_heads)
        self.mask_id = int(tokenizer.mask_token_id)
        self.whole = WholeWords(tokenizer, len(lm.output_VH))

    @classmethod
    def build(cls, source: HeadSource) -> RetroMaeHead:
        """The head in the folder, or a new one. Errors: `ModelError` for a family whose embedding layer cannot be used,
        a tokenizer without a mask token, and a file of another model."""
        backbone, file = source.backbone, source.folder / cls.file
        if backbone.config.model_type not in ("bert", "roberta", "xlm-roberta", "camembert"):
            raise ModelError(
                f"retromae of {type(backbone).__name__}",
                expected="a BERT, RoBERTa or XLM-RoBERTa, with absolute positions",
                fix="leave this stage out",
            )
        if source.tokenizer.mask_token_id is None:
            raise ModelError("the tokenizer has no mask token", expected="one, for retromae")
        if not file.exists():
            return cls(LmHead.new(source), backbone.config, source.tokenizer)
        lm, tensors, _ = LmHead.read(file, backbone)
        head = cls(lm, backbone.config, source.tokenizer)
        try:
            head.decoder.load_state_dict({name.removeprefix("decoder."): tensor for name, tensor in tensors.items()})
        except RuntimeError as error:
            raise ModelError(f"this decoder belongs to another model: {error}", where=file) from error
        return head

    def forward(self, model: ModelForHead, padded: PaddedTokens) -> Dense:
        """number_N4: cross-entropy sum and count of the masked tokens, the same of the decoder's."""
        word_NT = self.whole.words(padded)
        hidden_NT = random_words(word_NT, self.whole.groups(padded.id_NT), ENCODER_SHARE)
        shown = replace(padded, id_NT=shown_by_bert(padded.id_NT, hidden_NT, self.mask_id, len(self.lm.output_VH)))
        state_NTH = model.states(shown).last_hidden_state
        row_N = torch.arange(len(state_NTH), device=state_NTH.device)
        sentence_NH = state_NTH[row_N, first_index(padded.mask_NT)]
        decoded_NTH, target_NT = self._decode(model.backbone, padded, sentence_NH)
        numbers: list[Tensor] = []
        with torch.autocast(state_NTH.device.type, enabled=False):
            for hidden_NTH, chosen_NT in ((state_NTH, hidden_NT), (decoded_NTH, target_NT)):
                value_S = self.lm.cross_entropies(hidden_NTH[chosen_NT], padded.id_NT[chosen_NT])
                total_N = value_S.new_zeros(len(state_NTH)).index_add(0, chosen_NT.nonzero()[:, 0], value_S)
                numbers += [total_N, chosen_NT.sum(1).to(total_N.dtype)]
        return Dense(torch.stack(numbers, 1))

    def _decode(self, backbone: Any, padded: PaddedTokens, sentence_NH: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's states, and which tokens it has to say."""
        length = padded.id_NT.shape[1]
        query_NTH = backbone.embeddings(inputs_embeds=sentence_NH[:, None].expand(-1, length, -1))
        clean_NTH = backbone.embeddings(input_ids=padded.id_NT)
        memory_NTH = torch.cat([sentence_NH[:, None], clean_NTH[:, 1:]], 1)
        column_T = torch.arange(length, device=sentence_NH.device)
        ends_NT = column_T == last_index(padded.mask_NT)[:, None]
        target_NT = padded.mask_NT & ~ends_NT & (column_T > 0)
        return self.decoder(query_NTH, memory_NTH, self._visible(padded)), target_NT

    def _visible(self, padded: PaddedTokens) -> Tensor:
        """see_NTU: position t sees u. Every position draws one of the text's masks; c, at 0, is always seen."""
        rows, length = padded.id_NT.shape
        count = min(length, _POOL)
        word_NT, group_NT = self.whole.words(padded), self.whole.groups(padded.id_NT)
        many = [tensor.repeat_interleave(count, 0) for tensor in (word_NT, group_NT)]
        hidden_NPU = random_words(many[0], many[1], DECODER_SHARE).view(rows, count, length)
        drawn_NT = torch.randint(count, (rows, length), device=padded.id_NT.device)
        see_NTU = padded.mask_NT[:, None, :] & ~hidden_NPU.gather(1, drawn_NT[..., None].expand(-1, -1, length))
        see_NTU = see_NTU & ~torch.eye(length, dtype=torch.bool, device=see_NTU.device)
        see_NTU[:, :, 0] = True
        return see_NTU

    def save(self, folder: Path) -> None:
        self.lm.save(folder / self.file, {}, decoder=self.decoder)


class DecoderLayer(nn.Module):
    """One post-norm transformer layer whose queries and memory differ, as BERT's initialised."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, query_NTH: Tensor, memory_NTH: Tensor, see_NTU: Tensor) -> Tensor:
        parts = (self.query(query_NTH), self.key(memory_NTH), self.value(memory_NTH))
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]
        mixed = F.scaled_dot_product_attention(split[0], split[1], split[2], attn_mask=see_NTU[:, None])
        state_NTH = self.norms[0](query_NTH + self.out(mixed.transpose(1, 2).flatten(2)))
        made_NTH: Tensor = self.norms[1](state_NTH + self.narrow(F.gelu(self.wide(state_NTH))))
        return made_NTH


def random_words(word_NT: Tensor, group_NT: Tensor, share: float) -> Tensor:
    """hidden_NT: whole words in random order, as long as they fit into `share` of the row's word tokens (at least
    one token). `group_NT` numbers the words of a row."""
    size = group_NT.shape[1] + 1
    order_NG = torch.rand(len(group_NT), size, device=group_NT.device)
    value_NT = order_NG.gather(1, group_NT).masked_fill(~word_NT, 2.0)
    place_NT = value_NT.argsort(1).argsort(1)
    last_NG = torch.zeros(len(group_NT), size, dtype=torch.int64, device=group_NT.device)
    last_NG = last_NG.scatter_reduce(1, group_NT, place_NT.masked_fill(~word_NT, -1), "amax")
    first_NG = torch.full_like(last_NG, size).scatter_reduce(
        1, group_NT, place_NT.masked_fill(~word_NT, size), "amin", include_self=True
    )
    wanted_N1 = (word_NT.sum(1, keepdim=True) * share).round().clamp_min(1)
    whole_NT = last_NG.gather(1, group_NT) < wanted_N1
    first_word_NT = first_NG.gather(1, group_NT) == 0  # a first word longer than all that is wanted
    return word_NT & (whole_NT | first_word_NT)
