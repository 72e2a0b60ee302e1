"""A data source of a recipe, and reading it: any file or dataset to a set of records."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.loss import Loss
from embedsmith.core.progress import log
from embedsmith.core.recipe import section
from embedsmith.core.registry import losses
from embedsmith.data.beir import beir_rows, is_beir
from embedsmith.data.containers import Rows, has_known_kind, open_rows
from embedsmith.data.hub import hub_rows
from embedsmith.data.layouts import FORMATS, Layout, Reading, choose_layout
from embedsmith.data.record import Record, RowError, Task, validate
from embedsmith.data.scores import Extent, Range, check_range, infer_range, rescaled

Format = Literal["records", "flagembedding", "pairs", "labels", "beir"]
MOST_NEGATIVES = 4


@section
@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of training or validation records. Everything but `path` can be left out.

    - `path`: a file (.jsonl, .json, .csv, .tsv, .parquet; text kinds also .gz), a BEIR folder, a saved dataset, or
      the id of a dataset on the Hugging Face hub (`owner/name`);
    - `task`: `None` infers it from the columns; `name`: `None` is the file's name;
    - `format`: `None` finds it by the columns; `columns`: role to column, for files with names of their own;
    - `score_range`: the range scores were given in, [lowest, highest]; `None` infers it;
    - `split`: of a dataset or a BEIR folder; `instruction`: for records that have none; `limit`: only the first;
    - `weight`: how often an epoch sees each row; `batch_size`: rows a step, all ranks together;
    - `positives`, `negatives`: texts drawn for a query; `None` negatives are derived by `negatives_per_query`;
    - `teacher`: a model whose vectors of the same texts the loss `teacher_vectors` learns from;
    - `loss`: `None` is the default of the task; `on_error`: stop at faulty rows, or skip, count and name them.
    """

    path: str
    task: Task | None = None
    name: str | None = None
    format: Format | None = None
    columns: dict[str, str | list[str]] | None = None
    score_range: tuple[float, float] | None = None
    split: str | None = None
    instruction: str | None = None
    limit: Annotated[int, Field(gt=0)] | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    batch_size: Annotated[int, Field(gt=0)] | None = None
    positives: Annotated[int, Field(gt=0)] = 1
    negatives: Annotated[int, Field(ge=0)] | None = None
    teacher: str | None = None
    loss: Annotated[Loss, losses] | None = None
    on_error: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True)
class Skipped:
    """Rows left out because of one kind of fault: how many, and the first of their lines."""

    kind: str
    count: int
    lines: tuple[int, ...]


@dataclass(frozen=True)
class RecordSet:
    """The records of one source. `records` may be a list or a store on disk: only its length and its entries count.

    `fingerprint` is a hash of the records' content; `labels` names the classes if the file names them; `scores`
    says which score range was assumed and why.
    """

    name: str
    task: str
    records: Sequence[Record]
    fingerprint: str
    skipped: tuple[Skipped, ...] = ()
    format: str = "records"
    labels: tuple[str, ...] = ()
    score_range: Range | None = None
    scores: str = "none"


def negatives_per_query(source: Source, records: Sequence[Record]) -> int:
    """How many negatives a query draws: as declared, otherwise the most that a record has, at most 4 (CoDiEmb's n)."""
    if source.negatives is not None:
        return source.negatives
    return min(max((len(record.negatives) for record in records), default=0), MOST_NEGATIVES)


def source_name(source: Source) -> str:
    """The declared name, or the path's last part without its extensions."""
    if source.name:
        return source.name
    last = Path(source.path.removeprefix(_HUB)).name
    return Path(last.removesuffix(".gz")).stem if has_known_kind(last) else last


_HUB = "hf://"


def open_source(source: Source) -> Rows:
    """The rows of whatever `path` names. Errors: `DataError`."""
    path = Path(source.path).expanduser()
    if source.path.startswith(_HUB):
        return hub_rows(source.path.removeprefix(_HUB), source.split)
    if path.is_dir() and (source.format == "beir" or is_beir(path)):
        return beir_rows(path, source.split)
    if path.is_dir() or (source.path.count("/") == 1 and not path.parent.is_dir() and not has_known_kind(path.name)):
        return hub_rows(str(path) if path.is_dir() else source.path, source.split)
    return open_rows(path)


def read_source(source: Source) -> RecordSet:
    """Read, check and rescale all records of a source.

    Errors: `DataError` naming file and line: every kind of fault once, with its count and first lines.
    """
    if source.format is not None and source.format not in FORMATS:
        raise RecipeError(f"unknown format {source.format!r}", expected=f"one of {', '.join(FORMATS)}")
    return _Reader(source, open_source(source)).read()


