"""What searchers are made of: BM25 tokens of any script, kept vectors of every head, an approximate index, pairs."""

import random
from contextlib import contextmanager
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import bm25s
import numpy as np
import pytest
import torch

from embedsmith.core.encoder import fingerprint
from embedsmith.core.errors import DataError, ModelError, SearchError
from embedsmith.core.reps import Dense
from embedsmith.core.shelf import searchers, teachers
from embedsmith.mining import Bm25Search, Limits
from embedsmith.mining import searchers as module
from embedsmith.mining.bm25 import Bm25
from embedsmith.mining.searchers import EmbeddingSearch, EmbeddingSearcher, SearchTexts, TextReps, top_of_pieces
from embedsmith.mining.selection import fuse, loose_id, overlap, shingles
from embedsmith.search import exact_top_k, given_pairs
from embedsmith.search.cached import CachedEncoder
from embedsmith.search.hybrid import M3_WEIGHTS
from tests.mining.fakes import Words

TEXTS = [f"{a} {b} {a}" for a in ("cat", "dog", "tree") for b in ("red", "blue", "old", "new")]


@pytest.mark.parametrize(
    ("tokens", "text", "expected"),
    [
        ("mixed", "Late-Interaction 检索模型 v2", ["late", "interaction", *"检索模型", "检索", "索模", "模型", "v2"]),
        ("words", "Late 检索", ["late", "检索"]),
        ("characters", "ab", ["a", "b", "ab"]),
        ("mixed", "ＡＢＣ", ["abc"]),
    ],
)
def test_tokens(tokens, text, expected):
    assert Bm25Search(tokens=tokens).words(text) == expected


def test_bm25_finds_chinese_text_and_scores_nothing_for_unknown_words():
    corpus = ["今天天气很好", "检索模型的训练", "猫在睡觉", "训练一只猫"]
    index = Bm25(Bm25Search(), ["怎么训练检索模型", "zzz"], corpus)
    index.prepare(Path())
    score_Qk, index_Qk = index.top(0, 2, 2)
    assert index_Qk.tolist() == [[1, 3], [-1, -1]]
    assert score_Qk[0, 0] > score_Qk[0, 1] > 0
    assert score_Qk[1].tolist() == [0, 0]
    with pytest.raises(DataError, match="no text of the corpus has a word"):
        Bm25(Bm25Search(), [], ["?!", "..."]).prepare(Path())


@pytest.mark.parametrize("k", [1, 5, 20])
def test_bm25_scores_as_the_library_does_and_finds_the_best_of_many(k):
    chance = random.Random(0)
    words = [f"w{number}" for number in range(40)]
    corpus = [" ".join(chance.choices(words, k=chance.randint(0, 6))) for _ in range(3000)]
    queries = [" ".join(chance.choices(words, k=4)) for _ in range(8)] + ["w3 w3 unknown", "unknown"]
    whole, mine = bm25s.BM25(), Bm25(Bm25Search(), queries, corpus)
    whole.index([text.split() for text in corpus], show_progress=False)
    mine.prepare(Path())
    score_Qk, index_Qk = mine.top(0, len(queries), k)
    for query, score_k, index_k in zip(queries, score_Qk, index_Qk, strict=True):
        known = [word for word in query.split() if word != "unknown"]
        score_K = whole.get_scores(known) if known else np.zeros(len(corpus), np.float32)
        assert mine.scores(query).tobytes() == score_K.tobytes()
        best = [place for place in np.argsort(-score_K, kind="stable")[:k] if score_K[place] > 0]
        assert index_k.tolist() == best + [-1] * (k - len(best))
        assert score_k[: len(best)].tolist() == score_K[best].tolist()
    row_E, index_E = (
        np.repeat(np.arange(len(queries)), 50),
        np.asarray(chance.choices(range(3000), k=50 * len(queries))),
    )
    expected_E = [mine.scores(queries[row])[index] for row, index in zip(row_E, index_E, strict=True)]
    assert mine.pairs(row_E, index_E).tolist() == expected_E


@pytest.mark.parametrize("head", ["dense", "sparse", "multivector"])
def test_kept_representations_are_those_of_the_model(tmp_path, head):
    model = Words()
    texts = ["one", "two words", "three words here", "a much longer text of words"]
    expected = model.represent(texts, role="query", outputs=(head,))[head]
    for _ in range(2):
        kept = CachedEncoder.of(model, tmp_path).represent(texts, role="query", outputs=(head,))[head]
        torch.testing.assert_close(kept.scores(expected), expected.scores(expected))
    assert len(model.encoded) == 2 * len(texts)


