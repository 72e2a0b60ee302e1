"""Files of evaluation tasks: STS rows and BEIR folders. Errors are `DataError` with the file and the line."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedsmith.core.errors import DataError
from embedsmith.evaluate.tasks import RetrievalTask, STSTask

_TEXT_COLUMNS = (("text1", "text2"), ("sentence1", "sentence2"))
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
    corpus = _texts_by_id(_needed(path, "corpus"), document=True)
    queries = _texts_by_id(_needed(path, "queries"), document=False)
    qrels = read_qrels(qrels_path)
    if not any(query in queries for query in qrels):
        raise DataError("no judged query is in queries.jsonl", where=qrels_path, fix="check the ids of both files")
    return RetrievalTask(name, queries, corpus, qrels)


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Tab-separated `query-id, corpus-id, score`, with or without that heading. Grades are whole numbers."""
    qrels: dict[str, dict[str, int]] = {}
    for number, line in _lines(path):
        cells = [cell.strip() for cell in line.split("\t")]
        where = f"{path}:{number}"
        if number == 1 and len(cells) == 3 and not _is_number(cells[2]):
            continue
        if len(cells) != 3:
            raise DataError(f"{len(cells)} columns", where=where, expected="query-id, corpus-id, score, by tabs")
        query, document, score = cells
        if not _is_number(score) or float(score) != int(float(score)):
            raise DataError(f"the grade {score!r} is not a whole number", where=where)
        grade = int(float(score))
        if qrels.setdefault(query, {}).setdefault(document, grade) != grade:
            earlier = qrels[query][document]
            raise DataError(
                f"query {query!r} and document {document!r} have the grades {earlier} and {grade}", where=where
            )
    if not qrels:
        raise DataError("the file has no judgements", where=path)
    return qrels


def rows_of(path: Path) -> Iterator[tuple[str, Row]]:
    """JSON objects, one a line, each with its place (`file:line`). Empty lines are skipped."""
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"not valid JSON ({error.msg})", where=where) from error
        if not isinstance(row, dict):
            raise DataError(f"a row is an object, not {type(row).__name__}", where=where)
        yield where, row


def find(folder: Path, stem: str, endings: tuple[str, ...]) -> Path | None:
    """The first of `stem + ending` that is a file."""
    return next((file for file in (folder / f"{stem}{ending}" for ending in endings) if file.is_file()), None)


def _needed(folder: Path, stem: str) -> Path:
    path = find(folder, stem, (".jsonl", ".jsonl.gz"))
    if path is None:
        raise DataError(f"{stem}.jsonl is missing", where=folder, expected="corpus.jsonl, queries.jsonl and qrels/")
    return path


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError("the compressed file is damaged or cut short", where=path, fix="fetch it again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text ({error.reason})", where=path) from error
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path) from error


def _texts_by_id(path: Path, *, document: bool) -> dict[str, str]:
    texts: dict[str, str] = {}
    for where, row in rows_of(path):
        key = _id(row, where)
        if key in texts:
            raise DataError(f"the id {key!r} appears twice", where=where)
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
