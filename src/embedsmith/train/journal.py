"""What a run writes about itself, in its folder and to the trackers that accelerate knows (TensorBoard and others).

metrics.jsonl   one line of numbers at a time (`Journal`, from a `Meter`)
cut.json        what `max_length` cuts of the texts of each source (`tell_of_cut`)
manifest.json   what the run reads, and what it saw up to its last checkpoint: counts and hashes (`RunManifest`)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from embedsmith.core.collectives import objects_of_all_ranks, on_first_rank, rank, world_size
from embedsmith.core.errors import CheckpointError, DataError
from embedsmith.core.files import atomic_file, disk_errors
from embedsmith.core.inputs import read_typed
from embedsmith.core.progress import Bar, log
from embedsmith.core.settings import to_plain
from embedsmith.core.tokens import IntArray
from embedsmith.core.transfer import read
from embedsmith.data import Joined, RecordSet
from embedsmith.data.record import Text
from embedsmith.models import Model
from embedsmith.models.cut import cut_of
from embedsmith.train.feed import Feed, Lane
from embedsmith.train.step import StepOutput

Drawn = TypeVar("Drawn")


class Journal:
    """One line of numbers at a time, to the file and to every tracker. On the first rank only."""

    def __init__(
        self, output: Path, accelerator: Accelerator, recipe: Any, log_with: tuple[str, ...], start: int
    ) -> None:
        self._accelerator = accelerator
        self._file: IO[str] | None = None
        self._left_out: set[str] = set()
        if rank() != 0:
            return
        self._path = output / "metrics.jsonl"
        cut_back(self._path, start)
        self._file = self._path.open("a", encoding="utf-8")
        known = {tracker.value for tracker in get_available_trackers()}
        if missing := [name for name in log_with if name not in known]:
            fix = f"pip install {' '.join(missing)}"
            log.info("no curves in %s, which is not installed (%s); metrics.jsonl has all", ", ".join(missing), fix)
        if log_with:
            purge = {"tensorboard": {"purge_step": start}} if "tensorboard" in log_with else {}
            accelerator.init_trackers("embedsmith", config=_scalars(to_plain(recipe)), init_kwargs=purge)

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._file is None:
            return
        if strange := {name for name, value in values.items() if not math.isfinite(value)} - self._left_out:
            self._left_out |= strange
            log.warning("step %d: not finite and so left out of metrics.jsonl: %s", step, ", ".join(sorted(strange)))
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        with disk_errors(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            self._accelerator.log(values, step=step)

    def close(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            for tracker in self._accelerator.trackers:  # `end_training` would also end the process group
                tracker.finish()


def cut_back(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a half-written last one: the run goes on from there and writes them again."""
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            if entry["step"] <= step:
                kept.append(line)
        except (ValueError, RecursionError, TypeError, LookupError):
            continue
    with atomic_file(path) as file:
        file.writelines(line + "\n" for line in kept)


