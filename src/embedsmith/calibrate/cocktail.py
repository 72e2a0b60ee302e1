"""LM-Cocktail: weights from how well each parent already does a few examples, w = softmax(-L_i / T)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from embedsmith.calibrate.live import LiveMerge
from embedsmith.calibrate.positioning import ProbeBatches
from embedsmith.core.errors import RecipeError
from embedsmith.core.settings import section

REPORTED = (1.0, 2.0, 5.0)
"""Temperatures the weights are always shown for: the published code has 5, its documentation 3."""


@section
@dataclass(frozen=True)
class CocktailConfig:
    """`temperature`: T of the softmax over losses. `batch_size`: examples of a task in one contrastive batch.

    Losses are those of the sources (InfoNCE, CoSENT, or as they say), at the model's own pooling, prompts and length;
    with several sources the mean over them.
    """

    temperature: float = 5.0
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.batch_size < 2:
            raise RecipeError("lm_cocktail: temperature above 0 and batch_size of at least 2 are needed")


@dataclass(frozen=True)
class Cocktail:
    """w_M, every parent's loss, and what w would be at other temperatures."""

    weight_M: Tensor
    losses: tuple[float, ...]
    at_temperature: Mapping[float, tuple[float, ...]] = field(default_factory=dict)


def cocktail_weights(live: LiveMerge, batches: ProbeBatches, config: CocktailConfig) -> Cocktail:
    """Each parent's loss on all examples of the probe, turned into weights (LM-Cocktail, 2311.13534)."""
    parts = batches.held_out_parts()
    losses = []
    for parent in range(live.parents):
        live.place_parent(parent)
        losses.append(sum(batches.loss(part) for task in parts for part in task))
    shown = {t: tuple(softmin(losses, t).tolist()) for t in REPORTED}
    return Cocktail(softmin(losses, config.temperature), tuple(losses), shown)


def softmin(losses: Sequence[float], temperature: float) -> Tensor:
    """softmax(-L / T) [M] in float64, so that weights sum to 1 to the last digits."""
    return torch.softmax(-torch.tensor(losses, dtype=torch.float64) / temperature, dim=0)
