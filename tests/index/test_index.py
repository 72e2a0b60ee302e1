"""The hybrid index: the same figures as scoring every pair, on both engines, and what happens when things go wrong."""

import json
import multiprocessing as mp
import os
import random
import signal
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from embedsmith.core.errors import DataError, SearchError
from embedsmith.core.reps import Sparse
from embedsmith.index import (
    Document,
    EdgeStore,
    HitExplanation,
    ReciprocalRank,
    ServerStore,
    WeightedSum,
    open_index,
    read_documents,
)
from embedsmith.index.vector_store import Request
from embedsmith.search.hybrid import Hybrid
from tests.index.words import Words

HEADS = ("dense", "sparse", "multivector")
WORDS = ["cat", "dog", "bird", "fish", "tree", "river", "stone", "cloud", "the", "of", "house", "road", "moon", "star"]
QUERIES = ["the cat of the house", "river stone", "moon moon star", "of the", "zebra"]


def texts(count=120):
    chance = random.Random(0)
    return [" ".join(chance.choices(WORDS, k=chance.randint(3, 9))) for _ in range(count)]


def documents(count=120):
    return [
        Document(str(n), text, {"lang": "en" if n % 2 else "zh", "year": 2000 + n})
        for n, text in enumerate(texts(count))
    ]


@pytest.fixture(params=["edge", "server"])
def store(request, tmp_path):
    made = EdgeStore(tmp_path / "index") if request.param == "edge" else ServerStore(":memory:", "docs", waits=())
    yield made
    made.close()


@pytest.fixture
def index(store):
    found = open_index(Words(), store, heads=HEADS, create=True)
    found.add(documents(), batch=50)
    return found


def exact(weights):
    """Every pair scored: [Q][document id]."""
    encoder, heads = Words(), tuple(weights)
    sides = (
        encoder.represent(rows, role=role, outputs=heads) for rows, role in ((QUERIES, "query"), (texts(), "document"))
    )
    query, document = (Hybrid(tuple(reps[head] for head in heads), tuple(weights.values())) for reps in sides)
    return query.scores(document)[0]


@pytest.mark.parametrize(
    "weights",
    [
        {"dense": 1.0},
        {"multivector": 1.0},
        {"dense": 1.0, "sparse": 0.3},
        {"dense": 1.0, "sparse": 0.3, "multivector": 0.7},
    ],
)
def test_scores_are_those_of_every_pair(index, weights):
    expected = exact(weights)
    for q, hits in enumerate(index.search(QUERIES, k=20, fusion=WeightedSum(weights), candidates=120)):
        if len(weights) == 1:
            assert len(hits) == 20
        for hit in hits:
            assert hit.score == pytest.approx(float(expected[q, int(hit.id)]), abs=1e-5)
            assert hit.score == pytest.approx(sum(weights[head] * score for head, score in hit.scores.items()))
            assert hit.text == texts()[int(hit.id)]
        best = expected[q].topk(20).values.tolist()
        assert [hit.score for hit in hits] == pytest.approx(best[: len(hits)], abs=1e-5)


def test_sparse_alone_finds_what_shares_a_weighted_word(index):
    found = index.search(QUERIES, k=5, fusion=WeightedSum({"sparse": 1.0}))
    assert [bool(hits) for hits in found] == [True, True, True, False, False]  # only stop words; an unknown word
    expected = exact({"sparse": 1.0})
    for q in range(3):
        assert found[q][0].score == pytest.approx(float(expected[q].max()), abs=1e-5)


def test_reciprocal_ranks(index):
    (hits,) = index.search(["river stone"], k=3, fusion=ReciprocalRank({"dense": 1.0, "sparse": 2.0}, k=10))
    (dense,) = index.search(["river stone"], k=120, fusion=WeightedSum({"dense": 1.0}), candidates=120)
    (sparse,) = index.search(["river stone"], k=120, fusion=WeightedSum({"sparse": 1.0}), candidates=120)
    union = {hit.id for hit in dense[:100]} | {hit.id for hit in sparse[:100]}
    expected = Counter()
    for weight, ranked in ((1.0, dense), (2.0, sparse)):
        for rank, hit in enumerate([hit for hit in ranked if hit.id in union], start=1):
            expected[hit.id] += weight / (10 + rank)
    assert [hit.score for hit in hits] == pytest.approx([score for _, score in expected.most_common(3)], rel=0.05)
    assert hits[0].score == pytest.approx(expected.most_common(1)[0][1])


