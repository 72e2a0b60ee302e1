"""Length and direction of task vectors against the amount of data: fits with R^2 and their leave-one-out error.

The two findings of 2410.15035: the length of a task vector grows with its data, and the joint one leans to the larger
data set. The paper's functional form was not readable; both usual ones are fitted, and named.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedsmith.core.errors import RecipeError
from embedsmith.report.page import Section, chart, table

Floats = npt.NDArray[np.float64]
POWER = "|V| = c n^p"
FEWEST = 4
"""Points below which a fit says nothing."""


@dataclass(frozen=True)
class Fit:
    """y = `intercept` + `slope` x in the form's own coordinates.

    `r2` = 1 - SS_res / SS_tot in the units of y itself; `left_out`: root mean square error of each point predicted
    from the others. `conclusive`: at least four points.
    """

    form: str
    slope: float
    intercept: float
    r2: float
    left_out: float
    points: int

    def at(self, x: float) -> float:
        """The fitted value at `x` examples, or at a ratio of them."""
        line = self.intercept + self.slope * math.log(x)
        return math.exp(line) if self.form == POWER else line

    @property
    def conclusive(self) -> bool:
        return self.points >= FEWEST

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "conclusive": self.conclusive}


def fit_norms(examples: Sequence[float], norms: Sequence[float]) -> list[Fit]:
    """|V| = c n^p (ordinary least squares in logarithms) and |V| = a + b log n, n the number of examples.

    Errors: `RecipeError` for fewer than two points, or values that have no logarithm.
    """
    n, y = _checked(examples, norms)
    return [_fit(POWER, np.log(n), y, np.log, np.exp), _fit("|V| = a + b log n", np.log(n), y)]


def fit_directions(ratios: Sequence[float], degrees: Sequence[float]) -> Fit:
    """angle(V_joint, V_i) = a + b log(n_i / n_j), in degrees: b below 0 where the joint vector leans to more data."""
    ratio, y = _checked(ratios, degrees)
    return _fit("angle = a + b log(n_i / n_j)", np.log(ratio), y)


def _checked(x: Sequence[float], y: Sequence[float]) -> tuple[Floats, Floats]:
    if len(x) != len(y) or len(x) < 2:
        raise RecipeError(f"{len(x)} sizes and {len(y)} values", expected="at least two of both")
    if min(x) <= 0 or min(y) <= 0:
        raise RecipeError("sizes and lengths must be above 0")
    if len(set(x)) < 2:
        raise RecipeError("all sizes are the same", expected="runs on different amounts of data")
    return np.asarray(x, np.float64), np.asarray(y, np.float64)


@dataclass(frozen=True)
class Growth:
    """What runs on different amounts of data show. `lengths`: task to (examples, |V|) of runs on that task alone.
    `directions`: task to (n_task / n_others, degrees): how far joint runs point from the longest run on that task."""

    lengths: Mapping[str, Sequence[tuple[float, float]]]
    directions: Mapping[str, Sequence[tuple[float, float]]]

    def length_fits(self) -> dict[str, list[Fit]]:
        """Both forms for every task with runs of at least two sizes."""
        return {task: fit_norms(*zip(*points, strict=True)) for task, points in self.lengths.items() if _spread(points)}

    def direction_fits(self) -> dict[str, Fit]:
        found = self.directions.items()
        return {task: fit_directions(*zip(*points, strict=True)) for task, points in found if _spread(points)}

    def as_dict(self) -> dict[str, Any]:
        lengths = {task: [fit.as_dict() for fit in fits] for task, fits in self.length_fits().items()}
        directions = {task: fit.as_dict() for task, fit in self.direction_fits().items()}
        points = {"lengths": dict(self.lengths), "directions": dict(self.directions)}
        return {**points, "length_fits": lengths, "direction_fits": directions}


def _spread(points: Sequence[tuple[float, float]]) -> bool:
    return len({x for x, _ in points}) > 1


Change = Callable[[Floats], Floats]


def _same(values: Floats) -> Floats:
    return values


def _fit(form: str, x: Floats, y: Floats, to: Change = _same, back: Change = _same) -> Fit:
    """A line through (x, to(y)); errors are measured after `back`."""
    slope, intercept = np.polyfit(x, to(y), 1)
    residual = y - back(intercept + slope * x)
    spread = float(np.square(y - y.mean()).sum())
    r2 = 1 - float(np.square(residual).sum()) / spread if spread > 0 else float("nan")
    return Fit(form, float(slope), float(intercept), r2, _left_out(x, y, to, back), len(x))


def _left_out(x: Floats, y: Floats, to: Change, back: Change) -> float:
    if len(set(x.tolist())) < 3:
        return float("nan")
    errors = []
    for place in range(len(x)):
        keep = np.arange(len(x)) != place
        slope, intercept = np.polyfit(x[keep], to(y[keep]), 1)
        errors.append(y[place] - back(np.asarray(intercept + slope * x[place])))
    return float(np.sqrt(np.mean(np.square(errors))))


# Length and direction against the amount of data as charts with fits: figures 3 to 5 of 2410.15035, on own runs.

_STEPS = 24


def growth_sections(growth: Growth) -> list[Section]:
    """One section for lengths and one for directions; a section without points has no body and is not shown."""
    lengths, directions = growth.length_fits(), {task: [fit] for task, fit in growth.direction_fits().items()}
    return [
        _section("growth", "Length against data", growth.lengths, lengths, "examples", "length of the task vector"),
        _section(
            "direction",
            "Direction against data",
            growth.directions,
            directions,
            "examples of the task / examples of the others",
            "degrees from the run on the task alone",
        ),
    ]


def _section(key: str, title: str, points: Any, fits: Any, x: str, y: str) -> Section:
    if not points:
        return Section(key, title, "")
    traces = [trace for task, own in points.items() for trace in _traces(task, own, fits.get(task, []))]
    rows = [_row(task, fit) for task, own in fits.items() for fit in own]
    head = ["task", "fit", "slope", "R^2", "left-out error", "conclusive"]
    body = chart(traces, title=y, x=x, y=y, xaxis={"type": "log"}) + table(head, rows, numbers_from=2)
    return Section(key, title, body)


def _traces(task: str, points: Sequence[tuple[float, float]], fits: Sequence[Fit]) -> list[dict[str, Any]]:
    """The points of a task, and its best fit as a line."""
    x, y = ([point[axis] for point in points] for axis in (0, 1))
    dots = {"type": "scatter", "mode": "markers", "name": task, "x": x, "y": y}
    if not fits:
        return [dots]
    best = max(fits, key=lambda fit: fit.r2)
    ratio = max(x) / min(x)
    at = [min(x) * ratio ** (step / _STEPS) for step in range(_STEPS + 1)]
    name = f"{best.form}, R^2 {best.r2:.3f}"
    return [dots, {"type": "scatter", "mode": "lines", "name": name, "x": at, "y": [best.at(value) for value in at]}]


def _row(task: str, fit: Fit) -> list[str]:
    told = "yes" if fit.conclusive else "too few points"
    return [html.escape(task), html.escape(fit.form), f"{fit.slope:.4g}", f"{fit.r2:.4f}", f"{fit.left_out:.4g}", told]
