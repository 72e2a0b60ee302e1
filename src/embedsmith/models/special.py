"""Special tokens around a text: an end token for last-token pooling, a first token for cls pooling, padding.

They are put into the tokenizer's own post-processing, so that truncation leaves room for them, nothing appends them
twice, and a saved tokenizer adds them in every program.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from tokenizers.processors import ByteLevel, TemplateProcessing
from tokenizers.processors import Sequence as Steps

from embedsmith.core.errors import ModelError


def put_end_token(tokenizer: Any, wanted: str | None) -> int:
    """The id of the token behind every text, put there if the tokenizer does not put one there by itself.

    `wanted`: its text; `None` takes what the tokenizer appends, else its eos token.
    Errors: `ModelError` when there is no such token.
    """
    front, tail = added_tokens(tokenizer)
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
        _surround(tokenizer, front, [*tail, int(number)])
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
    front, tail = added_tokens(tokenizer)
    if front[:1] != [number]:
        _surround(tokenizer, [number, *front], tail)


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


def _surround(tokenizer: Any, front: list[int], end: list[int]) -> None:
    """One template for everything around a text: templates in a row would mistake each other's pieces for texts."""
    native = tokenizer.backend_tokenizer
    before, behind = (tokenizer.convert_ids_to_tokens(ids) for ids in (front, end))
    named = [*zip(before, front, strict=True), *zip(behind, end, strict=True)]
    template = TemplateProcessing(
        single=[*before, "$A", *behind], pair=[*before, "$A", "$B", *behind], special_tokens=named
    )
    offsets = _byte_level(json.loads(native.to_str())["post_processor"])
    native.post_processor = template if offsets is None else Steps([offsets, template])


def _byte_level(processing: Any) -> ByteLevel | None:
    """The step that says where tokens of bytes lie in the text, wherever it is in a tokenizer's processing."""
    if processing is None:
        return None
    if processing["type"] == "ByteLevel":
        return ByteLevel(**{key: value for key, value in processing.items() if key != "type"})
    found = (_byte_level(step) for step in processing.get("processors", ()))
    return next((step for step in found if step is not None), None)
