"""What each pass of a curation gave, on the disk: parts of so many records, and a manifest that is written last. Every
engine writes the same parts with the same bytes, so one goes on where another was stopped.
"""

from __future__ import annotations

import gzip
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from embedsmith.core.errors import DataError
from embedsmith.core.files import atomic_file
from embedsmith.core.inputs import read_typed
from embedsmith.core.outputs import discard
from embedsmith.curate.comparing import ComparingStep, Keys, Places
from embedsmith.curate.ledger import Ledger, PerRecord, Tools
from embedsmith.curate.outcome import StepReport
from embedsmith.data.record import Record, RowError, validate
from embedsmith.data.writers import write_records

PART = 10_000
"""Records of a part, as they were read; steps make of each part another, which may hold fewer or more."""

T = TypeVar("T", covariant=True)
Advance = Callable[[int], None]
"""Is told of records as they are dealt with."""


@dataclass(frozen=True)
class PartsManifest:
    """What is written when all parts of a stage are there: the report, and the size of each part in bytes."""

    report: StepReport
    sizes: list[int]


@dataclass(frozen=True)
class StageParts:
    """The parts of one pass."""

    folder: Path
    ending: str = ".jsonl"

    def part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}{self.ending}"

    @property
    def manifest_path(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.json")

    def manifest(self) -> PartsManifest | None:
        """That of a finished stage whose parts are all as they were written."""
        try:
            known = read_typed(self.manifest_path, PartsManifest)
            sizes = [self.part(number).stat().st_size for number in range(len(known.sizes))]
            return known if sizes == known.sizes else None
        except (DataError, OSError):
            return None

    def clear(self) -> None:
        """Remove what a stopped run left of it."""
        self.manifest_path.unlink(missing_ok=True)
        discard(self.folder)
        self.folder.mkdir(parents=True)

    def finish(self, report: StepReport, count: int) -> PartsManifest:
        manifest = PartsManifest(report, [self.part(number).stat().st_size for number in range(count)])
        with atomic_file(self.manifest_path) as file:
            json.dump(asdict(manifest), file, ensure_ascii=False)
        return manifest

    def records(self, number: int, advance: Advance) -> Counted:
        return Counted(self, number, advance)

    def lines(self, number: int) -> Iterator[bytes]:
        """Errors: `DataError` where the part is not to be seen from here."""
        path = self.part(number)
        try:
            with path.open("rb") as file:
                yield from file
        except FileNotFoundError as error:
            raise DataError(
                "a part of the curation is not there",
                where=path,
                fix="on several machines, set work to a folder that all of them share; else run the command again",
            ) from error


@dataclass(frozen=True)
class Counted:
    """The records of a part, which can be read again."""

    stage: StageParts
    number: int
    advance: Advance

    def __iter__(self) -> Iterator[Record]:
        for line in self.stage.lines(self.number):
            yield record_of(line, self.stage.part(self.number))
            self.advance(1)


def record_of(line: bytes, path: Path) -> Record:
    """Of a line that `write_records` wrote."""
    try:
        row = json.loads(line).items()
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row}
        return Record(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError("a damaged stage file", where=path, fix="delete it and run again") from error


class PartWork(ABC, Generic[T]):
    """Something that is done with each part, by whatever process. A work can be pickled."""

    @abstractmethod
    def __call__(self, number: int, advance: Advance) -> T:
        """`advance` is told of each record that is read. Errors: those of the step."""


@dataclass(frozen=True)
class Survey(PartWork[Any]):
    """A step's first look at a part."""

    step: PerRecord
    source: StageParts
    tools: Tools

    def __call__(self, number: int, advance: Advance) -> Any:
        return self.step.survey(self.source.records(number, advance), self.tools)


@dataclass(frozen=True)
class StepRun(PartWork[Ledger]):
    """A step over a part: the part that it makes, and its ledger. `known`: what the step prepared."""

    step: PerRecord
    source: StageParts
    target: StageParts
    tools: Tools
    known: Any
    examples: int

    def __call__(self, number: int, advance: Advance) -> Ledger:
        ledger = Ledger(self.examples)
        records = self.source.records(number, advance)
        ledger.given = write_records(self.target.part(number), self.step.over(records, ledger, self.tools, self.known))
        return ledger


@dataclass(frozen=True)
class Sketches(PartWork[list[Any]]):
    """What is compared in place of the records of a part."""

    comparison: ComparingStep
    source: StageParts

    def __call__(self, number: int, advance: Advance) -> list[Any]:
        return [self.comparison.sketch(record) for record in self.source.records(number, advance)]


@dataclass(frozen=True)
class Drop(PartWork[Ledger]):
    """A part without some of its records. `leaving`: of a part, the lines that leave and what each is like."""

    comparison: ComparingStep
    source: StageParts
    target: StageParts
    leaving: Callable[[int], Mapping[int, str]]
    examples: int

    def __call__(self, number: int, advance: Advance) -> Ledger:
        ledger, leaving = Ledger(self.examples), self.leaving(number)
        with atomic_file(self.target.part(number), "wb") as file:
            for place, line in enumerate(self.source.lines(number)):
                ledger.taken += 1
                if (like := leaving.get(place)) is None:
                    file.write(line)
                    ledger.given += 1
                else:
                    self.comparison.leave(record_of(line, self.source.part(number)), like, ledger)
        return ledger


@dataclass(frozen=True)
class RecordCheck(PartWork[Ledger]):
    """A part as the output has it: without what cannot be trained on, compressed where its name says so."""

    source: StageParts
    target: StageParts
    examples: int

    def __call__(self, number: int, advance: Advance) -> Ledger:
        ledger, sound = Ledger(self.examples), bytearray()
        for line in self.source.lines(number):
            ledger.taken += 1
            advance(1)
            record = record_of(line, self.source.part(number))
            try:
                validate(record)
            except RowError as error:
                ledger.record_left(error.kind, record)
                continue
            sound += line
            ledger.given += 1
        zipped = self.target.ending.endswith(".gz")
        with atomic_file(self.target.part(number), "wb") as file:
            file.write(gzip.compress(sound, 6, mtime=0) if zipped and sound else sound)
        return ledger


PART_SHIFT = 32
"""A place is the number of a part, and in its last so many bits that of a line."""


def key_rows(comparison: ComparingStep, source: StageParts, parts: Iterable[int]) -> tuple[Keys, Places]:
    """Every key of the records of some parts, each with the place of its record."""
    keys, places = array("Q"), array("q")
    for number in parts:
        for line, sketch in enumerate(Sketches(comparison, source)(number, lambda count: None)):
            mine = () if sketch is None else comparison.keys(sketch)
            keys.extend(mine)
            places.extend([(number << PART_SHIFT) + line] * len(mine))
    return np.array(keys, np.uint64), np.array(places, np.int64)


def sketches_at(comparison: ComparingStep, source: StageParts, places: Places) -> list[Any]:
    """The sketches of the records at some places, ascending."""
    found: list[Any] = []
    for number, some in groupby(places.tolist(), key=lambda place: place >> PART_SHIFT):
        wanted = {place & (2**PART_SHIFT - 1) for place in some}
        for line, content in enumerate(source.lines(number)):
            if line in wanted:
                found.append(comparison.sketch(record_of(content, source.part(number))))
    return found
