"""Files to rows: one function a kind of file, on the shelf `file_kinds` under its extension. A row is its place in the
file and a mapping of column to value, as JSON would give it.

A row that cannot be read is handed on as a `RowError`, so that the reader can count such rows, name them, and skip
them if the recipe says so. A file that cannot be read any further (missing, truncated) is a `DataError` at once.
"""

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.shelf import file_kinds
from embedsmith.data.record import RowError, kind_of

Row = tuple[int, "dict[str, Any] | RowError"]


@dataclass(frozen=True)
class Rows:
    """`rows` yields (line, columns) or (line, error); `cells` is true where every value is text (CSV). A reader that
    knows the format or the score range itself sets it here. `version` stands for the content of a dataset that has
    no file here, of about `size` bytes."""

    path: Path | str
    rows: Iterable[Row]
    cells: bool = False
    format: str | None = None
    score_range: tuple[float, float] | None = None
    version: str | None = None
    size: int = 0


def open_rows(path: Path, columns: Sequence[str] | None = None) -> Rows:
    """The rows of a file, by its extension. `columns`: those that are wanted, where a kind can leave out the others.

    Errors: `DataError` if it is missing or of an unknown kind.
    """
    if not path.is_file():
        near = sorted(other.name for other in path.parent.glob("*"))[:8] if path.parent.is_dir() else []
        raise DataError(
            "no such file",
            where=path,
            expected=f"a file; in its folder: {', '.join(near)}" if near else "a file",
            fix="check the path" if path.parent.is_dir() else f"check the path: there is no folder {path.parent}",
        )
    kind = _kind(path.name)
    try:
        read = file_kinds.get(kind)
    except RecipeError as error:
        what = f"unknown kind of file {kind or path.name!r}"
        kinds = f"{error.expected}, the text kinds also as .gz; or a BEIR or dataset folder"
        raise DataError(what, where=path, expected=kinds, fix="rename or convert the file") from error
    rows = parquet_rows(path, columns) if read is parquet_rows else read(path)
    return Rows(path, rows, cells=kind in (".csv", ".tsv"))


def sound_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with its place (`file:line`). Errors: `DataError` for the first that cannot be read."""
    for line, row in open_rows(path, columns).rows:
        if isinstance(row, RowError):
            raise row.at(f"{path}:{line}")
        yield f"{path}:{line}", row


def has_known_kind(name: str) -> bool:
    """Whether the name ends like a file of a known kind. Packages of users are imported only if it ends otherwise."""
    own = (entry.name for entry in file_kinds.entries(plugins=False))
    return _kind(name) in own or ("." in name and _kind(name) in file_kinds.names())


def _kind(name: str) -> str:
    """The last extension that is not .gz, in small letters."""
    return next((suffix.lower() for suffix in reversed(Path(name).suffixes) if suffix.lower() != ".gz"), "")


def text_lines(path: Path) -> Iterator[tuple[int, str | RowError]]:
    """Lines of a UTF-8 file, gzipped or not, numbered from 1. A byte order mark that starts a line is dropped: files
    that were joined have one at every seam. A file in UTF-16 or UTF-32 is refused by its mark, once for all lines."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
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


@file_kinds.register(".txt")
def plain_lines(path: Path) -> Iterator[Row]:
    """A text a line, in the column `text`."""
    for number, line in text_lines(path):
        yield number, line if isinstance(line, RowError) else {"text": line}


@file_kinds.register(".jsonl")
@file_kinds.register(".ndjson")
def json_lines(path: Path) -> Iterator[Row]:
    """A JSON object a line. Empty lines are left out."""
    for number, line in text_lines(path):
        if isinstance(line, RowError):
            yield number, line
        elif line and not line.isspace():
            yield number, _parsed(line)


def _parsed(line: str) -> dict[str, Any] | RowError:
    try:
        return _object(json.loads(line))
    except ValueError as error:
        return RowError("not valid JSON", f"not valid JSON ({error})", fix="one JSON object a line")
    except RecursionError:
        return RowError("not valid JSON", "JSON nested too deeply", fix="one JSON object a line")


def _object(value: Any) -> dict[str, Any] | RowError:
    if isinstance(value, dict):
        return value
    kind = f"the row is {kind_of(value)}, not an object"
    return RowError(kind, expected='a JSON object such as {"query": ..., "positives": [...]}')


@file_kinds.register(".json")
def json_rows(path: Path) -> Iterator[Row]:
    """Either lines of objects, or one array of them (rows are then numbered from 1)."""
    lines = text_lines(path)
    first = next(((n, line) for n, line in lines if isinstance(line, RowError) or line.strip()), None)
    if first is None or isinstance(first[1], RowError) or not first[1].lstrip().startswith("["):
        yield from json_lines(path)
        return
    rest = [line if isinstance(line, str) else "" for _, line in lines]
    try:
        values = json.loads("\n".join([first[1], *rest]))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON ({error})", where=path, fix="an array of objects, or one a line") from error
    yield from enumerate((_object(value) for value in values), start=1)


@file_kinds.register(".csv")
def comma_separated(path: Path) -> Iterator[Row]:
    """Cells between commas below a header, in quotes where a text has commas or line breaks."""
    return _separated(path, ",", csv.QUOTE_MINIMAL)


@file_kinds.register(".tsv")
def tab_separated(path: Path) -> Iterator[Row]:
    """Cells between tabs below a header; quotes are characters like others."""
    return _separated(path, "\t", csv.QUOTE_NONE)


def _separated(path: Path, delimiter: str, quoting: Literal[0, 3]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # long documents are longer than the default limit
    broken: list[RowError] = []
    lines = csv.reader(_whole_lines(path, broken), delimiter=delimiter, strict=True, quoting=quoting)
    header: list[str] | None = None
    try:
        for cells in lines:
            if header is None:
                if broken:
                    raise broken.pop().at(f"{path}:{lines.line_num}")
                header = [cell.strip() for cell in cells]
                if twice := sorted({name for name in header if header.count(name) > 1}):
                    what = f"the header names {', '.join(twice)} twice"
                    raise DataError(what, where=f"{path}:1", fix="rename one of them")
            elif broken:
                yield lines.line_num, broken.pop()
            elif cells and len(cells) != len(header):
                what = f"{len(cells)} cells, but the header has {len(header)}"
                fix = "quote cells with commas"
                yield lines.line_num, RowError("cells and header differ in number", what, fix=fix)
            elif cells:
                yield lines.line_num, dict(zip(header, cells))
    except csv.Error as error:
        raise DataError(f"not valid CSV ({error})", where=f"{path}:{lines.line_num}") from error


def _whole_lines(path: Path, broken: list[RowError]) -> Iterator[str]:
    """Lines as the csv module wants them; one that cannot be decoded leaves its error in `broken`."""
    for _, line in text_lines(path):
        if isinstance(line, RowError):
            broken.append(line)
        yield "undecodable\n" if isinstance(line, RowError) else line + "\n"


@file_kinds.register(".parquet")
def parquet_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Rows are numbered from 1. Read batch by batch; where the first of `columns` is there, only those are read."""
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            found = file.schema_arrow.names
            kept = None if columns is None or columns[0] not in found else [name for name in columns if name in found]
            for batch in file.iter_batches(batch_size=4096, columns=kept):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"not a readable Parquet file ({error})", where=f"{path}:{number + 1}", fix="copy it again"
        ) from error
