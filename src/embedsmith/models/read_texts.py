"""Texts with ids from a file, one at a time: plain text, JSONL, CSV, TSV or Parquet. Only what encoding needs."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import IO, Any

from embedsmith.core.errors import DataError
from embedsmith.core.titles import titled

Row = tuple[str | None, str]
"""(id or None, text)"""
FORMATS = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")


def read_texts(path: Path, column: str | None = None) -> Iterator[Row]:
    """Rows of one file. `.txt`: a text a line. `.jsonl`: `text`, after `title` and a space where there is one.
    `.csv`, `.tsv`, `.parquet`: the named column. `.gz` is fine. Ids come from `_id` or `id`.

    Errors: `DataError` naming the file and the line.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind not in FORMATS:
        raise DataError(f"unknown kind of file {kind!r}", where=path, expected=f"one of {', '.join(FORMATS)}")
    if kind == ".parquet":
        yield from _parquet(path, column)
        return
    try:
        with _open(path) as file:
            if kind == ".txt":
                yield from ((None, line.rstrip("\r\n")) for line in file)
            elif kind == ".jsonl":
                yield from _jsonl(file, path, column)
            else:
                yield from _csv(file, path, column, "\t" if kind == ".tsv" else ",")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read this file: {error}", where=path) from error


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _jsonl(file: IO[str], path: Path, column: str | None) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"not JSON: {error}", where=where, expected="one object a line") from error
        if not isinstance(row, dict):
            raise DataError(f"a {type(row).__name__}, not an object", where=where)
        text = _text(row, column or "text", where)
        title = "" if column is not None else _text(row, "title", where) if row.get("title") else ""
        yield _id(row), titled(title, text)


def _csv(file: IO[str], path: Path, column: str | None, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(file, delimiter=delimiter)
    name = _column(column, list(reader.fieldnames or []), path)
    for row in reader:
        yield _id(row), _text(row, name, f"{path}:{reader.line_num}")


def _parquet(path: Path, column: str | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            name = _column(column, file.schema_arrow.names, path)
            kept = [name, *(key for key in ("_id", "id") if key in file.schema_arrow.names and key != name)]
            batches = (batch.to_pylist() for batch in file.iter_batches(columns=kept))
            for number, row in enumerate(chain.from_iterable(batches), start=1):
                yield _id(row), _text(row, name, f"{path}: row {number}")
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"cannot read this file: {error}", where=path) from error


def _column(column: str | None, found: list[str], path: Path) -> str:
    name = column or ("text" if "text" in found else None)
    if name is None or name not in found:
        raise DataError(
            "which column holds the texts?" if name is None else f"there is no column {name!r}",
            where=path,
            expected=f"one of the columns {', '.join(found) or '(none)'}",
            fix="name it with --column",
        )
    return name


def _text(row: Mapping[Any, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise DataError(
            f"{name!r} is {'missing' if name not in row else type(value).__name__}", where=where, expected="a string"
        )
    return value


def _id(row: Mapping[Any, Any]) -> str | None:
    value = row.get("_id", row.get("id"))
    return None if value is None else str(value)
