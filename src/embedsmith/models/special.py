"""Special tokens around a text: an end token for last-token pooling, a first token for cls pooling, padding.

They are put into the tokenizer's own post-processing, so that truncation leaves room for them, nothing appends them
twice, and a saved tokenizer adds them in every program.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers.processors import Sequence as Steps
from tokenizers.processors import TemplateProcessing

from embedsmith.core.errors import ModelError


def put_end_token(tokenizer: Any, wanted: str | None) -> int:
    """The id of the token behind every text, put there if the tokenizer does not put one there by itself.

    `wanted`: its text; `None` takes what the tokenizer appends, else its eos token.
    Errors: `ModelError` when there is no such token.
    """
    tail = added_tokens(tokenizer)[1]
    if wanted is None and tail:
        return tail[-1]
    token = wanted or tokenizer.eos_token
    number = None if token is None else tokenizer.convert_tokens_to_ids(token)
    if number is None or (wanted is not None and number == tokenizer.unk_token_id):
        raise ModelError(
            "the tokenizer has no end token" if token is None else f"the tokenizer does not know {token!r}",
            where=getattr(tokenizer, "name_or_path", None) or "tokenizer",
            expected="a token to put behind every text, whose state is then the vector",
            fix="name one that the vocabulary has with eos_token=..., or use pooling=mean",
        )
    if tail[-1:] != [number]:
        _process(tokenizer, ["$A", token], token, number)
    return int(number)


def put_first_token(tokenizer: Any, backbone: Any, token: str) -> None:
    """`token` in front of every text; a new one gets the mean of all embeddings as its own."""
    if token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"cls_token": token})
    number = int(tokenizer.convert_tokens_to_ids(token))
    table = backbone.get_input_embeddings()
    if number >= table.num_embeddings:
        mean_H = table.weight.detach().float().mean(0)
        backbone.resize_token_embeddings(number + 1, mean_resizing=False)
        with torch.no_grad():
            backbone.get_input_embeddings().weight[number] = mean_H
    if added_tokens(tokenizer)[0][:1] != [number]:
        _process(tokenizer, [token, "$A"], token, number)


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts in front of a text and behind it."""
    native = tokenizer.backend_tokenizer
    plain = native.encode("a", add_special_tokens=False).ids
    whole = native.encode("a").ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def ensure_padding(tokenizer: Any) -> None:
    """A pad token for programs that insist on one: the end token, or the first of the vocabulary. Masks come from
    lengths, so a pad token that is also a real one does no harm."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)


def _process(tokenizer: Any, pieces: list[str], token: str, number: int) -> None:
    native = tokenizer.backend_tokenizer
    step = TemplateProcessing(single=pieces, pair=[*pieces, "$B"], special_tokens=[(token, number)])
    native.post_processor = step if native.post_processor is None else Steps([native.post_processor, step])
