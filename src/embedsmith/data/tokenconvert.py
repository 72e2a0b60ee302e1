"""A token cache's Parquet files to what is memory-mapped: records of keys, and plain arrays of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedsmith.core.errors import DataError
from embedsmith.core.tokens import IntArray
from embedsmith.data.record import Record
from embedsmith.data.source import RecordSet, Shelf, Source
from embedsmith.data.storecache import DiskShelf
from embedsmith.data.tokencache import SCORES
from embedsmith.data.tokenmanifest import DatasetFacts

_BATCH = 8192
SIDES = {"q": "query", "d": "document"}
"""First letter of a key, and the arrays it points into."""


def corpus_of(folder: Path, name: str) -> Path:
    """A dataset's own corpus, or the one that the released scripts want all corpora joined to."""
    own = folder / f"{name}_corpus.parquet"
    return own if own.exists() or not (folder / "corpus.parquet").exists() else folder / "corpus.parquet"


class _SideWriter:
    """Appends tokens to the arrays of one side."""

    def __init__(self, folder: Path, name: str) -> None:
        self._files: dict[str, IO[bytes]] = {
            part: (folder / f"tokens.{name}.{part}").open("wb") for part in ("ids", "ends", "body")
        }
        self.rows = self._end = 0

    def add(self, lists: Any, body: npt.NDArray[Any]) -> None:
        """`lists`: an Arrow list array without nulls."""
        lengths = np.asarray(pc.list_value_length(lists)).astype(np.int64)
        ends = self._end + np.cumsum(lengths)
        self._files["ids"].write(np.asarray(lists.flatten()).astype(np.int32).tobytes())
        self._files["ends"].write(ends.astype(np.int64).tobytes())
        self._files["body"].write(np.ascontiguousarray(body, dtype=np.int32).tobytes())
        self.rows += len(lengths)
        self._end += int(lengths.sum())

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def convert_tokens(folder: Path, facts: DatasetFacts, source: Source, shelf: Shelf) -> RecordSet:
    """Parquet to records of keys and arrays of tokens."""
    assert isinstance(shelf, DiskShelf)
    convert = _Conversion(facts, source, shelf)
    try:
        if facts.layout == "corpus":
            convert.read_corpus(corpus_of(folder, facts.name))
            convert.read_rows(folder / f"{facts.name}_query.parquet")
        else:
            convert.read_rows(folder / f"{facts.name}.parquet")
    finally:
        convert.close()
    if not len(shelf):
        raise DataError("no records in it", where=folder, fix="tokenize again")
    records, hash_ = shelf.settle(None)
    return RecordSet(source.name or facts.name, facts.task, records, hash_, format="tokens", labels=facts.labels)


