"""`manifest.json` in a run's folder: what the run reads, and in the end what it saw: counts and hashes.

The plan is a function of the step number, so what was seen is not recorded but computed: the batches are planned once
more, without reading a text.
"""

from __future__ import annotations

import hashlib
import json
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


def open_manifest(output: Path, feed: Feed, step: int) -> list[Start]:
    """Say what will be read, before the first step or after a resume; returns all starts so far. Collective.

    Errors: `DataError` on a resume when a source holds other records than before: its steps would not be the same.
    """
    if step:
        now = _of_all_ranks(_sources(feed))
        on_first_rank(lambda: _refuse_changed(output, now))
    earlier = [start for start in _starts(output) if start.step < step] if step else []
    starts = [*earlier, Start(step, world_size())]
    _write(output, starts, _sources(feed))
    return starts


def close_manifest(output: Path, feed: Feed, starts: list[Start], steps: int) -> None:
    """Add what steps 0 to `steps` - 1 saw of each source. Collective."""
    sources = _sources(feed)
    for lane in feed.lanes:
        seen = _replay(lane, starts, steps)
        for supply, one in zip(lane.supplies, seen, strict=True):
            entry = sources[supply.records.name]
            entry["seen"] = {
                "steps": one.steps,
                "rows_drawn": one.drawn,
                "rows": int(one.mask_N.sum()),
                "hash": one.digest.hexdigest(),
            }
            if isinstance(supply.records.records, Joined):
                pieces = np.split(one.mask_N, supply.records.records.stop[:-1])
                counts = [int(piece.sum()) for piece in pieces]
                entry["seen"]["rows_of"] = dict(zip(supply.records.records.names, counts, strict=True))
    _write(output, starts, sources, steps)


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


def _replay(lane: Lane, starts: list[Start], steps: int) -> list[_Seen]:
    seen = [_Seen(supply.rows, mask_N=np.zeros(supply.rows, bool)) for supply in lane.supplies]
    for step, ranks in _steps(starts, steps, lane):
        planned = lane.plan.at(step, ranks)
        one = seen[planned.source]
        one.steps += 1
        one.drawn += len(planned.rows)
        one.mask_N[planned.rows] = True
        one.digest.update(planned.rows.tobytes())
    return seen


def _steps(starts: list[Start], steps: int, lane: Lane) -> list[tuple[int, int]]:
    """Every step with the number of ranks that shared its rows: all of them, or the part of them this lane has now."""
    ends = [start.step for start in starts[1:]] + [steps]
    now: BatchPlan = lane.plan
    return [
        (step, start.ranks if start.ranks != world_size() else now.world)
        for start, end in zip(starts, ends, strict=True)
        for step in range(start.step, min(end, steps))
    ]


def _of_all_ranks(mine: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: entry for theirs in objects_of_all_ranks(mine) for name, entry in theirs.items()}


def _write(output: Path, starts: list[Start], mine: dict[str, dict[str, Any]], steps: int | None = None) -> None:
    """On the first rank; ranks may hold different sources (Conan's split mode)."""
    sources = _of_all_ranks(mine)
    if rank() != 0:
        return
    with atomic_file(output / NAME) as file:
        json.dump({"starts": to_plain(starts), "steps": steps, "sources": sources}, file, indent=2, ensure_ascii=False)
