"""Which rows of which source make the batch of a step: a pure function of the step number.

CoDiEmb's dynamic sampler (every step one task and one file, the same on all ranks, disjoint slices), with every row
accounted for. The whole state is the number of the next step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from embedsmith.core.errors import RecipeError
from embedsmith.core.progress import log
from embedsmith.core.seeds import derive_seed
from embedsmith.core.tokens import IntArray


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step: `rows` of `source`, for all ranks together.

    `visit` counts the passes begun over this source before this one (more than the epochs where a source's weight
    exceeds 1): with it, and not with `epoch`, the draw of negatives is seeded, so that a second visit draws others.
    """

    step: int
    epoch: int
    source: int
    visit: int
    rows: IntArray

    def rows_of(self, rank: int, world: int) -> IntArray:
        """The rows of one rank: equal, disjoint slices in rank order, [len(rows) / world]."""
        each, rest = divmod(len(self.rows), world)
        assert rest == 0, "the plan was made for another number of ranks"
        return self.rows[rank * each : (rank + 1) * each]


@dataclass(frozen=True)
class BatchPlan:
    """The batches of a run, from the sizes of its sources alone; proportional schedule.

    An epoch cuts a fresh permutation of every source into batches, and shuffles the batches of all sources. So a
    source's share of the steps is its share of the batches. What does not fill a batch is left out for the epoch
    (other rows every time) and counted in `unused_rows`.

    - `sizes`, `batch_sizes`: rows of each source, and rows of one of its steps, all ranks together;
    - `weights`: how often an epoch sees a source's rows, 1 each by default: 2 is two passes with permutations of
      their own, 0.5 half of the batches of one;
    - `world`: the number of ranks; it changes nothing but which batch sizes are possible;
    - `names`: for messages.

    Errors: `RecipeError` for a batch size that ranks cannot share equally, an empty source, one with fewer rows than
    there are ranks, a weight that is not above 0.
    """

    sizes: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    seed: int = 0
    world: int = 1
    weights: tuple[float, ...] | None = None
    names: tuple[str, ...] | None = None
    _orders: dict[int, tuple[int, npt.NDArray[np.integer]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _schedules: dict[int, tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not self.sizes:
            raise RecipeError("a plan needs at least one source", where="sources")
        for values in (self.batch_sizes, self.weights, self.names):
            if values is not None and len(values) != len(self.sizes):
                raise RecipeError(f"{len(values)} values for {len(self.sizes)} sources", where="sources")
        for source in range(len(self.sizes)):
            self._check(source)
        for note in self.notes:
            log.warning(note)

    def _check(self, source: int) -> None:
        size, batch, weight = self.sizes[source], self.batch_sizes[source], self.weight(source)
        where = f"source {self.name(source)!r}"
        if size < 1:
            raise RecipeError("the source is empty", where=where, fix="remove it from the recipe")
        if batch < 1 or batch % self.world:
            down, up = batch // self.world * self.world, -(-batch // self.world) * self.world
            near = " or ".join(str(value) for value in sorted({down, max(up, self.world)}) if value > 0)
            raise RecipeError(
                f"batch_size {batch} cannot be shared equally by {self.world} ranks",
                where=where,
                fix=f"set batch_size to {near}",
            )
        if size < self.world:
            raise RecipeError(
                f"{size} rows cannot be shared by {self.world} ranks",
                where=where,
                fix="merge it with another source of its task, or use fewer ranks",
            )
        if not (math.isfinite(weight) and weight > 0):
            raise RecipeError(f"weight {weight} is not above 0", where=where, fix="remove a source you do not want")

    def name(self, source: int) -> str:
        return self.names[source] if self.names else str(source)

    def weight(self, source: int) -> float:
        return self.weights[source] if self.weights else 1.0

    @cached_property
    def rows_per_step(self) -> tuple[int, ...]:
        """The batch sizes used: a source smaller than its batch gets the largest batch that it fills."""
        return tuple(min(batch, size // self.world * self.world) for size, batch in zip(self.sizes, self.batch_sizes))

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What the plan had to change, one sentence each."""
        return tuple(
            f"source {self.name(i)!r} has {self.sizes[i]} rows, fewer than its batch_size {self.batch_sizes[i]}: "
            f"its batches have {used} rows"
            for i, used in enumerate(self.rows_per_step)
            if used < self.batch_sizes[i]
        )

    @cached_property
    def _batches_per_pass(self) -> tuple[int, ...]:
        return tuple(size // rows for size, rows in zip(self.sizes, self.rows_per_step))

    @cached_property
    def steps_of(self) -> tuple[int, ...]:
        """Steps of each source in an epoch: whole passes, and part of one more for the fraction of the weight."""
        return tuple(
            max(math.floor(self.weight(i)) * n + round(self.weight(i) % 1 * n), 1)
            for i, n in enumerate(self._batches_per_pass)
        )

    @property
    def steps_per_epoch(self) -> int:
        return sum(self.steps_of)

    @cached_property
    def unused_rows(self) -> tuple[int, ...]:
        """Rows of each source that an epoch does not see: the remainder that fills no batch, and, for a weight
        below 1, the batches left out. Other rows in every epoch."""
        return tuple(
            size - min(steps, full) * rows
            for size, steps, full, rows in zip(self.sizes, self.steps_of, self._batches_per_pass, self.rows_per_step)
        )

    def at(self, step: int) -> PlannedStep:
        """The batch of a step, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        source_S, ordinal_S = self._schedule(epoch)
        source = int(source_S[place])
        passed, batch = divmod(int(ordinal_S[place]), self._batches_per_pass[source])
        visit = epoch * -(-self.steps_of[source] // self._batches_per_pass[source]) + passed
        count = self.rows_per_step[source]
        rows = self._order(source, visit)[batch * count : (batch + 1) * count].astype(np.int64)
        return PlannedStep(step, epoch, source, visit, rows)

    def _schedule(self, epoch: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """(source_S, ordinal_S): the source of each step of the epoch, and how many of its batches came before."""
        kept = self._schedules.get(epoch)
        if kept is None:
            source_S = np.repeat(np.arange(len(self.sizes), dtype=np.int32), self.steps_of)
            np.random.default_rng(derive_seed(self.seed, "schedule", epoch)).shuffle(source_S)
            ordinal_S = np.empty_like(source_S)
            for source, steps in enumerate(self.steps_of):
                ordinal_S[source_S == source] = np.arange(steps, dtype=np.int32)
            kept = (source_S, ordinal_S)
            self._schedules.clear()  # only the epoch in use is kept
            self._schedules[epoch] = kept
        return kept

    def _order(self, source: int, visit: int) -> npt.NDArray[np.integer]:
        """The permutation of a source's rows in one pass; the pass in use is kept."""
        kept = self._orders.get(source)
        if kept is None or kept[0] != visit:
            order_N: npt.NDArray[np.integer] = np.arange(self.sizes[source], dtype=_narrow(self.sizes[source]))
            np.random.default_rng(derive_seed(self.seed, "rows", source, visit)).shuffle(order_N)
            kept = (visit, order_N)
            self._orders[source] = kept
        return kept[1]


def _narrow(size: int) -> type[np.int32 | np.int64]:
    """Row numbers in four bytes where they fit: a permutation is kept for every source."""
    return np.int32 if size < 2**31 else np.int64
