"""Scores in blocks: every candidate loss is written once against blocks of candidates.

One block is the plain path. With a block size each block is scored under a checkpoint: only its small result is kept,
and its scores are computed again in the backward pass, so that the whole score matrix never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from embedsmith.core.reps import Representation, Widths

R = TypeVar("R")

NEVER = -1e30
"""The logit of a candidate that does not count. Finite, so that a row without candidates has no NaN gradient."""


def in_blocks(
    pairs: Sequence[tuple[Representation, Representation]],
    widths: Widths | None,
    block_size: int | None,
    reduce: Callable[..., R],
) -> list[R]:
    """`reduce(start, *scores)` of every block of candidates, in order.

    `pairs` are the queries and candidates of one head or of several; each gives one score_WQB of the block that
    begins at row `start`.
    """

    def scored(start: int, *blocks: Representation) -> R:
        return reduce(start, *(query.scores(block, widths) for (query, _), block in zip(pairs, blocks, strict=True)))

    documents = [document for _, document in pairs]
    if block_size is None or block_size >= len(documents[0]):
        return [scored(0, *documents)]
    blocks = zip(*(_split(document, block_size) for document in documents), strict=True)
    return [
        checkpoint(scored, number * block_size, *block, use_reentrant=False, preserve_rng_state=False)
        for number, block in enumerate(blocks)
    ]


def _split(document: Representation, size: int) -> Iterator[Representation]:
    """Blocks of rows. Split, not sliced: the gradient of all blocks is then put together once, not added up in a
    full-size buffer for every block."""
    names = [f.name for f in fields(document)]
    for column in zip(*(tensor.split(size) for tensor in document.tensors()), strict=True):
        yield replace(document, **dict(zip(names, column, strict=True)))


def pair_scores(
    query: Representation, document: Representation, row_QX: Tensor, widths: Widths | None, replay: bool
) -> Tensor:
    """score_WQX of query n against the documents `row_QX[n]`; an absent slot has the score of row 0, to be masked.

    Slot by slot, so that no more than one document a query is copied at a time; `replay` computes them again in the
    backward pass instead of keeping the copies.
    """

    def slot(row_Q: Tensor) -> Tensor:
        return query.paired(document.rows(row_Q), widths)

    columns = row_QX.clamp_min(0).unbind(1)
    if not replay:
        return torch.stack([slot(row_Q) for row_Q in columns], -1)
    replayed = [checkpoint(slot, row_Q, use_reentrant=False, preserve_rng_state=False) for row_Q in columns]
    return torch.stack(replayed, -1)
