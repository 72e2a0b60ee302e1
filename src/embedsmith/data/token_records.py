"""Reading a token cache: its records hold the tokens of their texts (`TokenIds`) in the places of the texts.

Whatever draws rows, positives and negatives works on them as on texts: `text_id` gives the id of the text, and
`tokens_of` the batch of tokens. The Parquet files are converted once, to a store that is memory-mapped, because
Parquet cannot be read at single rows.

    NAME_corpus.parquet  ->  rows of the store's token table, found by `doc_id`
    NAME_query.parquet   ->  the queries' tokens: more rows; and the records, which hold numbers of rows
    NAME.parquet         ->  both at once (inline layout)
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedsmith.core.encoder import Role
from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.inputs import local_path
from embedsmith.core.tokens import IntArray, TokenBatch
from embedsmith.data.cache import file_states, stored
from embedsmith.data.formats.file_kinds import parquet_schema, readable_parquet
from embedsmith.data.record import TASKS, Record, Text, TokenIds, typed_for_source, value_faults
from embedsmith.data.source import DatasetFacts, RecordSet, Source
from embedsmith.data.store import StoreWriter
from embedsmith.data.token_cache import MANIFEST, SCORES, Manifest, Tokenize

_BATCH = 8192
_KEPT_TEXT = re.compile(r"query|text|(passage|negative)(_\d+)?")
"""Columns of texts, which a cache may have beside the tokens."""


def tokens_of(
    tokenize: Tokenize,
    texts: Sequence[Text],
    role: Role | Sequence[Role],
    task: str | None = None,
    instructions: Sequence[str | None] | None = None,
) -> TokenBatch:
    """The tokens of texts, in their order: those that a token cache holds, and those that `tokenize` makes.

    `role`: of all texts, or one a text. An instruction, one a text where there are any, takes the place of the task's
    prompt; tokens of a cache have it in them.
    """
    roles = [role] * len(texts) if isinstance(role, str) else role
    plain = [place for place, text in enumerate(texts) if isinstance(text, str)]
    known = [place for place, text in enumerate(texts) if not isinstance(text, str)]
    parts = []
    if known or not texts:
        held = [text for text in texts if isinstance(text, TokenIds)]
        ids = np.concatenate([np.zeros(0, np.int64), *(text.ids for text in held)], dtype=np.int64)
        ends = np.cumsum([0, *(len(text.ids) for text in held)], dtype=np.int64)
        body = np.asarray([text.body for text in held], np.int64)
        parts.append(TokenBatch(ids, ends, body, np.asarray([roles[place] == "query" for place in known], bool)))
    if plain:
        own = None if instructions is None else [instructions[place] for place in plain]
        given = own if own is not None and any(one is not None for one in own) else None
        wanted = role if isinstance(role, str) else [role[place] for place in plain]
        parts.append(tokenize([text for text in texts if isinstance(text, str)], wanted, task, given))
    return parts[0] if len(parts) == 1 else TokenBatch.concatenate(parts).take(np.argsort([*known, *plain]))


def is_token_cache(path: Path) -> bool:
    """Whether this is a folder of tokens, with or without its manifest."""
    if not path.is_dir():
        return False
    if (path / MANIFEST).is_file():
        return True
    files = (file for file in path.glob("*.parquet") if file.is_file())
    return any("query_input_ids" in parquet_schema(file).names for file in files)


def read_tokens(source: Source) -> RecordSet[TokenIds]:
    """A dataset of a token cache; `split` names it where there are several.

    Errors: `DataError` for a missing manifest, file or dataset, a document that is named but not there, or doc ids
    that stand for several documents.
    """
    folder = local_path(source.path)
    manifest = Manifest.load(folder)
    facts = _chosen(manifest, source, folder)
    if source.task is not None and source.task != facts.task:
        raise RecipeError(f"the tokens are of task {facts.task}, not {source.task}", where=source.path)
    task: Any = facts.task
    source = replace(source, split=facts.name, format=None, task=task)
    paths = [str(path) for path in _paths(folder, facts)]
    files = {name: state for name, state in file_states(folder).items() if name in paths}
    found = stored(source, files, None, lambda writer: _convert(folder, facts, source, writer), tokens=True)
    hash_ = f"{found.fingerprint}-{manifest.tokenizer.sha256[:16]}"
    return replace(found, tokens=(manifest.tokenizer, facts), fingerprint=hash_)


def _chosen(manifest: Manifest, source: Source, folder: Path) -> DatasetFacts:
    names = list(manifest.datasets)
    name = source.split or (names[0] if len(names) == 1 else None)
    if name not in manifest.datasets:
        raise DataError(
            "several datasets" if source.split is None and names else f"no dataset {source.split!r}",
            where=folder,
            expected=f"one of those in its manifest: {', '.join(names) or 'none'}",
            fix=f"set split to one of them {typed_for_source('split=' + next(iter(names), 'NAME'))}",
        )
    facts = manifest.datasets[name]
    if facts.task not in TASKS:
        raise DataError(f"unknown task {facts.task!r}", where=folder / MANIFEST, expected=f"one of {', '.join(TASKS)}")
    return facts


def _paths(folder: Path, facts: DatasetFacts) -> list[Path]:
    """The files of a dataset in the order in which they are read: its corpus first, or the one that the released
    scripts want all corpora joined to."""
    if facts.layout == "inline":
        return [folder / f"{facts.name}.parquet"]
    corpora = [folder / f"{facts.name}_corpus.parquet", folder / "corpus.parquet"]
    corpus = next((path for path in corpora if path.exists()), corpora[0])
    return [corpus, folder / f"{facts.name}_query.parquet"]


def _convert(folder: Path, facts: DatasetFacts, source: Source, writer: StoreWriter) -> RecordSet[Any]:
    conversion = _Conversion(facts, source, writer)
    *corpus, rows = _paths(folder, facts)
    for path in corpus:
        conversion.read_corpus(path)
    conversion.read_rows(rows)
    if not len(writer):
        raise DataError("no records in it", where=folder, fix="tokenize again")
    records, hash_ = writer.settle()
    return RecordSet(source.name or facts.name, facts.task, records, hash_, format="tokens", labels=facts.labels)


class _Conversion:
    """Parquet files to a store of tokens. `_name_M` are hashes of the documents' names, sorted; `_row_M` the rows of
    the token table where these documents are."""

    def __init__(self, facts: DatasetFacts, source: Source, writer: StoreWriter) -> None:
        self.facts, self.source, self.writer = facts, source, writer
        self._name_M: IntArray = np.zeros(0, np.int64)
        self._row_M = self._name_M

    def read_corpus(self, path: Path) -> None:
        """Tokens of all documents, and where to find each by its `doc_id`.

        Errors: `DataError` for an id of two different documents.
        """
        names, texts, rows = [self._name_M], [self._name_M], [self._row_M]
        for line, batch in _batches(path, ("doc_id", "input_ids")):
            where = f"{path}:{line}"
            names.append(self._names(batch["doc_id"], where))
            texts.append(names[-1] if self.facts.ids == "text" else _content_ids(batch["input_ids"]))
            rows.append(self._add_tokens(batch["input_ids"], texts[-1], batch.get("body_start"), where))
        name_N, text_N, row_N = map(np.concatenate, (names, texts, rows))
        order_M = np.argsort(name_N, kind="stable")
        self._name_M, self._row_M = name_N[order_M], row_N[order_M]
        again = np.flatnonzero(self._name_M[1:] == self._name_M[:-1])
        differ = again[text_N[order_M[again]] != text_N[order_M[again + 1]]]
        if len(differ):
            first, second = (int(order_M[differ[0] + step]) + 1 for step in (0, 1))
            raise DataError(
                f"the doc_id of row {first} stands for another document here ({len(differ)} such rows)",
                where=f"{path}:{second}",
                fix="make doc ids unique: corpora of several datasets share ids only for equal documents",
            )

    def read_rows(self, path: Path) -> None:
        for line, batch in _batches(path, ("query_input_ids",)):
            queries = self._lists(batch, "query_input_ids", f"{path}:{line}")
            slots = [name for name in batch if re.fullmatch(r"(passage|negative)(_\d+)?_input_ids", name)]
            slots.sort(key=lambda name: (name[0], int((re.findall(r"\d+", name) or [0])[0])))
            rows = {name: self._documents(batch, name, f"{path}:{line}") for name in slots}
            documents: list[list[tuple[int, ...]]] = []
            for role in ("passage", "negative"):
                held = zip(*(rows[name] for name in slots if name.startswith(role)))
                documents.append([tuple(row for row in one if row is not None) for one in held] or [()] * len(queries))
            extra = {name: batch[name].to_pylist() for name in (*SCORES, "label") if name in batch}
            for n, (query, positives, negatives) in enumerate(zip(queries, *documents)):
                if self.source.limit is not None and len(self.writer) >= self.source.limit:
                    return
                values: dict[str, Any] = {"task": self.facts.task, "source": self.facts.name}
                for name, column in extra.items():
                    values[name] = tuple(column[n]) if isinstance(column[n], list) else column[n]
                record: Record[Any] = Record(query, positives, negatives, **values)
                for fault in value_faults(record):
                    raise fault.at(f"{path}:{line + n}")
                self.writer.add(record, line + n)

    def _documents(self, batch: dict[str, Any], name: str, where: str) -> list[int | None]:
        """The rows of the token table that hold one slot of every record."""
        column = batch[name]
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            return self._lists(batch, name, where)
        wanted = self._names(column.drop_null(), where)
        place = np.searchsorted(self._name_M, wanted).clip(max=max(len(self._name_M) - 1, 0))
        known = self._name_M[place] == wanted if len(self._name_M) else np.zeros(len(wanted), bool)
        if not known.all():
            missing = column.drop_null()[int(np.argmin(known))]
            raise DataError(f"{name} names the document {missing}, which is not in the corpus", where=where)
        return _spread(self._row_M[place], column)

    def _lists(self, batch: dict[str, Any], name: str, where: str) -> list[int | None]:
        """The rows of the token table that are made of a column of token ids. The id of a text is that of the cache
        where it has one, else a hash of the tokens: equal for equal texts either way."""
        column, prefix = batch[name], name.removesuffix("_input_ids")
        lists, held = column.drop_null(), column.is_valid()
        ids, body = batch.get(f"{prefix}_id"), batch.get(f"{prefix}_body_start")
        text_N = _content_ids(lists) if ids is None else np.asarray(ids.filter(held).fill_null(-1))
        return _spread(self._add_tokens(lists, text_N, None if body is None else body.filter(held), where), column)

    def _add_tokens(self, lists: Any, text_N: IntArray, body: Any, where: str) -> IntArray:
        length_N = np.asarray(pc.list_value_length(lists)).astype(np.int64)
        body_N = np.zeros(len(lists), np.int32) if body is None else np.asarray(body.fill_null(0))
        flat = lists.flatten()
        least, most = pc.min_max(flat).as_py().values() if len(flat) else (0, 0)
        for wrong, what in (
            (flat.null_count > 0, "a token id is null"),
            (least is None or least < 0 or most >= 2**31, f"token ids from {least} to {most}"),
            (bool((length_N < 1).any()), "a text has no token"),
            (bool(((body_N < 0) | (body_N > length_N)).any()), "a text's body starts outside of it"),
        ):
            if wrong:
                raise DataError(
                    what, where=f"{where} and below", expected="ids of tokens, from 0", fix="tokenize again"
                )
        return self.writer.add_tokens(text_N, length_N, np.asarray(flat), body_N)

    def _names(self, column: Any, where: str) -> IntArray:
        values = column.to_pylist()
        if self.facts.ids == "name":
            return np.asarray([_hash(str(value).encode()) for value in values], np.int64)
        try:
            return np.asarray([int(value) for value in values], np.int64)
        except (ValueError, OverflowError) as error:
            what = f"a document's name is no id of a text ({error})"
            raise DataError(what, where=f"{where} and below", fix="tokenize again") from error


def _batches(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, columns by name) of a Parquet file, a few thousand rows at a time. Errors: `DataError`."""
    line, schema = 1, parquet_schema(path)
    if absent := [name for name in needed if name not in schema.names]:
        raise DataError(f"no column {absent[0]!r}; found: {', '.join(schema.names)}", where=path)
    used = [name for name in schema.names if not _KEPT_TEXT.fullmatch(name)]
    for name in used:
        if (expected := _expected_type(name, schema.field(name).type)) is not None:
            raise DataError(f"the column {name!r} is {schema.field(name).type}", where=path, expected=expected)
    with readable_parquet(path, lambda: line), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH, columns=used):
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            for name in needed:
                if columns[name].null_count:
                    raise DataError(f"{name} is null", where=f"{path}:{line}", fix="remove such rows")
            yield line, columns
            line += len(batch)


def _expected_type(name: str, kind: pa.DataType) -> str | None:
    """What a column should hold, where it holds something else."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if name.endswith("input_ids"):
        by_name = is_text and name.startswith(("passage", "negative"))
        right = by_name or (is_list and pa.types.is_integer(kind.value_type))
        return None if right else "lists of token ids, or names of documents"
    if name in SCORES:
        right = is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))
        return None if right else "lists of numbers"
    if name == "doc_id":
        return None if is_text or pa.types.is_integer(kind) else "names of documents"
    if name == "label" or name.endswith(("_id", "body_start")):
        return None if pa.types.is_integer(kind) else "whole numbers"
    return None


def _spread(row_N: npt.NDArray[Any], column: Any) -> list[int | None]:
    """Rows of the texts that a column holds, `None` where it holds none."""
    rows = iter(row_N.tolist())
    return [next(rows) if held else None for held in column.is_valid().to_pylist()]


def _content_ids(lists: Any) -> IntArray:
    return np.asarray([_hash(np.asarray(row.values).tobytes()) for row in lists], np.int64)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1
