"""Is one model better than another? Differences of main scores, with confidence from a paired bootstrap."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt
from rich.table import Table

from embedsmith.core.errors import EvaluationError
from embedsmith.core.terminal import Printed
from embedsmith.evaluate.metrics import Floats, average_precision
from embedsmith.evaluate.result import Results, TaskResult, finite_or_none, percent, short_names

SAMPLES = 1000
_BLOCK = 2**22  # numbers resampled at once


@dataclass(frozen=True)
class Interval:
    """A value, and the bounds between which it lies in `level` of the resamples."""

    value: float
    low: float
    high: float

    @classmethod
    def within(cls, value: float, value_B: Floats, level: float) -> Self:
        """Of resampled values; unknown (NaN) where none of them is finite."""
        finite = value_B[np.isfinite(value_B)]
        if len(finite) == 0:
            return cls(value, float("nan"), float("nan"))
        low, high = np.quantile(finite, ((1 - level) / 2, (1 + level) / 2))
        return cls(value, float(low), float(high))

    @classmethod
    def of(cls, result: TaskResult, *, samples: int = SAMPLES, level: float = 0.95, seed: int = 0) -> Self:
        """A main score with its bootstrap percentile interval over items (queries, pairs, texts)."""
        value_B = resampled(result, _choices(result, samples, seed)) if result.items else np.zeros(0)
        return cls.within(result.main_score, value_B, level)


@dataclass(frozen=True)
class Difference:
    """Main score of one model minus that of another on one task.

    `p_value`: twice the share of resamples on the other side of zero, at least 1 / (samples + 1). `items`: how many
    items were resampled; 0 where there were none to pair, and the interval is unknown (NaN).
    """

    task: str
    metric: str
    interval: Interval
    p_value: float
    items: int

    @classmethod
    def of(
        cls, new: TaskResult, old: TaskResult, *, samples: int = SAMPLES, level: float = 0.95, seed: int = 0
    ) -> Self:
        """`new` minus `old` on one task: both are scored on the same resamples of its items (paired bootstrap, Efron
        and Tibshirani 1993, as used for retrieval by Sakai 2006).

        Errors: `EvaluationError` for results of different tasks, metrics or items.
        """
        if (new.task, new.metric) != (old.task, old.metric):
            raise EvaluationError(f"{new.task} ({new.metric}) and {old.task} ({old.metric}) are not the same task")
        gap = new.main_score - old.main_score
        if not new.items or not old.items:
            return cls(new.task, new.metric, Interval(gap, float("nan"), float("nan")), float("nan"), 0)
        if list(new.item_ids) != list(old.item_ids):
            fix = "score both models again"
            raise EvaluationError("the two results are of different items", where=new.task, fix=fix)
        choice_BN = _choices(new, samples, seed)
        gap_B = resampled(new, choice_BN) - resampled(old, choice_BN)
        gap_B = gap_B[np.isfinite(gap_B)]
        p_value = float("nan") if len(gap_B) == 0 else 1.0
        if gap_B.any():
            least = min(int((gap_B <= 0).sum()), int((gap_B >= 0).sum()))
            p_value = min(1.0, 2 * (least + 1) / (len(gap_B) + 1))
        return cls(new.task, new.metric, Interval.within(gap, gap_B, level), p_value, choice_BN.shape[1])

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval.low > 0 or self.interval.high < 0

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        values = {"difference": self.interval.value, "low": self.interval.low, "high": self.interval.high}
        numbers = {name: finite_or_none(value) for name, value in {**values, "p": self.p_value}.items()}
        return {"task": self.task, "metric": self.metric, **numbers, "items": self.items}

    def __str__(self) -> str:
        low, high = (f"{100 * bound:+.2f}" for bound in (self.interval.low, self.interval.high))
        bounds = "" if self.items == 0 else f" ({low} to {high}){'*' if self.clear else ''}"
        return f"{100 * self.interval.value:+.2f}{bounds}"


Statistic = Callable[[Mapping[str, npt.NDArray[np.float64]]], Floats]
"""Items [B, N] of B resamples to the main score of each, [B]."""


def statistic_of(result: TaskResult) -> tuple[tuple[str, ...], Statistic]:
    """Which items the main score is made of, and how.

    Rankings, classification and clustering are means over items; correlations and average precision are computed anew
    on every resample.
    """
    metric = result.metric
    if metric in result.items:
        return (metric,), lambda items: items[metric].mean(axis=1)
    column = "cosine" if metric.startswith("cosine_") else "similarity"
    if metric.endswith("spearman"):
        return (column, "score"), lambda items: spearman_rows(items[column], items["score"])
    if metric.endswith("ap"):

        def precisions(items: Mapping[str, Floats]) -> Floats:
            rows = zip(items[column], items["label"].astype(np.int64), strict=True)
            return np.array([average_precision(s, label) if label.any() else np.nan for s, label in rows])

        return (column, "label"), precisions
    raise EvaluationError(f"{metric!r} has no values of single items", where=result.task)


def spearman_rows(left_BN: Floats, right_BN: Floats) -> Floats:
    """Spearman's correlation of every row; NaN where a side is constant."""
    from scipy.stats import rankdata

    left, right = (rankdata(side, axis=1) for side in (left_BN, right_BN))
    left, right = (side - side.mean(axis=1, keepdims=True) for side in (left, right))
    norm_B = np.sqrt(np.square(left).sum(axis=1) * np.square(right).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        value_B: Floats = (left * right).sum(axis=1) / norm_B
    return value_B


def resampled(result: TaskResult, choice_BN: npt.NDArray[np.int64]) -> Floats:
    """The main score on every resample of items."""
    names, statistic = statistic_of(result)
    step = max(_BLOCK // choice_BN.shape[1], 1)
    blocks = (choice_BN[start : start + step] for start in range(0, len(choice_BN), step))
    return np.concatenate([statistic({name: result.items[name][rows] for name in names}) for rows in blocks])


def _choices(result: TaskResult, samples: int, seed: int) -> npt.NDArray[np.int64]:
    """Items of every resample, [B, N]."""
    count = len(result.items[statistic_of(result)[0][0]])
    return np.random.default_rng(seed).integers(0, count, (samples, count))


@dataclass(frozen=True, repr=False)
class Comparison(Printed):
    """Results of several models on the same tasks; the first model is the one the others are measured against."""

    models: tuple[str, ...]
    results: tuple[Results, ...]

    def __post_init__(self) -> None:
        if len(self.models) != len(self.results) or not self.models:
            raise EvaluationError(f"{len(self.models)} models and {len(self.results)} results")
        if len(set(self.models)) < len(self.models):
            raise EvaluationError("two models have the same name", fix="give each model once")
        for name, results in zip(self.models, self.results):
            if [each.task for each in results] != [each.task for each in self.results[0]]:
                raise EvaluationError(f"{name} was scored on other tasks than {self.models[0]}")

    @classmethod
    def of(cls, models: Sequence[tuple[str, Results]]) -> Self:
        """Names and results, the one to measure against first."""
        return cls(tuple(name for name, _ in models), tuple(results for _, results in models))

    def short(self) -> Self:
        """The same with the ends of long paths for names, where the ends differ."""
        return replace(self, models=short_names(self.models))

    def tasks(self) -> list[str]:
        return [result.task for result in self.results[0]]

    def differences(self, model: int) -> list[Difference]:
        """Of one model to the first, task by task."""
        return [Difference.of(new, old) for new, old in zip(self.results[model], self.results[0], strict=True)]

    def means(self) -> list[float]:
        """The mean main score of each model."""
        return [float(np.mean(list(results.main_scores().values()))) for results in self.results]

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        gaps = {name: self.differences(place) for place, name in enumerate(self.models) if place > 0}
        return {
            "baseline": self.models[0],
            "scores": {name: results.main_scores() for name, results in zip(self.models, self.results)},
            "means": dict(zip(self.models, self.means())),
            "differences": {name: [each.as_dict() for each in rows] for name, rows in gaps.items()},
        }

    def table(self) -> Table:
        """One row a task: every model's main score, and its difference to the first with the bounds of 95 %."""
        names = self.short().models
        table = Table(title=f"against {names[0]}; * marks an interval of 95 % without zero", title_justify="left")
        table.add_column("task")
        table.add_column("metric", overflow="fold")
        for name in names:
            table.add_column(name, justify="right", overflow="fold")
        gaps = [self.differences(place) for place in range(1, len(self.models))]
        for row, task in enumerate(self.tasks()):
            scores = [results[row] for results in self.results]
            cells = [percent(scores[0].main_score)]
            cells += [f"{percent(each.main_score)}  {gap[row]}" for each, gap in zip(scores[1:], gaps)]
            table.add_row(task, scores[0].metric, *cells)
        if len(self.tasks()) > 1:
            table.add_row("mean", "", *(percent(mean) for mean in self.means()))
        return table
