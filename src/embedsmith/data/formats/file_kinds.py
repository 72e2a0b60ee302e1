"""Files to rows: one function a kind of file, on the shelf `file_kinds` under its extension. A row is its place in the
file and a mapping of column to value, as JSON would give it.

A row that cannot be read is handed on as a `RowError`, so that the reader can count such rows, name them, and skip
them if the recipe says so. A file that cannot be read any further (missing, truncated) is a `DataError` at once.
"""

import codecs
import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.inputs import kind_of, local_path, refuse_other_encoding
from embedsmith.core.shelf import file_kinds
from embedsmith.data.record import SURROGATE, RowError

Row = tuple[int, "dict[str, Any] | RowError"]

LINE_BYTES = 2**27
"""The longest line of a file (128 MiB): a small gzip file can hold one that no memory does."""
ARRAY_BYTES = 2**30
"""The longest JSON array, which is read whole (1 GiB)."""
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


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
    path = local_path(path)
    if path.is_dir():
        raise DataError("this is a folder, not a file", where=path, fix="name a file in it")
    if not path.exists():
        near = sorted(other.name for other in path.parent.glob("[!.]*"))[:8] if path.parent.is_dir() else []
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


def text_lines(path: Path, most: int | None = None) -> Iterator[tuple[int, str | RowError]]:
    """Lines of a UTF-8 file, gzipped or not, numbered from 1, of at most `most` bytes each (`LINE_BYTES`). A byte order
    mark that starts a line is dropped: files that were joined have one at every seam. A file in UTF-16 or UTF-32 is
    refused by its mark, once for all lines."""
    number, most = 0, most or LINE_BYTES
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(most + 1), b""), start=1):
                if number == 1:
                    refuse_other_encoding(line, path)
                if len(line) > most:
                    what = f"the line is longer than {most:,} bytes"
                    raise DataError(what, where=f"{path}:{number}", fix="put one text or row in a line, and cut it")
                raw = line.removeprefix(codecs.BOM_UTF8)
                if b"\0" in raw:  # UTF-16 without a mark, or what a crash left of a file
                    yield number, RowError("a zero byte", "a zero byte: no text", fix="save the file as UTF-8")
                    continue
                try:
                    yield number, raw.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    what = f"not UTF-8 ({error.reason} 0x{raw[error.start]:02x} at byte {error.start + 1} of the line)"
                    yield number, RowError("not UTF-8", what, fix="save the file as UTF-8")
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
        value = json.loads(line)
    except ValueError as error:
        return RowError("not valid JSON", f"not valid JSON ({error})", fix="one JSON object a line")
    except RecursionError:
        return RowError("not valid JSON", "JSON nested too deeply", fix="one JSON object a line")
    return _object(value, bool(_ESCAPED_SURROGATE.search(line)))


def _object(value: Any, escaped: bool) -> dict[str, Any] | RowError:
    """A row, which must be an object of texts that UTF-8 can hold: the halves of a pair may be `escaped` in JSON, and
    one alone is no text."""
    if not isinstance(value, dict):
        kind = f"the row is {kind_of(value)}, not an object"
        return RowError(kind, expected='a JSON object such as {"query": ..., "positives": [...]}')
    if escaped and SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        return RowError(
            "broken Unicode", expected="UTF-8 text without lone surrogates", fix="correct the row's escapes"
        )
    return value


@file_kinds.register(".json")
def json_rows(path: Path) -> Iterator[Row]:
    """Either lines of objects, or one array of them (rows are then numbered from 1)."""
    lines = text_lines(path, ARRAY_BYTES)
    first = next(((n, line) for n, line in lines if isinstance(line, RowError) or line.strip()), None)
    if first is None or isinstance(first[1], RowError) or not first[1].lstrip().startswith("["):
        yield from json_lines(path)
        return
    parts, length = [first[1]], len(first[1])
    for number, line in lines:
        if isinstance(line, RowError):
            raise line.at(f"{path}:{number}")
        parts.append(line)
        if (length := length + len(line)) > ARRAY_BYTES:
            what = f"the array is longer than {ARRAY_BYTES:,} characters"
            raise DataError(what, where=f"{path}:{number}", fix="write one object a line, in a file .jsonl")
    text = "\n".join(parts)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON ({error})", where=path, fix="an array of objects, or one a line") from error
    escaped = bool(_ESCAPED_SURROGATE.search(text))
    yield from enumerate((_object(value, escaped) for value in values), start=1)


