"""What a curation did, as JSON and for a terminal: what left, why, and examples of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from embedsmith.core.shelf import curation_steps
from embedsmith.core.terminal import Printed
from embedsmith.curate.ledger import Departure, Ledger

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
        def frequent_first(departures: Mapping[str, Departure]) -> Left:
            ordered = sorted(departures.items(), key=lambda item: (-item[1].count, item[0]))
            return {reason: {"count": left.count, "examples": left.examples} for reason, left in ordered}

        left, lost = frequent_first(ledger.left), frequent_first(ledger.lost)
        return StepReport(settings, ledger.taken, ledger.given, left, lost, ledger.notes, round(seconds, 2))

    @staticmethod
    def together(passes: Sequence[StepReport]) -> StepReport:
        """Of a step that was several passes, whose reasons differ."""
        left, lost, notes = (
            {name: value for one in passes for name, value in getattr(one, part).items()}
            for part in ("left", "lost", "notes")
        )
        seconds = round(sum(one.seconds for one in passes), 2)
        return StepReport(passes[-1].settings, passes[0].taken, passes[-1].given, left, lost, notes, seconds)

    @property
    def name(self) -> str:
        return str(self.settings["type"])

    def reasons(self) -> str:
        return ", ".join(f"{reason} {left['count']:,}" for reason, left in self.left.items())


@dataclass(frozen=True, repr=False)
class Report(Printed):
    """A whole curation. `key` names recipe and input; `output_bytes` tells whether the output is still this one."""

    key: str
    recipe: dict[str, Any]
    steps: list[StepReport]
    records: int
    output: str
    output_bytes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> RenderableType:
        """A table of the steps, then what left of each with examples."""
        table = Table("step", "in", "out", "left", "texts lost", "seconds", title=self.output, title_justify="left")
        parts: list[RenderableType] = [table]
        for step in self.steps:
            left, lost = (sum(entry["count"] for entry in entries.values()) for entries in (step.left, step.lost))
            table.add_row(
                step.name, f"{step.taken:,}", f"{step.given:,}", f"{left:,}", f"{lost:,}", f"{step.seconds:.1f}"
            )
            for what, entries in (("left", step.left), ("lost", step.lost)):
                if entries:
                    parts.append(_reasons(f"{step.name}: {what}", entries))
            for name, value in step.notes.items():
                if name == "histogram" and value:
                    bars = Table("cosine from", "pairs", "")
                    for edge, count in value.items():
                        length = max(round(40 * count / max(value.values())), 1 if count else 0)
                        bars.add_row(edge, f"{count:,}", "█" * length)
                    parts.append(bars)
                elif value not in ({}, 0):
                    shown = (
                        ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else value
                    )
                    parts.append(Text(f"{step.name}: {name}: {shown}"))
        return Group(*parts, Text(f"{self.records:,} records in {self.output}"))


def _reasons(title: str, entries: Left) -> Table:
    def shown(value: Any) -> str:
        text = " / ".join(map(str, value)) if isinstance(value, list) else str(value)
        return text if len(text) <= 90 else text[:87] + "..."

    table = Table(title, "count", "for example", title_justify="left")
    for reason, entry in entries.items():
        lines = [" | ".join(map(shown, example.values())) for example in entry["examples"][:2]]
        table.add_row(Text(reason), f"{entry['count']:,}", Text("\n".join(lines)))
    return table


def table_of_steps() -> RenderableType:
    """Every step a recipe can name, with its settings and their defaults."""

    def shown(setting: Field[Any]) -> str:
        if setting.default is not MISSING:
            return f"{setting.name}={setting.default}"
        return setting.name if setting.default_factory is MISSING else f"{setting.name}={setting.default_factory()}"

    table = Table("step", "what", "settings", title="steps", title_justify="left")
    for entry in curation_steps.entries():
        table.add_row(Text(entry.name), Text(entry.summary), Text(", ".join(map(shown, fields(entry.thing)))))
    return table
