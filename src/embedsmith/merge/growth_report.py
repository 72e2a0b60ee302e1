"""Length and direction against the amount of data as charts with fits: figures 3 to 5 of 2410.15035, on own runs."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from embedsmith.evaluate.report.page import Section, chart, table
from embedsmith.merge.explain_growth import Fit, Growth

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
