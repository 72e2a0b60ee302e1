"""BEIR folders (corpus, queries, qrels) as rows of records."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedsmith.core.errors import DataError
from embedsmith.data.formats.files import Row, Rows, open_rows
from embedsmith.data.record import RowError, titled

Judgements = dict[str, dict[str, float]]


def is_beir(folder: Path) -> bool:
    return _file(folder, "corpus.jsonl").is_file() and _file(folder, "queries.jsonl").is_file()


def beir_rows(folder: Path, split: str | None) -> Rows:
    """One row a judged query: documents judged above 0 are its positives (graded), the others its negatives.

    A document's text is its title and its text, joined by a space. Lines are those of the queries file.
    Errors: `DataError` for a missing file or split, and for judgements of texts that do not exist.
    """
    documents = {id_: text for _, id_, text in _texts(_file(folder, "corpus.jsonl"))}
    path, judgements = _judgements(folder, split, documents)
    grades = [score for judged in judgements.values() for score in judged.values()]
    top = max(1.0, max(grades, default=1.0))
    queries = _file(folder, "queries.jsonl")
    return Rows(queries, _rows(queries, path, documents, judgements), format="beir", score_range=(0.0, top))


def _rows(queries: Path, qrels: Path, documents: dict[str, str], judgements: Judgements) -> Iterator[Row]:
    unseen = set(judgements)
    for line, id_, text in _texts(queries):
        if id_ in unseen:
            unseen.remove(id_)
            judged = judgements[id_]
            good = {document: score for document, score in judged.items() if score > 0}
            row: dict[str, Any] = {
                "query": text,
                "positives": [documents[document] for document in good],
                "positive_scores": list(good.values()),
                "negatives": [documents[document] for document in judged if document not in good],
                "task": "retrieval",
            }
            yield line, row
    if unseen:
        raise DataError(
            f"judgements of {len(unseen)} queries that are not in {queries.name}: {', '.join(sorted(unseen)[:5])}",
            where=qrels,
            fix="check that the folder's files belong together",
        )


def _texts(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, id, text) of a corpus or queries file."""
    seen: set[str] = set()
    for line, row in open_rows(path).rows:
        if isinstance(row, RowError):
            raise row.at(f"{path}:{line}")
        if "_id" not in row or not isinstance(row.get("text"), str):
            raise DataError(
                f"found: {', '.join(row) or 'no keys'}",
                where=f"{path}:{line}",
                expected="the keys _id and text (a text)",
            )
        id_ = str(row["_id"])
        if id_ in seen:
            raise DataError(f"the id {id_!r} appears twice", where=f"{path}:{line}", fix="make ids unique")
        seen.add(id_)
        yield line, id_, titled(row.get("title"), row["text"]).strip()


def _judgements(folder: Path, split: str | None, documents: dict[str, str]) -> tuple[Path, Judgements]:
    path = _qrels_file(folder, split)
    judgements: Judgements = {}
    for line, row in open_rows(path).rows:
        where = f"{path}:{line}"
        if isinstance(row, RowError):
            raise row.at(where)
        if not {"query-id", "corpus-id", "score"} <= row.keys():
            raise DataError(f"found: {', '.join(row)}", where=where, expected="columns query-id, corpus-id, score")
        if row["corpus-id"] not in documents:
            raise DataError(f"judges the document {row['corpus-id']!r}, which is not in the corpus", where=where)
        grade = _grade(row["score"], where)
        earlier = judgements.setdefault(row["query-id"], {}).setdefault(row["corpus-id"], grade)
        if earlier != grade:
            raise DataError(f"grade {grade:g}, but an earlier line gave the same pair {earlier:g}", where=where)
    return path, judgements


def _grade(cell: str, where: str) -> float:
    try:
        grade = float(cell)
    except ValueError:
        grade = float("nan")
    if not math.isfinite(grade):
        raise DataError(f"the score is {cell!r}", where=where, expected="a number")
    return grade


def _qrels_file(folder: Path, split: str | None) -> Path:
    """The judgements of the split asked for; else of `train`; else the only ones there are."""
    found = {path.stem: path for path in sorted((folder / "qrels").glob("*.tsv"))}
    chosen = split or ("train" if "train" in found else next(iter(found)) if len(found) == 1 else None)
    if chosen not in found:
        what = "no judgements" if split is None and not found else f"no split {split!r}" if split else "several splits"
        raise DataError(
            what,
            where=folder / "qrels",
            expected=f"one of those found: {', '.join(found) or 'none'}",
            fix="set split to one of them" if found else "add qrels/train.tsv",
        )
    return found[chosen]


def _file(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_file() else folder / f"{name}.gz"
