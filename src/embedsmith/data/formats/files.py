"""Files to rows: one function a kind of file. A row is a place in its file and a mapping of column to value.

A row that cannot be read is handed on as a `RowError`, so that the reader can count such rows, name them and skip
them if it was told to. A file that cannot be read any further (missing, truncated) is a `DataError` at once.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from embedsmith.core.errors import DataError
from embedsmith.data.record import RowError, kind_of

Row = tuple[int, "dict[str, Any] | RowError"]


@dataclass(frozen=True)
class Rows:
    """`rows` yields (line, columns) or (line, error); `cells` is true where every value is text (CSV). A reader that
    knows the format or the score range itself says so. `version` stands for the content of a dataset that has no file
    here, of about `size` bytes."""

    path: Path | str
    rows: Iterable[Row]
    cells: bool = False
    format: str | None = None
    score_range: tuple[float, float] | None = None
    version: str | None = None
    size: int = 0


def open_rows(path: Path) -> Rows:
    """The rows of a file, by its extension. Errors: `DataError` if it is missing or of an unknown kind."""
    if not path.is_file():
        near = sorted(other.name for other in path.parent.glob("*"))[:8] if path.parent.is_dir() else []
        raise DataError(
            "no such file",
            where=path,
            expected=f"a file; in its folder: {', '.join(near)}" if near else "a file",
            fix="check the path" if path.parent.is_dir() else f"check the path: there is no folder {path.parent}",
        )
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = next((suffix for suffix in reversed(suffixes) if suffix != ".gz"), "")
    if kind not in _READERS:
        raise DataError(
            f"unknown kind of file {kind or path.name!r}",
            where=path,
            expected=f"one of {', '.join(_READERS)}, the text kinds also as .gz; or a BEIR or dataset folder",
            fix="rename or convert the file",
        )
    return Rows(path, _READERS[kind](path), cells=kind in (".csv", ".tsv"))


def has_known_kind(name: str) -> bool:
    return any(name.lower().removesuffix(".gz").endswith(kind) for kind in _READERS)


def text_lines(path: Path) -> Iterator[tuple[int, str | RowError]]:
    """Lines of a UTF-8 file, gzipped or not, numbered from 1. A byte order mark that starts a line is dropped: files
    that were joined have one at every seam. A file in UTF-16 or UTF-32 is refused by its mark, once for all lines."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
                    fix = f"convert it, for example: iconv -f UTF-16 -t UTF-8 {path.name}"
                    raise DataError("the file is UTF-16 or UTF-32, by its byte order mark", where=path, fix=fix)
                raw = line.removeprefix(codecs.BOM_UTF8)
                try:
                    yield number, raw.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    yield number, RowError("not UTF-8", f"not UTF-8 ({error.reason})", fix="save the file as UTF-8")
    except EOFError as error:
        raise DataError(
            "the gzip file ends in the middle", where=f"{path}:{number + 1}", fix="copy or download it again"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"not a readable gzip file ({error})",
            where=f"{path}:{number + 1}",
            fix="copy it again, or drop .gz from the name if it is plain text",
        ) from error
    except OSError as error:
        raise DataError(f"cannot read the file ({error.strerror})", where=path, fix="check its permissions") from error


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return path.open("rb")


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in text_lines(path):
        if isinstance(line, RowError):
            yield number, line
        elif line and not line.isspace():
            yield number, parse_object(line)


def parse_object(line: str) -> dict[str, Any] | RowError:
    try:
        value = json.loads(line)
    except ValueError as error:
        return RowError("not valid JSON", f"not valid JSON ({error})", fix="one JSON object a line")
    except RecursionError:
        return RowError("not valid JSON", "JSON nested too deeply", fix="one JSON object a line")
    return _object(value)


def _object(value: Any) -> dict[str, Any] | RowError:
    if isinstance(value, dict):
        return value
    kind = f"the row is {kind_of(value)}, not an object"
    return RowError(kind, expected='a JSON object such as {"query": ..., "positives": [...]}')


def _json(path: Path) -> Iterator[Row]:
    """A JSON file is either lines of objects, or one array of them (rows are then numbered from 1)."""
    lines = text_lines(path)
    first = next(((n, line) for n, line in lines if isinstance(line, RowError) or line.strip()), None)
    if first is None or isinstance(first[1], RowError) or not first[1].lstrip().startswith("["):
        yield from _json_lines(path)
        return
    rest = [line if isinstance(line, str) else "" for _, line in lines]
    try:
        values = json.loads("\n".join([first[1], *rest]))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON ({error})", where=path, fix="an array of objects, or one a line") from error
    yield from enumerate((_object(value) for value in values), start=1)


def _separated(delimiter: str) -> Callable[[Path], Iterator[Row]]:
    def read(path: Path) -> Iterator[Row]:
        csv.field_size_limit(2**31 - 1)  # long documents are longer than the default limit
        broken: list[RowError] = []
        quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        lines = csv.reader(_whole_lines(path, broken), delimiter=delimiter, strict=True, quoting=quoting)
        header: list[str] | None = None
        try:
            for cells in lines:
                if header is None:
                    if broken:
                        raise broken.pop().at(f"{path}:{lines.line_num}")
                    header = _header(path, cells)
                elif cells:
                    yield lines.line_num, broken.pop() if broken else _row(header, cells)
        except csv.Error as error:
            raise DataError(f"not valid CSV ({error})", where=f"{path}:{lines.line_num}") from error

    return read


def _whole_lines(path: Path, broken: list[RowError]) -> Iterator[str]:
    """Lines as the csv module wants them; one that cannot be decoded leaves its error in `broken`."""
    for _, line in text_lines(path):
        if isinstance(line, RowError):
            broken.append(line)
        yield "undecodable\n" if isinstance(line, RowError) else line + "\n"


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"the header names {', '.join(twice)} twice", where=f"{path}:1", fix="rename one of them")
    return names


def _row(header: list[str], cells: list[str]) -> dict[str, Any] | RowError:
    if len(cells) != len(header):
        kind = "cells and header differ in number"
        return RowError(kind, f"{len(cells)} cells, but the header has {len(header)}", fix="quote cells with commas")
    return dict(zip(header, cells))


def _parquet(path: Path) -> Iterator[Row]:
    """Rows are numbered from 1. Read batch by batch."""
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"not a readable Parquet file ({error})", where=f"{path}:{number + 1}", fix="copy it again"
        ) from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}
