"""Which rows of which source make the batch of a step: a pure function of the step number.

CoDiEmb's dynamic sampler (every step one task and one file, the same on all ranks, disjoint slices) and M3's efficient
batching (rows of one length group, a token budget), with every row accounted for. The whole state is the number of
the next step. How a pass is cut: `plan_cut`; rows that share a text: `plan_separate`; shares and order of the steps:
`plan_schedule`; what a recipe may ask for: `plan_config`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from embedsmith.core.errors import RecipeError
from embedsmith.core.progress import log
from embedsmith.core.tokens import IntArray
from embedsmith.data.plan.config import PlanConfig, ordinals, source_order, steps_of_sources
from embedsmith.data.plan.passes import Cut, Order, Pass, cut, make_pass
from embedsmith.data.plan.separate import RowFacts


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step: `rows` of `source`, for all ranks together.

    `visit` counts the passes over this source that ended before this one (more than the epochs where a source's
    weight exceeds 1): with it, and not with `epoch`, the draw of negatives is seeded, so that a second visit draws
    others. `length` are the rows' lengths where the plan goes by length.
    """

    step: int
    epoch: int
    source: int
    visit: int
    rows: IntArray
    length: npt.NDArray[np.int32] | None = None

    def rows_of(self, rank: int, world: int) -> IntArray:
        """The rows of one rank, [len(rows) / world]: equal in number, disjoint, and of about the same tokens.

        Contiguous slices in rank order; where lengths are known, rows are dealt from the longest to the shortest,
        forth and back, as in 0 1 2 2 1 0 0 1 2.
        """
        each, rest = divmod(len(self.rows), world)
        assert rest == 0, "the plan was made for another number of ranks"
        if self.length is None:
            return self.rows[rank * each : (rank + 1) * each]
        dealt = np.argsort(-self.length, kind="stable").reshape(each, world)
        dealt[1::2] = dealt[1::2, ::-1]
        return self.rows[dealt[:, rank]]


@dataclass(frozen=True)
class Account:
    """What an epoch does with the rows of one source: `rows` = `seen` + the sum of `unseen`, by reason; `drawn` counts
    a row that is seen twice twice. Reasons: `no full batch`, `shares a text`, `ranks` (a batch is not a multiple of
    them), `not reached` (a weight, a cap or the schedule ends the epoch before), `too small`."""

    rows: int
    steps: int
    drawn: int
    seen: int
    unseen: dict[str, int]


