"""Search over folders of vectors: what the verb finds is what scoring every text gives, by one process and by ranks."""

import json
import os
import random

import numpy as np
import pytest

import embedsmith as es
from embedsmith.core.errors import SearchError
from embedsmith.models.encode_files import EncodeJob, encode_files
from embedsmith.search import approximate, exact_top_k, stored
from tests.ranks import on_ranks
from tests.tinybert import WORDS

QUERIES = ["the red cat", "a big old tree", "dog by the mat"]
SMALL = ((approximate, "_RUN", 8), (approximate, "_BLOCK_BYTES", 1), (stored, "_PIECE", 8))


@pytest.fixture(scope="module")
def base(tmp_path_factory, bert):
    """A model, two files of texts and their vectors."""
    folder = tmp_path_factory.mktemp("stored")
    es.load(str(bert), pooling="mean", prompts={"query": "the "}).save(folder / "model")
    chance = random.Random(2)
    for name, count in (("one", 25), ("two", 36)):
        rows = [
            {"_id": f"{name}{n}", "text": " ".join(chance.sample(WORDS, chance.randint(2, 9)))} for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        encode_files(EncodeJob(str(folder / "model"), (folder / f"{name}.jsonl",), folder / f"v-{name}"), False)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for change in SMALL:
        monkeypatch.setattr(*change)


def found_by(base, **how):
    folders = [base / "v-one", base / "v-two"]
    hits = es.search(QUERIES, k=7, vectors=folders, model=base / "model", **how)
    return [[(hit.id, hit.score, hit.text) for hit in one.hits] for one in hits]


def on_one(base, work):
    for change in SMALL:
        setattr(*change)
    os.chdir(work)
    return found_by(base), found_by(base, approximate="IVF3,Flat", effort=2)


def test_hits_are_those_of_all_texts_scored_with_their_ids_and_texts(base, typed):
    model = es.load(str(base / "model"))
    rows = [json.loads(line) for name in ("one", "two") for line in (base / f"{name}.jsonl").open()]
    vector_ND = model.encode([row["text"] for row in rows], role="document")
    score_Qk, index_Qk = exact_top_k(model.encode(QUERIES, role="query"), vector_ND, 7)
    hits = found_by(base, texts=[base / "one.jsonl", base / "two.jsonl"])
    for one, score_k, index_k in zip(hits, score_Qk, index_Qk, strict=True):
        assert [(id_, text) for id_, _, text in one] == [(rows[n]["_id"], rows[n]["text"]) for n in index_k]
        np.testing.assert_allclose([score for _, score, _ in one], score_k, atol=1e-5)
    given = ("search", *QUERIES, "-k", 7, "--json", "--model", base / "model", "--vectors", base / "v-one")
    out, _, code = typed(*given, "--vectors", base / "v-two")
    assert code == 0
    assert [[hit["id"] for hit in json.loads(line)["hits"]] for line in out.splitlines()] == [
        [id_ for id_, _, _ in one] for one in hits
    ]


def test_an_approximate_search_tells_its_recall_and_is_made_once(base, caplog):
    exact = found_by(base)
    with caplog.at_level("INFO"):
        all_cells = found_by(base, approximate="IVF3,Flat", effort=3)
    assert "IVF3,Flat finds 100.0 % of the 7 nearest, on 3 of the queries" in caplog.text
    assert [[id_ for id_, _, _ in one] for one in all_cells] == [[id_ for id_, _, _ in one] for one in exact]
    files = {path: path.stat().st_mtime_ns for path in (base / "v-one.faiss").rglob("*.faiss")}
    assert len(files) == 1 + 8
    found_by(base, approximate="IVF3,Flat", effort=1)
    assert files == {path: path.stat().st_mtime_ns for path in (base / "v-one.faiss").rglob("*.faiss")}


@pytest.mark.dist
def test_ranks_find_what_one_process_finds(base, tmp_path):
    expected = found_by(base), found_by(base, approximate="IVF3,Flat", effort=2)
    assert on_ranks(3, on_one, tmp_path, base, tmp_path) == [expected] * 3


def test_what_is_not_that_is_refused(base, tmp_path, bert, typed):
    es.load(str(bert), pooling="cls").save(tmp_path / "other")
    model = es.load(str(base / "model"))
    model.backbone.embeddings.word_embeddings.weight.data[5] += 1
    with pytest.raises(
        SearchError, match=r"v-one: these vectors were made by a model with other weights(.|\n)*--model"
    ):
        es.search("cat", vectors=base / "v-one", model=model)
    with pytest.raises(SearchError, match="which model made these vectors"):
        es.search("cat", vectors=base / "v-one")
    with pytest.raises(SearchError, match="no query"):
        es.search([], vectors=base / "v-one", model=str(base / "model"))
    with pytest.raises(SearchError, match="both vectors and an index"):
        es.search("cat", "index", vectors=base / "v-one", model=str(base / "model"))
    with pytest.raises(
        SearchError, match=r"the id is 'two\d+' here, and 'one\d+' among the vectors(.|\n)*in their order"
    ):
        es.search("cat", vectors=base / "v-one", model=str(base / "model"), texts=base / "two.jsonl")
    with pytest.raises(SearchError, match="there are fewer texts than vectors"):
        found_by(base, texts=base / "one.jsonl")
    given = ("search", "cat", "--model", base / "model")
    assert "--rrf with --vectors" in typed(*given, "--vectors", base / "v-one", "--rrf")[1]
    assert "--texts without --vectors" in typed(*given, "--index", tmp_path, "--texts", base / "one.jsonl")[1]