def test_every_part_of_the_key_counts(tmp_path):
    model = Words()
    paths = {
        CachedEncoder.of(encoder, tmp_path).path(texts, role, task, head)
        for encoder in (model, Words("b"))
        for texts in (["a", "b"], ["ab"], ["b", "a"])
        for role in ("query", "document")
        for task in (None, "sts")
        for head in ("dense", "sparse")
    }
    assert len(paths) == 48
    cached = CachedEncoder.of(model, tmp_path)
    told = {cached.path(["a", "b"], "query", None, "dense", own) for own in (None, [None, "x"], ["x", None], ["", "x"])}
    assert len(told) == 4
    assert fingerprint(model) == "words-a-16"


def test_what_is_kept_of_other_texts_is_made_again(tmp_path, caplog):
    model = Words()
    cached = CachedEncoder.of(model, tmp_path)
    cached.represent(["a"], role="query")
    (path,) = tmp_path.rglob("*.safetensors")
    path.rename(cached.path(["a", "b"], "query", None, "dense"))
    assert len(cached.represent(["a", "b"], role="query")["dense"]) == 2
    assert "1 rows of 2 texts" in caplog.text


def test_values_that_are_not_finite_are_not_kept(tmp_path):
    class Broken(Words):
        def _dense(self, texts):
            return Dense(torch.full((len(texts), 4), float("nan")))

    with pytest.raises(SearchError, match="not finite"):
        CachedEncoder.of(Broken(), tmp_path).represent(["a"], role="query")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_pairs_and_pieces_equal_whole_scores(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 5)
    monkeypatch.setattr(given_pairs, "_PAIRS", 3)
    queries, documents = (TextReps(Words(), texts, "query", None, "dense") for texts in (TEXTS[:4], TEXTS))
    whole_QK = Words()._dense(TEXTS[:4]).scores(Words()._dense(TEXTS))[0].numpy()
    row_E, index_E = np.divmod(np.random.default_rng(0).permutation(whole_QK.size), len(TEXTS))
    found = EmbeddingSearcher(queries, documents)
    np.testing.assert_allclose(found.pairs(row_E, index_E), whole_QK[row_E, index_E], atol=1e-6)
    query = queries.rows(np.arange(4))
    expected = exact_top_k(query, Words()._dense(TEXTS), 6)
    actual = top_of_pieces(query, documents.pieces(), 6)
    np.testing.assert_allclose(actual[0], expected[0], atol=1e-6)


def test_limits():
    score_C = np.array([0.96, 0.95, 0.9, 0.2], np.float32)
    keep = lambda **limits: Limits(**limits).allow(score_C, 1.0).tolist()
    assert keep() == [True] * 4
    assert keep(relative_margin=0.05) == [False, True, True, True]
    assert keep(absolute_margin=0.1) == [False, False, True, True]
    assert keep(max_score=0.5, min_score=0.3) == [False] * 4
    assert keep(max_score=0.95 - 1e-7) == [False, True, True, True]  # equal up to rounding is not above
    assert keep(min_score=0.2 + 1e-8) == [True] * 4
    below = Limits(relative_margin=0.1).allow(np.array([-0.5, -0.6], np.float32), -0.5)
    assert below.tolist() == [False, True]  # the limit is below a negative positive score, not above it


def test_loose_ids_and_overlap():
    assert loose_id("The  Cat, sat.") == loose_id("the cat SAT") == loose_id("ｔｈｅ cat sat")
    assert loose_id("the cat") != loose_id("the bat")
    assert loose_id("?!") != loose_id("...")
    assert overlap(shingles("same text"), shingles("Same  text")) == 1
    assert overlap(shingles("one thing"), shingles("unlike that")) < 0.2


