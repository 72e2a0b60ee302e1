"""What a curation step is, and the ledger it keeps of what left and why.

A step is a frozen dataclass whose fields are its settings. Called with records it yields records, one by one where it
can, and writes into its ledger everything it took away. A step that looks at one record at a time (`PerRecord`), or
only at what makes records alike (`Comparison`), says so, and is divided among processes and machines by whatever engine
runs it; any other is called once, with all records in their order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from embedsmith.core.encoder import Encoder, Reranker, Role
from embedsmith.core.seeds import derive_seed
from embedsmith.curate.keeper import Cache, Purse
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

    An engine sets the rest: `purse`, from which all workers of a step spend, and `caches`, what opens a cache by its
    name where `folder` is on another machine.
    """

    folder: Path | None = None
    encoder: Callable[[str], tuple[Encoder, str]] | None = None
    reranker: Callable[[str], tuple[Reranker, str]] | None = None
    evaluation: Callable[[Sequence[str]], Iterable[EvaluationText]] | None = None
    labels: tuple[str, ...] = ()
    purse: Purse = field(default_factory=Purse)
    caches: Callable[[str], AbstractContextManager[Cache]] | None = None

    def for_a_step(self) -> Tools:
        """With an empty purse, and models that are opened once."""
        encoder = None if self.encoder is None else OpenedOnce(self.encoder)
        reranker = None if self.reranker is None else OpenedOnce(self.reranker)
        return replace(self, encoder=encoder, reranker=reranker, purse=Purse())

    def cache(self, name: str) -> AbstractContextManager[Cache]:
        """What is kept under this name."""
        return Cache.open(self.folder, name) if self.caches is None else self.caches(name)


@dataclass
class OpenedOnce:
    """Opens a model by its name, each once in a process."""

    open: Callable[[str], Any]
    opened: dict[str, Any] = field(default_factory=dict)

    def __call__(self, name: str) -> Any:
        if name not in self.opened:
            self.opened[name] = self.open(name)
        return self.opened[name]


@dataclass
class Departure:
    """What left for one reason: how many, and a fair sample of the different ones among them: those with the lowest
    hashes, whatever the order in which they left and in how many places they were counted."""

    count: int = 0
    sample: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def examples(self) -> list[dict[str, Any]]:
        return [self.sample[rank] for rank in sorted(self.sample)]

    def add(self, texts: Sequence[str], example: Callable[[], dict[str, Any]], why: str, size: int) -> None:
        self.count += 1
        rank = derive_seed(*texts, why)
        if len(self.sample) < size or (size and rank < max(self.sample)):
            self.sample[rank] = example() | ({"why": why} if why else {})
            self._keep(size)

    def merge(self, other: Departure, size: int) -> None:
        self.count += other.count
        self.sample |= other.sample
        self._keep(size)

    def _keep(self, size: int) -> None:
        for rank in sorted(self.sample)[size:]:
            del self.sample[rank]


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

        texts = (record.query, *record.positives[:1])
        self.left.setdefault(reason, Departure()).add(texts, example, why, self.examples)

    def text_lost(self, reason: str, record: Record, text: str, why: str = "") -> None:
        def example() -> dict[str, Any]:
            return {"query": short(record.query), "text": short(text)}

        self.lost.setdefault(reason, Departure()).add((record.query, text), example, why, self.examples)

    def merge(self, other: Ledger) -> None:
        """Count in what another ledger of the same step says of other records. Of the notes, numbers are added up,
        arrays joined, and all else is the other's."""
        self.taken += other.taken
        self.given += other.given
        for mine, others in ((self.left, other.left), (self.lost, other.lost)):
            for reason, departure in others.items():
                mine.setdefault(reason, Departure()).merge(departure, self.examples)
        self.notes = _together(self.notes, other.notes)

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


def _together(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    joined = dict(one)
    for name, value in other.items():
        before = joined.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            joined[name] = _together(before, value)
        elif isinstance(before, int | float | array) and type(before) is type(value):
            joined[name] = before + value  # type: ignore[operator]
        else:
            joined[name] = value
    return joined


class Step(Protocol):
    def __call__(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        """The records that stay, or those made of them. A step that needs two passes says so and reads `records`
        twice: it is given something that can be read again."""
        ...


class PerRecord(ABC):
    """A step that makes of each record what it makes of it whatever stands beside it, so that the records may be cut
    into parts, and each part be dealt with by any process. What must be known before goes through `prepare`.

    `holds_model`: whether it holds a model or asks one. Such a step runs in one process of a machine, and on actors of
    a cluster.
    """

    holds_model: ClassVar[bool] = False

    @property
    def surveyed(self) -> bool:
        """Whether the records are read once before, by `survey`."""
        return False

    def survey(self, records: Iterable[Record], tools: Tools) -> Any:
        """What is to be known of some of the records before any is dealt with."""
        return None

    def prepare(self, ledger: Ledger, tools: Tools, surveys: Sequence[Any]) -> Any:
        """What `over` needs to know, made once: of the surveys of all parts, in their order, and of the tools."""
        return None

    @abstractmethod
    def over(self, records: Iterable[Record], ledger: Ledger, tools: Tools, known: Any) -> Iterator[Record]:
        """The records that stay of some of them, or those made of them."""

    def conclude(self, ledger: Ledger, tools: Tools) -> None:
        """Make of the notes of all parts what the report shows."""
        return None

    def shared(self, workers: int) -> Self:
        """The step as one of so many workers has it."""
        return self

    def __call__(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        tools = tools.for_a_step()
        known = self.prepare(ledger, tools, [self.survey(records, tools)] if self.surveyed else [])
        yield from self.over(records, ledger, tools, known)
        self.conclude(ledger, tools)


class TextRule(PerRecord):
    """A step that looks at one text at a time, whatever stands beside it."""

    @abstractmethod
    def fault(self, text: str, role: Role) -> str | None:
        """Why the text cannot stay, or `None`."""

    def over(self, records: Iterable[Record], ledger: Ledger, tools: Tools, known: Any) -> Iterator[Record]:
        return ledger.sift(records, self.fault)


class Chain(ABC):
    """A step that is several, one after the other."""

    @abstractmethod
    def passes(self) -> tuple[Step, ...]:
        """The steps it is made of."""

    def __call__(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        ledgers = []
        for step in self.passes():
            ledgers.append(Ledger(ledger.examples))
            records = step(records, ledgers[-1], tools)
        yield from records
        ledger.taken += ledgers[0].taken
        for one in ledgers:
            one.taken = 0
            ledger.merge(one)


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
