"""A token cache as a source: records whose texts are places in it, and the tokens at those places.

A record of a cache holds keys instead of texts (`TokenText`): `q5:17` is the query in row 5, whose text has the id 17;
`d8:23` the document in row 8. Whatever draws rows, positives and negatives works on them as on texts: `text_id` gives
the id of the text, `tokens_of` the tokens. The Parquet files are converted once (`storecache`) to
plain arrays that are memory-mapped, because Parquet cannot be read at single rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.tokens import IntArray, TokenBatch
from embedsmith.data.cache import DiskShelf, look, stored
from embedsmith.data.plan.separate import RowFacts
from embedsmith.data.record import Record, TokenSide, TokenText
from embedsmith.data.source import RecordSet, Shelf, Source
from embedsmith.data.store import Kind, RecordStore, map_array
from embedsmith.data.token_cache import MANIFEST, SCORES, DatasetFacts, Manifest, TokenizerFacts

# A token cache's Parquet files to what is memory-mapped: records of keys, and plain arrays of tokens.

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


def is_token_cache(path: Path) -> bool:
    """A folder of tokens, with or without its manifest."""
    if not path.is_dir():
        return False
    if (path / MANIFEST).is_file():
        return True
    return any("query_input_ids" in pq.read_schema(file).names for file in path.glob("*.parquet"))


def read_tokens(source: Source) -> RecordSet:
    """A dataset of a token cache; `split` names it where there are several.

    Errors: `DataError` for a missing manifest, file or dataset, a document that is named but not there, or doc ids
    that stand for several documents.
    """
    folder = Path(source.path).expanduser()
    manifest = Manifest.load(folder)
    facts = _chosen(manifest, source, folder)
    source = replace(source, split=facts.name, format=None, task=_task(source, facts))
    files = {name: state for name, state in look(folder).items() if Path(name).name in _files_of(folder, facts)}
    found = stored(source, files, None, lambda shelf: convert_tokens(folder, facts, source, shelf))
    store = found.records
    assert isinstance(store, RecordStore)
    return replace(
        found,
        records=TokenRecords(store, manifest.tokenizer, facts),
        fingerprint=f"{found.fingerprint}-{manifest.tokenizer.sha256[:16]}",
    )


def _chosen(manifest: Manifest, source: Source, folder: Path) -> DatasetFacts:
    names = list(manifest.datasets)
    name = source.split or (names[0] if len(names) == 1 else None)
    if name not in manifest.datasets:
        raise DataError(
            "several datasets" if source.split is None and names else f"no dataset {source.split!r}",
            where=folder,
            expected=f"one of those in its manifest: {', '.join(names) or 'none'}",
            fix="set split to one of them",
        )
    return manifest.datasets[name]


def _task(source: Source, facts: DatasetFacts) -> Any:
    if source.task is not None and source.task != facts.task:
        raise RecipeError(f"the tokens are of task {facts.task}, not {source.task}", where=source.path)
    return facts.task


def _files_of(folder: Path, facts: DatasetFacts) -> set[str]:
    if facts.layout == "inline":
        return {f"{facts.name}.parquet"}
    return {f"{facts.name}_query.parquet", corpus_of(folder, facts.name).name}


@dataclass(frozen=True)
class TokenRecords(Sequence[Record]):
    """Records of keys (see above), and the tokens behind them. Safe to share between threads."""

    store: RecordStore
    tokenizer: TokenizerFacts
    facts_of_set: DatasetFacts

    def __len__(self) -> int:
        return len(self.store)

    @overload
    def __getitem__(self, row: int) -> Record: ...
    @overload
    def __getitem__(self, row: slice) -> list[Record]: ...
    def __getitem__(self, row: int | slice) -> Record | list[Record]:
        if isinstance(row, slice):
            return [self[place] for place in range(*row.indices(len(self)))]
        return self._known(self.store[row])

    def __iter__(self) -> Iterator[Record]:
        return map(self._known, self.store)

    def _known(self, record: Record) -> Record:
        """The record with keys that know their tokens."""
        return replace(
            record,
            query=self._text(record.query),
            positives=tuple(map(self._text, record.positives)),
            negatives=tuple(map(self._text, record.negatives)),
        )

    def _text(self, key: str) -> TokenText:
        row, _, id_ = key[1:].partition(":")
        return TokenText(key, int(id_), int(row), self._sides[key[0]])

    def facts(self) -> RowFacts:
        """Ids of the texts, and lengths in tokens."""
        folder = self.store.folder
        return RowFacts(
            map_array(folder / "tokens.query_id", np.int64),
            map_array(folder / "tokens.positive_id", np.int64),
            self.store.facts().offset_N1,
            map_array(folder / "tokens.length", np.int32),
        )

    def most_negatives(self) -> int:
        return self.store.most_negatives()

    @cached_property
    def _sides(self) -> dict[str, Side]:
        return {letter: Side.open(self.store.folder, name) for letter, name in SIDES.items()}


def tokens_of(texts: Sequence[str], is_query: bool, tokenize: Callable[[list[int]], TokenBatch]) -> TokenBatch:
    """The tokens of texts, in their order: looked up where they are known, and by `tokenize`, which is given the
    places of the texts that are not."""
    known: dict[int, list[int]] = {}
    places: list[int] = []
    plain: list[int] = []
    sides: dict[int, TokenSide] = {}
    for place, text in enumerate(texts):
        if isinstance(text, TokenText):
            sides[id(text.side)] = text.side
            known.setdefault(id(text.side), []).append(place)
        else:
            plain.append(place)
    if not known:
        return tokenize(plain)
    parts = []
    for number, side in sides.items():
        rows = [text.row for place in known[number] if isinstance(text := texts[place], TokenText)]
        parts.append(side.take(np.asarray(rows, np.int64), is_query))
        places += known[number]
    if plain:
        parts.append(tokenize(plain))
        places += plain
    return TokenBatch.concatenate(parts).take(np.argsort(places))


@dataclass(frozen=True)
class Side:
    """Tokens of all queries or all documents: row n is `id_S[end_N[n - 1]:end_N[n]]`."""

    id_S: npt.NDArray[np.int32]
    end_N: IntArray
    body_N: npt.NDArray[np.int32]

    @staticmethod
    def open(folder: Path, name: str) -> Side:
        kinds: dict[str, Kind] = {"ids": np.int32, "ends": np.int64, "body": np.int32}
        return Side(*(map_array(folder / f"tokens.{name}.{part}", kind) for part, kind in kinds.items()))

    def take(self, rows: IntArray, is_query: bool) -> TokenBatch:
        end = self.end_N[rows]
        start = np.where(rows > 0, self.end_N[rows - 1], 0)
        offset_P = np.concatenate([[0], np.cumsum(end - start)]).astype(np.int64)
        place = np.arange(offset_P[-1]) + np.repeat(start - offset_P[:-1], end - start)
        body = self.body_N[rows].astype(np.int64)
        return TokenBatch(self.id_S[place].astype(np.int64), offset_P, body, np.full(len(rows), is_query))
