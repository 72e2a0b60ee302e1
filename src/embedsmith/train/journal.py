"""What a run writes about itself: `metrics.jsonl`, and the trackers accelerate knows (TensorBoard and others)."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from accelerate import Accelerator

from embedsmith.core.collectives import (
    objects_of_all_ranks,
    on_first_rank,
    rank,
    world_size,
)
from embedsmith.core.errors import DataError
from embedsmith.core.files import atomic_file
from embedsmith.core.progress import Bar
from embedsmith.core.settings import to_plain
from embedsmith.data import BatchPlan, Joined
from embedsmith.train.feed import Feed, Lane
from embedsmith.train.step import DeadHeads, StepOutput


class Journal:
    """One line of numbers at a time, to the file and to every tracker. On the first rank only."""

    def __init__(
        self, output: Path, accelerator: Accelerator, recipe: Any, log_with: tuple[str, ...], start: int
    ) -> None:
        self._accelerator = accelerator
        self._file: IO[str] | None = None
        if rank() != 0:
            return
        path = output / "metrics.jsonl"
        cut_back(path, start)
        self._file = path.open("a", encoding="utf-8")
        if log_with:
            purge = {"tensorboard": {"purge_step": start}} if "tensorboard" in log_with else {}
            accelerator.init_trackers("embedsmith", config=_scalars(to_plain(recipe)), init_kwargs=purge)

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._file is None:
            return
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
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["step"] <= step:
            kept.append(line)
    with atomic_file(path) as file:
        file.writelines(line + "\n" for line in kept)


def _scalars(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A flat view of the recipe that every tracker accepts."""
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _scalars(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): tree if isinstance(tree, bool | int | float | str) else json.dumps(tree)}


# `manifest.json` in a run's folder: what the run reads, and what it saw up to its last checkpoint: counts and hashes.
# The plan is a function of the step number, so what was seen is not recorded but computed: the batches are planned once
# more, without reading a text.

NAME = "manifest.json"


@dataclass(frozen=True)
class Start:
    """A start of the run, at `step`, on so many ranks."""

    step: int
    ranks: int


@dataclass
class _Seen:
    """What a run saw of one source. The hash is over the row numbers in the order of the steps."""

    rows: int
    steps: int = 0
    drawn: int = 0
    mask_N: Any = None
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))


@dataclass
class RunManifest:
    """The manifest of a run under way: `save` counts what the steps since the last call saw."""

    output: Path
    feed: Feed
    starts: list[Start]
    _step: int = 0
    _seen: list[list[_Seen]] = field(init=False)

    def __post_init__(self) -> None:
        self._seen = [
            [_Seen(supply.rows, mask_N=np.zeros(supply.rows, bool)) for supply in lane.supplies]
            for lane in self.feed.lanes
        ]

    def save(self, step: int, *, finished: bool = False) -> None:
        """Write what steps 0 to `step` - 1 saw of each source. Collective."""
        sources = _sources(self.feed)
        for lane, seen in zip(self.feed.lanes, self._seen, strict=True):
            self._follow(lane, seen, step)
            for supply, one in zip(lane.supplies, seen, strict=True):
                sources[supply.records.name]["seen"] = _told(supply.records.records, one)
        self._step = max(self._step, step)
        _write(self.output, {"starts": to_plain(self.starts), "steps": step, "finished": finished}, sources)

    def _follow(self, lane: Lane, seen: list[_Seen], step: int) -> None:
        for each, ranks in _steps(self.starts, range(self._step, step), lane):
            planned = lane.plan.at(each, ranks)
            one = seen[planned.source]
            one.steps += 1
            one.drawn += len(planned.rows)
            one.mask_N[planned.rows] = True
            one.digest.update(planned.rows.tobytes())


def open_manifest(output: Path, feed: Feed, step: int) -> RunManifest:
    """Say what will be read, before the first step or after a resume, and what was seen before. Collective.

    Errors: `DataError` on a resume when a source holds other records than before: its steps would not be the same.
    """
    if step:
        now = _of_all_ranks(_sources(feed))
        on_first_rank(lambda: _refuse_changed(output, now))
    earlier = [start for start in _starts(output) if start.step < step] if step else []
    manifest = RunManifest(output, feed, [*earlier, Start(step, world_size())])
    manifest.save(step)
    return manifest


