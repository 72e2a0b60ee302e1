"""Texts with ids, titles and more, from a file of any kind or from a BEIR folder: read here for encoding, mining,
indexing, evaluation and curation alike."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, time
from pathlib import Path
from typing import Any, Literal

from embedsmith.core.errors import DataError
from embedsmith.core.inputs import local_path
from embedsmith.data.formats.file_kinds import sound_rows
from embedsmith.data.record import titled

_IDS = ("_id", "id")


@dataclass(frozen=True, slots=True)
class FileText:
    """A text of a file, with its title in front as `titled` joins them. `where` is its place (`file:line`); `metadata`
    holds the other columns of its row, where they were asked for."""

    id: str | None
    text: str
    where: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_texts(
    path: str | Path,
    part: str = "corpus",
    *,
    column: str | None = None,
    titles: bool = True,
    ids: Literal["any", "each", "unique"] = "any",
    metadata: bool = False,
) -> Iterator[FileText]:
    """The texts of a file, or of one part (`corpus`, `queries`) of a BEIR folder, one after another.

    A row's id is in `_id` or `id`; its text is in `text`, with `title` in front where there is one and `titles` are
    wanted, or in `column`, alone. `ids`: rows may lack one, each has one, or each has one of its own.
    Errors: `DataError` naming file and line for a row that is not like that.
    """
    path = local_path(path)
    path = file_in(path, f"{part}.jsonl") if path.is_dir() else path
    name = column or "text"
    first: dict[str, str] = {}
    for where, row in sound_rows(path, None if metadata else (name, "title", *_IDS)):
        text = text_in(row, name, where, empty=True)
        if titles and column is None and row.get("title"):
            text = titled(text_in(row, "title", where, empty=True), text)
        id_ = _id_of(row, where, needed=ids != "any")
        line = where.rpartition(":")[2]
        if ids == "unique" and first.setdefault(str(id_), line) != line:
            raise DataError(
                f"the id {id_!r} appears twice, first in line {first[str(id_)]}",
                where=where,
                fix="give every text an id of its own",
            )
        rest = {key: value for key, value in row.items() if key not in (*_IDS, name, "title")} if metadata else {}
        rest = {key: _as_json(value, key, where) for key, value in rest.items()}
        yield FileText(id_, text, where, rest)


def _as_json(value: Any, column: str, where: str) -> Any:
    """A value beside a text as JSON has it: dates as texts, numbers finite. Errors: `DataError` for what it has not."""
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, list):
        return [_as_json(one, column, where) for one in value]
    if isinstance(value, dict):
        return {str(key): _as_json(one, column, where) for key, one in value.items()}
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    fix = "leave the column out, or write it as texts or numbers"
    raise DataError(f"{column!r} is {str(value)[:60]!r}", where=where, expected="what JSON can hold", fix=fix)


def file_in(folder: Path, name: str) -> Path:
    """A file of a BEIR folder, or the same with .gz where that is there instead."""
    return folder / name if (folder / name).is_file() else folder / f"{name}.gz"


def text_in(row: Mapping[str, Any], column: str, where: str, *, empty: bool = False) -> str:
    """The text in a column of a row. Errors: `DataError` where there is none, or (unless `empty`) only white space."""
    value = row.get(column)
    if isinstance(value, str):
        if not value.strip() and not empty:
            raise DataError(f"{column!r} is empty", where=where)
        return value
    found = ", ".join(row) or "no columns"
    raise DataError(
        f"{column!r} is {value!r}" if column in row else f"the column {column!r} is missing",
        where=where,
        expected=f"a text; found: {found}" if column in row else f"found: {found}",
        fix="correct the row, or name the column that holds the texts",
    )


def _id_of(row: Mapping[str, Any], where: str, needed: bool) -> str | None:
    value = row.get("_id", row.get("id"))
    if needed and (isinstance(value, bool) or not isinstance(value, str | int) or value == ""):
        raise DataError(
            f"the id is {value!r}",
            where=where,
            expected=f"`_id` or `id`, a text or a whole number; found: {', '.join(row)}",
        )
    return None if value is None else str(value)
