"""Files of evaluation tasks: STS rows and BEIR folders. Errors are `DataError` with the file and the line."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from embedsmith.core.errors import DataError
from embedsmith.core.progress import log
from embedsmith.data.containers import open_rows
from embedsmith.data.record import RowError
from embedsmith.evaluate.tasks import RetrievalTask, STSTask

_TEXT_COLUMNS = (("text1", "text2"), ("sentence1", "sentence2"))
_QRELS = {"query-id", "corpus-id", "score"}
Row = dict[str, Any]


def read_sts(path: Path, name: str, split: str) -> STSTask:
    """Rows of `text1`, `text2`, `score` (or `sentence1`, `sentence2`, `score`). The file is the split."""
    text1, text2, score = [], [], []
    for where, row in rows_of(path):
        first, second = next((pair for pair in _TEXT_COLUMNS if pair[0] in row), _TEXT_COLUMNS[0])
        text1.append(_text(row, first, where))
        text2.append(_text(row, second, where))
        score.append(_score(row, where))
    if not score:
        raise DataError("the file has no rows", where=path, expected="rows of text1, text2, score")
    return STSTask(name, text1, text2, score)


def read_beir(path: Path, name: str, split: str) -> RetrievalTask:
    """`corpus.jsonl` (`_id, title, text`), `queries.jsonl` (`_id, text`) and `qrels/SPLIT.tsv`.

    A document is its title and its text joined by one space. Ids that are numbers are read as strings.
    """
    qrels_path = find(path / "qrels", split, (".tsv", ".tsv.gz"))
    if qrels_path is None:
        have = sorted(file.name.split(".")[0] for file in path.glob("qrels/*.tsv*"))
        raise DataError(
            f"there are no judgements for the split {split!r}",
            where=path,
            expected=f"qrels/{split}.tsv",
            fix=f"choose another split: {', '.join(have)}" if have else "add the file",
        )
    qrels = read_qrels(qrels_path)
    judged = {document for grades in qrels.values() for document in grades}
    corpus = _texts_by_id(_needed(path, "corpus"), judged, document=True)
    queries = _texts_by_id(_needed(path, "queries"), qrels, document=False)
    if not any(query in queries for query in qrels):
        raise DataError("no judged query is in queries.jsonl", where=qrels_path, fix="check the ids of both files")
    return RetrievalTask(name, queries, corpus, qrels)


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Columns `query-id`, `corpus-id`, `score`. Grades are whole numbers; a pair judged twice must agree."""
    qrels: dict[str, dict[str, int]] = {}
    for where, row in rows_of(path):
        if not row.keys() >= _QRELS:
            raise DataError(f"found: {', '.join(row)}", where=path, expected=f"columns {', '.join(sorted(_QRELS))}")
        query, document, score = (str(row[column]) for column in ("query-id", "corpus-id", "score"))
        if not _is_number(score) or not float(score).is_integer():
            raise DataError(f"the grade is {score!r}", where=where, expected="a whole number")
        grade = int(float(score))
        earlier = qrels.setdefault(query, {}).setdefault(document, grade)
        if earlier != grade:
            raise DataError(f"{document!r} has the grades {earlier} and {grade} for query {query!r}", where=where)
    if not qrels:
        raise DataError("the file has no judgements", where=path)
    return qrels


def rows_of(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a file of any kind that `embedsmith.data` reads, each with its place (`file:line`)."""
    for line, row in open_rows(path).rows:
        if isinstance(row, RowError):
            raise row.at(f"{path}:{line}")
        yield f"{path}:{line}", row


def find(folder: Path, stem: str, endings: tuple[str, ...]) -> Path | None:
    """The first of `stem + ending` that is a file."""
    return next((file for file in (folder / f"{stem}{ending}" for ending in endings) if file.is_file()), None)


def _needed(folder: Path, stem: str) -> Path:
    path = find(folder, stem, (".jsonl", ".jsonl.gz"))
    if path is None:
        raise DataError(f"{stem}.jsonl is missing", where=folder, expected="corpus.jsonl, queries.jsonl and qrels/")
    return path


def _texts_by_id(path: Path, judged: Collection[str], *, document: bool) -> dict[str, str]:
    """Texts by id. Where an id appears twice the last one counts, as in BEIR's own loader; but a judged id must be
    one text."""
    texts: dict[str, str] = {}
    for where, row in rows_of(path):
        key = _id(row, where)
        if key in texts and key in judged:
            raise DataError(f"the judged id {key!r} appears twice", where=where, fix="keep one of the two rows")
        if key in texts:
            log.warning("%s: the id %r appears twice; the later text counts", where, key)
        text = _text(row, "text", where, empty=document)
        title = _text({"title": row.get("title") or ""}, "title", where, empty=True) if document else ""
        texts[key] = f"{title} {text}".strip() if title else text
    if not texts:
        raise DataError("the file has no rows", where=path)
    return texts


def _id(row: Row, where: str) -> str:
    value = row.get("_id", row.get("id"))
    if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
        return str(value)
    raise DataError(f"the id is {value!r}", where=where, expected="`_id`, a text or a whole number")


def _text(row: Row, column: str, where: str, *, empty: bool = False) -> str:
    if column not in row:
        raise DataError(f"the column {column!r} is missing", where=where, expected=f"found: {', '.join(row)}")
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{column!r} is {value!r}", where=where, expected="a text")
    if not value.strip() and not empty:
        raise DataError(f"{column!r} is empty", where=where)
    return value


def _score(row: Row, where: str) -> float:
    value = row.get("score")
    if isinstance(value, str) and _is_number(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"the score is {value!r}", where=where, expected="`score`, a finite number")
    return float(value)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
