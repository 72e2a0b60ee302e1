"""Records on disk: an Arrow file that is memory-mapped, so that millions of records cost no memory and open at once.

records.arrow               one row a record; a field that no record has is null in all of them
lines.i64                   the line of each record in its source
query_id_N.i64 ...          the `RowFacts` of all records, as plain arrays
store.json                  counts and the fingerprint
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedsmith.core.errors import DataError
from embedsmith.core.tokens import IntArray
from embedsmith.data.plan.separate import RowFacts, facts_of
from embedsmith.data.record import Record

_TEXTS, _SCORES = pa.list_(pa.string()), pa.list_(pa.float64())
SCHEMA = pa.schema(
    {
        "query": pa.string(),
        "positives": _TEXTS,
        "negatives": _TEXTS,
        "task": pa.string(),
        "positive_scores": _SCORES,
        "negative_scores": _SCORES,
        "teacher_positive_scores": _SCORES,
        "teacher_negative_scores": _SCORES,
        "label": pa.int64(),
        "instruction": pa.string(),
        "source": pa.string(),
    }
)
"""The fields of `Record`, in its order."""

Kind = type[np.int32] | type[np.int64]
_FACTS: dict[str, Kind] = {
    "query_id_N": np.int64,
    "positive_id_P": np.int64,
    "count_N": np.int32,
    "length_N": np.int32,
}
_LINES: tuple[str, Kind] = ("lines", np.int64)
_ROWS, _CHARACTERS = 4096, 2**24
"""A block of the Arrow file ends at this many rows or, for long texts, characters: what is in memory while writing."""


@dataclass(frozen=True)
class StoreCounts:
    """What `store.json` says: rows, the most negatives and positives that one of them has, the content's hash."""

    rows: int
    most_negatives: int
    most_positives: int
    fingerprint: str


class Fingerprint:
    """A hash of what records hold, in their order; where they came from does not count."""

    _names = tuple(f.name for f in fields(Record) if f.name != "source")

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, record: Record) -> None:
        self._digest.update(repr([getattr(record, name) for name in self._names]).encode())

    def hex(self) -> str:
        return self._digest.hexdigest()


class StoreWriter:
    """Writes a store into a folder, record by record; `close` completes it. Memory: one block.

    The folder is the caller's to make atomic (`core.files.atomic_folder`). Errors: `OSError` of a full disk.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.rows = 0
        self._most_negatives = self._most_positives = self._characters = 0
        self._block: list[Record] = []
        self._lines: list[int] = []
        self._fingerprint = Fingerprint()
        self._arrow = pa.ipc.new_file(str(folder / "records.arrow"), SCHEMA)
        self._arrays: dict[str, IO[bytes]] = {
            name: (folder / f"{name}.{_suffix(kind)}").open("wb") for name, kind in (*_FACTS.items(), _LINES)
        }

    def __len__(self) -> int:
        return self.rows

    def add(self, record: Record, line: int = 0) -> None:
        self.rows += 1
        self._block.append(record)
        self._lines.append(line)
        self._fingerprint.add(record)
        self._most_negatives = max(self._most_negatives, len(record.negatives))
        self._most_positives = max(self._most_positives, len(record.positives))
        self._characters += len(record.query) + sum(map(len, record.positives)) + sum(map(len, record.negatives))
        if len(self._block) == _ROWS or self._characters >= _CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        if not self._block:
            return
        columns = [pa.array([getattr(record, f.name) for record in self._block], f.type) for f in SCHEMA]
        self._arrow.write_batch(pa.record_batch(columns, schema=SCHEMA))
        facts = facts_of(self._block)
        values = {"query_id_N": facts.query_id_N, "positive_id_P": facts.positive_id_P, "length_N": facts.length_N}
        values |= {"count_N": np.diff(facts.offset_N1), "lines": np.asarray(self._lines)}
        for name, kind in (*_FACTS.items(), _LINES):
            self._arrays[name].write(np.ascontiguousarray(values[name], dtype=kind).tobytes())
        self._block, self._lines, self._characters = [], [], 0

    def close(self) -> StoreCounts:
        self._flush()
        self.abandon()
        counts = StoreCounts(self.rows, self._most_negatives, self._most_positives, self._fingerprint.hex())
        (self.folder / "store.json").write_text(json.dumps(counts.__dict__), encoding="utf-8")
        return counts

    def abandon(self) -> None:
        """Close the files as they are."""
        self._arrow.close()
        for file in self._arrays.values():
            file.close()


class RecordStore(Sequence[Record]):
    """The records of a store, as a sequence: each is made when it is asked for. Safe to share between threads.

    Errors: `DataError` for a folder that is damaged or not a store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.counts = StoreCounts(**json.loads((folder / "store.json").read_text(encoding="utf-8")))
            self._map = pa.memory_map(str(folder / "records.arrow"))
            reader = pa.ipc.open_file(self._map)
            batches = [reader.get_batch(place) for place in range(reader.num_record_batches)]
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise DataError(f"not a readable store of records ({error})", where=folder, fix="delete it") from error
        self._blocks = [batch.columns for batch in batches]
        self._ends = list(accumulate(len(batch) for batch in batches))
        if (self._ends[-1] if self._ends else 0) != self.counts.rows:
            raise DataError(f"{self._ends[-1]} rows instead of {self.counts.rows}", where=folder, fix="delete it")

    def __len__(self) -> int:
        return self.counts.rows

    @overload
    def __getitem__(self, row: int) -> Record: ...
    @overload
    def __getitem__(self, row: slice) -> list[Record]: ...
    def __getitem__(self, row: int | slice) -> Record | list[Record]:
        if isinstance(row, slice):
            return [self[place] for place in range(*row.indices(len(self)))]
        place = row + len(self) if row < 0 else row
        if not 0 <= place < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        block = bisect_right(self._ends, place)
        within = place - (self._ends[block - 1] if block else 0)
        return _record([column[within].as_py() for column in self._blocks[block]])

    def __iter__(self) -> Iterator[Record]:
        for columns in self._blocks:
            yield from map(_record, zip(*(column.to_pylist() for column in columns)))

    def most_negatives(self) -> int:
        """Of any record."""
        return self.counts.most_negatives

    def facts(self) -> RowFacts:
        """The facts of all rows, memory-mapped (offsets are made anew, 8 bytes a row)."""
        return self._facts

    @cached_property
    def _facts(self) -> RowFacts:
        values = {name: map_array(self.folder / f"{name}.{_suffix(kind)}", kind) for name, kind in _FACTS.items()}
        offset_N1: IntArray = np.zeros(len(self) + 1, np.int64)
        np.cumsum(values["count_N"], out=offset_N1[1:])
        return RowFacts(values["query_id_N"], values["positive_id_P"], offset_N1, values["length_N"])

    def lines(self) -> IntArray:
        """The line of each record in its source."""
        return map_array(self.folder / "lines.i64", np.int64)


def _record(values: Sequence[Any]) -> Record:
    arguments: list[Any] = [tuple(value) if isinstance(value, list) else value for value in values]
    return Record(*arguments)


def map_array(path: Path, kind: Kind) -> npt.NDArray[Any]:
    """A plain array on disk, memory-mapped for reading. An empty file cannot be mapped, so it is an empty array."""
    return np.memmap(path, dtype=kind, mode="r") if os.path.getsize(path) else np.zeros(0, kind)


def _suffix(kind: Kind) -> str:
    return f"i{8 * np.dtype(kind).itemsize}"
