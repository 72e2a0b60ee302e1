"""How a recipe asks for its batches (the section `train.plan`), and what its schedule makes of it: how many steps of an
epoch each source gets, and in which order they come."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from embedsmith.core.errors import RecipeError
from embedsmith.core.seeds import derive_seed
from embedsmith.core.settings import Count, Positive, Share, did_you_mean, section

Ints = npt.NDArray[np.int32]
MULTIPLE = 8
"""Rows of a token-budget batch are a multiple of it where they can be, so that 1, 2, 4 and 8 ranks plan the same."""


@section
@dataclass(frozen=True)
class PlanConfig:
    """Which rows meet in a batch, and in which order batches come. The default is CoDiEmb's dynamic sampler.

    - `schedule`: shares of the steps. `proportional`, of the batches each source has; `balanced`, equal for every
      task; `ratio`, by task; `temperature`, a source's share grows with rows ** temperature. With balanced and ratio
      an epoch sees all rows of every task and cycles the smaller ones; with temperature it has as many steps as with
      proportional.
    - `ratio`: the share of each task in the steps, for `schedule: ratio`.
    - `temperature`: the exponent of that schedule, from 0 (sources get equal shares) to 1 (proportional to their rows).
    - `order`: `shuffle`; `strict` spreads every task and source evenly, in the same way every epoch; `sequential`
      runs through one source after the other, in an order drawn for the epoch (a baseline).
    - `batches`: `single`, one source a step; `mixed`, rows of all sources in every step (a baseline, see
      `docs/batching.md`).
    - `small`: a source with fewer rows than a batch gets smaller batches (`shrink`), is put together with the other
      small ones of its kind (`merge`), repeats rows (`pad`), or is left out with a warning (`drop`).
    - `duplicates`: whether rows of a batch may share a text among their queries and positives; `None` forbids it
      where batches are contrasted and allows it for scored pairs.
    - `lengths`: edges in tokens between groups of rows that never meet in a batch, or `auto`; `None` makes one group.
    - `batch_sizes`: rows of a step in each group, one more than there are edges (M3's table).
    - `batch_tokens`: padded tokens of a step, all ranks together, in place of `batch_size` for sources without one of
      their own. Rows = batch_tokens / (longest text of the group x texts a row).
    - `multiple`: what the rows of a token budget are a multiple of, so that a run may go on with any number of ranks
      that divides it.

    Source: CoDiEmb (arXiv 2508.11442), its released sampler; M3-Embedding (arXiv 2402.03216), efficient batching.
    """

    schedule: Literal["proportional", "balanced", "ratio", "temperature"] = "proportional"
    ratio: dict[str, Positive] = field(default_factory=dict)
    temperature: Share = 0.5
    order: Literal["shuffle", "strict", "sequential"] = "shuffle"
    batches: Literal["single", "mixed"] = "single"
    small: Literal["shrink", "merge", "pad", "drop"] = "shrink"
    duplicates: Literal["forbid", "allow"] | None = None
    lengths: Literal["auto"] | tuple[Count, ...] | None = None
    batch_sizes: tuple[Count, ...] | None = None
    batch_tokens: Count | None = None
    multiple: Count = MULTIPLE

    def __post_init__(self) -> None:
        if (self.schedule == "ratio") != bool(self.ratio):
            raise RecipeError(
                f"plan.schedule is {self.schedule} and plan.ratio {self.ratio or 'empty'}",
                fix="set both, for example train.plan.schedule=ratio and train.plan.ratio.retrieval=3",
            )
        edges = self.lengths if isinstance(self.lengths, tuple) else ()
        if list(edges) != sorted(set(edges)):
            raise RecipeError(f"plan.lengths is {list(edges)}", expected="token counts, ascending")
        if self.batch_sizes is not None and (not edges or len(self.batch_sizes) != len(edges) + 1):
            raise RecipeError(
                f"plan.batch_sizes has {len(self.batch_sizes)} values for {len(edges)} edges in plan.lengths",
                expected="one value a group: one more than there are edges",
            )
        if self.batch_sizes is not None and self.batch_tokens is not None:
            raise RecipeError("plan.batch_sizes and plan.batch_tokens are both set", fix="keep one of them")

    @cached_property
    def by_length(self) -> bool:
        """Whether rows are grouped by length: asked for, or needed by a token budget."""
        return self.lengths is not None or self.batch_tokens is not None

    def steps_of_sources(
        self, batches: Sequence[int], weights: Sequence[float], sizes: Sequence[int], tasks: Sequence[str]
    ) -> tuple[int, ...]:
        """Steps of each source in an epoch. `batches`: those of one pass over it (0: a source that is left out).

        - proportional: weight x batches, 1 at least;
        - balanced, ratio: those, multiplied task by task so that tasks relate as asked and none loses a step;
        - temperature: the same number in all, shared in proportion to (weight x rows) ** temperature.

        Source: CoDiEmb's decisions in the specification (A.5); temperature: file probability ~ |f| ** alpha.
        """
        own = [
            0 if n == 0 else max(math.floor(weight * n + 0.5), 1) for n, weight in zip(batches, weights, strict=True)
        ]
        if self.schedule == "proportional":
            return tuple(own)
        if self.schedule == "temperature":
            shares = [
                (w * size) ** self.temperature if n else 0.0 for n, w, size in zip(own, weights, sizes, strict=True)
            ]
            return tuple(_apportion(shares, sum(own)))
        ratio = self._ratio(own, tasks)
        totals = {task: sum(n for n, of in zip(own, tasks) if of == task) for task in ratio}
        unit = max(totals[task] / ratio[task] for task in ratio)
        wanted = {task: round(unit * ratio[task]) for task in ratio}
        return tuple(
            _apportion([n for n, of in zip(own, tasks) if of == task], wanted[task])[tasks[:i].count(task)] if n else 0
            for i, (n, task) in enumerate(zip(own, tasks))
        )

    def _ratio(self, own: Sequence[int], tasks: Sequence[str]) -> dict[str, float]:
        """The share of every task that has steps. Errors: `RecipeError` for a share missing or of no task."""
        present = [task for task in dict.fromkeys(tasks) if any(n for n, of in zip(own, tasks) if of == task)]
        if self.schedule == "balanced":
            return dict.fromkeys(present, 1.0)
        for task in self.ratio:
            if task not in tasks:
                hint = did_you_mean(task, present)
                raise RecipeError(f"plan.ratio: no source has the task {task!r}{hint}", expected=", ".join(present))
        missing = [task for task in present if task not in self.ratio]
        if missing:
            raise RecipeError(
                f"plan.ratio has no share for the task {missing[0]!r}", fix=f"set train.plan.ratio.{missing[0]}=1"
            )
        return {task: self.ratio[task] for task in present}

    def source_order(self, steps: Sequence[int], tasks: Sequence[str], seed: int, epoch: int) -> Ints:
        """The source of each step of an epoch. The order `strict` spreads tasks evenly, and within the steps of a task
        its sources."""
        source_S = np.repeat(np.arange(len(steps), dtype=np.int32), steps)
        chance = np.random.default_rng(derive_seed(seed, "schedule", epoch))
        if self.order == "shuffle":
            chance.shuffle(source_S)
        elif self.order == "sequential":
            drawn = chance.permutation(len(steps))
            source_S = np.repeat(drawn.astype(np.int32), np.asarray(steps)[drawn])
        else:
            names = dict.fromkeys(tasks)
            members = [[source for source, task in enumerate(tasks) if task == name] for name in names]
            task_S = _spread([sum(steps[source] for source in sources) for sources in members])
            for place, sources in enumerate(members):
                source_S[task_S == place] = np.asarray(sources, np.int32)[
                    _spread([steps[source] for source in sources])
                ]
        return source_S


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


def _spread(counts: Sequence[int]) -> Ints:
    """Number i, counts[i] times, at even distances: its k-th comes at (k + 1/2) / counts[i] of the way."""
    kind = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    way = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    return kind[np.argsort(way, kind="stable")]