def test_filters(index):
    (hits,) = index.search(["cat"], k=100, filter={"lang": "zh", "year": {"gte": 2050}})
    assert hits
    assert {(hit.metadata["lang"], hit.metadata["year"] >= 2050) for hit in hits} == {("zh", True)}
    (hits,) = index.search(["cat"], k=100, filter={"year": [2003, 2004]})
    assert {hit.id for hit in hits} <= {"3", "4"}
    with pytest.raises(SearchError, match="filter on 'year'"):
        index.search(["cat"], filter={"year": {"over": 3}})


def test_documents_are_replaced_deleted_and_left_alone(index):
    again = documents()
    again[7] = Document("7", "an aardvark", {"lang": "en"})
    encoder_calls = []
    represent = index.encoder.represent
    index.encoder.represent = lambda rows, **options: encoder_calls.append(rows) or represent(rows, **options)
    written = index.add([*again, Document("new", "an abacus")])
    assert (written.new, written.changed, written.unchanged) == (1, 1, 119)
    assert sorted(text for rows in encoder_calls for text in rows) == ["an aardvark", "an abacus"]
    assert index.search(["aardvark"], k=1)[0][0].id == "7"
    index.delete(["7"])
    assert len(index) == 120
    assert index.search(["aardvark"], k=1, fusion=WeightedSum({"sparse": 1.0})) == [[]]


def test_an_index_of_another_model_or_other_heads_is_refused(index):
    with pytest.raises(SearchError, match="made by another model"):
        open_index(Words(seed=1), index.store)
    with pytest.raises(SearchError, match="the index has the heads"):
        open_index(Words(), index.store, heads=("dense",))
    with pytest.raises(SearchError, match="no head 'middle'"):
        index.search(["cat"], fusion=WeightedSum({"middle": 1.0}))
    with pytest.raises(SearchError, match="above 0 for one"):
        WeightedSum({"dense": 0.0})


def test_no_index_there(tmp_path):
    with pytest.raises(SearchError, match="no index here"):
        open_index(Words(), EdgeStore(tmp_path / "none"))
    for place in ("mine", "mine/shard"):
        thesis = tmp_path / place / "thesis.txt"
        thesis.parent.mkdir(parents=True, exist_ok=True)
        thesis.write_text("years of work", encoding="utf-8")
        with pytest.raises(SearchError, match="holds other files"):
            open_index(Words(), EdgeStore(tmp_path / "mine"), create=True)
        thesis.unlink()


def _write_slowly(folder):
    class Slow(Words):
        def represent(self, rows, **options):
            time.sleep(0.2)
            return super().represent(rows, **options)

    open_index(Slow(), EdgeStore(folder), heads=HEADS, create=True).add(documents(), batch=10)


def test_a_killed_writer_loses_nothing_and_is_continued(tmp_path):
    writer = mp.get_context("spawn").Process(target=_write_slowly, args=(tmp_path / "index",))
    writer.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (tmp_path / "index" / "embedsmith_index.json").exists():
        time.sleep(0.05)
    time.sleep(1.0)
    with pytest.raises(SearchError, match="another process has this index open"):
        EdgeStore(tmp_path / "index")
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    index = open_index(Words(), EdgeStore(tmp_path / "index"), heads=HEADS)
    kept = len(index)
    assert 0 < kept < 120
    written = index.add(documents())
    assert (written.new, written.unchanged) == (120 - kept, kept)
    expected = exact({"dense": 1.0})
    found = index.search(QUERIES, k=3, fusion=WeightedSum({"dense": 1.0}), candidates=120)
    for q, hits in enumerate(found):
        assert [hit.score for hit in hits] == pytest.approx(expected[q].topk(3).values.tolist(), abs=1e-5)