@file_kinds.register(".csv")
def comma_separated(path: Path) -> Iterator[Row]:
    """Cells between commas below a header, in quotes where a text has commas or line breaks."""
    return _separated(path, ",", csv.QUOTE_MINIMAL)


@file_kinds.register(".tsv")
def tab_separated(path: Path) -> Iterator[Row]:
    """Cells between tabs below a header; quotes are characters like others."""
    return _separated(path, "\t", csv.QUOTE_NONE)


def _separated(path: Path, delimiter: str, quoting: Literal[0, 3]) -> Iterator[Row]:
    csv.field_size_limit(LINE_BYTES)  # long documents are longer than the default limit
    broken: list[RowError] = []
    lines = csv.reader(_whole_lines(path, broken), delimiter=delimiter, strict=True, quoting=quoting)
    header: list[str] | None = None
    try:
        for cells in lines:
            if header is None:
                if broken:
                    raise broken.pop().at(f"{path}:{lines.line_num}")
                header = [cell.strip() for cell in cells]
                _refuse_other_delimiter(path, header, delimiter)
                if twice := sorted(name for name, count in Counter(header).items() if count > 1):
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
        fix = "close quotes, and double those inside a quoted cell"
        raise DataError(f"not valid CSV ({error})", where=f"{path}:{lines.line_num}", fix=fix) from error


_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


def _refuse_other_delimiter(path: Path, header: list[str], delimiter: str) -> None:
    """Errors: `DataError` for a header of one cell that has another delimiter in it."""
    other = next((mark for mark in _DELIMITERS if len(header) == 1 and mark != delimiter and mark in header[0]), None)
    if other is None:
        return
    rename = {"\t": f"mv '{path}' '{path.with_suffix('.tsv')}'", ",": f"mv '{path}' '{path.with_suffix('.csv')}'"}
    if path.suffix == ".gz":
        rename = dict.fromkeys(_DELIMITERS, f"unpack it first: gunzip '{path}'")
    convert = f"import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter={other!r}))"
    raise DataError(
        f"the cells of the header stand between {_DELIMITERS[other]}: {header[0][:80]!r}",
        where=f"{path}:1",
        expected=f"{_DELIMITERS[delimiter]}, since the name ends in {_kind(path.name)}",
        fix=rename.get(other, f"python -c \"{convert}\" < '{path}' > '{path.with_suffix('.commas.csv')}'"),
    )


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
    with readable_parquet(path, lambda: number + 1), pq.ParquetFile(path) as file:
        found = file.schema_arrow.names
        kept = None if columns is None or columns[0] not in found else [name for name in columns if name in found]
        for batch in file.iter_batches(batch_size=4096, columns=kept):
            for row in table_rows(batch):
                number += 1
                yield number, row


def table_rows(batch: Any) -> Iterator[dict[str, Any] | RowError]:
    """The rows of an Arrow table or batch; one with a value that Python has no object for (bytes that are not UTF-8 in
    a text, a date in the year 300,000) is an error by itself."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        for place in range(len(batch)):
            yield table_row(batch, place)


def table_row(batch: Any, place: int) -> dict[str, Any] | RowError:
    try:
        row: dict[str, Any] = batch.slice(place, 1).to_pylist()[0]
    except (ValueError, OverflowError) as error:
        kind = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "a value that cannot be read"
        return RowError(kind, f"{kind} ({error})", fix="write texts as UTF-8 and dates as texts")
    return row


@contextmanager
def readable_parquet(name: Path | str, line: Callable[[], int] | None = None) -> Iterator[None]:
    """Whatever is wrong with a Parquet file, as a `DataError` that names it, and the line where it is known."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"not a readable Parquet file ({error})",
            where=name if line is None else f"{name}:{line()}",
            fix="copy it again",
        ) from error


def parquet_schema(path: Path) -> pa.Schema:
    """The columns of a Parquet file. Errors: `DataError` for one that cannot be read."""
    if not local_path(path).is_file():
        what = "this is a folder, not a file" if path.is_dir() else "no such file"
        raise DataError(what, where=path, fix="check that its folder is whole")
    with readable_parquet(path):
        return pq.read_schema(path)
