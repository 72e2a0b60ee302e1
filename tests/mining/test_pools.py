"""New pools while a model trains: what a plain loop over all pairs gives, whatever is in a piece and on a rank."""

import numpy as np
import pytest

from embedsmith.core.recipe import parse
from embedsmith.core.reps import Dense
from embedsmith.data import Record, RecordSet
from embedsmith.mining import LiveNegatives, live, searchers
from embedsmith.mining.corpus import corpus_texts
from embedsmith.mining.live import EMPTY, LiveState, mine_pools
from embedsmith.mining.offline import Texts
from embedsmith.mining.searchers import TextReps
from embedsmith.mining.selection import loose_id
from tests.mining.fakes import TOPICS, Words
from tests.ranks import on_ranks


def texts_of(count=23):
    """Several positives, a query asked twice, texts that differ in case alone, queries that are in the corpus."""
    records = [
        Record(f"about {TOPICS[n % 5]} {n % 11}", (f"text on {TOPICS[n % 5]} {n}", f"About {TOPICS[n % 5]}, {n}"))
        for n in range(count)
    ]
    records += [Record("all by itself", ("TEXT on cats 0", "text on cats 5")), Record("about", ("about cats 0",))]
    return Texts(RecordSet("r", "retrieval", records, "r"), corpus_texts(records, ()))


def pools_of(texts, head="dense", **config):
    queries = TextReps(Words(), texts.queries, "query", None, head)
    documents = TextReps(Words(), texts.corpus, "document", None, head)
    return mine_pools(texts, queries, documents, parse(LiveNegatives, config))


def by_hand(texts, pool, skip=0, guard=None):
    """Repeated texts take places among those that are looked at: as many as could be known, beside the pool."""
    looked_at = pool + skip + max(len(texts.positives_of(row)) for row in range(len(texts.queries))) + 1
    score_QK = Words()._dense(texts.queries).scores(Words()._dense(texts.corpus))[0].numpy()
    found = []
    for record, score_K in zip(texts.records, score_QK, strict=True):
        known = {text for other in texts.records if other.query == record.query for text in other.positives}
        banned = {loose_id(record.query), *map(loose_id, known)}
        ranked = []
        for place in np.argsort(-score_K, kind="stable")[:looked_at]:
            if (same := loose_id(texts.corpus[place])) not in banned:
                banned.add(same)
                ranked.append(int(place))
        ranked = ranked[skip : skip + pool]
        limit = np.inf if guard is None else guard * min(score_K[texts.place[text]] for text in known)
        found.append([place for place in ranked if score_K[place] <= limit + 1e-6])
    return found


CASES = [{"pool": 6}, {"pool": 4, "skip": 3}, {"pool": 100}, {"pool": 30, "guard": 0.7}]


def as_lists(pool_NP, size_N):
    assert pool_NP.dtype == np.int32
    assert pool_NP.shape == (len(size_N), size_N.max())
    for row_P, size in zip(pool_NP, size_N, strict=True):
        assert (row_P[size:] == EMPTY).all()
    return [row_P[:size].tolist() for row_P, size in zip(pool_NP, size_N, strict=True)]


@pytest.mark.parametrize("config", CASES, ids=str)
@pytest.mark.parametrize("piece", [4, 2048])
def test_pools_are_those_of_a_plain_loop(config, piece, monkeypatch):
    for module in (live, searchers):
        monkeypatch.setattr(module, "PIECE", piece)
    texts = texts_of()
    found = as_lists(*pools_of(texts, **config))
    assert found == by_hand(texts, **config)
    if "guard" in config:
        assert len({len(row) for row in found}) > 3, "pools of different sizes"


def of_rank(configs):
    live.PIECE = searchers.PIECE = 4
    return [as_lists(*pools_of(texts_of(), **config)) for config in configs]


@pytest.mark.dist
def test_ranks_that_share_the_work_have_the_pools_of_one(tmp_path):
    """Two ranks share 25 queries, which cannot be dealt evenly, and 13 pieces of the corpus."""
    expected = [by_hand(texts_of(), **config) for config in CASES]
    assert on_ranks(2, of_rank, tmp_path, CASES) == [expected] * 2


def test_a_rank_without_a_piece_of_the_corpus_finds_nothing_of_its_own(monkeypatch):
    texts = texts_of()
    monkeypatch.setattr(live, "rank", lambda group: 1)
    monkeypatch.setattr(live, "world_size", lambda group: 2)
    documents = TextReps(Words(), texts.corpus, "document", None, "dense")
    found = live._searched(Words()._dense(texts.queries), documents, 5, None)
    assert found.top(3, 9, 4)[1].shape == (6, 0)
    with pytest.raises(AssertionError, match="with its candidates"):
        found.pairs(np.zeros(1), np.zeros(1))


def test_a_state_of_mined_pools_goes_into_a_checkpoint_with_them():
    state = LiveState(parse(LiveNegatives, {}), [3, 4], 2, lag=0)
    pool_NP = np.arange(40, dtype=np.int32).reshape(2, 20)
    state.install_pools(pool_NP, np.array([20, 17]))
    state.observe(0, np.array([0]), state.draw(np.array([0]), 0), np.zeros((1, 2), np.float32), np.ones(1, np.float32))
    other = LiveState(parse(LiveNegatives, {}), [3, 4], 2, lag=0)
    assert other.digest() != state.digest()
    other.load_state_dict(state.state_dict())
    assert (other.generation, other.replaced, other.digest()) == (1, 2, state.digest())
    np.testing.assert_array_equal(other.pool_NP, pool_NP)
    np.testing.assert_array_equal(other.draw(np.array([0, 1]), 1), state.draw(np.array([0, 1]), 1))


def test_ties_go_to_the_lower_place_across_pieces(monkeypatch):
    for module in (live, searchers):
        monkeypatch.setattr(module, "PIECE", 2)

    class Same(Words):
        def _dense(self, texts):
            return Dense(super()._dense(["one"] * len(texts)).vector_ND)

    documents = TextReps(Same(), [f"text {n}" for n in range(7)], "document", None, "dense")
    found = live._searched(Same()._dense(["q"]), documents, 5, None)
    assert found.top(0, 1, 5)[1].tolist() == [[0, 1, 2, 3, 4]]
