"""Records on disk: an Arrow file that is memory-mapped, so that millions of records cost no memory and open at once.

records.arrow               one row a record; a field that no record has is null in all of them
lines.i64                   the line of each record in its source
query_id_N.i64 ...          the `RowFacts` of all records, as plain arrays
store.json                  counts and the fingerprint

A store of token ids has one more table, of all texts of its records by row; what stands in the columns `query`,
`positives` and `negatives` are then numbers of its rows:

token_text_N.i64            the id of each text
token_body_N.i32            how many of its tokens belong to a prompt
token_end_N.i64             where its tokens end in
token_id_S.i32              the token ids of all texts, one after the other
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedsmith.core.errors import DataError
from embedsmith.core.inputs import read_typed
from embedsmith.core.tokens import IntArray
from embedsmith.data.plan.separate import RowFacts, row_facts
from embedsmith.data.record import OneByOne, Record, T, Text, TokenIds

# The plain arrays that belong together, and the type of their entries.
_FACTS = {"query_id_N": "int64", "positive_id_P": "int64", "count_N": "int32", "length_N": "int32"}
_LINES = {"lines": "int64"}
_TOKENS = {"token_text_N": "int64", "token_body_N": "int32", "token_end_N": "int64", "token_id_S": "int32"}
_ROWS, _CHARACTERS = 4096, 2**24
"""A block of the Arrow file ends at this many rows or, for long texts, characters: what is in memory while writing."""


def _schema(text: pa.DataType) -> pa.Schema:
    """The fields of `Record`, in its order; what stands for a text is of the type `text`."""
    scores = pa.list_(pa.float64())
    return pa.schema(
        {
            "query": text,
            "positives": pa.list_(text),
            "negatives": pa.list_(text),
            "task": pa.string(),
            "positive_scores": scores,
            "negative_scores": scores,
            "teacher_positive_scores": scores,
            "teacher_negative_scores": scores,
            "label": pa.int64(),
            "instruction": pa.string(),
            "source": pa.string(),
        }
    )


class ArrayWriter:
    """Appends to plain arrays, each in a file of its own."""

    def __init__(self, folder: Path, kinds: dict[str, str]) -> None:
        self._files = {name: (_array_file(folder, name, kind).open("wb"), kind) for name, kind in kinds.items()}

    def append(self, **arrays: npt.NDArray[Any]) -> None:
        for name, values in arrays.items():
            file, kind = self._files[name]
            file.write(np.ascontiguousarray(values, dtype=kind).tobytes())

    def flush(self) -> None:
        for file, _ in self._files.values():
            file.flush()

    def close(self) -> None:
        for file, _ in self._files.values():
            file.close()


def _mapped(folder: Path, kinds: dict[str, str]) -> dict[str, npt.NDArray[Any]]:
    """Plain arrays, memory-mapped. An empty file cannot be mapped, so it is an empty array."""
    files = {name: (_array_file(folder, name, kind), kind) for name, kind in kinds.items()}
    return {
        name: np.asarray(np.memmap(file, dtype=kind, mode="r")) if os.path.getsize(file) else np.zeros(0, kind)
        for name, (file, kind) in files.items()
    }


def _array_file(folder: Path, name: str, kind: str) -> Path:
    return folder / f"{name}.{kind.replace('int', 'i')}"


class TokenTable:
    """The tokens of many texts by row, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self._text_N, self._body_N, self._end_N, self._id_S = _mapped(folder, _TOKENS).values()

    def __getitem__(self, row: int) -> TokenIds:
        start = self._end_N[row - 1] if row else 0
        return TokenIds(int(self._text_N[row]), self._id_S[start : self._end_N[row]], int(self._body_N[row]))

    def known(self, block: list[Record[Any]]) -> tuple[list[Record[Any]], RowFacts]:
        """Records of rows of this table as records of the ids of their texts, without the tokens, and their facts: all
        at once, because one text after the other would take longer than all else."""
        rows = [(record.query, *record.positives, *record.negatives) for record in block]
        count_N = np.fromiter(map(len, rows), np.int64, len(rows))
        row_E = np.fromiter(chain.from_iterable(rows), np.int64, int(count_N.sum()))
        id_E = self._text_N[row_E]
        length_E = self._end_N[row_E] - np.where(row_E > 0, self._end_N[row_E - 1], 0)
        first_N = np.cumsum(count_N) - count_N
        positives_N = np.fromiter((len(record.positives) for record in block), np.int64, len(block))
        place_E = np.arange(len(row_E)) - np.repeat(first_N, count_N)
        is_positive_E = (place_E > 0) & (place_E <= np.repeat(positives_N, count_N))
        facts = RowFacts(
            query_id_N=id_E[first_N],
            positive_id_P=id_E[is_positive_E],
            offset_N1=np.concatenate([[0], np.cumsum(positives_N)]),
            length_N=np.maximum.reduceat(length_E, first_N).astype(np.int32),
        )
        texts = (TokenIds(id_, self._id_S[:0], 0) for id_ in id_E.tolist())
        held = [tuple(islice(texts, len(each))) for each in rows]
        splits = zip(block, held, (1 + positives_N).tolist())
        records = [replace(record, query=h[0], positives=h[1:n], negatives=h[n:]) for record, h, n in splits]
        return records, facts

    def record(self, query: int, positives: Sequence[int], negatives: Sequence[int], *rest: Any) -> Record[TokenIds]:
        """A record of tokens, from the fields of one that has the numbers of their rows."""
        get = self.__getitem__
        return Record(get(query), tuple(map(get, positives)), tuple(map(get, negatives)), *rest)


