"""How many steps of an epoch each source gets, and in which order they come."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from embedsmith.core.errors import RecipeError
from embedsmith.core.registry import did_you_mean
from embedsmith.core.seeds import derive_seed
from embedsmith.data.plan_config import PlanConfig

Ints = npt.NDArray[np.int32]


def steps_of_sources(
    batches: Sequence[int], weights: Sequence[float], sizes: Sequence[int], tasks: Sequence[str], config: PlanConfig
) -> tuple[int, ...]:
    """Steps of each source in an epoch. `batches`: those of one pass over it (0: a source that is left out).

    - proportional: weight x batches, 1 at least;
    - balanced, ratio: those, multiplied task by task so that tasks relate as asked and none loses a step;
    - temperature: the same number in all, shared in proportion to (weight x rows) ** temperature.

    Source: CoDiEmb's decisions in the specification (A.5); temperature: file probability ~ |f| ** alpha.
    """
    own = [0 if n == 0 else max(math.floor(weight * n + 0.5), 1) for n, weight in zip(batches, weights, strict=True)]
    if config.schedule == "proportional":
        return tuple(own)
    if config.schedule == "temperature":
        return _tempered(own, weights, sizes, config.temperature)
    ratio = _ratio(own, tasks, config)
    totals = {task: sum(n for n, of in zip(own, tasks) if of == task) for task in ratio}
    unit = max(totals[task] / ratio[task] for task in ratio)
    wanted = {task: round(unit * ratio[task]) for task in ratio}
    return tuple(
        _apportion([n for n, of in zip(own, tasks) if of == task], wanted[task])[tasks[:i].count(task)] if n else 0
        for i, (n, task) in enumerate(zip(own, tasks))
    )


def _ratio(own: Sequence[int], tasks: Sequence[str], config: PlanConfig) -> dict[str, float]:
    """The share of every task that has steps. Errors: `RecipeError` for a share missing or of no task."""
    present = [task for task in dict.fromkeys(tasks) if any(n for n, of in zip(own, tasks) if of == task)]
    if config.schedule == "balanced":
        return dict.fromkeys(present, 1.0)
    for task in config.ratio:
        if task not in tasks:
            hint = did_you_mean(task, present)
            raise RecipeError(f"plan.ratio: no source has the task {task!r}{hint}", expected=", ".join(present))
    missing = [task for task in present if task not in config.ratio]
    if missing:
        raise RecipeError(f"plan.ratio has no share for the task {missing[0]!r}", fix=f"add {missing[0]}: 1")
    return {task: config.ratio[task] for task in present}


def _tempered(
    own: Sequence[int], weights: Sequence[float], sizes: Sequence[int], temperature: float
) -> tuple[int, ...]:
    shares = [(w * size) ** temperature if n else 0.0 for n, w, size in zip(own, weights, sizes, strict=True)]
    return tuple(_apportion(shares, sum(own)))


def _apportion(shares: Sequence[float], total: int) -> list[int]:
    """`total` whole units in proportion to `shares`, by largest remainder; every share above 0 gets 1 at least."""
    exact = [share * total / sum(shares) for share in shares]
    units = [max(math.floor(value), 1) if value > 0 else 0 for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: units[place] - exact[place])
    for place in by_remainder[: max(total - sum(units), 0)]:
        units[place] += 1
    while sum(units) > max(total, sum(value > 0 for value in exact)):
        units[units.index(max(units))] -= 1
    return units


def source_order(steps: Sequence[int], tasks: Sequence[str], config: PlanConfig, seed: int, epoch: int) -> Ints:
    """The source of each step of an epoch."""
    source_S = np.repeat(np.arange(len(steps), dtype=np.int32), steps)
    chance = np.random.default_rng(derive_seed(seed, "schedule", epoch))
    if config.order == "shuffle":
        chance.shuffle(source_S)
    elif config.order == "sequential":
        drawn = chance.permutation(len(steps))
        source_S = np.repeat(drawn.astype(np.int32), np.asarray(steps)[drawn])
    else:
        source_S = _strict(steps, tasks)
    return source_S


def _strict(steps: Sequence[int], tasks: Sequence[str]) -> Ints:
    """Tasks spread evenly, and within the steps of a task its sources."""
    names = list(dict.fromkeys(tasks))
    members = [[source for source, task in enumerate(tasks) if task == name] for name in names]
    task_S = _spread([sum(steps[source] for source in sources) for sources in members])
    source_S = np.empty(len(task_S), np.int32)
    for place, sources in enumerate(members):
        source_S[task_S == place] = np.asarray(sources, np.int32)[_spread([steps[source] for source in sources])]
    return source_S


def _spread(counts: Sequence[int]) -> Ints:
    """Number i, counts[i] times, at even distances: its k-th comes at (k + 1/2) / counts[i] of the way."""
    kind = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    way = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    return kind[np.argsort(way, kind="stable")]


def ordinals(source_S: Ints) -> Ints:
    """How many steps of the same source came before each step."""
    ordinal_S = np.empty_like(source_S)
    for source in np.unique(source_S):
        mine = source_S == source
        ordinal_S[mine] = np.arange(int(mine.sum()), dtype=np.int32)
    return ordinal_S
