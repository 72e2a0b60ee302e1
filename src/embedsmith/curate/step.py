"""What a curation step is, and the book it keeps of what left and why.

A step is a frozen dataclass whose fields are its settings. Called with records it yields records, one by one where it
can, and writes into its ledger everything it took away.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from embedsmith.core.encoder import Encoder, Role
from embedsmith.core.errors import RecipeError
from embedsmith.core.seeds import derive_seed
from embedsmith.core.shelf import curation_steps
from embedsmith.data.record import Record, Scores

T = TypeVar("T")
Fault = Callable[[str, Role], str | None]
"""Says why a text cannot stay, or `None`."""


@dataclass(frozen=True)
class EvaluationText:
    """A text of an evaluation set: which set, and whether it is a query (or a text of a pair) or a document."""

    text: str
    task: str
    role: Role


@dataclass(frozen=True)
class Tools:
    """What steps may need from outside the room. The command line fills it; from Python, give what your steps use.

    `folder` holds caches (`None`: they live in memory and end with the process); `encoder` turns a model's name into
    the model and a key that changes when the model does; `evaluation` yields the texts of evaluation sets by name;
    `labels` are the names of the classes, where the records' file names them.
    """

    folder: Path | None = None
    encoder: Callable[[str], tuple[Encoder, str]] | None = None
    evaluation: Callable[[Sequence[str]], Iterable[EvaluationText]] | None = None
    labels: tuple[str, ...] = ()


@dataclass
class Departure:
    """What left for one reason: how many, and a fair sample of them (reservoir sampling, always the same)."""

    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, example: Callable[[], dict[str, Any]], keep: int) -> None:
        self.count += 1
        if len(self.examples) < keep:
            self.examples.append(example())
        elif (place := random.Random(derive_seed(self.count)).randrange(self.count)) < keep:
            self.examples[place] = example()


@dataclass
class Ledger:
    """The book of one step. `left`: records, by reason; `lost`: single positives or negatives of records that stay,
    by reason; `notes`: whatever else the step has to say (a histogram, what was spent)."""

    examples: int = 5
    taken: int = 0
    given: int = 0
    left: dict[str, Departure] = field(default_factory=dict)
    lost: dict[str, Departure] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def record_left(self, reason: str, record: Record, why: str = "") -> None:
        def example() -> dict[str, Any]:
            shown = {"query": short(record.query), "positives": [short(text) for text in record.positives[:2]]}
            return shown | ({"why": why} if why else {})

        self.left.setdefault(reason, Departure()).add(example, self.examples)

    def text_lost(self, reason: str, record: Record, text: str, why: str = "") -> None:
        def example() -> dict[str, Any]:
            return {"query": short(record.query), "text": short(text)} | ({"why": why} if why else {})

        self.lost.setdefault(reason, Departure()).add(example, self.examples)


class Step(Protocol):
    def __call__(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        """The records that stay, or those made of them. A step that must look twice says so and reads `records` twice:
        whoever runs steps hands them something that can be read again."""
        ...


def apply(step: Step, records: Iterable[Record], tools: Tools | None = None) -> tuple[list[Record], Ledger]:
    """Run one step over records in memory."""
    ledger = Ledger()
    kept = list(booked(step, list(records), ledger, tools or Tools()))
    return kept, ledger


def booked(step: Step, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
    """The step's records, counted in its ledger."""
    for record in step(records, ledger, tools):
        ledger.given += 1
        yield record


def sift(records: Iterable[Record], ledger: Ledger, fault: Fault) -> Iterator[Record]:
    """Records without the texts that have a fault: a faulty query takes its record along, a positive or negative only
    itself; a record whose positives are all gone leaves."""
    for record in records:
        ledger.taken += 1
        kept = sifted(record, ledger, fault)
        if kept is not None:
            yield kept


def sifted(record: Record, ledger: Ledger, fault: Fault) -> Record | None:
    if record.query and (reason := fault(record.query, "query")):
        ledger.record_left(f"query: {reason}", record)
        return None
    positives = [fault(text, "document") for text in record.positives]
    negatives = [fault(text, "document") for text in record.negatives]
    return without(record, positives, negatives, ledger)


def without(
    record: Record, positives: Sequence[str | None], negatives: Sequence[str | None], ledger: Ledger
) -> Record | None:
    """The record without the texts for which a reason is given; `None`, and booked, if no positive is left of some."""
    if not any(positives) and not any(negatives):
        return record
    if record.positives and all(positives):
        ledger.record_left(f"positive: {positives[0]}", record)
        return None
    for role, texts, reasons in (
        ("positive", record.positives, positives),
        ("negative", record.negatives, negatives),
    ):
        for text, reason in zip(texts, reasons, strict=True):
            if reason:
                ledger.text_lost(f"{role}: {reason}", record, text)
    return select(record, _places(positives), _places(negatives))


def _places(reasons: Sequence[str | None]) -> list[int]:
    return [place for place, reason in enumerate(reasons) if not reason]


def select(record: Record, positives: Sequence[int], negatives: Sequence[int]) -> Record:
    """The record with only the named positives and negatives, their scores beside them."""
    return replace(
        record,
        positives=tuple(record.positives[place] for place in positives),
        negatives=tuple(record.negatives[place] for place in negatives),
        positive_scores=_chosen(record.positive_scores, positives),
        negative_scores=_chosen(record.negative_scores, negatives),
        teacher_positive_scores=_chosen(record.teacher_positive_scores, positives),
        teacher_negative_scores=_chosen(record.teacher_negative_scores, negatives),
    )


def _chosen(scores: Scores | None, places: Sequence[int]) -> Scores | None:
    return None if scores is None else tuple(scores[place] for place in places) or None


def in_windows(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` successive items; the last may be shorter."""
    rest = iter(items)
    while window := list(islice(rest, size)):
        yield window


def short(text: str, length: int = 200) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 3] + "..."


def check_range(name: str, value: float | None, low: float, high: float) -> None:
    """Raise `RecipeError` for a setting outside [low, high]."""
    if value is not None and not low <= value <= high:
        raise RecipeError(f"{name} is {value}", expected=f"a number from {low:g} to {high:g}")


# What a curation did, as JSON and for a terminal: what left, why, and examples of it.

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
        settings = ", ".join(_setting(f) for f in fields(entry.thing))
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
