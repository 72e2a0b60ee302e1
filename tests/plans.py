"""The steps of a plan's epoch."""

from __future__ import annotations

from embedsmith.data import BatchPlan, PlannedStep


def epoch_of(plan: BatchPlan, epoch: int = 0) -> list[PlannedStep]:
    return [plan.at(epoch * plan.steps_per_epoch + step) for step in range(plan.steps_per_epoch)]
