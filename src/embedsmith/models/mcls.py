"""MCLS: many CLS tokens in one long text, for encoders that were trained on short ones.

A CLS stands before every block of content tokens, the text is encoded once with full attention, and the vector is the
mean of the states of all CLS. Source: M3-Embedding (Chen et al., 2024), section 3.4; the exact sequence,
`[CLS] t1..t256 [CLS] t257.. [SEP]`, is reconstructed. A text of one block has its ordinary CLS vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedsmith.core.errors import ModelError
from embedsmith.core.tokens import PaddedTokens, TokenBatch
from embedsmith.models.tokenize import added_tokens


def check_mcls(block: int | None, pooling: str, tokenizer: Any) -> None:
    """Errors: `ModelError` for a pooling other than cls, or a tokenizer without a single CLS in front."""
    if block is None:
        return
    if block < 1 or pooling != "cls" or len(added_tokens(tokenizer)[0]) != 1:
        raise ModelError(
            f"mcls={block} with {pooling} pooling",
            expected="1 or more, for an encoder with cls pooling whose tokenizer puts one CLS before a text",
            fix="leave mcls out",
        )


def room_for(max_length: int, block: int, ends: int) -> int:
    """Tokens that a text may have before the CLS tokens between its blocks are put in, so that it then has at most
    `max_length`: 1 + n + ends for the largest n with n + ceil(n / block) + ends <= max_length."""
    room = max_length - ends
    content = room - -(-room // (block + 1))
    return 1 + content + ends


def with_cls_blocks(tokens: TokenBatch, block: int, ends: int) -> TokenBatch:
    """Every row `[CLS] content end` with its CLS also before each further block of content."""
    rows: list[list[int]] = []
    body: list[int] = []
    for number, start in enumerate(tokens.offset_P[:-1]):
        ids = tokens.id_S[start : tokens.offset_P[number + 1]]
        stop = max(len(ids) - ends, 1)
        places = np.arange(1 + block, stop, block)
        rows.append(np.insert(ids, places, ids[0]).tolist())
        before = int(tokens.body_N[number])
        body.append(before + int((places < before).sum()))
    made = TokenBatch.from_rows(rows, body, is_query=False)
    return TokenBatch(made.id_S, made.offset_P, made.body_N, tokens.is_query_N)


def cls_places(padded: PaddedTokens, cls_id: int) -> Tensor:
    """mask_NT of the CLS tokens."""
    return padded.mask_NT & (padded.id_NT == cls_id)


def without_inner_cls(part_NT: Tensor, padded: PaddedTokens, cls_id: int) -> Tensor:
    """`part_NT` without the CLS tokens that were put between blocks: they are no words of the text."""
    place_NT = cls_places(padded, cls_id)
    inner_NT = place_NT & (torch.cumsum(place_NT.int(), 1) > 1)
    return part_NT & ~inner_NT
