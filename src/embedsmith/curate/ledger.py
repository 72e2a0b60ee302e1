"""What a curation step is, and the ledger it keeps of what left and why.

A step is a frozen dataclass whose fields are its settings. Called with records it yields records, one by one where it
can, and writes into its ledger everything it took away.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from embedsmith.core.encoder import Encoder, Role
from embedsmith.core.reranker import Reranker
from embedsmith.core.seeds import derive_seed
from embedsmith.data.record import Record

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
    the model and a key that changes when the model does, `reranker` that of a reranker; `evaluation` yields the texts
    of evaluation sets by name; `labels` are the names of the classes, where the records' file names them.
    """

    folder: Path | None = None
    encoder: Callable[[str], tuple[Encoder, str]] | None = None
    reranker: Callable[[str], tuple[Reranker, str]] | None = None
    evaluation: Callable[[Sequence[str]], Iterable[EvaluationText]] | None = None
    labels: tuple[str, ...] = ()


@dataclass
class Departure:
    """What left for one reason: how many, and a fair sample of them (reservoir sampling, always the same)."""

    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, example: Callable[[], dict[str, Any]], why: str, size: int) -> None:
        self.count += 1
        place = self.count - 1
        if place >= size:
            place = random.Random(derive_seed(self.count)).randrange(self.count)
        if place < size:
            self.examples[place : place + 1] = [example() | ({"why": why} if why else {})]


@dataclass
class Ledger:
    """What one step did. `left`: records, by reason; `lost`: single positives or negatives of records that stay, by
    reason; `notes`: whatever else the step has to say (a histogram, what was spent); `examples`: how many of those that
    left are shown for each reason."""

    examples: int = 5
    taken: int = 0
    given: int = 0
    left: dict[str, Departure] = field(default_factory=dict)
    lost: dict[str, Departure] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def record_left(self, reason: str, record: Record, why: str = "") -> None:
        def example() -> dict[str, Any]:
            return {"query": short(record.query), "positives": [short(text) for text in record.positives[:2]]}

        self.left.setdefault(reason, Departure()).add(example, why, self.examples)

    def text_lost(self, reason: str, record: Record, text: str, why: str = "") -> None:
        def example() -> dict[str, Any]:
            return {"query": short(record.query), "text": short(text)}

        self.lost.setdefault(reason, Departure()).add(example, why, self.examples)

    def sift(self, records: Iterable[Record], fault: Fault) -> Iterator[Record]:
        """Records without the texts that have a fault: a faulty query takes its record along, a positive or negative
        only itself; a record whose positives are all gone leaves."""
        for record in records:
            self.taken += 1
            if record.query and (reason := fault(record.query, "query")):
                self.record_left(f"query: {reason}", record)
                continue
            positives = [fault(text, "document") for text in record.positives]
            negatives = [fault(text, "document") for text in record.negatives]
            if (left := self.without(record, positives, negatives)) is not None:
                yield left

    def without(
        self, record: Record, positives: Sequence[str | None], negatives: Sequence[str | None]
    ) -> Record | None:
        """The record without the texts for which a reason is given, nor their scores; `None`, which is counted here,
        if no positive is left of some."""
        if not any(positives) and not any(negatives):
            return record
        if record.positives and all(positives):
            self.record_left(f"positive: {positives[0]}", record)
            return None
        changes: dict[str, Any] = {}
        for role, reasons in (("positive", positives), ("negative", negatives)):
            texts = getattr(record, f"{role}s")
            places = [place for place, reason in enumerate(reasons) if not reason]
            for text, reason in zip(texts, reasons, strict=True):
                if reason:
                    self.text_lost(f"{role}: {reason}", record, text)
            changes[f"{role}s"] = tuple(texts[place] for place in places)
            for name in (f"{role}_scores", f"teacher_{role}_scores"):
                scores = getattr(record, name)
                changes[name] = None if scores is None else tuple(scores[place] for place in places) or None
        return replace(record, **changes)


class Step(Protocol):
    def __call__(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        """The records that stay, or those made of them. A step that needs two passes says so and reads `records`
        twice: it is given something that can be read again."""
        ...


class TextRule(ABC):
    """A step that looks at one text at a time, whatever stands beside it."""

    @abstractmethod
    def fault(self, text: str, role: Role) -> str | None:
        """Why the text cannot stay, or `None`."""

    def __call__(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        return ledger.sift(records, self.fault)


def apply(step: Step, records: Iterable[Record], tools: Tools | None = None) -> tuple[list[Record], Ledger]:
    """Run one step over records in memory."""
    ledger = Ledger()
    kept = list(step(list(records), ledger, tools or Tools()))
    ledger.given = len(kept)
    return kept, ledger


def short(text: str, length: int = 200) -> str:
    """On one line, and cut where it is longer."""
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 3] + "..."