def test_an_unreachable_server_is_tried_again_then_named(monkeypatch):
    waits = []
    monkeypatch.setattr("embedsmith.index.server.time.sleep", waits.append)
    store = ServerStore("http://127.0.0.1:9", "docs", waits=(0.1, 0.2))
    with pytest.raises(SearchError, match=r"cannot be reached .* after 3 tries"):
        store.settings()
    assert waits == [0.1, 0.2]


def test_a_server_that_goes_away_in_the_middle_loses_nothing(monkeypatch):
    from qdrant_client.http.exceptions import ResponseHandlingException

    store = ServerStore(":memory:", "docs", waits=())
    index = open_index(Words(), store, heads=HEADS, create=True)
    upsert, calls = store._client.upsert, []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise ResponseHandlingException(OSError("gone"))
        return upsert(*args, **options)

    monkeypatch.setattr(store._client, "upsert", failing)
    with pytest.raises(SearchError, match="give the same command again"):
        index.add(documents(), batch=20)
    assert len(index) == 40
    written = index.add(documents(), batch=20)
    assert (written.new, written.unchanged) == (80, 40)


def test_what_is_too_large_for_one_call_is_written_in_several(monkeypatch):
    monkeypatch.setattr("embedsmith.index.server._NUMBERS", 60)
    store = ServerStore(":memory:", "docs", waits=())
    index = open_index(Words(), store, heads=HEADS, create=True)
    upsert, calls = store._client.upsert, []

    def counting(collection, rows, **options):
        count = lambda vector: np.size(vector) if isinstance(vector, list) else 2 * len(vector.indices)
        numbers = [sum(map(count, row.vector.values())) for row in rows]
        calls.append(numbers)
        return upsert(collection, rows, **options)

    monkeypatch.setattr(store._client, "upsert", counting)
    index.add(documents(30))
    assert len(index) == 30 == sum(map(len, calls))
    assert len(calls) > 3
    assert all(sum(numbers) <= 60 or len(numbers) == 1 for numbers in calls)
    assert any(sum(one) + two[0] > 60 for one, two in pairwise(calls))


def test_explanations_add_up():
    encoder = Words()
    query, document = "the cat saw a moon moon", "moon over the cat house"
    reps = [encoder.represent([t], role=r, outputs=HEADS) for t, r in ((query, "query"), (document, "document"))]
    known = {encoder.word_id(word): word for word in (query + " " + document).split()}
    vocabulary = lambda ids: [known[each] for each in ids]
    found = HitExplanation.of(*reps, query.split(), document.split(), vocabulary)
    for head in ("sparse", "multivector"):
        assert sum(match.score for match in found.matches[head]) == pytest.approx(found.scores[head], abs=1e-5)
    assert {match.query_token for match in found.matches["sparse"]} == {"cat", "moon"}
    assert {(m.query_token, m.document_token) for m in found.matches["multivector"]} >= {("cat", "cat"), ("the", "the")}
    assert "dense" not in found.matches
    with pytest.raises(SearchError, match="5 tokens for 6 places"):
        HitExplanation.of(*reps, query.split()[1:], document.split(), vocabulary)


def test_a_word_that_no_token_of_the_text_is_explains_a_hit_too():
    """A SPLADE head gives words of its own, and as many as it likes."""
    query = {"sparse": Sparse(torch.tensor([[7, 3]]), torch.tensor([[2.0, 1.0]]))}
    document = {"sparse": Sparse(torch.tensor([[1, 3, 7]]), torch.tensor([[1.0, 5.0, 2.0]]))}
    found = HitExplanation.of(query, document, ["pet"], ["cats"], lambda ids: [f"word {each}" for each in ids])
    assert [(match.query_token, match.score) for match in found.matches["sparse"]] == [("word 3", 5.0), ("word 7", 4.0)]


def test_documents_of_files(tmp_path):
    rows = [{"_id": 1, "title": "A", "text": "b", "lang": "en"}, {"id": "x", "text": " c\n"}]
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert list(read_documents(path)) == [Document("1", "A b", {"lang": "en"}), Document("x", "c")]
    for wrong, words in (
        ({"text": "b"}, "the id is None"),
        ({"id": 1}, "the column .text. is missing"),
        ({"id": 2, "text": " "}, "empty"),
    ):
        path.write_text(json.dumps(rows[0]) + "\n" + json.dumps(wrong), encoding="utf-8")
        with pytest.raises(DataError, match=words) as error:
            list(read_documents(path))
        assert "docs.jsonl:2" in str(error.value)
    with pytest.raises(DataError, match="comes twice"):
        open_index(Words(), ServerStore(":memory:", "d", waits=()), create=True).add([Document("1", "a")] * 2)