class Asked(Words):
    """Notes under which role, task and instructions it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def represent(self, texts, *, role, task=None, outputs=("dense",), instruction=None):
        self.asked.append((list(texts), role, task, tuple(outputs), instruction and list(instruction)))
        return super().represent(texts, role=role, task=task, outputs=outputs)


def opened(tmp_path, **settings):
    model = Asked()
    own = [None, "find"]
    texts = SearchTexts(["red cat", "old dog"], TEXTS, own, "retrieval", {"words": model}.__getitem__, tmp_path)
    return model, EmbeddingSearch(model="words", **settings).open(texts)


@pytest.mark.parametrize(
    ("settings", "task", "own"),
    [
        ({}, "retrieval", [None, "find"]),
        ({"task": "sts"}, "sts", [None, "find"]),
        ({"instructions": False}, "retrieval", None),
    ],
)
def test_a_model_is_asked_for_each_side_in_its_role_task_and_words(tmp_path, settings, task, own):
    model, searcher = opened(tmp_path, **settings)
    searcher.prepare(tmp_path)
    assert model.asked == [
        (["red cat", "old dog"], "query", task, ("dense",), own),
        (TEXTS, "document", task, ("dense",), None),
    ]


@pytest.mark.parametrize("weights", [None, {"dense": 0.25, "sparse": 2.0}])
def test_a_hybrid_search_has_the_weights_that_were_given_or_those_of_m3(tmp_path, weights):
    _, searcher = opened(tmp_path, head="hybrid", weights=weights)
    assert searcher.queries.encoder.weights == (weights or M3_WEIGHTS)


def test_an_encoder_without_the_head_or_with_too_few_rows_is_named():
    class Poor(Words):
        def represent(self, texts, **how):
            return {"dense": self._dense(texts[:1])}

    with pytest.raises(ModelError, match="the model gave no 'sparse' output\n  expected: dense"):
        TextReps(Poor(), ["a"], "query", None, "sparse").piece(0)
    with pytest.raises(ModelError, match="the model gave 1 rows for 2 texts"):
        TextReps(Poor(), ["a", "b"], "query", None, "dense").piece(0)


@pytest.mark.parametrize("me", [0, 1])
def test_a_rank_computes_its_share_of_the_pieces_and_says_how_far_it_is(monkeypatch, me):
    bars = []

    @contextmanager
    def bar(label, total, done=0):
        bars.append([label, total, done])
        yield SimpleNamespace(advance=lambda: bars[-1].__setitem__(2, bars[-1][2] + 1))

    for name, value in (("PIECE", 5), ("rank", lambda: me), ("world_size", lambda: 2), ("progress_bar", bar)):
        monkeypatch.setattr(module, name, value)
    model = Words()
    TextReps(model, TEXTS, "document", None, "dense").compute("encode corpus")
    assert model.encoded == (TEXTS[:5] + TEXTS[10:] if me == 0 else TEXTS[5:10])
    assert bars == [["encode corpus", 2 - me, 2 - me]]


def test_bm25_gives_as_many_as_there_are_and_ties_to_the_lower_place():
    corpus = ["red cat", "dog", "red cat", "blue cat", "red cat"]
    index = Bm25(Bm25Search(), ["red", "cat dog"], corpus)
    index.prepare(Path())
    score_Qk, index_Qk = index.top(0, 2, 9)
    assert index_Qk.shape == score_Qk.shape == (2, 5)
    assert index_Qk[0].tolist() == [0, 2, 4, -1, -1]
    assert index.top(0, 1, 2)[1].tolist() == [[0, 2]]
    assert index.top(1, 2, 1)[1].tolist() == [[1]]
    pairs = index.pairs(np.array([1, 0, 1]), np.array([1, 4, 0]))
    np.testing.assert_array_equal(
        pairs, [index.scores("cat dog")[1], index.scores("red")[4], index.scores("cat dog")[0]]
    )
    assert index.models() == {}


@pytest.mark.parametrize("shelf", [searchers, teachers], ids=["searchers", "teachers"])
def test_settings_are_named_and_fixed(shelf):
    for entry in shelf.entries():
        kind = entry.thing
        given = {"model": "m"} if "model" in kind.__dataclass_fields__ else {}
        one = kind(**given)
        assert hash(one) == hash(kind(**given))
        with pytest.raises(FrozenInstanceError):
            setattr(one, next(iter(kind.__dataclass_fields__)), "x")
        with pytest.raises(TypeError, match="positional"):
            kind("m")


def test_fused_ranks_by_hand():
    """1 / (60 + rank) summed: the second of both beats the first of one alone; what was not found counts nothing."""
    both = [np.array([[5, 3, 2, -1]]), np.array([[7, 3, -1, -1]])]
    assert [row.tolist() for row in fuse(both)] == [[3, 5, 7, 2]]
    assert [row.tolist() for row in fuse([np.array([[4, 1, -1], [2, -1, -1]])])] == [[4, 1], [2]]
