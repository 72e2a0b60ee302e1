"""LM-Cocktail: weights from how well each parent already does a few examples, w = softmax(-L_i / T)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from embedsmith.calibrate.live_model import LiveMerge, open_live
from embedsmith.calibrate.probe import ProbedMethod
from embedsmith.calibrate.task_batches import TaskBatches
from embedsmith.core.settings import Positive
from embedsmith.core.shelf import merge_methods
from embedsmith.merge.method import Combine, Job, combine_coefficients

REPORTED = (1.0, 2.0, 5.0)
"""Temperatures the weights are always shown for: the published code has 5, its documentation 3."""


@merge_methods.register("lm_cocktail", formula="w = softmax(-L_i / T)", source="LM-Cocktail (2311.13534)")
@dataclass(frozen=True, kw_only=True)
class LMCocktail(ProbedMethod):
    """The parents' mean, weighed by their losses on a few examples of the task at hand.

    Losses are those of the sources (InfoNCE, CoSENT, or as they say), at the model's own pooling, prompts and length;
    with several sources the mean over them.
    `temperature`: T of the softmax over losses. `batch_size`: examples of a task in one contrastive batch.
    """

    temperature: Positive = 5.0
    batch_size: Annotated[int, Field(ge=2)] = 16

    def prepare(self, job: Job) -> Combine:
        live = open_live(job.parents, job.base)
        tasks = TaskBatches.whole(live, self.probe.sources, self.probe.read(), self.batch_size, self.probe.seed)
        losses = parent_losses(live, tasks)
        job.report["lm_cocktail"] = {
            "losses": live.by_parent(losses),
            "weights_at_temperature": {f"{t:g}": softmin(losses, t).tolist() for t in REPORTED},
            "texts": live.cost.texts,
        }
        return combine_coefficients(live.coefficients_by_name(softmin(losses, self.temperature)[None], job))


def parent_losses(live: LiveMerge, tasks: TaskBatches) -> list[float]:
    """Each parent's loss on all examples of the probe."""
    parts = tasks.held_out_parts()
    losses = []
    for parent in range(live.parents):
        live.place_parent(parent)
        losses.append(sum(tasks.loss(part) for task in parts for part in task))
    return losses


def softmin(losses: Sequence[float], temperature: float) -> Tensor:
    """softmax(-L / T) [M] in float64, so that weights sum to 1 to the last digits."""
    return torch.softmax(-torch.tensor(losses, dtype=torch.float64) / temperature, dim=0)
