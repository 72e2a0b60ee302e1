"""Kinds of task, by what their files look like, and tasks by path or by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

from embedsmith.core.errors import DataError, EvaluationError
from embedsmith.core.settings import did_you_mean
from embedsmith.core.shelf import task_kinds
from embedsmith.data.formats.files import rows_of
from embedsmith.evaluate.tasks.files import (
    find,
    read_beir,
    read_classification,
    read_clustering,
    read_pairs,
    read_reranking_folder,
    read_reranking_rows,
    read_sts,
    train_file,
)
from embedsmith.evaluate.tasks.retrieval import LongDocumentTask, RetrievalTask, across_languages
from embedsmith.evaluate.tasks.similarity import Task

_DEPTH = 2  # how deep below the data folder a task may lie: sts/stsb-en-test.jsonl, retrieval/cranfield/
_ROWS = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Format:
    """A form that the files of a kind may have: recognised by `matches(path)`, read by `read(path, name, split)`. All
    forms are tried in the order of `order`; those of other packages come last unless they say otherwise."""

    matches: Callable[[Path], bool]
    read: Callable[[Path, str, str], Task]
    order: int = 100


class TaskKind:
    """A kind of task on the shelf `task_kinds`: its name may stand before that of a task, as in `clustering:banking77`.

    One of your own is a class with `formats`; where a name stands for something else than one path, it has `load` too.
    """

    formats: ClassVar[tuple[Format, ...]] = ()

    @classmethod
    def load(cls, name: str, find: Callable[[str], Path], split: str) -> Task:
        """The task that is asked for as `KIND:NAME`, read as this kind whatever the file looks like: folders in the
        first form, files in the last. `find` gives the path of a name."""
        path = find(name)
        return cls.formats[0 if path.is_dir() else -1].read(path, _name(path), split)


def is_beir(path: Path) -> bool:
    return path.is_dir() and find(path, "corpus", _ROWS) is not None


def has_columns(*choices: set[str]) -> Callable[[Path], bool]:
    """Recognises a JSONL file by the columns of its first row: those of one of the choices."""

    def matches(path: Path) -> bool:
        columns = _first_columns(path)
        return any(choice <= columns for choice in choices)

    return matches


def _first_columns(path: Path) -> set[str]:
    """The columns of the first row; none where it is no JSONL file or cannot be read."""
    if not path.is_file() or not path.name.endswith(_ROWS):
        return set()
    try:
        return {column for _, row in islice(rows_of(path), 1) for column in row}
    except DataError:
        return set()


_labelled = has_columns({"text", "label"})


@task_kinds.register("reranking")
class Reranking(TaskKind):
    """Given candidates of every query, put into order: a BEIR folder with `top_ranked.jsonl`, or rows of `query`,
    `positive` and `negative`."""

    formats = (
        Format(lambda path: is_beir(path) and find(path, "top_ranked", _ROWS) is not None, read_reranking_folder, 1),
        Format(has_columns({"query", "positive", "negative"}), read_reranking_rows, 5),
    )


@task_kinds.register("retrieval")
class Retrieval(TaskKind):
    """Queries against a corpus: a BEIR folder."""

    formats = (Format(is_beir, read_beir, 2),)


@task_kinds.register("sts")
class Similarity(TaskKind):
    """Pairs of texts with a human score: rows of `text1`, `text2` (or `sentence1`, `sentence2`) and `score`."""

    formats = (Format(has_columns({"text1", "text2", "score"}, {"sentence1", "sentence2", "score"}), read_sts, 3),)


@task_kinds.register("pair_classification")
class PairClassification(TaskKind):
    """Pairs of texts that belong together or not: rows of `text1`, `text2` (or `sentence1`, `sentence2`) and `label`,
    0 or 1."""

    formats = (Format(has_columns({"text1", "text2", "label"}, {"sentence1", "sentence2", "label"}), read_pairs, 4),)


@task_kinds.register("classification")
class Classification(TaskKind):
    """Labels that a probe learns: rows of `text` and `label` in a file `NAME-test`, with `NAME-train` beside it."""

    formats = (Format(lambda path: train_file(path) is not None and _labelled(path), read_classification, 6),)


@task_kinds.register("clustering")
class Clustering(TaskKind):
    """Labels that clusters should find: rows of `text` and `label`, which may be a list from coarse to fine."""

    formats = (Format(_labelled, read_clustering, 7),)


@task_kinds.register("long")
class Long(TaskKind):
    """Retrieval with its score by the length of the relevant documents: `long:NAME` of a BEIR folder."""

    @classmethod
    def load(cls, name: str, find: Callable[[str], Path], split: str) -> Task:
        return LongDocumentTask(_collection(find(name), split))


@task_kinds.register("cross")
class Cross(TaskKind):
    """The queries of one collection against the corpus of another: `cross:QUERIES:DOCUMENTS` of BEIR folders."""

    @classmethod
    def load(cls, name: str, find: Callable[[str], Path], split: str) -> Task:
        queries, colon, documents = name.partition(":")
        if not colon:
            raise EvaluationError(f"'cross:{name}' names one collection", expected="cross:QUERIES:DOCUMENTS")
        return across_languages(*(_collection(find(each), split) for each in (queries, documents)))


def _collection(path: Path, split: str) -> RetrievalTask:
    return read_beir(path, _name(path), split)


def formats() -> list[Format]:
    """Of all kinds, in the order in which they are tried."""
    return sorted((form for entry in task_kinds.entries() for form in entry.thing.formats), key=lambda form: form.order)


def load_task(name_or_path: str | Path, *, data_dir: str | Path | None = None, split: str = "test") -> Task:
    """A task from a file, a folder, or a name looked up in the data folder (see `data_folder`).

    A name is a file or folder without its ending; `stsb-en` also finds `stsb-en-SPLIT`. `split` chooses the
    judgements of a BEIR folder; another file is one split already. `KIND:NAME` says what the task is where the file
    could be several (`pair_classification:afqmc-dev`, `clustering:banking77`); `long:NAME` tells the score by length;
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
            return form.read(path, _name(path), split)
    if path.is_file():  # not recognised by its first row: the reader of rows says what is wrong with it
        return read_sts(path, _name(path), split)
    raise DataError(
        "not a task", where=path, expected="an STS file, or a BEIR folder (corpus.jsonl, queries.jsonl, qrels/)"
    )


def _locate(name_or_path: str | Path, data_dir: str | Path | None, split: str) -> Path:
    path = Path(name_or_path)
    if path.exists():
        return path
    folder = data_folder(data_dir)
    known = {} if folder is None else known_tasks(folder)
    found = known.get(str(name_or_path)) or known.get(f"{name_or_path}-{split}")
    if found is None:
        raise _unknown(str(name_or_path), list(known), folder)
    return found


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
    forms = formats()
    paths = [path for path in _candidates(Path(folder), _DEPTH) if any(form.matches(path) for form in forms)]
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


def _name(path: Path) -> str:
    """File or folder name without its ending. A dot inside a folder's name stays."""
    name = path.resolve().name
    return next((name.removesuffix(ending) for ending in _ROWS if name.endswith(ending)), name)