class _Conversion:
    def __init__(self, facts: DatasetFacts, source: Source, shelf: DiskShelf) -> None:
        self.facts, self.source, self.shelf = facts, source, shelf
        self.query, self.document = (_SideWriter(shelf.folder, name) for name in SIDES.values())
        self._facts = {
            name: (shelf.folder / f"tokens.{name}").open("wb") for name in ("query_id", "positive_id", "length")
        }
        self._name_M: IntArray = np.zeros(0, np.int64)
        self._row_M = self._id_N = self._length_N = self._name_M

    def close(self) -> None:
        self.query.close()
        self.document.close()
        for file in self._facts.values():
            file.close()

    def read_corpus(self, path: Path) -> None:
        """Tokens of all documents, and where to find each by its `doc_id`."""
        names: list[IntArray] = []
        ids: list[IntArray] = []
        lengths: list[IntArray] = []
        for _, batch in _batches(path, ("doc_id", "input_ids")):
            names.append(self._names(batch["doc_id"]))
            ids.append(names[-1] if self.facts.ids == "text" else _content_ids(batch["input_ids"]))
            lengths.append(np.asarray(pc.list_value_length(batch["input_ids"])).astype(np.int64))
            self.document.add(batch["input_ids"], _column(batch, "body_start"))
        name_N = np.concatenate(names) if names else self._name_M
        self._id_N = np.concatenate(ids) if ids else self._name_M
        self._length_N = np.concatenate(lengths) if lengths else self._name_M
        self._row_M = np.argsort(name_N, kind="stable")
        self._name_M = name_N[self._row_M]
        again = np.flatnonzero(self._name_M[1:] == self._name_M[:-1])
        differ = again[self._id_N[self._row_M[again]] != self._id_N[self._row_M[again + 1]]]
        if len(differ):
            first, second = (int(self._row_M[differ[0] + step]) + 1 for step in (0, 1))
            raise DataError(
                f"the doc_id of row {first} stands for another document here ({len(differ)} such rows)",
                where=f"{path}:{second}",
                fix="make doc ids unique: corpora of several datasets share ids only for equal documents",
            )

    def _names(self, column: Any) -> IntArray:
        values = column.to_pylist()
        if self.facts.ids == "text":
            return np.asarray([int(value) for value in values], np.int64)
        return np.asarray([_hash(str(value).encode()) for value in values], np.int64)

    def read_rows(self, path: Path) -> None:
        columns = ("query_input_ids",)
        for line, batch in _batches(path, columns):
            slots = [name for name in batch if name.endswith("_input_ids") and name != "query_input_ids"]
            slots.sort(key=_slot_order)
            query_id_N = self._ids(batch, "query_id", "query_input_ids")
            length_N = np.asarray(pc.list_value_length(batch["query_input_ids"])).astype(np.int64)
            first = self.query.rows
            self.query.add(batch["query_input_ids"], _column(batch, "query_body_start"))
            held = {name: self._documents(batch, name, f"{path}:{line}") for name in slots}
            self._add(batch, held, first, query_id_N, length_N, line)
            if self.source.limit is not None and len(self.shelf) >= self.source.limit:
                return

    def _documents(self, batch: dict[str, Any], name: str, where: str) -> tuple[list[str | None], IntArray, IntArray]:
        """(keys, text ids, lengths) of one slot of every row; -1 where it is empty."""
        column = batch[name]
        held = np.asarray(column.is_valid())
        row_N, id_N, length_N = (np.full(len(held), -1, np.int64) for _ in range(3))
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            prefix = name.removesuffix("_input_ids")
            lists = column.filter(column.is_valid())
            row_N[held] = self.document.rows + np.arange(held.sum())
            id_N[held] = self._ids(batch, f"{prefix}_id", name)[held]
            length_N[held] = np.asarray(pc.list_value_length(lists))
            self.document.add(lists, _column(batch, f"{prefix}_body_start")[held])
        elif held.any():
            wanted = self._names(column.filter(column.is_valid()))
            place = np.searchsorted(self._name_M, wanted).clip(max=max(len(self._name_M) - 1, 0))
            known = self._name_M[place] == wanted if len(self._name_M) else np.zeros(len(wanted), bool)
            if not known.all():
                missing = column.filter(column.is_valid())[int(np.argmin(known))]
                raise DataError(f"{name} names the document {missing}, which is not in the corpus", where=where)
            row_N[held] = self._row_M[place]
            id_N[held], length_N[held] = self._id_N[row_N[held]], self._length_N[row_N[held]]
        keys = [f"d{row}:{id_}" if row >= 0 else None for row, id_ in zip(row_N.tolist(), id_N.tolist())]
        return keys, id_N, length_N

    def _ids(self, batch: dict[str, Any], column: str, tokens: str) -> IntArray:
        """Text ids where the cache has them, else a hash of the tokens: equal for equal texts either way."""
        if column in batch:
            return np.asarray(batch[column].fill_null(-1)).astype(np.int64)
        return _content_ids(batch[tokens])

    def _add(
        self,
        batch: dict[str, Any],
        held: dict[str, Any],
        first: int,
        query_id_N: IntArray,
        length_N: IntArray,
        line: int,
    ) -> None:
        good = [name for name in held if name.startswith("passage")]
        bad = [name for name in held if name.startswith("negative")]
        extra = {name: batch[name].to_pylist() for name in (*SCORES, "label") if name in batch}
        for name in held:
            length_N = np.maximum(length_N, held[name][2])
        positive_ids: list[int] = []
        count = (
            len(query_id_N) if self.source.limit is None else min(len(query_id_N), self.source.limit - len(self.shelf))
        )
        for n in range(count):
            positives = tuple(held[name][0][n] for name in good if held[name][0][n] is not None)
            positive_ids.extend(int(held[name][1][n]) for name in good if held[name][0][n] is not None)
            scores: dict[str, Any] = {name: _tuple(extra[name][n]) for name in SCORES if name in extra}
            record = Record(
                query=f"q{first + n}:{query_id_N[n]}",
                positives=positives,
                negatives=tuple(held[name][0][n] for name in bad if held[name][0][n] is not None),
                task=self.facts.task,
                label=extra["label"][n] if "label" in extra else None,
                source=self.facts.name,
                **scores,
            )
            self.shelf.add(record, line + n)
        self._facts["query_id"].write(query_id_N[:count].tobytes())
        self._facts["positive_id"].write(np.asarray(positive_ids, np.int64).tobytes())
        self._facts["length"].write(length_N[:count].astype(np.int32).tobytes())


def _batches(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, columns) of a Parquet file, a few thousand rows at a time. Errors: `DataError`."""
    line = 1
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if absent := [name for name in needed if name not in names]:
                raise DataError(f"no column {absent[0]!r}; found: {', '.join(names)}", where=path)
            used = [name for name in names if name not in ("query", "passage", "text") and not _is_text(name)]
            for batch in file.iter_batches(batch_size=_BATCH, columns=used):
                columns = dict(zip(batch.schema.names, batch.columns, strict=True))
                for name in needed:
                    if columns[name].null_count:
                        raise DataError(f"{name} is null", where=f"{path}:{line}", fix="remove such rows")
                yield line, columns
                line += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"not a readable Parquet file ({error})", where=f"{path}:{line}", fix="copy it again"
        ) from error


def _is_text(name: str) -> bool:
    """`passage_2`, `negative_7`: kept texts, of no use here."""
    head, _, number = name.partition("_")
    return head in ("passage", "negative") and number.isdecimal()


def _slot_order(name: str) -> tuple[str, int]:
    head, _, number = name.removesuffix("_input_ids").partition("_")
    return head, int(number or 0)


def _column(batch: dict[str, Any], name: str) -> npt.NDArray[Any]:
    """A column of numbers, zeros where the cache does not have it."""
    if name not in batch:
        return np.zeros(len(next(iter(batch.values()))), np.int32)
    return np.asarray(batch[name].fill_null(0))


def _content_ids(lists: Any) -> IntArray:
    return np.asarray([_hash(np.asarray(row.values).tobytes()) if row.is_valid else -1 for row in lists], np.int64)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def _tuple(value: list[Any] | None) -> tuple[Any, ...] | None:
    return None if value is None else tuple(value)
