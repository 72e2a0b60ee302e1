"""Files of evaluation tasks. Errors are `DataError` with the file and the line."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from embedsmith.core.errors import DataError
from embedsmith.core.progress import log
from embedsmith.data.formats.files import rows_of
from embedsmith.data.formats.texts import read_texts, text_in
from embedsmith.evaluate.tasks.labels import ClassificationTask, ClusteringTask, Label, PairClassificationTask
from embedsmith.evaluate.tasks.retrieval import RerankingTask, RetrievalTask
from embedsmith.evaluate.tasks.similarity import STSTask

_TEXT_COLUMNS = (("text1", "text2"), ("sentence1", "sentence2"))
_CANDIDATE_COLUMNS = (("positive", "negative"), ("pos", "neg"), ("positives", "negatives"))
_QRELS = {"query-id", "corpus-id", "score"}
Row = dict[str, Any]


def read_sts(path: Path, name: str, split: str) -> STSTask:
    """Rows of `text1`, `text2`, `score` (or `sentence1`, `sentence2`, `score`). The file is the split."""
    text1, text2, score = [], [], []
    for where, row in rows_of(path):
        first, second = next((pair for pair in _TEXT_COLUMNS if pair[0] in row), _TEXT_COLUMNS[0])
        text1.append(text_in(row, first, where))
        text2.append(text_in(row, second, where))
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


def read_pairs(path: Path, name: str, split: str) -> PairClassificationTask:
    """Rows of `text1`, `text2` and `label` (or `score`), which is 0 or 1."""
    text1, text2, label = [], [], []
    for where, row in rows_of(path):
        first, second = next((pair for pair in _TEXT_COLUMNS if pair[0] in row), _TEXT_COLUMNS[0])
        text1.append(text_in(row, first, where))
        text2.append(text_in(row, second, where))
        value: Any = row.get("label", row.get("score"))
        if str(value) not in ("0", "1", "0.0", "1.0"):
            raise DataError(f"the label is {value!r}", where=where, expected="`label` (or `score`), 0 or 1")
        label.append(int(float(value)))
    _filled(label, path, "text1, text2, label")
    return PairClassificationTask(name, text1, text2, label)


def read_clustering(path: Path, name: str, split: str) -> ClusteringTask:
    """Rows of `text` and `label`; a label may be a list, from coarse to fine."""
    text, label = _labelled(path)
    return ClusteringTask(name, text, label)


def read_classification(path: Path, name: str, split: str) -> ClassificationTask:
    """Rows of `text` and `label`; the texts to learn from are in the file of the split `train` beside it."""
    train = train_file(path)
    if train is None:
        raise DataError(
            "there is no file with training texts beside it",
            where=path,
            expected="names by split, such as banking-test.jsonl beside banking-train.jsonl",
            fix="add the file, or use it for clustering: clustering:NAME",
        )
    (train_text, train_label), (text, label) = _labelled(train), _labelled(path)
    return ClassificationTask(name, train_text, train_label, text, label)


def train_file(path: Path) -> Path | None:
    """`banking-train.jsonl` for `banking-test.jsonl`, `train.jsonl` for `test.jsonl`, where it exists."""
    stem, dot, ending = path.name.partition(".")
    base, dash, split = stem.rpartition("-")
    file = path.with_name(f"{base}{dash}train{dot}{ending}")
    return file if split != "train" and file.is_file() else None


def _labelled(path: Path) -> tuple[list[str], list[Label]]:
    text: list[str] = []
    label: list[Label] = []
    for where, row in rows_of(path):
        text.append(text_in(row, "text", where))
        value: Any = row.get("label")
        plain = value if isinstance(value, list) else [value]
        if not plain or any(isinstance(each, bool) or not isinstance(each, str | int) for each in plain):
            raise DataError(f"the label is {value!r}", where=where, expected="`label`, a text or a whole number")
        label.append(value)
    _filled(label, path, "text, label")
    if len({type(each) for each in label}) > 1:
        raise DataError("some labels are numbers and some are texts", where=path, fix="write all of them the same way")
    return text, label


def _filled(rows: list[Any], path: Path, columns: str) -> None:
    if not rows:
        raise DataError("the file has no rows", where=path, expected=f"rows of {columns}")


def read_reranking_folder(path: Path, name: str, split: str) -> RerankingTask:
    """A BEIR folder with `top_ranked.jsonl` beside the corpus: rows of `query-id` and `corpus-ids`."""
    base = read_beir(path, name, split)
    file = find(path, "top_ranked", (".jsonl", ".jsonl.gz"))
    if file is None:
        raise DataError("top_ranked.jsonl is missing", where=path, expected="rows of `query-id` and `corpus-ids`")
    candidates: dict[str, list[str]] = {}
    for where, row in rows_of(file):
        ids = row.get("corpus-ids")
        if "query-id" not in row or not isinstance(ids, list):
            raise DataError(f"found: {', '.join(row)}", where=where, expected="`query-id`, and `corpus-ids`, a list")
        candidates[str(row["query-id"])] = [str(each) for each in ids]
    return RerankingTask(name, base.queries, base.corpus, base.qrels, candidates)


def read_reranking_rows(path: Path, name: str, split: str) -> RerankingTask:
    """Rows of `query`, `positive` and `negative` (or `pos`, `neg`), lists of texts. Rows without a positive or
    without a negative are left out, and ids are given as mteb does, so that ties are decided alike."""
    queries: dict[str, str] = {}
    corpus: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    number = 0
    for where, row in rows_of(path):
        columns = next((pair for pair in _CANDIDATE_COLUMNS if set(pair) <= row.keys()), None)
        if columns is None:
            raise DataError(f"found: {', '.join(row)}", where=where, expected="`query`, `positive` and `negative`")
        positive, negative = ([row[c]] if isinstance(row[c], str) else list(row[c] or ()) for c in columns)
        if positive and negative:
            query = f"{split}_query{number}"
            number += 1
            queries[query] = text_in(row, "query", where)
            for prefix, texts, grade in (("apositive", positive, 1), ("negative", negative, 0)):
                for place, text in enumerate(texts):
                    document = f"{prefix}_{query}_{place:05d}"
                    corpus[document] = text_in({"text": text}, "text", where, empty=True)
                    qrels.setdefault(query, {})[document] = grade
    _filled(list(queries), path, "query, positive, negative")
    return RerankingTask(name, queries, corpus, qrels, {query: list(grades) for query, grades in qrels.items()})


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
    for one in read_texts(path, titles=document, ids="each"):
        key = str(one.id)
        if key in texts and key in judged:
            raise DataError(f"the judged id {key!r} appears twice", where=one.where, fix="keep one of the two rows")
        if key in texts:
            log.warning("%s: the id %r appears twice; the later text counts", one.where, key)
        if not document and not one.text.strip():
            raise DataError("'text' is empty", where=one.where)
        texts[key] = one.text
    if not texts:
        raise DataError("the file has no rows", where=path)
    return texts


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
