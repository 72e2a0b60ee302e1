"""Tasks by path or by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from embedsmith.core.errors import DataError, EvaluationError
from embedsmith.core.registry import did_you_mean
from embedsmith.evaluate.readers import find, read_beir, read_sts, rows_of
from embedsmith.evaluate.tasks import Task

_DEPTH = 2  # how deep below the data folder a task may lie: sts/stsb-en-test.jsonl, retrieval/cranfield/
_ROWS = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Format:
    """How the files of one kind of task are recognised and read: `read(path, name, split)`."""

    kind: str
    matches: Callable[[Path], bool]
    read: Callable[[Path, str, str], Task]


def is_beir(path: Path) -> bool:
    return path.is_dir() and find(path, "corpus", _ROWS) is not None


def is_sts(path: Path) -> bool:
    """A JSONL file whose first row has a score and one of the known pairs of text columns."""
    if not path.is_file() or not path.name.endswith(_ROWS):
        return False
    try:
        columns = {column for _, row in islice(rows_of(path), 1) for column in row}
    except DataError:
        return False
    return {"text1", "text2", "score"} <= columns or {"sentence1", "sentence2", "score"} <= columns


FORMATS: tuple[Format, ...] = (Format("retrieval", is_beir, read_beir), Format("sts", is_sts, read_sts))


def load_task(name_or_path: str | Path, *, data_dir: str | Path | None = None, split: str = "test") -> Task:
    """A task from a BEIR folder, an STS file, or a name looked up in the data folder (see `data_folder`).

    A name is a file or folder without its ending; `stsb-en` also finds `stsb-en-SPLIT`. `split` chooses the
    judgements of a BEIR folder; an STS file is one split already.
    Errors: `EvaluationError` for an unknown name, with the nearest known ones; `DataError` for a wrong file.
    """
    path = Path(name_or_path)
    if path.exists():
        return _read(path, split)
    folder = data_folder(data_dir)
    known = {} if folder is None else known_tasks(folder)
    found = known.get(str(name_or_path)) or known.get(f"{name_or_path}-{split}")
    if found is not None:
        return _read(found, split)
    raise _unknown(str(name_or_path), list(known), folder)


def _unknown(name: str, known: list[str], folder: Path | None) -> EvaluationError:
    where = "no data folder was found" if folder is None else f"{folder} holds no tasks"
    return EvaluationError(
        f"no task is called {name!r}, and there is no such path{did_you_mean(name, known)}",
        expected=f"a path, or one of: {', '.join(known)}" if known else "a path to an STS file or a BEIR folder",
        fix=None if known else f"name the folder with the data; {where}",
    )


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
    paths = [path for path in _candidates(Path(folder), _DEPTH) if any(f.matches(path) for f in FORMATS)]
    names = [_name(path) for path in paths]
    qualified = (f"{path.parent.name}/{name}" if names.count(name) > 1 else name for path, name in zip(paths, names))
    return dict(zip(qualified, paths, strict=True))


def _candidates(folder: Path, depth: int) -> list[Path]:
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        found.append(path)
        if path.is_dir() and depth > 1 and not is_beir(path):
            found += _candidates(path, depth - 1)
    return found


def _read(path: Path, split: str) -> Task:
    for each in FORMATS:
        if each.matches(path):
            return each.read(path, _name(path), split)
    if path.is_file():  # not recognised by its first row: the reader of rows says what is wrong with it
        return read_sts(path, _name(path), split)
    raise DataError(
        "not a task", where=path, expected="an STS file, or a BEIR folder (corpus.jsonl, queries.jsonl, qrels/)"
    )


def _name(path: Path) -> str:
    """File or folder name without its ending. A dot inside a folder's name stays."""
    name = path.resolve().name
    return next((name.removesuffix(ending) for ending in _ROWS if name.endswith(ending)), name)
