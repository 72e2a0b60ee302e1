"""What a kind of task is: a value that holds its data and says how an encoder is scored on it, and what its files look
like.

A new kind is one more frozen dataclass on the shelf `task_kinds`, in this folder or in a package of your own, with
`name`, `kind`, `evaluate` and `formats` (docs/evaluation.md). Nothing else knows the kinds: `load_task` finds a task by
its path or name and asks the formats of all kinds.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol

from embedsmith.core.errors import DataError, EvaluationError
from embedsmith.core.inputs import local_path
from embedsmith.core.settings import did_you_mean
from embedsmith.core.shelf import task_kinds
from embedsmith.data.formats.file_kinds import sound_rows
from embedsmith.evaluate.encoding import Reader
from embedsmith.evaluate.result import TaskResult

ENDINGS = (".jsonl", ".jsonl.gz")
_DEPTH = 2  # how deep below the data folder a task may lie: sts/stsb-en-test.jsonl, retrieval/cranfield/


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
    forms are tried in the order of `order`; those of other packages come last unless they say otherwise. `listed`:
    whether such files in a data folder have names, besides their paths."""

    matches: Callable[[Path], bool]
    read: Callable[[Path, str, str], Task]
    order: int = 100
    listed: bool = True


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
        return cls.formats[0 if path.is_dir() else -1].read(path, task_name_of(path), split)


def formats() -> list[Format]:
    """Those of all kinds, in the order in which they are tried."""
    return sorted((form for entry in task_kinds.entries() for form in entry.thing.formats), key=lambda form: form.order)


def load_task(name_or_path: str | Path, *, data_dir: str | Path | None = None, split: str = "test") -> Task:
    """A task from a file, a folder, or a name looked up in the data folder (see `data_folder`).

    A name is a file or folder without its ending; `stsb-en` also finds `stsb-en-SPLIT`. `split` chooses the
    judgements of a BEIR folder; another file is one split already. `KIND:NAME` says what the task is where the file
    could be several (`pair_classification:afqmc-dev`, `clustering:banking77`); `long:NAME` gives the score by length;
    `cross:QUERIES:DOCUMENTS` asks the queries of one collection of the corpus of another.
    Errors: `EvaluationError` for an unknown name, with the nearest known ones; `DataError` for a wrong file.
    """
    kind, colon, rest = str(name_or_path).partition(":")
    if colon and kind in task_kinds.names():
        found: Task = task_kinds.get(kind).load(rest, lambda name: _locate(name, data_dir, split), split)
        return found
    path = _locate(name_or_path, data_dir, split)
    for form in formats():
        if form.matches(path):
            return form.read(path, task_name_of(path), split)
    if path.is_file():  # not recognised by its first row: the reader of rows says what is wrong with it
        as_pairs: Task = task_kinds.get("sts").read(path, task_name_of(path), split)
        return as_pairs
    raise DataError(
        "not a task",
        where=path,
        expected="a file of pairs, with scores or without, or a BEIR folder (corpus.jsonl, queries.jsonl, qrels/)",
    )


def check_tasks(names: Sequence[str], *, data_dir: str | Path | None = None, split: str = "test") -> None:
    """Whether there are such tasks, without reading any; what the kind before a colon makes of a name is left open.
    Errors: `EvaluationError` for one that is nowhere."""
    for name in names:
        if name.partition(":")[0] not in task_kinds.names():
            _locate(name, data_dir, split)


def load_tasks(names: Sequence[str | Path], *, data_dir: str | Path | None = None, split: str = "test") -> list[Task]:
    """Several tasks, each under a name of its own: files of one name are told apart by the folders they lie in, as in
    `dev/questions` and `test/questions`. Errors: those of `load_task`."""
    tasks: list[Any] = [load_task(name, data_dir=data_dir, split=split) for name in names]
    paths = [local_path(str(name).rpartition(":")[2], EvaluationError).resolve() for name in names]
    named = []
    for task, name in zip(tasks, _apart([task.name for task in tasks], paths), strict=True):
        # one that makes its name of something else keeps it
        settable = dataclasses.is_dataclass(task) and "name" in {f.name for f in dataclasses.fields(task)}
        named.append(dataclasses.replace(task, name=name) if settable and name != task.name else task)
    return named


def _apart(names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """The names, and before those that stand for several paths as many of their folders as tell these apart."""
    made = list(names)
    for name in {name for name in names if names.count(name) > 1}:
        places = [place for place, other in enumerate(names) if other == name]
        for depth in range(1, max(len(paths[place].parts) for place in places)):
            longer = ["/".join((*paths[place].parts[-1 - depth : -1], name)) for place in places]
            if len(set(longer)) == len({paths[place] for place in places}) > 1:
                made = [longer[places.index(n)] if n in places else old for n, old in enumerate(made)]
                break
    return made


def _locate(name_or_path: str | Path, data_dir: str | Path | None, split: str) -> Path:
    path = local_path(name_or_path, EvaluationError)
    if path.exists():
        return path
    folder = data_folder(data_dir)
    known = {} if folder is None else known_tasks(folder)
    name = str(name_or_path)
    found = known.get(name) or known.get(f"{name}-{split}")
    if found is None:
        where = "no data folder was found" if folder is None else f"{folder} holds no tasks"
        beside = [str(path.with_name(other.name)) for other in path.parent.glob("[!.]*")]
        raise EvaluationError(
            f"no task is called {name!r}, and there is no such path{did_you_mean(name, (*known, *beside))}",
            expected=f"a path, or one of: {', '.join(known)}" if known else "a path to an STS file or a BEIR folder",
            fix=None if known else f"name the folder with the data; {where}",
        )
    return found


def split_names(given: Sequence[str]) -> list[str]:
    """Names as a command line gives them: several in one text are separated by commas or spaces. A path that exists
    stays whole."""
    return [name for text in given for name in ([text] if os.path.exists(text) else text.replace(",", " ").split())]


def data_folder(given: str | Path | None = None) -> Path | None:
    """Where names of tasks are looked up: the given folder, else the first of `./data` and `../shared/data`.

    Errors: `EvaluationError` when the given folder does not exist.
    """
    if given is not None:
        if not Path(given).is_dir():
            raise EvaluationError("there is no such folder", where=given, expected="a folder with tasks")
        return Path(given)
    return next((folder for folder in (Path("data"), Path("../shared/data")) if folder.is_dir()), None)


def known_tasks(folder: str | Path) -> dict[str, Path]:
    """Name to path of every task in a data folder. A name that two tasks share is qualified by its folder."""
    forms = [form for form in formats() if form.listed]
    paths = [path for path in _candidates(Path(folder), _DEPTH) if any(form.matches(path) for form in forms)]
    names = [task_name_of(path) for path in paths]
    qualified = (f"{path.parent.name}/{name}" if names.count(name) > 1 else name for path, name in zip(paths, names))
    return dict(zip(qualified, paths, strict=True))


def _candidates(folder: Path, depth: int) -> list[Path]:
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        found.append(path)
        if path.is_dir() and depth > 1 and not is_beir(path):
            found += _candidates(path, depth - 1)
    return found


# Files of tasks.


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


def task_name_of(path: Path) -> str:
    """File or folder name without its ending. A dot inside a folder's name stays."""
    name = path.resolve().name
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


def refuse_empty(rows: list[Any], path: Path, columns: str) -> None:
    """Errors: `DataError` for a file without rows."""
    if not rows:
        raise DataError("the file has no rows", where=path, expected=f"rows of {columns}")


def is_number(value: str | float) -> bool:
    """Whether a number, or a text that is one, is finite."""
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False