def _told(records: Any, seen: _Seen) -> dict[str, Any]:
    told = {
        "steps": seen.steps,
        "rows_drawn": seen.drawn,
        "rows": int(seen.mask_N.sum()),
        "hash": seen.digest.hexdigest(),
    }
    if isinstance(records, Joined):
        counts = [int(piece.sum()) for piece in np.split(seen.mask_N, records.stop[:-1])]
        told["rows_of"] = dict(zip(records.names, counts, strict=True))
    return told


def _refuse_changed(output: Path, now: dict[str, dict[str, Any]]) -> None:
    path = output / NAME
    before = json.loads(path.read_text(encoding="utf-8"))["sources"] if path.exists() else {}
    changed = [name for name, entry in now.items() if name in before and before[name]["content"] != entry["content"]]
    if changed:
        rows = "; ".join(f"{name}: {before[name]['rows']:,} rows before, {now[name]['rows']:,} now" for name in changed)
        raise DataError(
            f"data of this run changed since it was stopped ({rows})",
            where=output,
            fix="put the files back as they were to continue it, or start anew in another output",
        )


def _starts(output: Path) -> list[Start]:
    path = output / NAME
    if not path.exists():
        return []
    return [Start(**start) for start in json.loads(path.read_text(encoding="utf-8"))["starts"]]


def _sources(feed: Feed) -> dict[str, dict[str, Any]]:
    sources: dict[str, dict[str, Any]] = {}
    for lane in feed.lanes:
        for place, supply in enumerate(lane.supplies):
            sources[supply.records.name] = {
                "task": supply.records.task,
                "rows": supply.rows,
                "content": supply.records.fingerprint,
                "skipped_rows": sum(skipped.count for skipped in supply.records.skipped),
                "weight": supply.weight,
                "steps_per_epoch": lane.plan.steps_of[place],
                "unseen_rows_first_epoch": lane.plan.unused_rows[place],
            }
    return sources


def _steps(starts: list[Start], wanted: range, lane: Lane) -> Iterator[tuple[int, int]]:
    """Some steps with the number of ranks that shared their rows: all of them, or the part of them this lane has
    now."""
    ends = [start.step for start in starts[1:]] + [wanted.stop]
    now: BatchPlan = lane.plan
    for start, end in zip(starts, ends, strict=True):
        ranks = start.ranks if start.ranks != world_size() else now.world
        for step in range(max(start.step, wanted.start), min(end, wanted.stop)):
            yield step, ranks


def _of_all_ranks(mine: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: entry for theirs in objects_of_all_ranks(mine) for name, entry in theirs.items()}


def _write(output: Path, run: dict[str, Any], mine: dict[str, dict[str, Any]]) -> None:
    """On the first rank; ranks may hold different sources (Conan's split mode)."""
    sources = _of_all_ranks(mine)
    if rank() != 0:
        return
    with atomic_file(output / NAME) as file:
        json.dump({**run, "sources": sources}, file, indent=2, ensure_ascii=False)


class Meter:
    """Means since the last report."""

    def __init__(self) -> None:
        self._dead = DeadHeads()
        self._reset()

    def _reset(self) -> None:
        self._losses: dict[str, list[torch.Tensor]] = {}
        self._tokens, self._padded, self._since = 0, 0, time.perf_counter()

    def add(self, output: StepOutput) -> None:
        for name, parts in output.parts.items():
            for key, value in parts.items():
                self._losses.setdefault(f"{key}/{name}", []).append(value.detach().float().mean())
        self._tokens += output.tokens
        self._padded += output.padded_tokens

    def report(self, rate: float, norm: float, bar: Bar) -> dict[str, float]:
        """The values since the last call, averaged over ranks, and a note on the bar. Collective."""
        seconds = time.perf_counter() - self._since
        mine = {key: float(torch.stack(values).mean()) for key, values in self._losses.items()}
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
        self._dead.watch(averages)
        losses = " ".join(f"{key.split('/', 1)[1]} {v:.3f}" for key, v in averages.items() if key.startswith("loss/"))
        bar.note(f"loss {losses} · lr {rate:.1e} · {speed:,.0f} tokens/s")
        self._reset()
        return report
