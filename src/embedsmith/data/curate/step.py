"""What a curation step is, and the book it keeps of what left and why.

A step is a frozen dataclass whose fields are its settings. Called with records it yields records, one by one where it
can, and writes into its ledger everything it took away.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from embedsmith.core.encoder import Encoder, Role
from embedsmith.core.errors import RecipeError
from embedsmith.core.seeds import derive_seed
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
