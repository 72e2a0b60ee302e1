"""Tasks by path or by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from embedsmith.core.errors import DataError, EvaluationError
from embedsmith.core.settings import did_you_mean
from embedsmith.core.shelf import task_kinds
from embedsmith.evaluate.tasks.kinds import Format, Task, is_beir, name_of
from embedsmith.evaluate.tasks.pairs import STSTask

_DEPTH = 2  # how deep below the data folder a task may lie: sts/stsb-en-test.jsonl, retrieval/cranfield/


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
            return form.read(path, name_of(path), split)
    if path.is_file():  # not recognised by its first row: the reader of rows says what is wrong with it
        return STSTask.read(path, name_of(path), split)
    raise DataError(
        "not a task", where=path, expected="an STS file, or a BEIR folder (corpus.jsonl, queries.jsonl, qrels/)"
    )


def _locate(name_or_path: str | Path, data_dir: str | Path | None, split: str) -> Path:
    path = Path(name_or_path)
    if path.exists():
        return path
    folder = data_folder(data_dir)
    known = {} if folder is None else known_tasks(folder)
    name = str(name_or_path)
    found = known.get(name) or known.get(f"{name}-{split}")
    if found is None:
        where = "no data folder was found" if folder is None else f"{folder} holds no tasks"
        raise EvaluationError(
            f"no task is called {name!r}, and there is no such path{did_you_mean(name, known)}",
            expected=f"a path, or one of: {', '.join(known)}" if known else "a path to an STS file or a BEIR folder",
            fix=None if known else f"name the folder with the data; {where}",
        )
    return found


def split_names(given: Sequence[str]) -> list[str]:
    """Names as a command line gives them: several in one text are separated by commas or spaces. A path that exists
    stays whole."""
    return [name for text in given for name in ([text] if Path(text).exists() else text.replace(",", " ").split())]


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
    forms = formats()
    paths = [path for path in _candidates(Path(folder), _DEPTH) if any(form.matches(path) for form in forms)]
    names = [name_of(path) for path in paths]
    qualified = (f"{path.parent.name}/{name}" if names.count(name) > 1 else name for path, name in zip(paths, names))
    return dict(zip(qualified, paths, strict=True))


def _candidates(folder: Path, depth: int) -> list[Path]:
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        found.append(path)
        if path.is_dir() and depth > 1 and not is_beir(path):
            found += _candidates(path, depth - 1)
    return found
