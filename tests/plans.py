"""Plans of sources that are given as numbers, and the steps of a plan's epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embedsmith.data import BatchPlan, PlanConfig, PlannedSource, PlannedStep

FIELDS = {"weights": "weight", "names": "name", "tasks": "task", "texts": "texts", "apart": "apart"}
FIELDS |= {"facts": "facts", "orders": "order"}


def plan_from(
    sizes: Sequence[int],
    batch_sizes: Sequence[int | None],
    seed: int = 0,
    world: int = 1,
    config: PlanConfig = PlanConfig(),  # noqa: B008  (frozen)
    **columns: Sequence[Any] | None,
) -> BatchPlan:
    """`columns`: fields of `PlannedSource`, in the plural, one value a source."""
    sources = []
    for place, (rows, batch_size) in enumerate(zip(sizes, batch_sizes, strict=True)):
        more = {FIELDS[name]: values[place] for name, values in columns.items() if values is not None}
        sources.append(PlannedSource(rows, batch_size, **more))
    return BatchPlan(tuple(sources), seed, world, config)


def epoch_of(plan: BatchPlan, epoch: int = 0) -> list[PlannedStep]:
    return [plan.at(epoch * plan.steps_per_epoch + step) for step in range(plan.steps_per_epoch)]
