"""More positions for models with a learned position table: BERT, XLM-RoBERTa and their like.

New rows repeat the old ones (position n of the longer table is position n mod L of the old), as Longformer's were
made: a text that fits the old table keeps its vector, and a longer one starts from positions the model knows. How
M3-Embedding's new rows were made is not published; this is reconstructed. Texts longer than before need training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from embedsmith.core.errors import ModelError
from embedsmith.models.embedder import position_table


def extend_positions(backbone: Any, positions: int) -> None:
    """Give the position table room for `positions` tokens, in place.

    Errors: `ModelError` for a model without such a table, and for fewer positions than it has.
    """
    table = position_table(backbone)
    holder = next((module for module in backbone.modules() if table in module.children()), None)
    if table is None or type(table) is not nn.Embedding or not _is_plain(holder):
        raise ModelError(
            f"positions={positions}: {type(backbone).__name__} has no position table that can be extended",
            expected="a model like BERT or XLM-RoBERTa",
            fix="leave positions out; a model with rotary positions takes max_length alone",
        )
    offset = 0 if table.padding_idx is None else table.padding_idx + 1
    old = table.num_embeddings - offset
    if positions < old:
        raise ModelError(f"positions={positions}", expected=f"{old} or more, as many as the model has")
    if positions == old:
        return
    assert holder is not None
    longer = nn.Embedding(positions + offset, table.embedding_dim, table.padding_idx)
    rows = table.weight.detach()
    again = rows[offset:].repeat(-(-positions // old), 1)[:positions]
    longer.weight = nn.Parameter(torch.cat([rows[:offset], again]))
    name = next(name for name, child in holder.named_children() if child is table)
    setattr(holder, name, longer)
    _lengthen(holder, positions + offset)
    backbone.config.max_position_embeddings = positions + offset


def _is_plain(holder: nn.Module | None) -> bool:
    """Whether the table belongs to a module that adds it to word embeddings, as BERT's does."""
    return holder is not None and "word_embeddings" in dict(holder.named_children())


def _lengthen(holder: nn.Module, count: int) -> None:
    """The buffers that go with the table: the numbers of positions, and token types of zero."""
    for name, buffer in list(holder.named_buffers(recurse=False)):
        if name == "position_ids":
            holder.register_buffer(name, torch.arange(count, device=buffer.device)[None], persistent=False)
        elif name == "token_type_ids":
            holder.register_buffer(name, buffer.new_zeros(1, count), persistent=False)