class Broken:
    """In place of the engine's shard: whatever is asked, it says the same."""

    def __getattr__(self, name):
        def say(*given, **named):
            raise RuntimeError("no such segment")

        return say


@pytest.mark.parametrize(
    "ask",
    [
        lambda store, point: store.upsert([point]),
        lambda store, point: store.delete([point.key]),
        lambda store, point: store.payloads([point.key], ["id"]),
        lambda store, point: store.search([Request("dense", point.vectors["dense"], 1)]),
        lambda store, point: store.count(),
        lambda store, point: store.optimize(),
        lambda store, point: store.close(),
    ],
    ids=["upsert", "delete", "payloads", "search", "count", "optimize", "close"],
)
def test_whatever_the_engine_says_is_an_error_that_names_the_folder(tmp_path, ask):
    store = EdgeStore(tmp_path / "index")
    index = open_index(Words(), store, create=True)
    (point,) = index._points([Document("a", "cat")])
    shard, store._shard = store._shard, Broken()
    with pytest.raises(SearchError, match=f"^{tmp_path / 'index'}: the index engine says: no such segment$"):
        ask(store, point)
    shard.close()


def test_room_is_taken_before_the_engine_writes_and_as_much_as_it_may_need(tmp_path, monkeypatch):
    store = EdgeStore(tmp_path / "index")
    index = open_index(Words(), store, heads=HEADS, create=True)
    points = index._points([Document("a", "cat dog", {"x": "y" * 500}), Document("b", "bird")])
    events = []
    monkeypatch.setattr(store, "_take_room", events.append)
    shard = store._shard

    class Shard:
        def __getattr__(self, name):
            events.append(name)
            return getattr(shard, name)

    store._shard = Shard()
    store.upsert(points)
    texts = sum(len(json.dumps(dict(point.payload))) for point in points)
    numbers = sum(point.numbers for point in points)
    assert events == [2**23 + 3 * texts + 24 * numbers, "update", "flush"]
    assert texts > 500
    assert numbers > 3 * 8
    store.delete([points[0].key])
    assert events[3:] == ["update", "flush"]
    store.optimize()
    assert events[5] >= 2**23
    assert events[6:] == ["optimize"]
    store._shard = shard
    store.close()


def test_documents_are_encoded_as_documents_and_queries_as_queries(tmp_path):
    asked = []

    class Asked(Words):
        def represent(self, texts, *, role, **how):
            asked.append((list(texts), role, tuple(how["outputs"])))
            return super().represent(texts, role=role, **how)

    store = EdgeStore(tmp_path / "index")
    index = open_index(Asked(), store, heads=("dense", "sparse"), create=True)
    index.add([Document("1", "cat")])
    index.search(["dog"], k=1)
    both = ("dense", "sparse")
    assert asked == [(["a"], "document", both), (["cat"], "document", both), (["dog"], "query", both)]
    store.close()


def test_a_sample_is_the_same_every_time_and_holds_the_vectors_that_were_written(index, monkeypatch):
    monkeypatch.setattr("embedsmith.index.server._ROWS", 7)  # in several calls
    found, vector_ND = index.sample("dense", 40)
    assert len({document.id for document in found}) == len(found) == 40
    assert found == index.sample("dense", 120)[0][:40]
    known = {document.id: document for document in documents()}
    assert all(known[document.id] == document for document in found)
    expected = Words().represent([document.text for document in found], role="document")["dense"].vector_ND
    np.testing.assert_allclose(vector_ND, expected.numpy(), atol=1e-6)
    assert {len(document.id) for document in found} == {1, 2, 3}, "not the first that were written"


def test_texts_by_ids_leave_out_what_is_not_there(index):
    assert index.texts(["3", "nothing", "7"]) == {"3": texts()[3], "7": texts()[7]}
