"""Which rows of which source make the batch of a step: a pure function of the step number.

CoDiEmb's dynamic sampler (every step one task and one file, the same on all ranks, disjoint slices) and M3's efficient
batching (rows of one length group, a token budget), with every row accounted for. The whole state is the number of
the next step.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt

from embedsmith.core.errors import RecipeError
from embedsmith.core.progress import log
from embedsmith.core.tokens import IntArray
from embedsmith.data.plan.classes import ClassBatches
from embedsmith.data.plan.config import PlanConfig
from embedsmith.data.plan.passes import Cut, Order, Pass, cut, fitted
from embedsmith.data.plan.separate import RowFacts
from embedsmith.data.record import typed_for_source


@dataclass(frozen=True)
class PlannedSource:
    """What a plan must know of a source, and nothing else.

    - `rows`: how many there are; `batch_size`: rows of one of its steps, all ranks together. `None` follows from
      `batch_tokens` of the plan and `texts`, the texts that a row brings;
    - `weight`: how often an epoch sees its rows;
    - `name`: for messages; `task`: for schedules by task;
    - `facts`: of its rows, or `None` where neither lengths nor shared texts matter; `apart`: whether rows of a batch
      must share no text;
    - `order`: how its rows are permuted, where not any order will do (streams, batches by class).
    """

    rows: int
    batch_size: int | None
    weight: float = 1.0
    name: str = ""
    task: str = ""
    texts: int = 2
    apart: bool = True
    facts: RowFacts | None = field(default=None, repr=False, compare=False)
    order: Order | None = field(default=None, repr=False, compare=False)

    def check(self, world: int) -> None:
        """Errors: `RecipeError` for an empty source, a batch that ranks cannot share, a weight that is not above 0."""
        where = f"source {self.name!r}"
        if self.rows < 1:
            raise RecipeError("the source is empty", where=where, fix="remove it from the recipe")
        if self.batch_size is not None and (self.batch_size < 1 or self.batch_size % world):
            down, up = self.batch_size // world * world, -(-self.batch_size // world) * world
            near = [size for size in sorted({down, max(up, world)}) if size > 0]
            raise RecipeError(
                f"batch_size {self.batch_size} cannot be shared equally by {world} ranks",
                where=where,
                fix=f"set train.batch_size to {' or '.join(map(str, near))}, or the source's own where it has one "
                + typed_for_source(f"batch_size={near[-1]}"),
            )
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise RecipeError(
                f"weight {self.weight} is not above 0", where=where, fix="remove a source you do not want"
            )

    def check_cut(self, shape: Cut, world: int, dropped: bool) -> None:
        """Errors: `RecipeError` for a source of which no plan can be made for so many ranks."""
        where = f"source {self.name!r}"
        if not dropped and self.rows < world and not shape.padded:
            raise RecipeError(
                f"{self.rows} rows cannot be shared by {world} ranks",
                where=where,
                fix="merge it with another source of its task (train.plan.small=merge), pad or drop it, "
                "or use fewer ranks",
            )
        if shape.instead_of and min(shape.rows_G) < world:
            raise RecipeError(
                f"batches of {min(shape.rows_G)} rows, of which no two share a text, cannot be shared by {world} ranks",
                where=where,
                fix="set train.plan.duplicates=allow (losses count a text that repeats once), or use fewer ranks",
            )
        for rows in shape.rows_G:
            if not (dropped or shape.small or shape.instead_of) and rows % world:
                raise RecipeError(
                    f"batches of {rows} rows, by length, cannot be shared equally by {world} ranks",
                    where=where,
                    fix="set train.plan.batch_sizes to multiples of the ranks; or, with train.plan.batch_tokens, "
                    "train.plan.multiple to one, and enough tokens for the longest rows",
                )


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
    a row that is seen twice twice, `rows_of_steps` are the fewest and the most rows of a step. Reasons: `no full
    batch`, `shares a text`, `ranks` (a batch is not a multiple of them), `not reached` (a weight, a cap or the schedule
    ends the epoch before), `too small`."""

    rows: int
    steps: int
    drawn: int
    seen: int
    unseen: dict[str, int]
    rows_of_steps: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class BatchPlan:
    """The batches of a run, from what is known of its sources, for `world` ranks.

    A pass over a source is a fresh permutation cut into batches. An epoch has a number of steps of each source, given
    by the schedule; a source's passes follow each other without regard to epochs, so that no row is seen twice before
    all others were seen once. What an epoch does not see is counted with the reason (`account`). Batches do not depend
    on the number of ranks, which only must divide them, so a run may go on with another number.

    Errors: `RecipeError` for a batch that ranks cannot share equally, an empty source, one with fewer rows than
    there are ranks, a weight that is not above 0.
    """

    sources: tuple[PlannedSource, ...]
    seed: int = 0
    world: int = 1
    config: PlanConfig = PlanConfig()
    _passes: dict[int, tuple[int, Pass]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _schedules: dict[int, tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not self.sources:
            raise RecipeError("a plan needs at least one source", where="sources")
        for source in self.sources:
            source.check(self.world)
        for place, source in enumerate(self.sources):
            source.check_cut(self.cuts[place], self.world, self._is_dropped(place))
        if not any(self.steps_of):
            raise RecipeError(
                "every source is too small for a batch", where="sources", fix="set train.plan.small=shrink"
            )
        for source, shape, clashing in zip(self.sources, self.cuts, self._clashing, strict=True):
            if clashing > source.rows / 2 or (clashing and shape.shared is not None and shape.shared.most == 1):
                raise RecipeError(
                    f"{clashing} of {source.rows} rows find no batch without another row of the same query or positive",
                    where=f"source {source.name!r}",
                    fix="add rows of other queries and positives; or set train.plan.duplicates=allow (losses count a "
                    "text that repeats once), where rows have negatives of their own or there are other positives",
                )
        for note in self.notes:
            log.warning(note)

    @cached_property
    def cuts(self) -> tuple[Cut, ...]:
        """The shape of every source's passes."""
        return tuple(self._shape(place) for place in range(len(self.sources)))

    def _shape(self, place: int) -> Cut:
        s = self.sources[place]
        if isinstance(s.order, ClassBatches):
            return Cut(s.rows, (s.order.classes * s.order.texts,), (s.order.batches,), order=s.order)
        of_at_most = partial(cut, s.rows, s.batch_size, s.texts, self.config, s.facts, s.apart)
        whole = replace(of_at_most(None), order=s.order)
        kept_as_it_is = whole.small and self.config.small in ("drop", "pad")
        if kept_as_it_is or whole.shared is None or whole.shared.texts == 0:
            return whole
        first = whole.draw(self.seed, place, 0)
        shape = fitted(whole, first.clashing, of_at_most, self.seed, place)
        if shape is whole:
            self._passes[place] = (0, first)
        return shape

    def _is_dropped(self, source: int) -> bool:
        return self.config.small == "drop" and self.cuts[source].small

    @cached_property
    def rows_per_step(self) -> tuple[int, ...]:
        """The most rows that a step of each source has: a source smaller than its batch gets the largest batch that
        it fills on these ranks."""
        return tuple(max(shape.rows_G) // self.world * self.world for shape in self.cuts)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What the plan had to change, one sentence each."""
        small: list[str] = []
        clashing: list[str] = []
        remedies = {"drop": "it is left out", "pad": "rows are repeated to fill {}"}
        remedy = remedies.get(self.config.small, "its batches have {} rows")
        for place, source in enumerate(self.sources):
            if self.cuts[place].small:
                small.append(
                    f"source {source.name!r} has {source.rows} rows, fewer than its batch_size "
                    f"{source.batch_size or 'by tokens'}: {remedy.format(self.rows_per_step[place])}"
                )
            if wanted := self.cuts[place].instead_of:
                clashing.append(
                    f"source {source.name!r}: its batches have {self.rows_per_step[place]} rows instead of {wanted}, "
                    f"because many of its {source.rows} rows have the same query or positive, and a batch has each "
                    "once; train.plan.duplicates=allow keeps the larger batches"
                )
            if left := self._clashing[place]:
                clashing.append(
                    f"source {source.name!r}: {left} of {source.rows} rows find no batch in a pass without another row "
                    "of the same query or positive, and are left out of it; train.plan.duplicates=allow keeps them"
                )
        return (*small, *clashing)

    @cached_property
    def _clashing(self) -> tuple[int, ...]:
        """Rows that the first pass over each source leaves out because they share a text with others."""
        firsts = [None if self._is_dropped(place) else self._pass(place, 0) for place in range(len(self.sources))]
        return tuple(0 if each is None else each.clashing for each in firsts)

    @cached_property
    def steps_of(self) -> tuple[int, ...]:
        """Steps of each source in an epoch."""
        batches = [0 if self._is_dropped(place) else shape.batches for place, shape in enumerate(self.cuts)]
        weights, rows = [source.weight for source in self.sources], [source.rows for source in self.sources]
        return self.config.steps_of_sources(batches, weights, rows, [source.task for source in self.sources])

    @cached_property
    def steps_per_epoch(self) -> int:
        return sum(self.steps_of)

    def at(self, step: int, world: int | None = None) -> PlannedStep:
        """The batch of a step, counted from 0 over all epochs; for another number of ranks where one is given."""
        epoch, place = divmod(step, self.steps_per_epoch)
        source_S, ordinal_S = self._schedule(epoch)
        source = int(source_S[place])
        visit, batch = divmod(epoch * self.steps_of[source] + int(ordinal_S[place]), self.cuts[source].batches)
        made, ranks = self._pass(source, visit), world or self.world
        start, kept = (int(each[made.sequence[batch]]) for each in (made.start, made.kept))
        # Rows that share a text with one that is kept are used only where a batch would be empty without.
        rows = made.row_P[start : start + max(kept // ranks * ranks, ranks)].astype(np.int64)
        facts = self.sources[source].facts
        length = facts.length_N[rows] if facts is not None and self.config.by_length else None
        return PlannedStep(step, epoch, source, visit, rows, length)

    def _schedule(self, epoch: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """(source_S, ordinal_S): the source of each step of the epoch, and how many of its batches came before."""
        kept = self._schedules.get(epoch)
        if kept is None:
            tasks = [source.task for source in self.sources]
            source_S = self.config.source_order(self.steps_of, tasks, self.seed, epoch)
            ordinal_S = np.empty_like(source_S)
            for source in np.unique(source_S):
                mine = source_S == source
                ordinal_S[mine] = np.arange(int(mine.sum()), dtype=np.int32)
            kept = (source_S, ordinal_S)
            self._schedules.clear()  # only the epoch in use is kept
            self._schedules[epoch] = kept
        return kept

    def _pass(self, source: int, visit: int) -> Pass:
        """The pass in use is kept, one a source."""
        kept = self._passes.get(source)
        if kept is None or kept[0] != visit:
            kept = (visit, self.cuts[source].draw(self.seed, source, visit))
            self._passes[source] = kept
        return kept[1]

    def summary(self) -> list[str]:
        """A line a source: rows, steps of an epoch and their size, rows that the first epoch does not see and why."""
        lines = []
        for source, steps, account in zip(self.sources, self.steps_of, self.account(0), strict=True):
            fewest, most = account.rows_of_steps
            size = f"{most}" if fewest == most else f"{fewest} to {most}"
            unseen = "".join(f", {count:,} rows left out ({why})" for why, count in account.unseen.items())
            rows = f"{source.name}: {source.task}, {account.rows:,} rows"
            drawn = f" ({account.drawn:,} rows)" if fewest != most else ""
            lines.append(f"{rows}, {steps:,} step{'s' * (steps != 1)} of {size} an epoch{drawn}{unseen}")
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
        return tuple(self._account(source, epoch) for source in range(len(self.sources)))

    def _account(self, source: int, epoch: int) -> Account:
        size, steps = self.sources[source].rows, self.steps_of[source]
        if steps == 0:
            return Account(size, 0, 0, 0, {"too small": size})
        seen_N, why_N = np.zeros(size, bool), np.zeros(size, np.int8)
        drawn_S, batches = list[int](), self.cuts[source].batches
        for visit in range(epoch * steps // batches, ((epoch + 1) * steps - 1) // batches + 1):
            made = self.cuts[source].draw(self.seed, source, visit)
            why_N[made.row_P] = _NOT_REACHED
            why_N[made.row_P[made.start[-1] :]] = _NO_BATCH
            first, last = max(epoch * steps - visit * batches, 0), min((epoch + 1) * steps - visit * batches, batches)
            for place in made.sequence[first:last]:
                start, stop, kept = int(made.start[place]), int(made.start[place + 1]), int(made.kept[place])
                rows = made.row_P[start : start + max(kept // self.world * self.world, self.world)]
                why_N[made.row_P[start : start + kept]] = _RANKS
                why_N[made.row_P[start + kept : stop]] = _CLASHES
                seen_N[rows] = True
                drawn_S.append(len(rows))
        counts = np.bincount(why_N[~seen_N], minlength=len(_REASONS))
        unseen = {reason: int(count) for reason, count in zip(_REASONS, counts, strict=True) if count}
        return Account(size, steps, sum(drawn_S), int(seen_N.sum()), unseen, (min(drawn_S), max(drawn_S)))


_REASONS = ("not reached", "no full batch", "shares a text", "ranks")
_NOT_REACHED, _NO_BATCH, _CLASHES, _RANKS = range(len(_REASONS))
