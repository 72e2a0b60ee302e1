"""Datasets of several files as rows of records: BEIR folders (corpus, queries, qrels), and datasets of Hugging Face,
from the hub or from a folder, which need the extra `hub`."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from embedsmith.core.errors import DataError, MissingExtraError
from embedsmith.data.formats.file_kinds import Row, Rows, sound_rows
from embedsmith.data.formats.texts import file_in, read_texts
from embedsmith.data.record import typed_for_source

Judgements = dict[str, dict[str, float]]
_WHAT_IT_RAISES = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    yaml.YAMLError,
)
"""By the package `datasets`, for files that it cannot read."""


def is_beir_folder(folder: Path) -> bool:
    return file_in(folder, "corpus.jsonl").is_file() and file_in(folder, "queries.jsonl").is_file()


def beir_rows(folder: Path, split: str | None) -> Rows:
    """One row a judged query: documents judged above 0 are its positives (graded), the others its negatives.

    A document's text is its title and its text, joined by a space. Lines are those of the queries file.
    Errors: `DataError` for a missing file or split, and for judgements of texts that do not exist.
    """
    documents = {one.id: one.text.strip() for one in read_texts(folder, ids="unique") if one.id is not None}
    path, judgements = _judgements(folder, split, documents)
    grades = [score for judged in judgements.values() for score in judged.values()]
    top = max(1.0, max(grades, default=1.0))
    rows = _rows(folder, path, documents, judgements)
    return Rows(file_in(folder, "queries.jsonl"), rows, format="beir", score_range=(0.0, top))


def _rows(folder: Path, qrels: Path, documents: dict[str, str], judgements: Judgements) -> Iterator[Row]:
    unseen = dict.fromkeys(judgements)
    for query in read_texts(folder, "queries", ids="unique"):
        if query.id in unseen:
            del unseen[query.id]
            judged = judgements[query.id]
            good = {document: score for document, score in judged.items() if score > 0}
            row: dict[str, Any] = {
                "query": query.text.strip(),
                "positives": [documents[document] for document in good],
                "positive_scores": list(good.values()),
                "negatives": [documents[document] for document in judged if document not in good],
                "task": "retrieval",
            }
            yield int(query.where.rpartition(":")[2]), row
    if unseen:
        raise DataError(
            f"judgements of {len(unseen)} queries that are not in queries.jsonl: {', '.join(sorted(unseen)[:5])}",
            where=qrels,
            fix="check that the folder's files belong together",
        )


def _judgements(folder: Path, split: str | None, documents: dict[str, str]) -> tuple[Path, Judgements]:
    found = {path.stem: path for path in sorted((folder / "qrels").glob("*.tsv"))}
    if not found:
        raise DataError("no judgements", where=folder / "qrels", fix="add qrels/train.tsv")
    path: Path = choose_split(found, split, folder / "qrels")
    judgements: Judgements = {}
    for where, row in sound_rows(path):
        if not {"query-id", "corpus-id", "score"} <= row.keys():
            raise DataError(f"found: {', '.join(row)}", where=where, expected="columns query-id, corpus-id, score")
        if row["corpus-id"] not in documents:
            raise DataError(f"judges the document {row['corpus-id']!r}, which is not in the corpus", where=where)
        try:
            grade = float(row["score"])
        except ValueError:
            grade = math.nan
        if not math.isfinite(grade):
            raise DataError(f"the score is {row['score']!r}", where=where, expected="a number")
        earlier = judgements.setdefault(row["query-id"], {}).setdefault(row["corpus-id"], grade)
        if earlier != grade:
            raise DataError(f"grade {grade:g}, but an earlier line gave the same pair {earlier:g}", where=where)
    return path, judgements


def is_saved_dataset(path: Path) -> bool:
    """A folder written by `save_to_disk`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def hub_rows(name: str, split: str | None) -> Rows:
    """Rows of one split, numbered from 1; without `split` that is `train`, or the only one.

    Errors: `DataError` if there is no such dataset or split; `MissingExtraError` without the package `datasets`.
    """
    datasets = load_datasets()
    with refused(name):
        found = datasets.load_from_disk(name) if is_saved_dataset(Path(name)) else datasets.load_dataset(name)
    return dataset_rows(choose_split(found, split, name), name)


def dataset_rows(dataset: Any, name: str) -> Rows:
    """Rows of a loaded dataset, numbered from 1."""
    return Rows(name, _decoded(dataset, name), version=dataset._fingerprint, size=dataset.data.nbytes)


def _decoded(dataset: Any, name: str) -> Iterator[Row]:
    """Rows of a loaded dataset; their values are decoded only now."""
    rows = iter(dataset)
    for number in count(1):
        with refused(f"{name}:{number}"):
            row = next(rows, None)
        if row is None:
            return
        yield number, dict(row)


def load_datasets() -> Any:
    """The package `datasets`. Errors: `MissingExtraError` without it."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "hub") from error
    return datasets


@contextmanager
def refused(name: str) -> Iterator[None]:
    """Whatever the package says of a dataset it cannot load, as a `DataError`."""
    datasets = load_datasets()
    try:
        yield
    except (*_WHAT_IT_RAISES, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"cannot load a dataset of this name ({reason})",
            where=name,
            expected="a file or folder here, or the id of a dataset on the hub",
            fix="check the path; for a hub id, check the network and HF_HUB_OFFLINE",
        ) from error


def choose_split(found: Any, split: str | None, name: object) -> Any:
    """One split of several: the one asked for, else `train`, else the only one. Errors: `DataError`."""
    if not isinstance(found, dict):
        return found
    chosen = split or ("train" if "train" in found else next(iter(found)) if len(found) == 1 else None)
    if chosen not in found:
        first = next(iter(found), "train")
        raise DataError(
            f"no split {split!r}" if split else "several splits",
            where=name,
            expected=f"one of those found: {', '.join(found)}",
            fix=f"say which: split: {first} beside its path {typed_for_source(f'split={first}')}",
        )
    return found[chosen]
