"""`embedsmith inspect`."""

import json
import re

import pytest
from typer.testing import CliRunner

from embedsmith.cli import app
from embedsmith.core.errors import DataError, RecipeError
from embedsmith.data import read_source
from embedsmith.data.inspect import inspect_source
from embedsmith.data.source import Source

ROWS = [
    {"query": "one", "pos": ["a" * 10], "neg": ["b", "a" * 10]},
    {"query": "one", "pos": ["a" * 10], "neg": ["b", "a" * 10]},
    {"query": "two  ", "pos": ["c", "a" * 10]},
    {"query": "", "pos": ["c"]},
]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def test_what_is_counted(path):
    found = inspect_source(Source(path=str(path), on_error="skip"), samples=2)
    assert (found.format, found.task, found.records) == ("flagembedding", "retrieval", 3)
    assert found.fields == {"query": 3, "positives": 3, "negatives": 2}
    assert (found.lengths["positives"].texts, found.lengths["positives"].percentiles[0]) == (4, 1)
    assert found.lengths["positives"].percentiles[-1] == 10
    duplicates = found.duplicates
    assert (duplicates.rows, duplicates.queries, duplicates.positives) == (1, 1, 2)
    assert duplicates.negatives_that_are_positives == 2
    assert [sample.query for sample in found.samples] == ["one", "two  "]


def test_scores_and_labels_are_counted(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("text1,text2,score\na,b,0\na,b,5\na,c,5\n")
    found = inspect_source(Source(path=str(path)))
    assert found.scores == "inferred 0 to 5, found 0 to 5"
    assert found.score_counts == {"0.0 to 0.1": 1, "0.9 to 1.0": 2}
    path.write_text("text,label\na,spam\nb,ham\nc,spam\n")
    assert inspect_source(Source(path=str(path))).labels == {"ham": 1, "spam": 2}


def test_the_verb_prints_tables_and_json(path):
    shown = run(path, "on_error=skip", "--samples", "1")
    assert shown.exit_code == 0
    assert "flagembedding" in shown.output
    assert "empty query" in shown.output
    record = read_source(Source(path=str(path), on_error="skip")).records[0]
    rows = [[cell.strip() for cell in re.split("[│┃|]", line)] for line in shown.output.splitlines()]
    texts = [("query", record.query), ("positive", record.positives[0])]
    for role, text in texts:
        assert [row for row in rows if role in row and text in row], f"{role} of a sample"
    tree = json.loads(run(path, "on_error=skip", "--json").stdout)
    assert tree["records"] == 3
    assert tree["skipped"] == [{"kind": "empty query", "count": 1, "lines": [4]}]


def test_the_verb_fails_with_the_reader_s_message(path):
    failed = run(path)
    assert failed.exit_code == 1
    assert isinstance(failed.exception, DataError)
    wrong = run(path, "formt=pairs")
    assert isinstance(wrong.exception, RecipeError)
    assert "did you mean 'format'" in str(wrong.exception)


def test_markup_in_a_text_is_not_markup(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"query": "[bold]x[/red]", "positives": ["[/]"]}) + "\n")
    assert "[bold]x[/red]" in run(path).output