@dataclass
class _Reader:
    """One pass over one source."""

    source: Source
    rows: Rows
    records: list[Record] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    faults: dict[str, tuple[RowError, list[int]]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    extent: Extent = field(default_factory=Extent)
    reading: Reading | None = None
    task: str | None = None

    def read(self) -> RecordSet:
        declared = self.source.score_range or self.rows.score_range
        if declared is not None and not declared[0] < declared[1]:
            raise RecipeError(f"score_range {list(declared)} is not [lowest, highest]", where=self.rows.path)
        self._read_rows(declared)
        if not self.records and not self.faults:
            raise DataError("no records in it", where=self.rows.path, fix="check that it is the right file")
        known, how = self._range(declared)
        labels = self._sort_labels()
        if known is not None:
            self.records = [rescaled(record, known) for record in self.records]
            self._leave_out_unlike()
        self._report()
        assert self.reading is not None
        assert self.task is not None
        return RecordSet(
            name=source_name(self.source),
            task=self.task,
            records=self.records,
            fingerprint=fingerprint(self.records),
            skipped=tuple(Skipped(kind, self.counts[kind], tuple(lines)) for kind, (_, lines) in self.faults.items()),
            format=self.rows.format or self.reading.layout.name,
            labels=labels,
            score_range=known,
            scores=how,
        )

    def _read_rows(self, declared: Range | None) -> None:
        """Past `limit` rows are read only where the score range is still to be inferred: it is the whole file's."""
        for line, row in self.rows.rows:
            full = self.source.limit is not None and len(self.records) >= self.source.limit
            if full and (declared is not None or self.extent.empty):
                return
            try:
                record = self._record(row, line)
                if declared is not None:
                    check_range(record, declared)
            except RowError as error:
                if not full:
                    self._note(error, line)
                continue
            self.extent.add(record, line)
            if not full:
                self.records.append(record)
                self.lines.append(line)

    def _record(self, row: dict[str, object] | RowError, line: int) -> Record:
        if isinstance(row, RowError):
            raise row
        if self.reading is None:
            self.reading = reading_of(row, self.source, self.rows, f"{self.rows.path}:{line}")
        record = self.reading.record(row)
        validate(record)
        self.task = self.task or self.source.task or record.task
        if record.task != self.task:
            kind = f"a row of task {record.task} among those of task {self.task}"
            raise RowError(kind, fix="put the rows of each task in a file of their own, and declare no other task")
        return record

    def _note(self, error: RowError, line: int) -> None:
        self.counts[error.kind] += 1
        _, lines = self.faults.setdefault(error.kind, (error.at(f"{self.rows.path}:{line}"), []))
        if len(lines) < 5:
            lines.append(line)

    def _report(self) -> None:
        """Stop with one message for all faults; or, told to skip, log the same and go on."""
        if not self.faults:
            return
        parts = [_summary(error, self.counts[kind], lines) for kind, (error, lines) in self.faults.items()]
        first = next(iter(self.faults.values()))[0]
        if self.source.on_error == "skip" and self.records:
            log.warning("skipped %d rows of %s: %s", self.counts.total(), self.rows.path, "; ".join(parts))
            return
        raise DataError(
            parts[0] + "".join(f"\n  and {part}" for part in parts[1:]),
            where=first.where,
            expected=first.expected,
            fix=f"{first.fix or 'correct the row'}; or leave such rows out with on_error: skip",
        )

    def _range(self, declared: Range | None) -> tuple[Range | None, str]:
        if self.extent.empty:
            return None, "none"
        found = f"found {self.extent.low:g} to {self.extent.high:g}"
        if declared is not None:
            return declared, f"declared {declared[0]:g} to {declared[1]:g}, {found}"
        low, high = infer_range(self.extent, self.rows.path)
        log.info("%s: scores taken as %g to %g (%s)", self.rows.path, low, high, found)
        return (low, high), f"inferred {low:g} to {high:g}, {found}"

    def _leave_out_unlike(self) -> None:
        """In retrieval a positive is a target whatever its score, so one with the lowest score would be learnt."""
        if self.task != "retrieval":
            return
        kept = []
        for record, line in zip(self.records, self.lines):
            if 0.0 in (record.positive_scores or ()):
                fix = "declare task: sts, or remove the rows"
                self._note(RowError("a positive with the lowest possible score is not a positive", fix=fix), line)
            else:
                kept.append(record)
        self.records = kept

    def _sort_labels(self) -> tuple[str, ...]:
        """Number named classes in the order of their names, so that the order of rows does not matter."""
        names = self.reading.labels if self.reading else {}
        if not names:
            return ()
        ordered = sorted(names)
        number = {names[name]: place for place, name in enumerate(ordered)}
        self.records = [
            record if record.label is None else replace(record, label=number[record.label]) for record in self.records
        ]
        return tuple(ordered)


def reading_of(row: dict[str, object], source: Source, rows: Rows, where: str) -> Reading:
    """How to read the rows of a source, decided by its first readable row. Errors: `DataError` if no format fits."""
    format_ = "records" if rows.format == "beir" else source.format
    layout = choose_layout(list(row), format_, source.columns, where)
    task = source.task or layout.task or _task_of(layout, row)
    if layout.name == "pairs" and task != "sts":
        layout = replace(layout, required=layout.required[:2])
    return Reading(layout, task, source_name(source), source.instruction, rows.cells)


def _task_of(layout: Layout, row: dict[str, object]) -> str:
    """A scored pair is sts; a label without positives is classification; anything else is retrieval."""
    found = layout.found(row)
    positives = found.get("positives", [])
    if not positives:
        return "classification" if "label" in found else "retrieval"
    single = len(positives) == 1 and (isinstance(positives[0], str) or len(positives[0]) == 1)
    return "sts" if single and "positive_scores" in found and "negatives" not in found else "retrieval"


def _summary(error: RowError, count: int, lines: list[int]) -> str:
    if count == 1:
        return error.what
    more = ", ..." if count > len(lines) else ""
    return f"{error.what} ({count} such rows: lines {', '.join(map(str, lines))}{more})"


def fingerprint(records: Iterable[Record]) -> str:
    """A hash of what the records hold, in their order; where they came from does not count."""
    digest = hashlib.blake2b(digest_size=16)
    names = [f.name for f in fields(Record) if f.name != "source"]
    for record in records:
        digest.update(repr([getattr(record, name) for name in names]).encode())
    return digest.hexdigest()
