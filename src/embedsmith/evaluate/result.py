"""What an evaluation gives back: scores, what they were computed from, and what to know about them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from embedsmith.core.errors import EvaluationError
from embedsmith.core.files import atomic_file
from embedsmith.core.inputs import read_json, typed
from embedsmith.core.outputs import delivered
from embedsmith.core.terminal import Printed
from embedsmith.evaluate.metrics import added_metrics

ItemValues = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Example:
    """One item of a task to show: how well it went (1 is best), its texts by what they are, and its numbers."""

    item_id: str
    value: float
    texts: Mapping[str, str]
    numbers: Mapping[str, float] = field(default_factory=dict)


def ends(value_N: ItemValues, count: int = 5) -> list[int]:
    """Places of the lowest and of the highest values, the lowest first; of few values each once."""
    order: list[int] = np.argsort(value_N, kind="stable").tolist()
    return order if len(order) <= 2 * count else order[:count] + order[-count:]


@dataclass(frozen=True)
class TaskResult:
    """Scores of one task, in [0, 1] or [-1, 1]; `metric` names the main one. NaN where a score is undefined.

    `counts`: how many items were scored and how many left out. `items`: one value an item by name (a query's nDCG, a
    pair's similarity), aligned with `item_ids`, for confidence intervals and for looking at single cases.
    `notes`: what a reader of the scores should know. `examples`: the items that went worst and best.
    """

    task: str
    kind: str
    metric: str
    scores: Mapping[str, float]
    counts: Mapping[str, int] = field(default_factory=dict)
    item_ids: Sequence[str] = ()
    items: Mapping[str, ItemValues] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    examples: tuple[Example, ...] = ()

    @property
    def main_score(self) -> float:
        return self.scores[self.metric]

    def as_dict(self, *, items: bool = False) -> dict[str, Any]:
        """Plain values for JSON; an undefined score is `null`."""
        plain: dict[str, Any] = {
            "task": self.task,
            "kind": self.kind,
            "metric": self.metric,
            "main_score": finite_or_none(self.main_score),
            "scores": {name: finite_or_none(value) for name, value in self.scores.items()},
            "counts": dict(self.counts),
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }
        if items:
            plain["item_ids"] = list(self.item_ids)
            plain["items"] = {name: [finite_or_none(value) for value in values] for name, values in self.items.items()}
            plain["examples"] = [
                {
                    "id": example.item_id,
                    "value": finite_or_none(example.value),
                    "texts": dict(example.texts),
                    "numbers": {name: finite_or_none(value) for name, value in example.numbers.items()},
                }
                for example in self.examples
            ]
        return plain

    @staticmethod
    def from_dict(plain: Mapping[str, Any], where: object = None) -> TaskResult:
        """Inverse of `as_dict`. Errors: `EvaluationError` for something else."""
        found = typed(_StoredResult, plain, where, EvaluationError, fix="score the task again: embedsmith evaluate")
        if found.metric not in found.scores:
            raise EvaluationError(f"its scores lack its metric {found.metric!r}", where=where)
        numbers = {name: [_value(value) for value in values] for name, values in found.items.items()}
        examples = (
            Example(one.id, _value(one.value), one.texts, {name: _value(value) for name, value in one.numbers.items()})
            for one in found.examples
        )
        return TaskResult(
            task=found.task,
            kind=found.kind,
            metric=found.metric,
            scores={name: _value(value) for name, value in found.scores.items()},
            counts=found.counts,
            item_ids=found.item_ids,
            items={name: np.array(values) for name, values in numbers.items()},
            notes=found.notes,
            seconds=found.seconds,
            examples=tuple(examples),
        )


@dataclass(frozen=True)
class _StoredExample:
    """An `Example` in JSON, where a number that does not exist is null."""

    id: str
    value: float | None
    texts: dict[str, str]
    numbers: dict[str, float | None]


@dataclass(frozen=True)
class _StoredResult:
    """A `TaskResult` in JSON."""

    task: str
    kind: str
    metric: str
    scores: dict[str, float | None]
    counts: dict[str, int] = field(default_factory=dict)
    item_ids: list[str] = field(default_factory=list)
    items: dict[str, list[float | None]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    examples: list[_StoredExample] = field(default_factory=list)


@dataclass(frozen=True, repr=False)
class Results(Printed, Sequence[TaskResult]):
    """The results of several tasks, in the order they were asked for. `about` describes the model and the run."""

    tasks: tuple[TaskResult, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[TaskResult]:
        return iter(self.tasks)

    def __getitem__(self, key: Any) -> Any:
        """By place, or by the name of a task."""
        if not isinstance(key, str):
            return self.tasks[key]
        for result in self.tasks:
            if result.task == key:
                return result
        raise KeyError(key)

    def main_scores(self) -> dict[str, float]:
        return {result.task: result.main_score for result in self.tasks}

    def as_dict(self, *, items: bool = False) -> dict[str, Any]:
        return {**self.about, "tasks": [result.as_dict(items=items) for result in self.tasks]}

    def to_json(self, *, items: bool = False) -> str:
        return json.dumps(self.as_dict(items=items), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, path: str | Path, *, items: bool = False) -> None:
        """Write JSON; the file appears whole or not at all. It may lie in object storage."""
        with delivered(path, "evaluate") as place:
            if Path(place).is_dir():
                raise EvaluationError("this is a folder", where=path, expected="a file to write JSON to")
            with atomic_file(place) as file:
                file.write(self.to_json(items=items))

    @staticmethod
    def load(path: str | Path) -> Results:
        """Read what `save` wrote. Errors: `EvaluationError` for a file that holds no results."""
        plain = read_json(path, EvaluationError)
        if not isinstance(plain.get("tasks"), list):
            raise EvaluationError("no results", where=path, expected="JSON that `embedsmith evaluate --json` wrote")
        about = {key: value for key, value in plain.items() if key != "tasks"}
        return Results(tuple(TaskResult.from_dict(task, path) for task in plain["tasks"]), about)

    def table(self) -> Table:
        """One row a task: the main score and a few others, times 100."""
        table = Table(title=str(self.about.get("model", "")) or None, title_justify="left")
        for name in ("task", "metric"):
            table.add_column(name)
        for name in ("score", "items", "seconds"):
            table.add_column(name, justify="right")
        table.add_column("also")
        # Metrics of other packages last. Similarities of a dense model are cosines, so those are not repeated.
        added = [form for name in added_metrics() for form in (f"cosine_{name}", name, f"{name}_at_10")]
        for result in self.tasks:
            shown = [name for name in (*_SHOWN, *added) if name in result.scores]
            beside = [name for name in shown if f"cosine_{name}" not in shown]
            also = "  ".join(f"{name} {percent(result.scores[name])}" for name in beside)
            items = str(next(iter(result.counts.values()), len(result.item_ids)))
            cells = (result.task, result.metric, percent(result.main_score), items, f"{result.seconds:.1f}", also)
            table.add_row(*cells)
        return table


_RANKED = ("recall_at_10", "recall_at_100", "mrr_at_10", "map_at_100")
_BY_LENGTH = tuple(f"ndcg_at_10_length_{quarter}" for quarter in range(1, 5))
_SHOWN = ("cosine_pearson", "pearson", *_RANKED, "f1", "ami", *_BY_LENGTH)


def short_names(names: Sequence[str], longest: int = 40) -> tuple[str, ...]:
    """Names of models for a table or a legend: long paths by their ends, where the ends differ."""
    short = tuple(name if len(name) <= longest else "…/" + "/".join(Path(name).parts[-2:]) for name in names)
    return short if len(set(short)) == len(short) else tuple(names)


def percent(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{100 * value:.2f}"


def finite_or_none(value: float) -> float | None:
    """A number as JSON has it: one that does not exist is `null`."""
    return float(value) if math.isfinite(value) else None


def _value(number: float | None) -> float:
    return float("nan") if number is None else float(number)