def _scalars(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A flat view of the recipe that every tracker accepts."""
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _scalars(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): tree if isinstance(tree, bool | int | float | str) else json.dumps(tree)}


class Meter:
    """Sums the numbers of steps, and reports their means since the last report, with the share of the time that was
    spent waiting for data (`wait`)."""

    def __init__(self) -> None:
        self._warned: set[str] = set()
        self._reset()

    def _reset(self) -> None:
        self._losses: dict[str, list[torch.Tensor]] = {}
        self._tokens, self._padded, self._waited, self._since = 0, 0, 0.0, time.perf_counter()

    def waiting(self, draws: Iterator[Drawn]) -> Iterator[Drawn]:
        """The same draws; how long each was waited for is summed."""
        while True:
            asked = time.perf_counter()
            try:
                draw = next(draws)
            except StopIteration:
                return
            self._waited += time.perf_counter() - asked
            yield draw

    def add(self, output: StepOutput) -> None:
        for name, parts in output.parts.items():
            for key, value in parts.items():
                self._losses.setdefault(f"{key}/{name}", []).append(value.detach().float().mean())
        self._tokens += output.tokens
        self._padded += output.padded_tokens

    def report(self, rate: float, norm: float, bar: Bar) -> dict[str, float]:
        """The values since the last call, averaged over ranks, and a note on the bar. Collective."""
        seconds = time.perf_counter() - self._since
        own = [torch.stack(values).mean() for values in self._losses.values()]
        numbers = read(torch.stack([mean.to(own[0].device) for mean in own])) if own else []  # of all in one read
        mine = dict(zip(self._losses, numbers, strict=True)) | {"wait": self._waited / seconds}
        means: dict[str, list[float]] = {}
        for theirs in objects_of_all_ranks(mine):  # ranks may hold parts of different sources
            for key, value in theirs.items():
                means.setdefault(key, []).append(value)
        averages = {key: sum(values) / len(values) for key, values in sorted(means.items())}
        speed = self._tokens * world_size() / seconds
        report = {
            **averages,
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens_per_second": speed,
            "padding_share": 1 - self._tokens / max(self._padded, 1),
        }
        self.warn_of_empty_vectors(averages)
        losses = " ".join(f"{key.split('/', 1)[1]} {v:.3f}" for key, v in averages.items() if key.startswith("loss/"))
        bar.note(f"loss {losses} · lr {rate:.1e} · {speed:,.0f} tokens/s · {averages['wait']:.0%} waiting for data")
        self._reset()
        return report

    def warn_of_empty_vectors(self, report: Mapping[str, float]) -> None:
        """Once for each head and source of which most vectors are empty; `report` names them `HEAD_empty/SOURCE`."""
        for name, value in report.items():
            key, _, source = name.partition("/")
            if key.endswith("_empty") and value > 0.5 and name not in self._warned:
                self._warned.add(name)
                log.warning(
                    "%s: %.0f%% of the texts have an empty %s vector; a smaller learning rate, a larger weight of this "
                    "head or distillation from the start may revive it",
                    source,
                    100 * value,
                    key.removesuffix("_empty"),
                )


NAME = "manifest.json"


class SeenRows:
    """What a run saw of one source. The hash is over the row numbers in the order of the steps."""

    def __init__(self, rows: int) -> None:
        self.steps, self.drawn, self.is_seen_N = 0, 0, np.zeros(rows, bool)
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, rows: IntArray) -> None:
        self.steps += 1
        self.drawn += len(rows)
        self.is_seen_N[rows] = True
        self._digest.update(rows.tobytes())

    def entry(self, records: Any) -> dict[str, Any]:
        """For the manifest; of sources that were put together also the rows of each."""
        entry = {
            "steps": self.steps,
            "rows_drawn": self.drawn,
            "rows": int(self.is_seen_N.sum()),
            "hash": self._digest.hexdigest(),
        }
        if isinstance(records, Joined):
            counts = [int(piece.sum()) for piece in np.split(self.is_seen_N, records.stop[:-1])]
            entry["rows_of"] = dict(zip(records.names, counts, strict=True))
        return entry


class RunManifest:
    """The manifest of a run under way. The plan is a function of the step number, so what was seen is not recorded but
    computed: `save` plans the batches of the steps since the last call once more, without reading a text.

    `starts`: the step and the number of ranks of each start of the run.
    """

    def __init__(self, output: Path, feed: Feed, starts: list[tuple[int, int]]) -> None:
        self.output, self.feed, self.starts = output, feed, starts
        self._step = 0
        self._seen = [[SeenRows(supply.rows) for supply in lane.supplies] for lane in feed.lanes]

    @staticmethod
    def open(output: Path, feed: Feed, step: int) -> RunManifest:
        """Write what will be read, before the first step or after a resume, and what was seen before. Collective.

        Errors: `DataError` on a resume when a source holds other records than before: its steps would not be the same.
        """
        starts: list[tuple[int, int]] = []
        path = output / NAME
        if step:
            now = _of_all_ranks(_sources(feed))
            fix = "put it back, or delete it to go on without the check that the data are the same"
            before = read_typed(path, _Before, CheckpointError, fix=fix) if path.exists() else _Before()
            on_first_rank(lambda: _refuse_changed(output, before.sources, now))
            starts = [(start.step, start.ranks) for start in before.starts if start.step < step]
        manifest = RunManifest(output, feed, [*starts, (step, world_size())])
        manifest.save(step)
        return manifest

    def save(self, step: int, *, finished: bool = False) -> None:
        """Write what steps 0 to `step` - 1 saw of each source. Collective: ranks may hold different sources (Conan's
        split mode)."""
        sources = _sources(self.feed)
        for lane, seen in zip(self.feed.lanes, self._seen, strict=True):
            for each, ranks in self._ranks_of_steps(range(self._step, step), lane):
                planned = lane.plan.at(each, ranks)
                seen[planned.source].add(planned.rows)
            for supply, one in zip(lane.supplies, seen, strict=True):
                sources[supply.records.name]["seen"] = one.entry(supply.records.records)
        self._step = step
        sources = _of_all_ranks(sources)
        if rank() == 0:
            starts = [{"step": start, "ranks": ranks} for start, ranks in self.starts]
            run = {"starts": starts, "steps": step, "finished": finished, "sources": sources}
            with atomic_file(self.output / NAME) as file:
                json.dump(run, file, indent=2, ensure_ascii=False)

    def _ranks_of_steps(self, wanted: range, lane: Lane) -> Iterator[tuple[int, int]]:
        """Some steps with the number of ranks that shared their rows: all of them, or the part of them this lane has
        now."""
        ends = [start for start, _ in self.starts[1:]] + [wanted.stop]
        for (start, ranks), end in zip(self.starts, ends, strict=True):
            sharing = ranks if ranks != world_size() else lane.plan.world
            for step in range(max(start, wanted.start), end):
                yield step, sharing


@dataclass(frozen=True)
class _Source:
    content: str
    rows: int


@dataclass(frozen=True)
class _Start:
    step: int
    ranks: int


@dataclass(frozen=True)
class _Before:
    """What a manifest says of the run until it stopped."""

    sources: dict[str, _Source] = field(default_factory=dict)
    starts: tuple[_Start, ...] = ()


def _refuse_changed(output: Path, before: Mapping[str, _Source], now: Mapping[str, Any]) -> None:
    changed = [name for name, entry in now.items() if name in before and before[name].content != entry["content"]]
    if changed:
        rows = "; ".join(f"{name}: {before[name].rows:,} rows before, {now[name]['rows']:,} now" for name in changed)
        raise DataError(
            f"data of this run changed since it was stopped ({rows})",
            where=output,
            fix="put the files back as they were to continue it, or start anew in another output",
        )


def _sources(feed: Feed) -> dict[str, dict[str, Any]]:
    """What this rank's lanes read, by the names of the sources."""
    sources: dict[str, dict[str, Any]] = {}
    for lane in feed.lanes:
        for place, supply in enumerate(lane.supplies):
            sources[supply.records.name] = {
                "task": "anchor" if lane.holds else supply.records.task,
                "rows": supply.rows,
                "content": supply.records.fingerprint,
                "skipped_rows": sum(skipped.count for skipped in supply.records.skipped),
                "weight": supply.weight,
                "steps_per_epoch": lane.plan.steps_of[place],
                "unseen_rows_first_epoch": lane.plan.unused_rows[place],
            }
    return sources


def _of_all_ranks(mine: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: entry for theirs in objects_of_all_ranks(mine) for name, entry in theirs.items()}


def tell_of_cut(model: Model, sets: Sequence[RecordSet[Text]], output: Path) -> None:
    """A line for each source some of whose texts are cut, and the counts of all of them for the report, as
    `cut.json`."""
    counted: dict[str, Any] = {}
    for records in sets:
        found = cut_of(model, records)
        if found is not None and found.cut:
            log.info("source %s: %s", records.name, found)
        if found is not None:
            counted[records.name] = asdict(found)
    with atomic_file(output / "cut.json") as file:
        json.dump(counted, file, indent=2, ensure_ascii=False)
