"""What a kind of task is: a value that holds its data and says how an encoder is scored on it, and what its files look
like.

A new kind is one more frozen dataclass on the shelf `task_kinds`, in this folder or in a package of your own, with
`name`, `kind`, `evaluate` and `formats` (docs/evaluation.md). Nothing else knows the kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol

from embedsmith.core.errors import DataError
from embedsmith.data.formats.files import sound_rows
from embedsmith.evaluate.encoding import Reader
from embedsmith.evaluate.result import TaskResult

ENDINGS = (".jsonl", ".jsonl.gz")


class Task(Protocol):
    """Anything `evaluate` can run."""

    kind: ClassVar[str]

    @property
    def name(self) -> str: ...

    def evaluate(self, reader: Reader) -> TaskResult:
        """Errors: `EvaluationError` when the model's output cannot be scored."""
        ...


@dataclass(frozen=True)
class Format:
    """A form that the files of a kind may have: recognised by `matches(path)`, read by `read(path, name, split)`. All
    forms are tried in the order of `order`; those of other packages come last unless they say otherwise."""

    matches: Callable[[Path], bool]
    read: Callable[[Path, str, str], Task]
    order: int = 100


class TaskKind:
    """What the shelf `task_kinds` wants of a class: the `formats` of its files. The name of a kind may stand before
    that of a task, as in `clustering:banking77`; where it stands for something else than one path, the class has
    `load`.
    """

    formats: ClassVar[tuple[Format, ...]] = ()

    @classmethod
    def load(cls, name: str, find: Callable[[str], Path], split: str) -> Task:
        """The task that is asked for as `KIND:NAME`, read as this kind whatever the file looks like: folders in the
        first form, files in the last. `find` gives the path of a name."""
        path = find(name)
        return cls.formats[0 if path.is_dir() else -1].read(path, name_of(path), split)


def has_columns(*choices: set[str]) -> Callable[[Path], bool]:
    """Recognises a JSONL file by the columns of its first row: those of one of the choices."""

    def matches(path: Path) -> bool:
        if not path.is_file() or not path.name.endswith(ENDINGS):
            return False
        try:
            columns = {column for _, row in islice(sound_rows(path), 1) for column in row}
        except DataError:
            return False
        return any(choice <= columns for choice in choices)

    return matches


def is_beir(path: Path) -> bool:
    return path.is_dir() and find(path, "corpus", ENDINGS) is not None


def find(folder: Path, stem: str, endings: tuple[str, ...]) -> Path | None:
    """The first of `stem + ending` that is a file."""
    return next((file for file in (folder / f"{stem}{ending}" for ending in endings) if file.is_file()), None)


def name_of(path: Path) -> str:
    """File or folder name without its ending. A dot inside a folder's name stays."""
    name = path.resolve().name
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


def refuse_empty(rows: list[Any], path: Path, columns: str) -> None:
    """Errors: `DataError` for a file without rows."""
    if not rows:
        raise DataError("the file has no rows", where=path, expected=f"rows of {columns}")


def is_number(text: str) -> bool:
    """Whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