class Fingerprint:
    """A hash of what records hold, in their order; where they came from does not count. Of tokens it takes the id of
    the text they stand for."""

    _names = tuple(f.name for f in fields(Record) if f.name != "source")

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, record: Record[Text]) -> None:
        self._digest.update(repr([getattr(record, name) for name in self._names]).encode())

    def hex(self) -> str:
        return self._digest.hexdigest()


@dataclass(frozen=True)
class StoreCounts:
    """What `store.json` says: rows, the most negatives and positives that one of them has, the content's hash; of a
    store of token ids the highest of them, and the most tokens of a text."""

    rows: int
    most_negatives: int
    most_positives: int
    fingerprint: str
    top_token: int = 0
    longest_text: int = 0


class StoreWriter:
    """Writes a store into a folder, record by record; `close` completes it. Memory: one block.

    With `tokens` it is a store of token ids: `add_tokens` first, then records in which the numbers of the rows stand
    in the places of their texts.

    The folder is the caller's to make atomic (`core.files.atomic_folder`). Errors: `OSError` of a full disk.
    """

    def __init__(self, folder: Path, *, tokens: bool = False) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.rows = self.token_rows = 0
        self._most_negatives = self._most_positives = self._characters = self._token_end = 0
        self._top_token = self._longest_text = 0
        self._block: list[Record[Any]] = []
        self._lines: list[int] = []
        self._fingerprint = Fingerprint()
        self._schema = _schema(pa.int64() if tokens else pa.string())
        self._arrow = pa.ipc.new_file(str(folder / "records.arrow"), self._schema)
        self._arrays = ArrayWriter(folder, {**_FACTS, **_LINES})
        self._tokens = ArrayWriter(folder, _TOKENS) if tokens else None

    def __len__(self) -> int:
        return self.rows

    def add_tokens(
        self, text_N: IntArray, length_N: IntArray, id_S: npt.NDArray[Any], body_N: npt.NDArray[Any]
    ) -> IntArray:
        """The rows of some more texts, given by their ids, their numbers of tokens, all of the tokens one after the
        other, and the numbers of tokens that belong to prompts."""
        assert self._tokens is not None
        end_N = self._token_end + np.cumsum(length_N)
        self._tokens.append(token_text_N=text_N, token_body_N=body_N, token_end_N=end_N, token_id_S=id_S)
        row_N = self.token_rows + np.arange(len(text_N))
        self.token_rows += len(text_N)
        self._token_end += len(id_S)
        self._top_token = max(self._top_token, int(id_S.max(initial=0)))
        self._longest_text = max(self._longest_text, int(length_N.max(initial=0)))
        return row_N

    def add(self, record: Record[Any], line: int = 0) -> None:
        self.rows += 1
        self._block.append(record)
        self._lines.append(line)
        self._most_negatives = max(self._most_negatives, len(record.negatives))
        self._most_positives = max(self._most_positives, len(record.positives))
        if self._tokens is None:
            self._characters += sum(map(len, (record.query, *record.positives, *record.negatives)))
        if len(self._block) == _ROWS or self._characters >= _CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        if not self._block:
            return
        columns = [pa.array([getattr(record, f.name) for record in self._block], f.type) for f in self._schema]
        self._arrow.write_batch(pa.record_batch(columns, schema=self._schema))
        if self._tokens is None:
            records, facts = self._block, row_facts(self._block)
        else:
            self._tokens.flush()
            records, facts = TokenTable(self.folder).known(self._block)
        for record in records:
            self._fingerprint.add(record)
        self._arrays.append(
            query_id_N=facts.query_id_N,
            positive_id_P=facts.positive_id_P,
            count_N=np.diff(facts.offset_N1),
            length_N=facts.length_N,
            lines=np.asarray(self._lines),
        )
        self._block, self._lines, self._characters = [], [], 0

    def settle(
        self, change: Callable[[Record[Any], int], Record[Any] | None] | None = None
    ) -> tuple[RecordStore[Any], str]:
        """The complete store and its fingerprint. Records are written once more only if all of them must change, as
        `change` says, given the record and its line (`None`: it is left out)."""
        counts = self.close()
        if change is None:
            return RecordStore(self.folder), counts.fingerprint
        before: RecordStore[Any] = RecordStore(self.folder)
        other = StoreWriter(self.folder / "changed")
        for record, line in zip(before, before.lines().tolist()):
            if (changed := change(record, line)) is not None:
                other.add(changed, line)
        fingerprint = other.close().fingerprint
        for file in other.folder.iterdir():
            file.replace(self.folder / file.name)
        other.folder.rmdir()
        return RecordStore(self.folder), fingerprint

    def close(self) -> StoreCounts:
        self._flush()
        self.abandon()
        counts = StoreCounts(
            self.rows,
            self._most_negatives,
            self._most_positives,
            self._fingerprint.hex(),
            self._top_token,
            self._longest_text,
        )
        (self.folder / "store.json").write_text(json.dumps(asdict(counts)), encoding="utf-8")
        return counts

    def abandon(self) -> None:
        """Close the files as they are."""
        self._arrow.close()
        self._arrays.close()
        if self._tokens is not None:
            self._tokens.close()


