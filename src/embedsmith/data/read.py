"""`read_source`: any source of a recipe to its records, in memory or on disk as its size asks."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.inputs import local_path
from embedsmith.core.progress import log
from embedsmith.data.cache import belongs_on_disk, file_states, refuse_vanished, stored, weight
from embedsmith.data.formats.columns import Extent, Range, Reading, check_range, rescaled
from embedsmith.data.formats.file_kinds import Rows
from embedsmith.data.record import Record, RowError, Text, typed_for_source
from embedsmith.data.source import RecordSet, Skipped, Source, open_source, reading_of, source_name
from embedsmith.data.store import Fingerprint, StoreWriter
from embedsmith.data.stream import stream_source
from embedsmith.data.token_records import is_token_cache, read_tokens


def read_source(source: Source) -> RecordSet[Text]:
    """Read, check and rescale all records of a source, or find them in the cache if they were read before.

    Errors: `DataError` naming file and line: every kind of fault once, with its count and first lines; or the source
    that is gone, or changes while it is read. `CheckpointError` when the disk is full.
    """
    if source.streaming:
        return stream_source(source)
    path = None if source.rows is not None else local_path(source.path)
    if path is not None and is_token_cache(path):
        return read_tokens(source)
    if path is not None and path.exists():
        files, version, rows = file_states(path), None, None
        size = weight(files)
    else:
        if path is not None:
            refuse_vanished(source)
        rows = open_source(source)
        files, version, size = {}, rows.version, rows.size
    if (rows is not None and version is None) or not belongs_on_disk(source, size):
        found = _Pass(source, rows or open_source(source), MemorySink()).read()
        _tell_empty(source, found.left_out)
        return found
    found = stored(source, files, version, lambda writer: _Pass(source, rows or open_source(source), writer).read())
    for skipped in found.skipped:  # named in every run, not only in the one that converted the source
        lines = ", ".join(map(str, skipped.lines))
        log.warning("%s: %d rows are left out: %s (lines %s)", source.path, skipped.count, skipped.kind, lines)
    _tell_empty(source, found.left_out)
    return found


def _tell_empty(source: Source, left_out: Mapping[str, int]) -> None:
    for slot, count in left_out.items():
        log.warning("%s: slots left out, their rows are kept: %d (%s)", source.path, count, slot)


Change = Callable[[Record, int], Record | None]
"""What a record becomes once its whole file is known (`None`: it is left out), given its line."""


class MemorySink:
    """Records in a list, for a source that is not kept on disk: what `StoreWriter` is for the others."""

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
        digest = Fingerprint()
        for record in records:
            digest.add(record)
        return records, digest.hex()


@dataclass
class _Pass:
    """One pass over the rows of one source, into a sink."""

    source: Source
    rows: Rows
    sink: MemorySink | StoreWriter
    faults: dict[str, tuple[RowError, list[int]]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    extent: Extent = field(default_factory=Extent)
    reading: Reading | None = None
    task: str | None = None
    left_out: dict[str, int] | None = None

    def read(self) -> RecordSet:
        declared = self.source.score_range or self.rows.score_range
        if declared is not None and not declared[0] < declared[1]:
            raise RecipeError(f"score_range {list(declared)} is not [lowest, highest]", where=self.rows.path)
        self._read_rows(declared)
        if not len(self.sink) and not self.faults:
            raise DataError("no records in it", where=self.rows.path, fix="check that it is the right file")
        known, how = self._range(declared)
        labels = tuple(sorted(self.reading.labels)) if self.reading else ()
        records, hash_ = self.sink.settle(self._change(known, labels))
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
            left_out=self.left_out if self.left_out is not None else dict(self.reading.left_out),
        )

    def _read_rows(self, declared: Range | None) -> None:
        """Past `limit` rows are read only where the score range is still to be inferred: it is the whole file's."""
        for line, row in self.rows.rows:
            full = self.source.limit is not None and len(self.sink) >= self.source.limit
            if full and (declared is not None or self.extent.empty):
                return
            if full and self.left_out is None and self.reading is not None:
                self.left_out = dict(self.reading.left_out)
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
                self.sink.add(record, line)

    def _record(self, row: dict[str, object] | RowError, line: int) -> Record:
        if isinstance(row, RowError):
            raise row
        if self.reading is None:
            self.reading = reading_of(row, self.source, self.rows, f"{self.rows.path}:{line}")
        record = self.reading.record(row)
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
        """Stop with one message for all faults; or, where faulty rows are to be skipped, log the same and go on."""
        if not self.faults:
            return
        parts: list[str] = []
        for kind, (error, lines) in self.faults.items():
            count, shown = self.counts[kind], ", ".join(map(str, lines))
            more = ", ..." if count > len(lines) else ""
            parts.append(error.what + (f" ({count} such rows: lines {shown}{more})" if count > 1 else ""))
        first = next(iter(self.faults.values()))[0]
        if self.source.on_error == "skip" and kept:
            log.warning("skipped %d rows of %s: %s", self.counts.total(), self.rows.path, "; ".join(parts))
            return
        raise DataError(
            parts[0] + "".join(f"\n  and {part}" for part in parts[1:]),
            where=first.where,
            expected=first.expected,
            fix=f"{first.fix or 'correct the row'}; or leave such rows out with on_error: skip beside its path "
            + typed_for_source("on_error=skip"),
        )

    def _range(self, declared: Range | None) -> tuple[Range | None, str]:
        if self.extent.empty:
            return None, "none"
        found = f"found {self.extent.low:g} to {self.extent.high:g}"
        if declared is not None:
            return declared, f"declared {declared[0]:g} to {declared[1]:g}, {found}"
        low, high = self.extent.range(self.rows.path)
        log.info("%s: scores taken as %g to %g (%s)", self.rows.path, low, high, found)
        return (low, high), f"inferred {low:g} to {high:g}, {found}"

    def _change(self, known: Range | None, labels: tuple[str, ...]) -> Change | None:
        """What is done to all records at the end, if anything: scores rescaled, classes numbered in the order of
        their names (so that the order of rows does not matter), positives with the lowest score left out."""
        lowest = self.task == "retrieval" and known is not None and self.extent.low <= known[0]
        if known in (None, (0.0, 1.0)) and not labels and not lowest:
            return None
        names = self.reading.labels if self.reading else {}
        number = {names[name]: place for place, name in enumerate(labels)}

        def change(record: Record, line: int) -> Record | None:
            if labels and record.label is not None:
                record = replace(record, label=number[record.label])
            try:
                return rescaled(record, known)
            except RowError as error:
                self._note(error, line)
                return None

        return change
