"""Rows that a Python program holds: a list of dicts, or a dataset of the package `datasets`, as a source."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.inputs import kind_of
from embedsmith.data.formats.datasets import choose_split, dataset_rows
from embedsmith.data.formats.file_kinds import Row, Rows
from embedsmith.data.record import RowError, typed_for_source

_HELD = "in memory"
_LIKE = '[{"query": "...", "positive": "..."}, ...]'


class HeldRows:
    """What `Source(rows=...)` was given. As text, which is all that a saved recipe keeps of it, it tells how many rows
    there were and a hash of them, so that a run of other rows is another run. (Not a dataclass: those are written into
    recipes with all that they hold.)"""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __str__(self) -> str:
        if isinstance(self.rows, str):
            return self.rows
        split = next(iter(self.rows.values()), ()) if isinstance(self.rows, dict) else self.rows
        return f"{len(split)} rows ({self.digest}) {_HELD}"

    @cached_property
    def digest(self) -> str:
        """8 hexadecimal digits of the content."""
        content = hashlib.blake2b(digest_size=4)
        for part in self.rows.values() if isinstance(self.rows, dict) else [self.rows]:
            for row in [part._fingerprint] if _is_dataset(part) else part:
                content.update(json.dumps(row, sort_keys=True, default=repr).encode())
        return content.hexdigest()

    @property
    def name(self) -> str:
        """What the source is called unless it says so: the dataset's own name, where it has one."""
        return str(getattr(getattr(self.rows, "info", None), "dataset_name", None) or "rows")

    def opened(self, where: str, split: str | None) -> Rows:
        """The rows, numbered from 1. Errors: `DataError` for a split that is not there."""
        found = choose_split(self.rows, split, where)
        if _is_dataset(found):
            return dataset_rows(found, where)
        if isinstance(found, str):
            what = f"the recipe was saved by a program that held {found}, which are not in it"
            raise DataError(
                what,
                where=where,
                fix=f"name a file {typed_for_source('path=FILE', 'rows=null')}, or give the rows again from Python",
            )
        return Rows(where, _numbered(found))


def _numbered(rows: Sequence[Any]) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Mapping):
            yield number, dict(row)
        else:
            yield number, RowError(f"the row is {kind_of(row)}, not a dict", expected=f"rows such as {_LIKE}")


def _is_dataset(value: Any) -> bool:
    """Whether this is a `datasets.Dataset`, which lies in Arrow tables, without importing the package."""
    return hasattr(value, "_fingerprint") and hasattr(value, "data")


def held_rows(given: Any) -> HeldRows:
    """Errors: `RecipeError` for what is no list of rows, with how to make one of it."""
    if isinstance(given, HeldRows):
        return given
    saved = isinstance(given, str) and given.endswith(_HELD)
    if saved or _is_dataset(given) or isinstance(given, list | tuple):
        return HeldRows(given)
    if isinstance(given, dict) and given and all(map(_is_dataset, given.values())):
        return HeldRows(given)
    fixes = {
        "str": f"path={given!r}",
        "DataFrame": 'rows=frame.to_dict("records")',
        "IterableDataset": "rows=list(dataset.take(100_000)), or name the dataset in `path` with streaming=True",
        "dict": "rows=[dict(zip(columns, cells)) for cells in zip(*columns.values())]",
    }
    name = type(given).__name__
    expected = f"a list of dicts, {_LIKE}, or a Dataset"
    raise RecipeError(f"rows: this is a {name}", expected=expected, fix=fixes.get(name, "rows=list(...)"))
