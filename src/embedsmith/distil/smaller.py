"""Where a smaller student begins: with the teacher's own weights, in fewer layers or in narrower ones."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from embedsmith.core.errors import ModelError
from embedsmith.models import load
from embedsmith.models.self_test import layers_of


def write_smaller(teacher: str, folder: Path, layers: int | None, hidden: int | None) -> None:
    """The student before training, as a model's folder. Layers are kept at even distances, the first and the last among
    them; of a width, the leading part of every matrix, in whole attention heads.

    Errors: `ModelError` for more than the teacher has, and for a family whose width is not known by these names.
    """
    model = load(teacher, device="cpu")
    if layers is not None:
        depth = len(layers_of(model.backbone))
        if layers >= depth:
            raise ModelError(
                f"layers={layers}, and the teacher has {depth}", expected=f"from 1 to {depth - 1}", where=teacher
            )
        model = load(teacher, device="cpu", layers=evenly(depth, layers))
    parts = replace(model.parts, heads={})
    if hidden is not None:
        if parts.pooler is not None:
            raise ModelError(f"hidden={hidden} of a pooling with weights", where=teacher, fix="leave hidden out")
        parts = replace(parts, backbone=narrowed(model.backbone, hidden), projections=())
    parts.save(folder)


def evenly(depth: int, count: int) -> tuple[int, ...]:
    """`count` of `depth` layers at even distances; of a single one the last of the first half."""
    if count == 1:
        return ((depth - 1) // 2,)
    return tuple(round(place * (depth - 1) / (count - 1)) for place in range(count))


def narrowed(backbone: Any, hidden: int) -> Any:
    """The same architecture with another hidden width, as many heads fewer and as much narrower in between; its weights
    are the leading parts of the backbone's.

    Errors: `ModelError` for a width that is not smaller or no multiple of a head's.
    """
    config = copy.deepcopy(backbone.config)
    width, count = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    between = getattr(config, "intermediate_size", None)
    if not (isinstance(width, int) and isinstance(count, int) and isinstance(between, int)):
        raise ModelError(
            f"the width of a {type(backbone).__name__}",
            expected="hidden_size, num_attention_heads and intermediate_size in its config",
            fix="distil to fewer layers",
        )
    of_a_head = width // count
    if hidden >= width or hidden % of_a_head:
        raise ModelError(
            f"hidden={hidden}, and the teacher has {width} in heads of {of_a_head}",
            expected=f"a multiple of {of_a_head} below {width}",
        )
    config.hidden_size, config.num_attention_heads = hidden, hidden // of_a_head
    config.intermediate_size = round(between * hidden / width)
    pairs = getattr(config, "num_key_value_heads", None)
    if pairs is not None:  # the largest number up to the teacher's that divides the heads
        kept = hidden // of_a_head
        config.num_key_value_heads = next(n for n in range(min(pairs, kept), 0, -1) if kept % n == 0)
    made = type(backbone)(config)
    if getattr(backbone, "pooler", None) is None and getattr(made, "pooler", None) is not None:
        made.pooler = None
    whole = backbone.state_dict()
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            tensor.copy_(whole[name][tuple(slice(0, size) for size in tensor.shape)])
    return made.to(next(backbone.parameters()).dtype).eval()
