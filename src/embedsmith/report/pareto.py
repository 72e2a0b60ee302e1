"""The report of a sweep: which of the recipes that were tried no other beats, what they cost each other, and how the
values of each key went with the scores.

Read is `sweep.json`, which a sweep writes after every trial, and the recipes in `best/`.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from embedsmith.core.errors import EvaluationError
from embedsmith.core.inputs import read_typed
from embedsmith.report.page import Section, chart, charts, environment_section, page, table

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class ScoredStep:
    """The objectives of a trial at an evaluation while it trained. `run`: which of a pipeline's runs."""

    run: str
    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class SweepTrial:
    """One recipe that was tried. `changes`: the value of each key that has a range; `values`: of each objective, where
    it is finished; `start`: the same before training; `curve`: while training; `why`: the reason of a failure."""

    number: int
    state: Literal["finished", "pruned", "failed"]
    changes: dict[str, Any]
    values: dict[str, float] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)
    curve: tuple[ScoredStep, ...] = ()
    why: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """What its recipe is called."""
        return f"trial-{self.number:04}"


@dataclass(frozen=True)
class SweepRecord:
    """What `sweep.json` holds. `objectives`: whether each is to be high or low; `ranges`: as the recipe has them."""

    verb: str
    sampler: str
    objectives: dict[str, Literal["high", "low"]]
    ranges: dict[str, str]
    trials: tuple[SweepTrial, ...] = ()

    @staticmethod
    def read(folder: Path) -> "SweepRecord":
        """Errors: `EvaluationError` for a file that is damaged."""
        fix = "put it back, or begin the sweep anew: --overwrite"
        return read_typed(folder / SWEEP_FILE, SweepRecord, EvaluationError, fix=fix)

    def finished(self) -> list[SweepTrial]:
        return [trial for trial in self.trials if trial.state == "finished"]

    def gains(self, trial: SweepTrial) -> list[float]:
        """The objectives of a finished trial, turned so that more is better."""
        return [trial.values[name] * (1 if goal == "high" else -1) for name, goal in self.objectives.items()]

    def front(self) -> list[SweepTrial]:
        """The Pareto front: finished trials that no other equals or beats in every objective and beats in one, the
        best in the first objective first. Of equals the earliest."""
        found, seen = [], set()
        for trial in self.finished():
            own = self.gains(trial)
            beaten = any(
                other != own and all(a >= b for a, b in zip(other, own)) for other in map(self.gains, self.finished())
            )
            if not beaten and tuple(own) not in seen:
                seen.add(tuple(own))
                found.append(trial)
        return sorted(found, key=lambda trial: (-self.gains(trial)[0], trial.number))

    def behind(self, run: str, step: int, curve: Sequence[ScoredStep]) -> bool:
        """Whether a trial with this curve, so far, has in every objective nothing better than the median of what the
        finished trials had up to that step."""
        verdicts = []
        for name, goal in self.objectives.items():
            sign = 1 if goal == "high" else -1

            def best(points: Sequence[ScoredStep], name: str = name, sign: int = sign) -> float | None:
                known = [point for point in points if point.run == run and point.step <= step and name in point.values]
                return max((sign * point.values[name] for point in known), default=None)

            own = best(curve)
            others = sorted(value for trial in self.finished() if (value := best(trial.curve)) is not None)
            if own is not None and others:
                middle = (others[(len(others) - 1) // 2] + others[len(others) // 2]) / 2
                verdicts.append(own < middle)
        return bool(verdicts) and all(verdicts)

    def counts(self) -> str:
        """How many trials ended in which way."""
        ways = {state: sum(trial.state == state for trial in self.trials) for state in ("finished", "pruned", "failed")}
        told = ", ".join(f"{count} {state}" for state, count in ways.items() if count)
        return f"{len(self.trials)} trial{'' if len(self.trials) == 1 else 's'}: {told or 'none is over'}"


def shown_changes(trial: SweepTrial) -> str:
    """The values of a trial's keys in a line."""
    return ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in trial.changes.items())


def sweep_page(folder: Path) -> str:
    """HTML of a sweep's report. Errors: `EvaluationError` for a damaged file; `MissingExtraError` without plotly."""
    record = SweepRecord.read(folder)
    front = record.front()
    sections = [
        _front_section(record, front),
        _recipe_section(record, front, folder),
        Section("keys", "What each key did", charts(_slices(record))),
        _trial_section(record),
        environment_section(None),
    ]
    lead = f"{' and '.join(record.objectives)}, searched by {record.sampler}"
    return page(f"Sweep: {folder.resolve().name}", lead, _sentences(record, front), sections)


def _sentences(record: SweepRecord, front: Sequence[SweepTrial]) -> list[str]:
    words = [f"{html.escape(record.counts())}."]
    if len(front) > 1:
        words.append(
            f"<b>{len(front)} recipes</b> are beaten by no other in every objective: whoever wants more of one gives up"
            " some of another."
        )
    for name, goal in record.objectives.items() if front else ():
        best = max(front, key=lambda trial: trial.values[name] * (1 if goal == "high" else -1))
        start = f" ({100 * best.start[name]:.2f} before training)" if goal == "high" and name in best.start else ""
        value = f"{100 * best.values[name]:.2f}{start}"
        words.append(
            f"<b>{html.escape(name)}</b>: {'highest' if goal == 'high' else 'lowest'} in trial {best.number}, {value}."
        )
    if front:
        words.append(
            "The winner of many trials is partly lucky: score it on data that the sweep did not see before you believe"
            " its lead."
        )
    return words


def _front_section(record: SweepRecord, front: Sequence[SweepTrial]) -> Section:
    """A chart for every two objectives, or for the only one over the trials."""
    numbers = {trial.number for trial in front}
    groups = {
        "on the front": sorted(front, key=lambda trial: trial.values[next(iter(record.objectives))]),
        "beaten": [trial for trial in record.finished() if trial.number not in numbers],
    }
    figures = []
    for x, y in combinations(record.objectives, 2):
        traces = [_points(name, trials, x, y) for name, trials in groups.items() if trials]
        started = [trial.start for trial in record.finished() if {x, y} <= trial.start.keys()][:1]
        at = {"type": "scatter", "mode": "markers", "name": "before training", "marker": {"size": 11, "symbol": "x"}}
        traces += [{**at, "x": [100 * each[x]], "y": [100 * each[y]]} for each in started]
        figures.append(chart(traces, title=f"{y} against {x}", x=_axis(record, x), y=_axis(record, y), height=420))
    for name in record.objectives if len(record.objectives) == 1 else ():
        traces = [_points(group, trials, None, name) for group, trials in groups.items() if trials]
        figures.append(chart(traces, title=f"{name} of each trial", x="trial", y=_axis(record, name), height=380))
    return Section("front", "What can be had together", charts(figures) if record.finished() else "")


def _axis(record: SweepRecord, name: str) -> str:
    return f"{name} × 100 ({record.objectives[name]} is good)"


def _points(name: str, trials: Sequence[SweepTrial], x: str | None, y: str) -> dict[str, Any]:
    """A marker a trial; what it changed is shown where the mouse is."""
    joined = name == "on the front" and x is not None and len(trials) > 1
    return {
        "type": "scatter",
        "mode": "lines+markers" if joined else "markers",
        "name": name,
        "marker": {"size": 9},
        "x": [trial.number if x is None else 100 * trial.values[x] for trial in trials],
        "y": [100 * trial.values[y] for trial in trials],
        "text": [html.escape(f"trial {trial.number}: {shown_changes(trial)}") for trial in trials],
        "hovertemplate": "%{text}<br>%{x:.2f}, %{y:.2f}<extra></extra>",
    }


def _recipe_section(record: SweepRecord, front: Sequence[SweepTrial], folder: Path) -> Section:
    """A row for each trial of the front, and below them their recipes."""
    head = ("trial", *record.objectives, *record.ranges)
    body = table(head, [_row(record, trial) for trial in front], numbers_from=1)
    for trial in front:
        file = folder / "best" / f"{trial.name}.yaml"
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        title = f"The recipe of trial {trial.number}: embedsmith {record.verb} {file}"
        code = f"<pre><code>{html.escape(text)}</code></pre>"
        body += f"<details><summary>{html.escape(title)}</summary>{code}</details>"
    return Section("recipes", "The best recipes", body if front else "")


def _row(record: SweepRecord, trial: SweepTrial) -> list[str]:
    values = [f"{100 * trial.values[name]:.2f}" if name in trial.values else "" for name in record.objectives]
    changes = [html.escape(json.dumps(trial.changes.get(name), ensure_ascii=False)) for name in record.ranges]
    return [str(trial.number), *values, *changes]


def _slices(record: SweepRecord) -> list[str]:
    """Of every key and objective a chart of the finished trials."""
    figures = []
    for key, given in record.ranges.items():
        for name in record.objectives if record.finished() else ():
            values = [trial.changes[key] for trial in record.finished()]
            plain = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
            x = values if plain else [json.dumps(value, ensure_ascii=False)[:60] for value in values]
            trace = _points("finished", record.finished(), None, name) | {"x": x, "showlegend": False}
            trace["hovertemplate"] = "%{text}<br>%{y:.2f}<extra></extra>"
            axis = {"type": "log" if given.startswith("{log") else "linear" if plain else "category"}
            figures.append(chart([trace], title=f"{name} by {key}", x=key, y=_axis(record, name), xaxis=axis))
    return figures


def _trial_section(record: SweepRecord) -> Section:
    rows = []
    for trial in record.trials:
        how = f"{trial.state}: {trial.why}" if trial.why else trial.state
        rows.append([*_row(record, trial), f"{trial.seconds:,.0f}", html.escape(how)])
    head = ("trial", *record.objectives, *record.ranges, "seconds", "how it ended")
    return Section("trials", "All trials", table(head, rows, 1, len(head) - 1))
