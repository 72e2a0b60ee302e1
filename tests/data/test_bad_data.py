"""Bad input: each gives one clear error with file and line."""

import gzip
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedsmith.core.errors import DataError, EmbedsmithError, MissingExtraError, RecipeError
from embedsmith.data import Source, read_source

GOOD = {"query": "q", "positives": ["p"]}
PAIR = {"text1": "a", "text2": "b", "score": 0.5}


def lines(path, *rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def error_of(path, kind=DataError, **more):
    with pytest.raises(EmbedsmithError) as caught:
        read_source(Source(path=str(path), **more))
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1, 2]", "the row is a list, not an object"),
        ('"text"', "the row is text, not an object"),
        ("{broken", "not valid JSON"),
        ({"query": 12, "positives": ["p"]}, "the query is a number, not text: 12"),
        ({"query": "q", "positives": []}, "no positives"),
        ({"query": "q", "positives": None}, "no positives"),
        ({"query": "q", "positives": 3}, "positives are a number, not texts: 3"),
        ({"query": "q", "positives": ["p", 3]}, "the positive is a number, not text: 3"),
        ({"query": "", "positives": ["p"]}, "empty query"),
        ({"query": None, "positives": ["p"]}, "empty query"),
        ({"query": "q", "positives": ["p"], "positve_scores": [1]}, "did you mean 'positive_scores'"),
        ({"query": "q", "positives": ["p"], "positive_scores": ["NaN"]}, "text, not a number: 'NaN'"),
        ('{"query": "q", "positives": ["p"], "positive_scores": [NaN]}', "positive_scores hold nan"),
        ({"query": "q", "positives": ["p"], "positive_scores": [1, 0.5]}, "2 positive_scores for 1 texts"),
        ({"query": "q", "positives": ["p", "r"], "positive_scores": [None, True]}, "true or false, not a number: True"),
        ({"query": "q", "positives": ["p"], "task": "sts"}, "no score for an sts pair"),
        ({"query": "q", "positives": ["p"], "task": "sts", "positive_scores": [1]}, "among those of task retrieval"),
        ({"query": "q", "positives": ["p"], "label": True}, "the label is true or false"),
        ({"query": "q", "positives": ["p"], "positive_scores": [0]}, "lowest possible score"),
        ({"query": "q"}, "no column 'positives'; found: query"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(tmp_path, row, message):
    path = lines(tmp_path / "bad.jsonl", GOOD, "", row, GOOD)
    error = error_of(path)
    assert error.startswith(f"{path}:3: ")
    assert message in error
    assert "to fix: " in error
    skipped = read_source(Source(path=str(path), on_error="skip"))
    assert len(skipped.records) == 2
    assert [(fault.count, fault.lines) for fault in skipped.skipped] == [(1, (3,))]


def test_two_thousand_empty_texts_are_one_message(tmp_path, caplog):
    empty = {"query": " ", "positives": ["p"]}
    path = lines(tmp_path / "bad.jsonl", GOOD, *[empty] * 2000, {"query": 5, "positives": ["p"]})
    error = error_of(path)
    assert error.startswith(f"{path}:2: empty query (2000 such rows: lines 2, 3, 4, 5, 6, ...)")
    assert "and the query is a number, not text: 5" in error
    assert len(error) < 600
    skipped = read_source(Source(path=str(path), on_error="skip"))
    assert [fault.count for fault in skipped.skipped] == [2000, 1]
    assert "skipped 2001 rows" in caplog.text


def test_nothing_left_after_skipping_is_an_error(tmp_path):
    path = lines(tmp_path / "bad.jsonl", *[{"query": "", "positives": ["p"]}] * 3)
    assert "empty query (3 such rows" in error_of(path, on_error="skip")


def test_an_empty_file(tmp_path):
    assert "no records in it" in error_of(lines(tmp_path / "bad.jsonl"))


def test_a_missing_file_lists_its_neighbours(tmp_path):
    lines(tmp_path / "train.jsonl", GOOD)
    error = error_of(tmp_path / "trian.jsonl")
    assert "trian.jsonl: no such file" in error
    assert "train.jsonl" in error.split("expected")[1]
    assert "there is no folder" in error_of(tmp_path / "no" / "a.jsonl")


def test_an_unknown_kind_of_file(tmp_path):
    error = error_of(lines(tmp_path / "a.xlsx", GOOD))
    assert "unknown kind of file '.xlsx'" in error
    assert ".parquet" in error


def test_a_truncated_gzip(tmp_path):
    path = lines(tmp_path / "a.jsonl.gz", *[{"query": str(n), "positives": [str(n * n)]} for n in range(5000)])
    path.write_bytes(path.read_bytes()[:-2000])
    error = error_of(path, on_error="skip")
    assert f"{path}:" in error
    assert "the gzip file ends in the middle" in error


def test_a_corrupt_gzip_and_text_named_gz(tmp_path):
    path = lines(tmp_path / "a.jsonl.gz", *[{"query": str(n), "positives": [str(n * n)]} for n in range(5000)])
    broken = bytearray(path.read_bytes())
    broken[3000:3100] = bytes(100)
    path.write_bytes(broken)
    assert "not a readable gzip file" in error_of(path)
    path.write_text(json.dumps(GOOD))
    assert "not a readable gzip file" in error_of(path)


def test_a_byte_order_mark_is_tolerated_and_other_encodings_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n", encoding="utf-8-sig")
    assert read_source(Source(path=str(path))).records[0].query == "q"
    path.write_bytes((json.dumps(GOOD) + "\n").encode() + '{"query": "é", "positives": ["p"]}\n'.encode("latin-1"))
    assert error_of(path).startswith(f"{path}:2: not UTF-8")
    path = tmp_path / "a.csv"
    path.write_bytes(b"query,positives\nq,p\n\xe9,p\nr,p\n")
    assert error_of(path).startswith(f"{path}:3: not UTF-8")
    assert len(read_source(Source(path=str(path), on_error="skip")).records) == 2
    path.write_text("query,positives\nq,p\n", encoding="utf-16")
    assert error_of(path).startswith(f"{path}: the file is UTF-16")
    path = tmp_path / "joined.jsonl"  # files with a mark, joined by cat
    path.write_bytes(2 * (json.dumps(GOOD) + "\n").encode("utf-8-sig"))
    assert len(read_source(Source(path=str(path))).records) == 2


@pytest.mark.parametrize(
    ("row", "found", "hint"),
    [
        ({"query": "q", "positve": ["p"]}, "found: query, positve", "'positve' (did you mean 'positive'?)"),
        ({"premise": "q", "hypothesis": "p"}, "found: premise, hypothesis", "columns: {"),
        ({}, "found: none", "text1, text2, score"),
    ],
)
def test_columns_that_fit_nothing_are_listed(tmp_path, row, found, hint):
    error = error_of(lines(tmp_path / "a.jsonl", row))
    assert found in error
    assert hint in error


def test_declared_columns_must_exist(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"title": "q", "body": "p"})
    error = error_of(path, columns={"query": "titel", "positives": "body"})
    assert "no column 'titel' (did you mean 'title'?)" in error
    assert "title, body" in error
    assert "unknown role 'querry' (did you mean 'query'?)" in error_of(path, RecipeError, columns={"querry": "title"})
    assert "no column is declared to be the query" in error_of(path, RecipeError, columns={"positives": "body"})


