"""`manifest.json` in a run's folder: what the run reads, and what it saw up to its last checkpoint: counts and hashes.

The plan is a function of the step number, so what was seen is not recorded but computed: the batches are planned once
more, without reading a text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedsmith.core.collectives import objects_of_all_ranks, on_first_rank, rank, world_size
from embedsmith.core.errors import DataError
from embedsmith.core.files import atomic_file
from embedsmith.core.registry import to_plain
from embedsmith.data import BatchPlan, Joined
from embedsmith.train.feed import Feed, Lane

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
