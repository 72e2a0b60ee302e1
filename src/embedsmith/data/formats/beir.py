"""BEIR folders (corpus, queries, qrels) as rows of records."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedsmith.core.errors import DataError
from embedsmith.data.formats.files import Row, Rows, sound_rows
from embedsmith.data.formats.hub import choose_split
from embedsmith.data.formats.texts import file_in, read_texts

Judgements = dict[str, dict[str, float]]


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