@dataclass(frozen=True)
class BatchPlan:
    """The batches of a run, from the sizes of its sources and, where rows must not share texts or go by length, the
    facts of their rows.

    A pass over a source is a fresh permutation cut into batches. An epoch has a number of steps of each source, given
    by the schedule; a source's passes follow each other without regard to epochs, so that no row is seen twice before
    all others were seen once. What an epoch does not see is counted with the reason (`account`). Batches do not depend
    on the number of ranks, which only must divide them, so a run may go on with another number.

    - `sizes`, `batch_sizes`: rows of each source, and rows of one of its steps, all ranks together; a batch size
      `None` follows from `config.batch_tokens` and `texts`, the texts that a row brings;
    - `weights`: how often an epoch sees a source's rows, 1 each by default;
    - `facts`: of each source, or `None` where neither lengths nor shared texts matter; `apart`: whether rows of a
      batch must share no text;
    - `orders`: of each source, how its rows are permuted, where not any order will do (streams);
    - `tasks`: for schedules by task; `world`: the number of ranks; `names`: for messages.

    Errors: `RecipeError` for a batch that ranks cannot share equally, an empty source, one with fewer rows than
    there are ranks, a weight that is not above 0.
    """

    sizes: tuple[int, ...]
    batch_sizes: tuple[int | None, ...]
    seed: int = 0
    world: int = 1
    weights: tuple[float, ...] | None = None
    names: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    config: PlanConfig = PlanConfig()
    texts: tuple[int, ...] | None = None
    apart: tuple[bool, ...] | None = None
    facts: tuple[RowFacts | None, ...] | None = field(default=None, repr=False, compare=False)
    orders: tuple[Order | None, ...] | None = field(default=None, repr=False, compare=False)
    _passes: dict[int, tuple[int, Pass]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _schedules: dict[int, tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not self.sizes:
            raise RecipeError("a plan needs at least one source", where="sources")
        for values in (self.batch_sizes, self.weights, self.names, self.tasks, self.texts, self.apart, self.facts):
            if values is not None and len(values) != len(self.sizes):
                raise RecipeError(f"{len(values)} values for {len(self.sizes)} sources", where="sources")
        for source in range(len(self.sizes)):
            self._check(source)
        if not any(self.steps_of):
            raise RecipeError("every source is too small for a batch", where="sources", fix="set plan.small=shrink")
        self._check_clashes()
        for note in self.notes:
            log.warning(note)

    def _check(self, source: int) -> None:
        size, batch, weight = self.sizes[source], self.batch_sizes[source], self.weight(source)
        where = f"source {self.name(source)!r}"
        if size < 1:
            raise RecipeError("the source is empty", where=where, fix="remove it from the recipe")
        if batch is not None and (batch < 1 or batch % self.world):
            raise RecipeError(
                f"batch_size {batch} cannot be shared equally by {self.world} ranks",
                where=where,
                fix=f"set batch_size to {_near(batch, self.world)}",
            )
        if not (math.isfinite(weight) and weight > 0):
            raise RecipeError(f"weight {weight} is not above 0", where=where, fix="remove a source you do not want")
        if self._left_out(source):
            return
        shape = self.cuts[source]
        if size < self.world and not shape.padded:
            raise RecipeError(
                f"{size} rows cannot be shared by {self.world} ranks",
                where=where,
                fix="merge it with another source of its task (plan.small=merge), pad or drop it, or use fewer ranks",
            )
        for rows in shape.rows_G:
            if not shape.small and rows % self.world:
                raise RecipeError(
                    f"batches of {rows} rows, by length, cannot be shared equally by {self.world} ranks",
                    where=where,
                    fix="set plan.batch_sizes to multiples of the ranks; or, with plan.batch_tokens, plan.multiple to "
                    "one, and enough tokens for the longest rows",
                )

    def _check_clashes(self) -> None:
        for source, left in enumerate(self._clashing):
            if left > self.sizes[source] / 2:
                raise RecipeError(
                    f"{left} of {self.sizes[source]} rows find no batch without another row of the same query or "
                    "positive",
                    where=f"source {self.name(source)!r}",
                    fix="set plan.duplicates=allow: losses count a text that repeats once; or use smaller batches",
                )

    def name(self, source: int) -> str:
        return self.names[source] if self.names else str(source)

    def weight(self, source: int) -> float:
        return self.weights[source] if self.weights else 1.0

    def _facts(self, source: int) -> RowFacts | None:
        return self.facts[source] if self.facts else None

    @cached_property
    def cuts(self) -> tuple[Cut, ...]:
        """The shape of every source's passes."""
        shapes = []
        for i, size in enumerate(self.sizes):
            texts, apart = self.texts[i] if self.texts else 2, self.apart is None or self.apart[i]
            shape = cut(size, self.batch_sizes[i], texts, self.config, self._facts(i), apart)
            shapes.append(replace(shape, order=self.orders[i] if self.orders else None))
        return tuple(shapes)

    def _left_out(self, source: int) -> bool:
        return self.config.small == "drop" and self.cuts[source].small

    @cached_property
    def rows_per_step(self) -> tuple[int, ...]:
        """The most rows that a step of each source has: a source smaller than its batch gets the largest batch that
        it fills on these ranks."""
        return tuple(max(shape.rows_G) // self.world * self.world for shape in self.cuts)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What the plan had to change, one sentence each."""
        return tuple(
            f"source {self.name(i)!r} has {self.sizes[i]} rows, fewer than its batch_size "
            f"{self.batch_sizes[i] or 'by tokens'}: {self._remedy(i)}"
            for i in range(len(self.sizes))
            if self.cuts[i].small
        ) + tuple(
            f"source {self.name(i)!r}: {left} of {self.sizes[i]} rows find no batch in a pass without another row of "
            "the same query or positive, and are left out of it; plan.duplicates=allow keeps them"
            for i, left in enumerate(self._clashing)
            if left
        )

    def _remedy(self, source: int) -> str:
        if self.config.small == "drop":
            return "it is left out"
        if self.config.small == "pad":
            return f"rows are repeated to fill {self.rows_per_step[source]}"
        return f"its batches have {self.rows_per_step[source]} rows"

    @cached_property
    def _clashing(self) -> tuple[int, ...]:
        """Rows that the first pass over each source leaves out because they share a text with others."""
        left = []
        for source in range(len(self.sizes)):
            made = None if self._left_out(source) else self._pass(source, 0)
            left.append(0 if made is None else int(made.start[-1]) - int(np.sum(made.kept)))
        return tuple(left)

    @cached_property
    def steps_of(self) -> tuple[int, ...]:
        """Steps of each source in an epoch."""
        batches = [0 if self._left_out(i) else shape.batches for i, shape in enumerate(self.cuts)]
        weights = [self.weight(i) for i in range(len(self.sizes))]
        return steps_of_sources(batches, weights, self.sizes, self._tasks, self.config)

    @property
    def _tasks(self) -> Sequence[str]:
        return self.tasks or ("",) * len(self.sizes)

    @property
    def steps_per_epoch(self) -> int:
        return sum(self.steps_of)

    def at(self, step: int, world: int | None = None) -> PlannedStep:
        """The batch of a step, counted from 0 over all epochs; for another number of ranks where one is given."""
        epoch, place = divmod(step, self.steps_per_epoch)
        source_S, ordinal_S = self._schedule(epoch)
        source = int(source_S[place])
        visit, batch = divmod(epoch * self.steps_of[source] + int(ordinal_S[place]), self.cuts[source].batches)
        rows = self._pass(source, visit).batch(batch, world or self.world)
        facts = self._facts(source)
        length = facts.length_N[rows] if facts is not None and self.config.by_length else None
        return PlannedStep(step, epoch, source, visit, rows, length)

    def _schedule(self, epoch: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """(source_S, ordinal_S): the source of each step of the epoch, and how many of its batches came before."""
        kept = self._schedules.get(epoch)
        if kept is None:
            source_S = source_order(self.steps_of, self._tasks, self.config, self.seed, epoch)
            kept = (source_S, ordinals(source_S))
            self._schedules.clear()  # only the epoch in use is kept
            self._schedules[epoch] = kept
        return kept

    def _pass(self, source: int, visit: int) -> Pass:
        """The pass in use is kept, one a source."""
        kept = self._passes.get(source)
        if kept is None or kept[0] != visit:
            kept = (visit, make_pass(self.cuts[source], self.seed, source, visit))
            self._passes[source] = kept
        return kept[1]

    def summary(self) -> list[str]:
        """A line a source: rows, steps of an epoch and their size, rows that the first epoch does not see and why."""
        lines = []
        for i, account in enumerate(self.account(0)):
            steps = f"{self.steps_of[i]:,} steps of {_range(self.cuts[i], self.world)} an epoch"
            unseen = "".join(f", {count:,} rows left out ({why})" for why, count in account.unseen.items())
            lines.append(f"{self.name(i)}: {self._tasks[i]}, {account.rows:,} rows, {steps}{unseen}")
        return lines

    def steps_with(self, source: int, epoch: int = 0) -> IntArray:
        """The numbers of the steps of an epoch that draw from a source."""
        return np.flatnonzero(self._schedule(epoch)[0] == source) + epoch * self.steps_per_epoch

    @cached_property
    def unused_rows(self) -> tuple[int, ...]:
        """Rows of each source that the first epoch does not see; other rows in every epoch."""
        return tuple(sum(account.unseen.values()) for account in self.account(0))

    def account(self, epoch: int) -> tuple[Account, ...]:
        """What an epoch does with every row of every source. The reason of an unseen row is that of its last pass."""
        return tuple(self._account(source, epoch) for source in range(len(self.sizes)))

    def _account(self, source: int, epoch: int) -> Account:
        size, steps = self.sizes[source], self.steps_of[source]
        if steps == 0:
            return Account(size, 0, 0, 0, {"too small": size})
        seen_N, why_N = np.zeros(size, bool), np.zeros(size, np.int8)
        drawn, batches = 0, self.cuts[source].batches
        for visit in range(epoch * steps // batches, ((epoch + 1) * steps - 1) // batches + 1):
            made = make_pass(self.cuts[source], self.seed, source, visit)
            why_N[made.row_P] = _NOT_REACHED
            why_N[made.row_P[made.start[-1] :]] = _NO_BATCH
            first, last = max(epoch * steps - visit * batches, 0), min((epoch + 1) * steps - visit * batches, batches)
            for number in range(first, last):
                place = int(made.sequence[number])
                start, stop, kept = int(made.start[place]), int(made.start[place + 1]), int(made.kept[place])
                rows = made.batch(number, self.world)
                why_N[made.row_P[start : start + kept]] = _RANKS
                why_N[made.row_P[start + kept : stop]] = _CLASHES
                seen_N[rows] = True
                drawn += len(rows)
        counts = np.bincount(why_N[~seen_N], minlength=len(_REASONS))
        unseen = {reason: int(count) for reason, count in zip(_REASONS, counts, strict=True) if count}
        return Account(size, steps, drawn, int(seen_N.sum()), unseen)


_REASONS = ("not reached", "no full batch", "shares a text", "ranks")
_NOT_REACHED, _NO_BATCH, _CLASHES, _RANKS = range(len(_REASONS))


def _range(shape: Cut, world: int) -> str:
    used = [rows // world * world for rows, batches in zip(shape.rows_G, shape.batches_G, strict=True) if batches]
    return f"{min(used)}" if min(used) == max(used) else f"{min(used)} to {max(used)}"


def _near(batch: int, world: int) -> str:
    down, up = batch // world * world, -(-batch // world) * world
    return " or ".join(str(value) for value in sorted({down, max(up, world)}) if value > 0)
