"""A run's report as plain values, for a page that draws it by itself: what changed on every task, which items moved and
what the figures say of why, curves, and what to try next."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedsmith.evaluate.compare import Comparison, Difference
from embedsmith.evaluate.result import TaskResult, finite_or_none
from embedsmith.evaluate.tasks.kinds import Task
from embedsmith.evaluate.tasks.pairs import STSTask
from embedsmith.evaluate.tasks.ranking import RankingTask
from embedsmith.report.changes import item_values, readable_tasks
from embedsmith.report.run_folder import Folder

_MOVED = 100
"""Items that are told of those that fell most; a fifth of it of those that rose."""
_LEAST = 0.01
_POINTS = 300
_TEXT = 2000
_CURVES = ("loss/", "validation_loss/", "score/")
_TEXTS = {
    "relevant": "right",
    "found before it": "wrong",
    "text 1": "first",
    "text 2": "second",
}

Texts = dict[str, str]


def run_facts(folder: str | Path) -> dict[str, Any]:
    """What a run or a merge left, for JSON. Errors: `EvaluationError` for a folder with nothing to report."""
    found = Folder.read(Path(folder))
    made = found.comparison()
    tasks = [task for task in readable_tasks(found.tasks())] if made is not None else []
    return {
        "name": found.path.resolve().name,
        "kind": "merge" if found.merge is not None else "run",
        "finished": found.finished is not None,
        "step": found.last_step if found.finished is None else found.finished.get("steps", found.last_step),
        "problems": list(found.problems),
        "tasks": [] if made is None else _tasks(made, {task.name: task for task in tasks}),
        "curves": _curves(found.lines),
        "next": [asdict(step) for step in found.next_steps(made)],
    }


def _tasks(made: Comparison, known: Mapping[str, Task]) -> list[dict[str, Any]]:
    """One a task, those that lost most first."""
    last = made.results[-1]
    if len(made.models) < 2:
        return [_head(result, None) | {"moved": []} for result in last]
    rows = []
    gaps = made.differences(len(made.models) - 1)
    for old, new, gap in zip(made.results[0], last, gaps, strict=True):
        rows.append(_head(new, gap, old) | _items(old, new, known.get(new.task)))
    return sorted(rows, key=lambda row: (not row["clear"], row["difference"] or 0.0))


def _head(new: TaskResult, gap: Difference | None, old: TaskResult | None = None) -> dict[str, Any]:
    interval = None if gap is None else gap.interval
    return {
        "task": new.task,
        "kind": new.kind,
        "metric": new.metric,
        "before": None if old is None else finite_or_none(old.main_score),
        "after": finite_or_none(new.main_score),
        "difference": None if interval is None else finite_or_none(interval.value),
        "low": None if interval is None else finite_or_none(interval.low),
        "high": None if interval is None else finite_or_none(interval.high),
        "clear": gap is not None and gap.clear,
        "items": 0,
        "better": 0,
        "worse": 0,
    }


def _items(old: TaskResult, new: TaskResult, task: Task | None) -> dict[str, Any]:
    """How many items went better and worse, and those that moved most: first all that fell, the worst first."""
    before_N, after_N = item_values(old), item_values(new)
    if before_N is None or after_N is None or list(old.item_ids) != list(new.item_ids):
        return {"moved": []}
    change_N = np.nan_to_num(after_N - before_N)
    order = np.argsort(change_N, kind="stable").tolist()
    fell = [place for place in order if change_N[place] < -_LEAST]
    rose = [place for place in order[::-1] if change_N[place] > _LEAST]
    shown = {example.item_id: example.texts for example in (*old.examples, *new.examples)}
    moved = [
        {
            "id": new.item_ids[place],
            "before": finite_or_none(before_N[place]),
            "after": finite_or_none(after_N[place]),
            "change": float(change_N[place]),
            "texts": _texts(task, new.item_ids[place], shown.get(new.item_ids[place], {})),
            **_why(old, new, place),
        }
        for place in (*fell[:_MOVED], *rose[: _MOVED // 5])
    ]
    return {"items": len(change_N), "better": len(rose), "worse": len(fell), "moved": moved}


def _why(old: TaskResult, new: TaskResult, place: int) -> dict[str, Any]:
    """Numbers of an item before and after: `rank` of the first right text (null where it is not among the first
    `depth`), similarity of the best `right` and the best `wrong` text; `similarity` of a pair, and what `people` gave
    it."""

    def both(name: str) -> list[float] | None:
        columns = [each.items.get(name) for each in (old, new)]
        pair = [math.nan if column is None else float(column[place]) for column in columns]
        return pair if all(map(math.isfinite, pair)) else None

    cuts = [int(name.rpartition("_")[2]) for name in new.items if name.startswith("mrr_at_")]
    depth = max(cuts, default=0)
    reciprocal = both(f"mrr_at_{depth}")
    people = both("score")
    return {
        "depth": depth,
        "rank": None if reciprocal is None else [round(1 / value) if value > 0 else None for value in reciprocal],
        "right": both("similarity_relevant"),
        "wrong": both("similarity_other"),
        "people": None if people is None else people[1],
        "similarity": both("cosine") or both("similarity"),
    }


def _texts(task: Task | None, item: str, shown: Mapping[str, str]) -> Texts:
    """An item's texts by what they are: those of the results, and of a task whose files are there."""
    found = {_TEXTS.get(name, name): text for name, text in shown.items()}
    if isinstance(task, RankingTask) and item in task.queries:
        found.setdefault("query", task.queries[item])
        grades = task.qrels.get(item, {})
        right = max((document for document in grades if document in task.corpus), key=grades.__getitem__, default=None)
        if right is not None:
            found.setdefault("right", task.corpus[right])
    elif isinstance(task, STSTask) and item.isdecimal() and int(item) < len(task.text1):
        found.setdefault("first", task.text1[int(item)])
        found.setdefault("second", task.text2[int(item)])
    order = ("query", "right", "wrong", "first", "second")
    return {name: found[name][:_TEXT] for name in order if found.get(name)}


def _curves(lines: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Losses and scores over steps, each series thinned to what a screen shows."""
    found = []
    for start in _CURVES:
        keys = [key for key in dict.fromkeys(key for line in lines for key in line) if key.startswith(start)]
        series = []
        for key in keys:
            points = [(int(line["step"]), line[key]) for line in lines if math.isfinite(line.get(key, math.nan))]
            if len(points) > _POINTS:  # evenly, with the first and the last
                place_N: npt.NDArray[np.int64] = np.linspace(0, len(points) - 1, _POINTS).round().astype(np.int64)
                points = [points[place] for place in place_N.tolist()]
            if points:
                series.append({"name": key.removeprefix(start), "points": points})
        found.append({"name": start.rstrip("/"), "series": series})
    return found
