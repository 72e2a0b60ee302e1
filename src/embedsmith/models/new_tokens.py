"""Words added to a model's vocabulary (`model.new_tokens`), each with an embedding of its own from then on.

A new token is found wherever it stands in a text as it is written, inside longer words too, before the tokenizer
changes the text. Its embedding starts as the mean of those of the pieces that the text was cut into before (Hewitt,
2021, takes the mean of all; the pieces are nearer), so a text with it means about the same at first.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken

from embedsmith.core.errors import ModelError


def add_new_tokens(tokenizer: Any, backbone: Any, tokens: Sequence[str]) -> list[int]:
    """Put `tokens` into the vocabulary and the table of embeddings, in place; returns their ids.

    Errors: `ModelError` for one that is a token already, or empty.
    """
    pieces = [_pieces(tokenizer, token) for token in dict.fromkeys(tokens)]
    if len(pieces) < len(tokens):
        twice = next(token for token in tokens if list(tokens).count(token) > 1)
        raise ModelError(f"new_tokens has {twice!r} twice", fix="leave one of them out")
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    ids: list[int] = [int(number) for number in tokenizer.convert_tokens_to_ids(list(tokens))]
    grow_table(backbone, max(ids) + 1)
    with torch.no_grad():
        table_VH = backbone.get_input_embeddings().weight
        start_MH = [(table_VH[own] if own else table_VH[: min(ids)]).float().mean(0) for own in pieces]
        for number, start_H in zip(ids, start_MH, strict=True):
            table_VH[number] = start_H.to(table_VH.dtype)
    return ids


def _pieces(tokenizer: Any, token: str) -> list[int]:
    """The ids of a text that is to be one token, without those that stand for anything unknown."""
    if not token.strip():
        raise ModelError(f"new_tokens has {token!r}", expected="texts", fix="leave it out")
    ids: list[int] = tokenizer.backend_tokenizer.encode(token, add_special_tokens=False).ids
    known = [number for number in ids if number != tokenizer.unk_token_id]
    if token in tokenizer.get_vocab() or len(ids) == len(known) == 1:
        named = tokenizer.convert_ids_to_tokens(ids)
        already = "" if token in tokenizer.get_vocab() else f" ({named[0]!r})"
        raise ModelError(f"new_tokens: {token!r} is a token of this model already{already}", fix="leave it out")
    return known


def grow_table(backbone: Any, rows: int) -> None:
    """Give the table of embeddings `rows` rows, unless it has as many; those that are new hold nothing yet."""
    if rows > len(backbone.get_input_embeddings().weight):
        backbone.resize_token_embeddings(rows, mean_resizing=False)
