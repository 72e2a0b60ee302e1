"""What an epoch of a recipe would be: `embedsmith inspect recipe.yaml`. Nothing is written.

Steps and rows are exact, from the plan. Tokens and padding are those of some steps of every source, tokenized and cut
into chunks as in training, times the steps. The time is that of some real training steps of every source.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from embedsmith.core.collectives import world_size
from embedsmith.data import Account
from embedsmith.models.cut import CutTexts, cut_of
from embedsmith.train.build import make_accelerator
from embedsmith.train.config import Recipe
from embedsmith.train.feed import Lane
from embedsmith.train.loop import Run, build, update

SAMPLED_STEPS = 8
TIMED_STEPS = 2


@dataclass(frozen=True)
class SourceOverview:
    """One source in the first epoch. `tokens` and `padded_tokens` are of all ranks; `seconds` is `None` if not timed;
    `sampled` is the number of its steps that were tokenized; `cut` what of its texts is cut at `max_length`, `None`
    where only the reading of them tells."""

    name: str
    task: str
    account: Account
    tokens: int
    padded_tokens: int
    sampled: int
    seconds: float | None
    cut: CutTexts | None = None

    @property
    def padding_share(self) -> float:
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0


@dataclass(frozen=True)
class Overview:
    """The plan of an epoch. `steps`: of an epoch; `run_steps`: of the whole run; `notes`: what the plan had to change;
    `how`: how tokens and time were found."""

    sources: tuple[SourceOverview, ...]
    steps: int
    run_steps: int
    seconds: float | None
    notes: tuple[str, ...]
    how: str

    def table(self) -> RenderableType:
        table = Table("source", "task", "rows", "seen", "steps", "tokens", "padding", "time")
        for one in self.sources:
            account = one.account
            cells = (f"{account.rows:,}", f"{account.seen:,}", f"{account.steps:,}", f"{one.tokens:,}")
            table.add_row(Text(one.name), one.task, *cells, f"{one.padding_share:.1%}", _clock(one.seconds))
        lines = [
            f"{one.name}: {count:,} rows are not seen in the epoch: {why}"
            for one in self.sources
            for why, count in one.account.unseen.items()
        ]
        again = [one for one in self.sources if one.account.drawn > one.account.seen]
        lines += [f"{one.name}: {one.account.drawn - one.account.seen:,} rows are seen again" for one in again]
        lines += [f"{one.name}: {one.cut}" for one in self.sources if one.cut is not None]
        lines.append(f"an epoch: {self.steps:,} steps, {_clock(self.seconds)}; the run: {self.run_steps:,} steps")
        lines.append(f"({self.how})")
        return Group(table, *(Text(line) for line in lines))


def overview(recipe: Recipe, *, timed: bool = True) -> Overview:
    """Build the run as for training, describe its first epoch, and throw it away. Errors: those of `train`."""
    run = build(recipe, make_accelerator(recipe))
    sources = tuple(source for lane in run.feed.lanes for source in _sources(run, lane))
    seconds = None
    if timed:
        first = len(run.feed.lanes[0].supplies)
        timings = _timings(run)
        sources = tuple(
            replace(source, seconds=timing)
            for source, timing in zip(sources, [*timings, *[None] * (len(sources) - first)], strict=True)
        )
        seconds = sum(timings) * run.feed.steps_per_epoch / run.feed.lanes[0].plan.steps_per_epoch
    notes = tuple(note for lane in run.feed.lanes for note in lane.plan.notes)
    how = f"tokens from up to {SAMPLED_STEPS} steps of a source"
    if timed:
        how += (
            f"; time from {TIMED_STEPS} training steps of a source after a warm-up, on {run.accelerator.device} with "
        )
        how += f"{world_size()} process(es), without evaluations and checkpoints"
    return Overview(sources, run.feed.steps_per_epoch, run.steps, seconds, notes, how)


def _sources(run: Run, lane: Lane) -> list[SourceOverview]:
    found = []
    for place, (supply, account) in enumerate(zip(lane.supplies, lane.plan.account(0), strict=True)):
        steps = _spread(lane.plan.steps_with(place), SAMPLED_STEPS)
        drawn = [lane.draw(run.model, int(step), run.recipe.train.seed)[0] for step in steps]
        real = padded = 0  # tokens of the draws of this rank
        for length_N in (one.length_N for one in drawn):
            real += int(length_N.sum())
            padded += sum(len(each.rows) * int(length_N[each.rows].max()) for each in run.memory.plan(length_N))
        scale = account.steps * lane.world / max(len(drawn), 1)
        name, task = supply.records.name, supply.records.task
        cut = cut_of(run.model, supply.records)
        found.append(
            SourceOverview(name, task, account, round(scale * real), round(scale * padded), len(drawn), None, cut)
        )
    return found


def _spread(steps: Sequence[int] | np.ndarray[tuple[int, ...], np.dtype[np.int64]], count: int) -> list[int]:
    places = np.linspace(0, len(steps) - 1, min(count, len(steps))).astype(int)
    return [int(steps[place]) for place in places]


def _timings(run: Run) -> list[float]:
    """Seconds of an epoch's steps of each source of the first lane, by the mean of a few whole steps."""
    plan = run.feed.lanes[0].plan
    update(run, run.feed.draw(0))
    seconds = []
    for source, count in enumerate(plan.steps_of):
        steps = _spread(plan.steps_with(source), TIMED_STEPS)
        start = time.perf_counter()
        for step in steps:
            update(run, run.feed.draw(step))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / max(len(steps), 1) * count)
    return seconds


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "not timed"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
