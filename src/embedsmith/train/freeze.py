"""What of a model stays as it is while the rest is trained (`train.freeze`), and how much is left to train.

    backbone      the whole transformer; poolings with weights, dense layers and heads train
    embeddings    its tables of words, positions and kinds, and an output layer that is tied to them
    layers 0-5    these layers of the transformer, from 0, both ends included; `layers 3` is one of them

A frozen weight has neither gradient nor optimizer state and does not decay: it ends with the bits that it began with.
"""

import re
from collections.abc import Iterator, Sequence

from torch import nn

from embedsmith.core.errors import RecipeError
from embedsmith.models import Model
from embedsmith.models.self_test import layers_of

_LAYERS = re.compile(r"layers (\d{1,5})(?:-(\d{1,5}))?")
_GRAMMAR = "backbone, embeddings, or layers such as 'layers 0-5'"


def check_grammar(parts: Sequence[str]) -> None:
    """Errors: `RecipeError` for a part of a model that has no such name."""
    for part in parts:
        named = _LAYERS.fullmatch(part)
        if named is not None and int(named[1]) > int(named[2] or named[1]):
            raise RecipeError(f"freeze: {part!r}", expected="the lower layer first, such as 'layers 0-5'")
        if named is None and part not in ("backbone", "embeddings"):
            raise RecipeError(f"freeze: {part!r}", expected=_GRAMMAR)


def freeze(model: Model, parts: Sequence[str]) -> None:
    """Errors: `RecipeError` for layers that the model does not have."""
    for part in parts:
        for parameter in _weights(model.backbone, part):
            parameter.requires_grad_(False)


def _weights(backbone: nn.Module, part: str) -> Iterator[nn.Parameter]:
    layers = layers_of(backbone)
    if part == "backbone":
        yield from backbone.parameters()
    elif part == "embeddings":
        inside = {id(module) for layer in layers for module in layer.modules()}
        tables = (one for one in backbone.modules() if isinstance(one, nn.Embedding) and id(one) not in inside)
        yield from (parameter for table in tables for parameter in table.parameters())
    elif named := _LAYERS.fullmatch(part):
        first, last = int(named[1]), int(named[2] or named[1])
        if last >= len(layers):
            raise RecipeError(
                f"train.freeze: {part!r} of a model with {len(layers)} layers",
                expected=f"layers 0 to {len(layers) - 1}",
            )
        yield from (parameter for layer in layers[first : last + 1] for parameter in layer.parameters())


def trained_in_words(model: Model, extras: nn.Module) -> str:
    """How many parameters are trained, of the model and of what its losses bring.

    Errors: `RecipeError` where nothing of the model is.
    """
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    if not trained:
        raise RecipeError(
            "train.freeze leaves nothing of the model to train",
            fix="freeze less, or add what can be trained, for example model.head.out=512",
        )
    trained += sum(one.numel() for one in extras.parameters() if one.requires_grad)
    whole = sum(one.numel() for part in (model, extras) for one in part.parameters())
    return f"{trained:,} of {whole:,} parameters are trained"
