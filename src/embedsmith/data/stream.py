"""Streaming: a source of any size, of which only the blocks in use are in memory.

A pass goes through all blocks in a new order, and through the rows of a buffer of blocks in a new order: the buffer
is filled, shuffled, emptied, and filled again. So the n-th row of a pass is a function of (seed, pass, n); the
position of a run stays the number of its step, a resumed run draws the same batches after reading one buffer, and
ranks take disjoint slices of every batch, however many there are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Protocol, overload, runtime_checkable

import numpy as np
import numpy.typing as npt

from embedsmith.core.errors import DataError
from embedsmith.core.progress import log
from embedsmith.data.blocks import Blocks, Row, open_blocks
from embedsmith.data.containers import Rows
from embedsmith.data.layouts import Reading
from embedsmith.data.record import Record, RowError, validate
from embedsmith.data.scores import Range, check_range, rescaled
from embedsmith.data.source import RecordSet, Source, reading_of, source_name

BUFFER_ROWS = 10_000
"""Rows shuffled together unless the source says or one of its blocks has more (it is in memory anyway)."""

Order = npt.NDArray[np.integer]


@runtime_checkable
class HasOrder(Protocol):
    """Records that cannot be read in any order at the same cost, and say in which order a pass should take them."""

    def order(self, chance: np.random.Generator) -> Order:
        """A permutation of all rows, drawn with `chance` alone."""
        ...


@dataclass(frozen=True)
class RowReader:
    """Rows to checked records: what reading a whole file does, without what needs the whole file."""

    source: Source
    reading: Reading
    declared: Range | None

    def record(self, row: Row) -> Record:
        """Errors: `RowError`."""
        record = self.reading.record(row)
        validate(record)
        if record.task != self.reading.task:
            raise RowError(f"a row of task {record.task} among those of task {self.reading.task}")
        if self.reading.labels:
            raise RowError("classes have names", fix="number the classes, or leave streaming out")
        if self.declared is None:
            if any(score is not None for score in (*(record.positive_scores or ()), *(record.negative_scores or ()))):
                raise RowError("scores of an unknown range", fix="declare score_range: [lowest, highest]")
            return record
        check_range(record, self.declared)
        record = rescaled(record, self.declared)
        if record.task == "retrieval" and 0.0 in (record.positive_scores or ()):
            raise RowError("a positive with the lowest possible score is not a positive", fix="remove the row")
        return record


@dataclass(frozen=True)
class StreamRecords(Sequence[Record]):
    """The records of a stream by row number; rows of the same buffer are cheap to reach together.

    A faulty row stops with its file and row; told to skip, the next good row of its block takes its place, it is
    named, and `skipped` counts it. Safe to share between threads.
    """

    blocks: Blocks
    reader: RowReader
    buffer: int
    rows: int
    skipped: set[str] = field(default_factory=set)
    _held: OrderedDict[int, Sequence[Row]] = field(default_factory=OrderedDict, init=False, repr=False, compare=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return self.rows

    @cached_property
    def start_B(self) -> npt.NDArray[np.int64]:
        """First row of each block, and the end of the last."""
        return np.concatenate([[0], np.cumsum(self.blocks.sizes)]).clip(max=self.rows).astype(np.int64)

    def order(self, chance: np.random.Generator) -> Order:
        """Blocks in a drawn order (unless they must come in their own), then each buffer of rows in a drawn order."""
        start_B = self.start_B
        sequence = np.arange(len(start_B) - 1)
        if not self.blocks.in_order:
            chance.shuffle(sequence)
        order_N = np.concatenate([np.arange(start_B[block], start_B[block + 1]) for block in sequence])
        for start in range(0, len(order_N), self.buffer):
            chance.shuffle(order_N[start : start + self.buffer])
        return order_N

    @overload
    def __getitem__(self, row: int) -> Record: ...
    @overload
    def __getitem__(self, row: slice) -> list[Record]: ...
    def __getitem__(self, row: int | slice) -> Record | list[Record]:
        if isinstance(row, slice):
            return [self[place] for place in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        place = row % len(self)
        block = int(np.searchsorted(self.start_B, place, side="right")) - 1
        return self._good(block, place - int(self.start_B[block]))

    def _good(self, block: int, row: int) -> Record:
        rows = self._rows(block)
        for step in range(len(rows)):
            at = (row + step) % len(rows)
            try:
                return self.reader.record(rows[at])
            except RowError as error:
                named = error.at(self.blocks.place(block, at))
                if self.reader.source.on_error == "stop":
                    raise named from error
                self._skip(named)
        raise DataError("no good row in the block", where=self.blocks.place(block, 0))

    def _skip(self, error: RowError) -> None:
        if str(error.where) not in self.skipped:
            self.skipped.add(str(error.where))
            log.warning("skipped (%d so far): %s: %s", len(self.skipped), error.where, error.what)

    def _rows(self, block: int) -> Sequence[Row]:
        with self._lock:
            if block not in self._held:
                self._held[block] = self.blocks.read(block)
                while len(self._held) > 1 and self._more_than_needed():
                    self._held.popitem(last=False)
            self._held.move_to_end(block)
            return self._held[block]

    def _more_than_needed(self) -> bool:
        """A buffer touches at most its own rows and the rest of the blocks at its two ends."""
        return sum(map(len, self._held.values())) > self.buffer + 2 * self._largest_block

    @cached_property
    def _largest_block(self) -> int:
        return max(self.blocks.sizes)

    def most_negatives(self) -> int:
        """Of the first hundred rows."""
        return max(len(self[row].negatives) for row in range(min(len(self), 100)))


def stream_source(source: Source) -> RecordSet:
    """A source to be streamed. Its first block tells layout, task and the most negatives of a row.

    Scores need a declared range and classes need numbers: what would take a look at every row is not inferred. The
    fingerprint is that of the files (footers of Parquet files), not of every record.
    Errors: `DataError` as in `open_blocks`, or for an empty stream.
    """
    blocks = open_blocks(source.path, source.split, source.limit)
    rows = min(sum(blocks.sizes), source.limit or sum(blocks.sizes))
    if rows == 0:
        raise DataError("no records in it", where=source.path, fix="check that it is the right source")
    first = next(block for block, size in enumerate(blocks.sizes) if size)
    head = blocks.read(first)
    reading = reading_of(dict(head[0]), source, Rows(source.path, ()), blocks.place(first, 0))
    reader = RowReader(source, reading, source.score_range)
    buffer = source.buffer or max(BUFFER_ROWS, *blocks.sizes)
    return RecordSet(
        name=source_name(source),
        task=reading.task,
        records=StreamRecords(blocks, reader, buffer, rows),
        fingerprint=f"{blocks.version}-{rows}",
        format=reading.layout.name,
        score_range=source.score_range,
        scores="declared" if source.score_range else "none",
    )
