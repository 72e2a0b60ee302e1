"""Which tokens of a text are words, which of them are pieces of one word, and what is shown of hidden ones."""

from typing import Any

import torch
from torch import Tensor, nn

from embedsmith.core.tokens import PaddedTokens


class WholeWords(nn.Module):
    """What a tokenizer says of its words. `follows_V`: pieces that begin with ##, which belong to the word before; for
    other tokenizers every piece is a word. `special_S`: ids that are no words."""

    follows_V: Tensor
    special_S: Tensor

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        super().__init__()
        follows_V = torch.zeros(vocabulary, dtype=torch.bool)
        for piece, number in tokenizer.get_vocab().items():
            follows_V[number] = piece.startswith("##")
        self.register_buffer("follows_V", follows_V, persistent=False)
        self.register_buffer("special_S", torch.tensor(sorted(tokenizer.all_special_ids)), persistent=False)

    def words(self, padded: PaddedTokens) -> Tensor:
        """word_NT: the tokens that are words or pieces of one."""
        return padded.mask_NT & ~torch.isin(padded.id_NT, self.special_S)

    def groups(self, id_NT: Tensor) -> Tensor:
        """group_NT: the number of the word that a token belongs to."""
        return (~self.follows_V[id_NT]).long().cumsum(1)


def shown_by_bert(id_NT: Tensor, hidden_NT: Tensor, mask_id: int, vocabulary: int) -> Tensor:
    """BERT's rule: of the hidden tokens 80 % are the mask token, 10 % another word, 10 % as they are."""
    dice_NT = torch.rand(id_NT.shape, device=id_NT.device)
    word_NT = torch.randint(vocabulary, id_NT.shape, device=id_NT.device)
    shown_NT = torch.where(hidden_NT & (dice_NT < 0.8), mask_id, id_NT)
    return torch.where(hidden_NT & (dice_NT >= 0.9), word_NT, shown_NT)