def test_a_format_asked_for_must_fit(tmp_path):
    error = error_of(lines(tmp_path / "a.jsonl", GOOD), format="flagembedding")
    assert "found: query, positives" in error
    assert "expected: flagembedding: query, pos" in error


def test_csv_faults(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text1,text2,score\na,b,1\na,b\n")
    assert error_of(path).startswith(f"{path}:3: 2 cells, but the header has 3")
    path.write_text("text1,text2,score\na,b,1\na,b,NaN\n")
    assert error_of(path).startswith(f"{path}:3: positive_scores hold nan")
    path.write_text("text1,text2,score\na,b,1\na,b,high\n")
    assert error_of(path).startswith(f"{path}:3: positive_scores hold text that is not a number: 'high'")
    path.write_text("text1,text2,score\na,b,1\na,b,\n")
    assert error_of(path).startswith(f"{path}:3: no score for an sts pair")
    path.write_text("text1,text2,text1\na,b,1\n")
    assert error_of(path).startswith(f"{path}:1: the header names text1 twice")
    path.write_text('text1,text2,score\n"a,b,1\n')
    assert "not valid CSV" in error_of(path)


def test_a_broken_parquet_file(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"query": ["q"] * 100, "positives": [["p"]] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "not a readable Parquet file" in error_of(path)


@pytest.mark.parametrize(
    ("low", "high", "known"),
    [
        *((0, 1, (0.0, 1.0)), (0.2, 0.7, (0.0, 1.0)), (-1, 1, (-1.0, 1.0)), (-0.1, 0.5, (-1.0, 1.0))),
        *((1, 5, (1.0, 5.0)), (1, 1.5, (1.0, 5.0)), (0, 5, (0.0, 5.0)), (0.5, 1.5, (0.0, 5.0)), (1.5, 5, (0.0, 5.0))),
        *((-1.1, 1, None), (-1, 1.1, None), (0, 5.1, None), (1, 5.1, None)),
    ],
)
def test_the_range_that_scores_are_in_is_told_at_its_edges(tmp_path, low, high, known):
    path = lines(tmp_path / "a.jsonl", *(PAIR | {"score": score} for score in (low, high, (low + high) / 2)))
    if known is None:
        error = error_of(path)
        assert f"scores from {low:g} (line 1) to {high:g} (line 2) fit no known range" in error
        assert "\n  expected: 0 to 1, -1 to 1, 1 to 5 or 0 to 5\n  to fix: declare it: score_range:" in error
        return
    found = read_source(Source(path=str(path)))
    assert found.score_range == known
    scores = [record.positive_scores[0] for record in found.records]
    assert scores == pytest.approx(
        [(score - known[0]) / (known[1] - known[0]) for score in (low, high, (low + high) / 2)]
    )


def test_score_ranges(tmp_path):
    path = lines(tmp_path / "a.jsonl", PAIR, PAIR | {"score": 17}, PAIR | {"score": -3})
    assert "scores from -3 (line 3) to 17 (line 2) fit no known range" in error_of(path)
    error = error_of(path, score_range=(0, 5))
    assert error.startswith(f"{path}:2: score 17 is outside the declared range")
    assert "(2 such rows: lines 2, 3)" in error
    assert "\n  expected: 0 to 5\n  to fix: correct the row, or declare another score_range" in error
    assert "not [lowest, highest]" in error_of(path, RecipeError, score_range=(5, 0))


def test_a_dataset_that_is_not_there(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra hub")
    (tmp_path / "empty").mkdir()
    assert "cannot load a dataset" in error_of(tmp_path / "empty")

    def unreachable(name):
        raise ConnectionError(f"no route to {name}")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for name in ("someone/something", "hf://someone/something"):
        error = error_of(name)
        assert "someone/something: cannot load a dataset of this name (no route to someone/something)" in error
        assert "a file or folder here, or the id" in error


def test_datasets_without_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert 'pip install "embedsmith[hub]"' in error_of("hf://someone/something", MissingExtraError)


def test_a_beir_folder_with_faults(tmp_path):
    (tmp_path / "qrels").mkdir()
    lines(tmp_path / "corpus.jsonl", {"_id": "d1", "text": "one"})
    lines(tmp_path / "queries.jsonl", {"_id": "q1", "text": "query"})
    assert "no judgements" in error_of(tmp_path)
    qrels = tmp_path / "qrels" / "train.tsv"
    for row, message in (
        ("q1\td9\t1", f"{qrels}:2: judges the document 'd9'"),
        ("q1\td1\thigh", f"{qrels}:2: the score is 'high'"),
        ("q1\td1\t1\nq1\td1\t2", f"{qrels}:3: grade 2, but an earlier line gave the same pair 1"),
        ("q9\td1\t1", "judgements of 1 queries that are not in queries.jsonl: q9"),
    ):
        qrels.write_text(f"query-id\tcorpus-id\tscore\n{row}\n")
        assert message in error_of(tmp_path)
    qrels.write_text("q1\td1\t1\nq1\td1\t1\n")
    assert f"{qrels}:2: found: q1, d1, 1" in error_of(tmp_path)
    lines(tmp_path / "corpus.jsonl", *[{"_id": "d1", "text": "one"}] * 2)
    assert f"{tmp_path / 'corpus.jsonl'}:2: the id 'd1' appears twice" in error_of(tmp_path)
    lines(tmp_path / "corpus.jsonl", {"key": "d1", "text": "one"})
    error = error_of(tmp_path)
    assert f"{tmp_path / 'corpus.jsonl'}:1: the id is None" in error
    assert "found: key, text" in error
