"""What a curation did, as JSON and for a terminal: what left, why, and examples of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from embedsmith.core.registry import curation_steps
from embedsmith.data.curate.step import Departure, Ledger

Left = dict[str, dict[str, Any]]
"""Reason to `count` and `examples`."""


@dataclass(frozen=True)
class StepReport:
    """One step: its settings, records in and out, what left for which reason, single texts lost by records that stay,
    and what else it noted."""

    settings: dict[str, Any]
    taken: int
    given: int
    left: Left
    lost: Left
    notes: dict[str, Any]
    seconds: float

    @staticmethod
    def of(settings: dict[str, Any], ledger: Ledger, seconds: float) -> StepReport:
        return StepReport(
            settings,
            ledger.taken,
            ledger.given,
            _sorted(ledger.left),
            _sorted(ledger.lost),
            ledger.notes,
            round(seconds, 2),
        )

    @property
    def name(self) -> str:
        return str(self.settings["type"])

    def reasons(self) -> str:
        return ", ".join(f"{reason} {left['count']:,}" for reason, left in self.left.items())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _sorted(departures: Mapping[str, Departure]) -> Left:
    """The most frequent reason first."""
    ordered = sorted(departures.items(), key=lambda item: (-item[1].count, item[0]))
    return {reason: {"count": left.count, "examples": left.examples} for reason, left in ordered}


@dataclass(frozen=True)
class Report:
    """A whole curation. `key` names recipe and input; `output_bytes` tells whether the output is still this one."""

    key: str
    recipe: dict[str, Any]
    steps: list[StepReport]
    records: int
    output: str
    output_bytes: int
    seconds: float

    @staticmethod
    def of(tree: Mapping[str, Any]) -> Report:
        """Inverse of `as_dict`."""
        return Report(**{**tree, "steps": [StepReport(**step) for step in tree["steps"]]})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def render(report: Report) -> RenderableType:
    """A table of the steps, then what left of each with examples."""
    table = Table("step", "in", "out", "left", "texts lost", "seconds", title=report.output, title_justify="left")
    for step in report.steps:
        left, lost = (sum(entry["count"] for entry in entries.values()) for entries in (step.left, step.lost))
        table.add_row(step.name, f"{step.taken:,}", f"{step.given:,}", f"{left:,}", f"{lost:,}", f"{step.seconds:.1f}")
    parts: list[RenderableType] = [table]
    for step in report.steps:
        parts += [
            _reasons(step.name, what, entries)
            for what, entries in (("left", step.left), ("lost", step.lost))
            if entries
        ]
        parts += [_note(step.name, name, value) for name, value in step.notes.items() if value not in ({}, 0)]
    return Group(*parts, Text(f"{report.records:,} records in {report.output}"))


def table_of_steps() -> RenderableType:
    """Every step a recipe can name, with its settings and their defaults."""
    table = Table("step", "what", "settings", title="steps", title_justify="left")
    for entry in curation_steps.entries():
        settings = ", ".join(_setting(f) for f in fields(entry.cls))
        table.add_row(Text(entry.name), Text(entry.summary), Text(settings))
    return table


def _setting(setting: Field[Any]) -> str:
    if setting.default is not MISSING:
        return f"{setting.name}={setting.default}"
    return setting.name if setting.default_factory is MISSING else f"{setting.name}={setting.default_factory()}"


def _reasons(step: str, what: str, entries: Left) -> Table:
    table = Table(f"{step}: {what}", "count", "for example", title_justify="left")
    for reason, entry in entries.items():
        lines = [" | ".join(_shown(value) for value in example.values()) for example in entry["examples"][:2]]
        table.add_row(Text(reason), f"{entry['count']:,}", Text("\n".join(lines)))
    return table


def _shown(value: Any) -> str:
    text = " / ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 90 else text[:87] + "..."


def _note(step: str, name: str, value: Any) -> RenderableType:
    """A histogram as bars, anything else as a line."""
    if name != "histogram":
        shown = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
        return Text(f"{step}: {name}: {shown}")
    table = Table("cosine from", "pairs", "")
    top = max(value.values())
    for edge, count in value.items():
        table.add_row(edge, f"{count:,}", "█" * max(round(40 * count / top), 1 if count else 0))
    return table