class RecordStore(OneByOne[T]):
    """The records of a store, as a sequence: each is made when it is asked for. Safe to share between threads.

    Errors: `DataError` for a folder that is damaged or not a store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.counts = read_typed(folder / "store.json", StoreCounts)
            self._map = pa.memory_map(str(folder / "records.arrow"))
            reader = pa.ipc.open_file(self._map)
            batches = [reader.get_batch(place) for place in range(reader.num_record_batches)]
            self._tokens = TokenTable(folder) if reader.schema.field("query").type == pa.int64() else None
        except (DataError, OSError, ValueError, TypeError, LookupError, pa.ArrowException) as error:
            raise DataError(f"not a readable store of records ({error})", where=folder, fix="delete it") from error
        self._blocks = [batch.columns for batch in batches]
        self._ends = list(accumulate(len(batch) for batch in batches))
        if (self._ends[-1] if self._ends else 0) != self.counts.rows:
            raise DataError(f"{self._ends[-1]} rows instead of {self.counts.rows}", where=folder, fix="delete it")

    def __len__(self) -> int:
        return self.counts.rows

    def row(self, place: int) -> Record[T]:
        block = bisect_right(self._ends, place)
        within = place - (self._ends[block - 1] if block else 0)
        return self._record([column[within].as_py() for column in self._blocks[block]])

    def __iter__(self) -> Iterator[Record[T]]:
        for columns in self._blocks:
            yield from map(self._record, zip(*(column.to_pylist() for column in columns)))

    def _record(self, values: Sequence[Any]) -> Record[Any]:
        given: list[Any] = [tuple(value) if isinstance(value, list) else value for value in values]
        return Record(*given) if self._tokens is None else self._tokens.record(*given)

    def most_negatives(self) -> int:
        """Of any record."""
        return self.counts.most_negatives

    def facts(self) -> RowFacts:
        """The facts of all rows, memory-mapped (offsets are made anew, 8 bytes a row)."""
        return self._facts

    @cached_property
    def _facts(self) -> RowFacts:
        values = _mapped(self.folder, _FACTS)
        offset_N1: IntArray = np.zeros(len(self) + 1, np.int64)
        np.cumsum(values["count_N"], out=offset_N1[1:])
        return RowFacts(values["query_id_N"], values["positive_id_P"], offset_N1, values["length_N"])

    def lines(self) -> IntArray:
        """The line of each record in its source."""
        return _mapped(self.folder, _LINES)["lines"]
