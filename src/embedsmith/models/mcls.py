"""MCLS: many CLS tokens in one long text, for encoders that were trained on short ones.

A CLS stands before every block of content tokens, the text is encoded once with full attention, and the vector is the
mean of the states of all CLS. Source: M3-Embedding (Chen et al., 2024), section 3.4; the exact sequence,
`[CLS] t1..t256 [CLS] t257.. [SEP]`, is reconstructed. A text of one block has its ordinary CLS vector.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from embedsmith.core.tokens import PaddedTokens, TokenBatch


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


def cls_and_words(padded: PaddedTokens, part_NT: Tensor, cls_id: int) -> tuple[Tensor, Tensor]:
    """mask_NT of the CLS tokens, and `part_NT` without those that were put between blocks: they are no words of the
    text."""
    cls_NT = padded.mask_NT & (padded.id_NT == cls_id)
    return cls_NT, part_NT & ~(cls_NT & (cls_NT.int().cumsum(1) > 1))
