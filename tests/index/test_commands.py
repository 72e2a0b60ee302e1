"""The verbs `index` and `search`, as a user types them."""

import json

import pytest
from typer.testing import CliRunner

import embedsmith as es
from embedsmith.cli import app
from embedsmith.core.errors import DataError, SearchError
from embedsmith.index import Document
from embedsmith.models import load
from tests.tinybert import tiny_bert

DOCUMENTS = [
    {"_id": "1", "text": "the cat sat on the mat", "lang": "en"},
    {"_id": "2", "title": "dog", "text": "ran by the old tree", "lang": "en"},
    {"_id": "3", "text": "a big red far mat", "lang": "de"},
]


@pytest.fixture
def model(tmp_path):
    folder = tiny_bert(tmp_path / "bert")
    heads = ("dense", "sparse", "multivector")
    load(folder, pooling="mean", heads=heads, new_heads=True, multivector_dim=8).save(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(map(json.dumps, DOCUMENTS)), encoding="utf-8")
    return str(path)


def typed(*words):
    return CliRunner().invoke(app, list(words), catch_exceptions=False).output


def test_index_then_search(model, documents, tmp_path):
    place = str(tmp_path / "index")
    assert "3 new, 0 changed, 0 unchanged; 3 in the index" in typed("index", model, documents, "--to", place)
    assert "0 new, 0 changed, 3 unchanged" in typed("index", model, documents, "--to", place)
    (line,) = typed("search", "cat mat", "--index", place, "--json", "--explain").splitlines()
    answer = json.loads(line)
    for hit, found in zip(answer["hits"], answer["explanations"], strict=True):
        assert set(hit["scores"]) <= {"dense", "sparse", "multivector"}
        for head, score in hit["scores"].items():
            assert found["scores"][head] == pytest.approx(score, abs=1e-5)
        matched = sum(match["score"] for match in found["matches"]["multivector"])
        assert matched == pytest.approx(found["scores"]["multivector"], abs=1e-5)
    shown = typed("search", "cat mat", "--index", place, "--explain", "--weight", "multivector=1", "-k", "2")
    assert "multivector: " in shown


def test_filters_weights_ranks_and_files(model, documents, tmp_path):
    place = str(tmp_path / "index")
    typed("index", model, documents, "--to", place, "--head", "dense", "--head", "sparse")
    (line,) = typed("search", "mat", "-i", place, "--json", "--rrf", "--filter", "lang=[de, fr]").splitlines()
    assert [hit["id"] for hit in json.loads(line)["hits"]] == ["3"]
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"_id": "q", "text": "dog"}\n{"_id": "r", "text": "tree"}', encoding="utf-8")
    lines = typed("search", "-i", place, "--file", str(queries), "--weight", "dense=1", "--json").splitlines()
    assert [json.loads(line)["query"] for line in lines] == ["dog", "tree"]
    with pytest.raises(SearchError, match="the index has the heads dense, sparse"):
        typed("index", model, documents, "--to", place, "--head", "dense")
    for words, said in (
        (["--weight", "dense=much"], "not a number"),
        (["--weight", "dense"], "key=value"),
        (["--weight", "dense=0"], "above 0"),
        (["--weight", "dense=nan"], "not a number"),
        (["--weight", "dense=.nan"], "not a number from 0"),
        (["--weight", "dense=1", "--weight", "sparse=.inf"], "not a number from 0"),
        (["--weight", "dense=-.inf"], "not a number from 0"),
        (["--rrf", "--weight", "dense=.nan"], "not a number from 0"),
        (["--filter", "year={gte: .nan}"], "the filter on 'year'"),
        (["--filter", "year={lt: .inf}"], "the filter on 'year'"),
        (["--weight", "multivector=1"], "no head 'multivector'"),
        (["--url", "http://127.0.0.1:9"], "either a folder or"),
    ):
        with pytest.raises(SearchError, match=said):
            typed("search", "mat", "-i", place, *words)


def test_texts_at_the_edge(model, documents, tmp_path):
    place = str(tmp_path / "index")
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"_id": "9", "text": "cat " * 100_000}) + '\n{"_id": "8", "text": "\\u2603 \\u2604"}')
    assert "2 new" in typed("index", model, str(long), "--to", place)
    for query in ("☃", " ", "cat"):
        (line,) = typed("search", query, "-i", place, "--json").splitlines()
        assert all(abs(hit["score"]) < 10 for hit in json.loads(line)["hits"])


def test_the_model_is_found_from_another_folder(model, documents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed("index", "model", documents, "--to", "index")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "mat" in typed("search", "mat", "-i", "../index")


def test_files_without_a_text_are_named(model, documents, tmp_path):
    empty, place = tmp_path / "empty.jsonl", str(tmp_path / "index")
    empty.write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        typed("index", model, str(empty), "--to", place)
    assert not (tmp_path / "index").exists()
    typed("index", model, documents, "--to", place)
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        typed("search", "-i", place, "--file", str(empty))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"_id": "1", "text": "the dog"}', "line 1"),
        ('{"_id": "4", "text": "a \\ud800 dog"}', "broken Unicode"),
    ],
)
def test_a_wrong_document_is_said_before_any_is_encoded(model, documents, tmp_path, row, says):
    with open(documents, "a", encoding="utf-8") as file:
        file.write(f"\n{row}")
    with pytest.raises(DataError, match=rf"docs.jsonl:4: .*{says}"):
        typed("index", model, documents, "--to", str(tmp_path / "index"), "--batch", "1")
    assert not (tmp_path / "index").exists()


def test_documents_without_a_text_are_left_out_and_told_and_such_a_query_is_refused(model, documents, tmp_path, caplog):
    with open(documents, "a", encoding="utf-8") as file:
        file.write('\n{"_id": "4", "text": " ", "title": ""}\n{"_id": "5", "text": ""}')
    place = str(tmp_path / "index")
    assert "3 new, 0 changed, 0 unchanged; 3 in the index" in typed("index", model, documents, "--to", place)
    told = [line for line in caplog.messages if "left out" in line]
    said = ": documents without a text, left out: 2 (the first: '4')"
    assert [line.rpartition("docs.jsonl")[2] for line in told] == [said]
    with pytest.raises(DataError, match=r"docs.jsonl:4: empty text"):
        typed("search", "-i", place, "--file", documents)


def test_given_documents_without_a_text_are_left_out_as_those_of_a_file(model, tmp_path, caplog):
    given = ["a cat", " ", {"id": "x", "text": ""}, Document("y", "\n"), {"id": "z", "text": "a tree"}]
    assert str(es.index(model, given, to=tmp_path / "index")) == "2 new, 0 changed, 0 unchanged; 2 in the index"
    assert "documents without a text, left out: 3 (the first: '1')" in caplog.messages
    with pytest.raises(DataError, match="no document with a text"):
        es.index(model, ["", " "], to=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_query_of_broken_unicode(model, documents, tmp_path):
    typed("index", model, documents, "--to", str(tmp_path / "index"))
    with pytest.raises(DataError, match="broken Unicode in text 1"):
        typed("search", "cat", "\udcff", "-i", str(tmp_path / "index"))
