"""A data source of a recipe, and reading it: any file or dataset to a set of records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Generic, Literal, Protocol, cast, runtime_checkable

from pydantic import Field

from embedsmith.core.batch import Loss
from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.progress import log
from embedsmith.core.settings import section
from embedsmith.core.shelf import losses
from embedsmith.data.formats.beir import beir_rows, is_beir
from embedsmith.data.formats.columns import (
    Extent,
    Layout,
    Range,
    Reading,
    check_range,
    choose_layout,
    infer_range,
    rescaled,
)
from embedsmith.data.formats.files import Rows, has_known_kind, open_rows
from embedsmith.data.formats.hub import hub_rows
from embedsmith.data.record import Record, RowError, T, Task, Text, validate
from embedsmith.data.store import Fingerprint
from embedsmith.data.token_manifest import DatasetFacts, TokenizerFacts

Format = Literal["records", "flagembedding", "f2llm", "pairs", "labels", "beir"]
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
    - `part`: the rows whose query hashes into this share of [0, 1], such as [0, 0.95] to train and [0.95, 1] to
      validate on: rows of the same query fall together, in every file and every run;
    - `weight`: how often an epoch sees each row; `cap`: rows that an epoch sees of it at most (others in the next);
    - `batch_size`: rows a step, all ranks together;
    - `positives`, `negatives`: texts drawn for a query; `None` negatives are derived by `negatives_per_query`;
    - `shuffle`: the probability that a positive is given with its thirds in another order (M3 uses 0.002);
    - `teacher`: a model whose vectors of the same texts the loss `teacher_vectors` learns from;
    - `loss`: `None` is the default of the task; `on_error`: stop at faulty rows, or skip, count and name them;
    - `cache`: the folder where the converted source is kept on disk; `None` derives it: small sources stay in memory,
      large ones go to the user's cache folder (`data/storecache.py`);
    - `streaming`: never read it whole (Parquet files, datasets), but through a shuffled buffer of `buffer` rows
      (`data/stream.py`).
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
    part: tuple[float, float] | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    cap: Annotated[int, Field(gt=0)] | None = None
    batch_size: Annotated[int, Field(gt=0)] | None = None
    positives: Annotated[int, Field(gt=0)] = 1
    negatives: Annotated[int, Field(ge=0)] | None = None
    shuffle: Annotated[float, Field(ge=0, le=1)] = 0.0
    teacher: str | None = None
    loss: Annotated[Loss, losses] | None = None
    on_error: Literal["stop", "skip"] = "stop"
    cache: str | None = None
    streaming: bool = False
    buffer: Annotated[int, Field(gt=0)] | None = None


@dataclass(frozen=True)
class Skipped:
    """Rows left out because of one kind of fault: how many, and the first of their lines."""

    kind: str
    count: int
    lines: tuple[int, ...]


@dataclass(frozen=True)
class RecordSet(Generic[T]):
    """The records of one source. `records` may be a list or a store on disk: only its length and its entries count.

    `fingerprint` is a hash of the records' content; `labels` names the classes if the file names them; `scores`
    says which score range was assumed and why; `tokens`, for records of a token cache, which tokenizer made them and
    what its manifest says of them.
    """

    name: str
    task: str
    records: Sequence[Record[T]]
    fingerprint: str
    skipped: tuple[Skipped, ...] = ()
    format: str = "records"
    labels: tuple[str, ...] = ()
    score_range: Range | None = None
    scores: str = "none"
    tokens: tuple[TokenizerFacts, DatasetFacts] | None = None

    def texts_only(self, purpose: str, where: object) -> RecordSet:
        """The same records, known to hold texts. Errors: `DataError` for records of a token cache."""
        if self.tokens is not None:
            raise tokens_refused(purpose, where)
        return cast(RecordSet, self)


def tokens_refused(purpose: str, where: object) -> DataError:
    fix = "name the files that the tokens were made from"
    return DataError(f"{purpose} needs texts, and a token cache has only tokens", where=where, fix=fix)


@runtime_checkable
class KnowsNegatives(Protocol):
    """Records that need not be read to find out how many negatives one of them has at most."""

    def most_negatives(self) -> int: ...


def negatives_per_query(source: Source, records: Sequence[Record[Text]]) -> int:
    """How many negatives a query draws: as declared, otherwise the most that a record has, at most 4 (CoDiEmb's n)."""
    if source.negatives is not None:
        return source.negatives
    if isinstance(records, KnowsNegatives):
        return min(records.most_negatives(), MOST_NEGATIVES)
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


Change = Callable[[Record, int], Record | None]
"""What a record becomes once its whole file is known (`None`: it is left out), given its line."""


class Shelf(Protocol):
    """Where the records of a source are put while it is read, and kept afterwards."""

    def __len__(self) -> int: ...

    def add(self, record: Record, line: int) -> None: ...

    def settle(self, change: Change | None) -> tuple[Sequence[Record], str]:
        """All records, changed where there is a change, and their fingerprint."""
        ...


class MemoryShelf:
    """Records in a list."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._lines: list[int] = []

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: Record, line: int) -> None:
        self._records.append(record)
        self._lines.append(line)

    def settle(self, change: Change | None) -> tuple[Sequence[Record], str]:
        records = self._records
        if change is not None:
            changed = map(change, records, self._lines)
            records = [record for record in changed if record is not None]
        return records, fingerprint(records)


def read_rows(source: Source, rows: Rows, shelf: Shelf) -> RecordSet:
    """Read, check and rescale all records of a source, onto a shelf. Errors: those of `read_source`."""
    return _Reader(source, rows, shelf).read()


@dataclass
class _Reader:
    """One pass over one source."""

    source: Source
    rows: Rows
    shelf: Shelf
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
        if not len(self.shelf) and not self.faults:
            raise DataError("no records in it", where=self.rows.path, fix="check that it is the right file")
        known, how = self._range(declared)
        labels = tuple(sorted(self.reading.labels)) if self.reading else ()
        records, hash_ = self.shelf.settle(self._change(known, labels))
        self._report(len(records))
        assert self.reading is not None
        assert self.task is not None
        return RecordSet(
            name=source_name(self.source),
            task=self.task,
            records=records,
            fingerprint=hash_,
            skipped=tuple(Skipped(kind, self.counts[kind], tuple(lines)) for kind, (_, lines) in self.faults.items()),
            format=self.rows.format or self.reading.layout.name,
            labels=labels,
            score_range=known,
            scores=how,
        )

    def _read_rows(self, declared: Range | None) -> None:
        """Past `limit` rows are read only where the score range is still to be inferred: it is the whole file's."""
        for line, row in self.rows.rows:
            full = self.source.limit is not None and len(self.shelf) >= self.source.limit
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
                self.shelf.add(record, line)

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

    def _report(self, kept: int) -> None:
        """Stop with one message for all faults; or, told to skip, log the same and go on."""
        if not self.faults:
            return
        parts = [_summary(error, self.counts[kind], lines) for kind, (error, lines) in self.faults.items()]
        first = next(iter(self.faults.values()))[0]
        if self.source.on_error == "skip" and kept:
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

    def _change(self, known: Range | None, labels: tuple[str, ...]) -> Change | None:
        """What is done to all records at the end, if anything: scores rescaled, classes numbered in the order of
        their names (so that the order of rows does not matter), positives with the lowest score left out."""
        unlike = self.task == "retrieval" and known is not None and self.extent.low <= known[0]
        if known in (None, (0.0, 1.0)) and not labels and not unlike:
            return None
        names = self.reading.labels if self.reading else {}
        number = {names[name]: place for place, name in enumerate(labels)}

        def change(record: Record, line: int) -> Record | None:
            if labels and record.label is not None:
                record = replace(record, label=number[record.label])
            if known is not None:
                record = rescaled(record, known)
            if unlike and 0.0 in (record.positive_scores or ()):
                # In retrieval a positive is a target whatever its score: one with the lowest would be learnt.
                fix = "declare task: sts, or remove the rows"
                self._note(RowError("a positive with the lowest possible score is not a positive", fix=fix), line)
                return None
            return record

        return change


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
    digest = Fingerprint()
    for record in records:
        digest.add(record)
    return digest.hex()
