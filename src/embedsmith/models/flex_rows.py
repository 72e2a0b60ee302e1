"""Flex attention of texts that stand in one row: for heads, cards and torch builds that no flash kernel takes.

torch compiles a kernel for a rule of who sees whom, and skips blocks of the row in which nobody sees anybody. Which
blocks those are follows from the bounds of the texts, so no mask of all tokens by all tokens is ever made.
"""

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Tokens a block has on each side, as torch's kernels have them."""


def text_blocks(text_S: Tensor, causal: bool, reach: int | None) -> BlockMask:
    """Which blocks of a row a kernel has to look at. `text_S`: the number of each token's text, which only rises.
    `reach`: how many tokens away a token sees.

    Blocks share a text where the last of the earlier one is the first of the later one, and then tokens at their
    border share it. A block is full, and needs no look at single tokens, where it holds one text on both sides.
    """
    count, device = len(text_S), text_S.device
    start_B = torch.arange(0, count, BLOCK, device=device)
    stop_B = (start_B + BLOCK).clamp_max(count)
    first_B, last_B = text_S[start_B], text_S[stop_B - 1]
    one_text_B = (first_B == last_B) & (stop_B - start_B == BLOCK)
    some_BB = (first_B[:, None] <= last_B[None, :]) & (first_B[None, :] <= last_B[:, None])
    full_BB = one_text_B[:, None] & one_text_B[None, :] & (first_B[:, None] == first_B[None, :])
    behind_BB = start_B[:, None] - start_B[None, :]
    if causal:
        some_BB, full_BB = some_BB & (behind_BB >= 0), full_BB & (behind_BB > 0)
    if reach is not None:
        some_BB = some_BB & (behind_BB.abs() - BLOCK + 1 <= reach)
        full_BB = full_BB & (behind_BB.abs() + BLOCK - 1 <= reach)

    def sees(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = text_S[query] == text_S[key]
        if causal:
            seen = seen & (query >= key)
        if reach is not None:
            seen = seen & (query - key <= reach) & (key - query <= reach)
        return seen

    counts = [_in_order(blocks_BB) for blocks_BB in (some_BB & ~full_BB, full_BB)]
    (partial, full), size = counts, (count, count)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=size)


def _in_order(blocks_BB: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and their numbers, [1, 1, B] and [1, 1, B, B]."""
    chosen_BB = blocks_BB.to(torch.int32)
    order_BB = torch.argsort(chosen_BB, dim=-1, descending=True, stable=True).to(torch.int32)
    return chosen_BB.sum(-1).to(torch.int32)[None, None], order_BB[None, None]


def attend_by_flex(query_SXD: Tensor, key_SYD: Tensor, value_SYD: Tensor, blocks: BlockMask, scale: float) -> Tensor:
    """out_SXD of the rows, under a rule of who sees whom."""
    rows = (one.transpose(0, 1)[None] for one in (query_SXD, key_SYD, value_SYD))
    groups = query_SXD.shape[1] != key_SYD.shape[1]
    made = _compiled(query_SXD.device.type)(*rows, block_mask=blocks, scale=scale, enable_gqa=groups)
    return cast(Tensor, made)[0].transpose(0, 1)


@cache
def _compiled(device: str) -> Any:
    """torch's function: compiled on a card, where it would else make the whole square of scores."""
    return flex_attention if device == "cpu" else torch.compile(flex_attention)
