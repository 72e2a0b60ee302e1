"""Heads scored together: the weighted sum of each head's own scores, whatever the blocks; who is asked for what."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedsmith.core.errors import SearchError
from embedsmith.core.reps import Dense, MultiVector, Reps, Sparse
from embedsmith.search import exact_top_k, hybrid
from embedsmith.search.hybrid import Hybrid, HybridEncoder, join

WEIGHTS = {"dense": 1.0, "sparse": 0.3, "multivector": 0.7}


def reps(rows: int, seed: int, tokens: int = 4) -> Reps:
    """All three heads; texts of one to `tokens` tokens, the first of them always full."""
    generator = torch.Generator().manual_seed(seed)
    length_N = torch.randint(1, tokens + 1, (rows,), generator=generator)
    length_N[:1] = tokens
    mask_NT = torch.arange(tokens) < length_N[:, None]
    weight_NT = torch.rand(rows, tokens, generator=generator) * mask_NT
    vector_NTD = torch.randn(rows, tokens, 3, generator=generator) * mask_NT[..., None]
    return {
        "dense": Dense(torch.randn(rows, 5, generator=generator)),
        "sparse": Sparse(torch.randint(0, 9, (rows, tokens), generator=generator), weight_NT),
        "multivector": MultiVector(vector_NTD, mask_NT),
    }


def hybrid_of(found: Reps) -> Hybrid:
    return Hybrid(tuple(found[head] for head in WEIGHTS), tuple(WEIGHTS.values()))


def expected(query: Reps, document: Reps) -> torch.Tensor:
    return sum(weight * query[head].scores(document[head])[0] for head, weight in WEIGHTS.items())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 4), documents=st.integers(1, 9), seed=st.integers(0, 99), numbers=st.sampled_from([1, 60])
)
def test_scores_are_the_weighted_sum_of_every_head_in_blocks_of_any_size(queries, documents, seed, numbers):
    query, document = reps(queries, seed), reps(documents, seed + 1, tokens=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hybrid, "_NUMBERS", numbers)
        score_1QK = hybrid_of(query).scores(hybrid_of(document))
    assert score_1QK.shape == (1, queries, documents)
    torch.testing.assert_close(score_1QK[0], expected(query, document))


def test_a_block_holds_no_more_numbers_than_it_may(monkeypatch):
    query, document = hybrid_of(reps(3, 0)), hybrid_of(reps(8, 1, tokens=6))
    seen = []
    plain = MultiVector.scores
    monkeypatch.setattr(
        MultiVector, "scores", lambda self, other, widths=None: seen.append(len(other)) or plain(self, other)
    )
    monkeypatch.setattr(hybrid, "_NUMBERS", 3 * 4 * 6 * 5 + 1)  # queries, their tokens, tokens of a document: five fit
    query.scores(document)
    assert seen == [5, 3]
    without_tokens = Hybrid(query.parts[:2], query.weights[:2])
    assert without_tokens.scores(Hybrid(document.parts[:2], document.weights[:2])).shape == (1, 3, 8)
    assert seen == [5, 3]


def test_no_document_and_no_query():
    none, some = hybrid_of(reps(0, 0)), hybrid_of(reps(3, 1))
    assert none.scores(some).shape == (1, 0, 3)
    assert some.scores(none).shape == (1, 3, 0)
    assert len(none) == 0


def test_paired_is_the_diagonal():
    left, right = reps(5, 2), reps(5, 3)
    torch.testing.assert_close(hybrid_of(left).paired(hybrid_of(right))[0], expected(left, right).diagonal())


def test_rows_and_joined_pieces_are_the_whole():
    whole, query = hybrid_of(reps(7, 4)), hybrid_of(reps(2, 5))
    pieces = [whole.rows(slice(0, 3)), whole.rows(slice(3, 7))]
    again = join(pieces)
    assert isinstance(again, Hybrid)
    assert len(again) == 7
    assert again.weights == whole.weights
    assert again.token_count == 4
    torch.testing.assert_close(query.scores(again), query.scores(whole))
    assert join(pieces[:1]) is pieces[0]
    dense = Dense(torch.arange(6.0).view(3, 2))
    assert join([dense.rows(slice(0, 1)), dense.rows(slice(1, 3))]).vector_ND.tolist() == dense.vector_ND.tolist()


def test_the_best_documents_are_those_of_the_sum():
    query, document = reps(6, 6), reps(40, 7)
    score, index = exact_top_k(hybrid_of(query), hybrid_of(document), 5, block=9)
    best = expected(query, document).topk(5)
    assert index.tolist() == best.indices.tolist()
    torch.testing.assert_close(torch.from_numpy(score), best.values)


class Model:
    """Gives the three heads, and remembers what it was asked for."""

    def __init__(self, name: str = "model") -> None:
        self.name, self.asked = name, []

    def represent(self, texts, *, role, task=None, outputs=("dense",), instruction=None):
        options = {"role": role, "task": task, "outputs": outputs, "instruction": instruction}
        self.asked.append((list(texts), options))
        return {head: reps(len(texts), len(self.asked))[head] for head in outputs}

    def fingerprint(self) -> str:
        return self.name


def test_the_model_is_asked_once_for_the_heads_that_count_and_for_what_else_is_wanted():
    model = Model()
    found = HybridEncoder(model, {"dense": 1.0, "sparse": 0.0, "multivector": 0.5}).represent(
        ["a", "b"], role="query", task="t", outputs=("sparse", "hybrid"), instruction=["x", None]
    )
    assert list(found) == ["sparse", "hybrid"]
    assert found["hybrid"].weights == (1.0, 0.5)
    assert [type(part) for part in found["hybrid"].parts] == [Dense, MultiVector]
    options = {"role": "query", "task": "t", "outputs": ("dense", "multivector", "sparse"), "instruction": ["x", None]}
    assert model.asked == [(["a", "b"], options)]


def test_without_the_hybrid_output_the_model_answers_alone():
    model = Model()
    found = HybridEncoder(model).represent(["a"], role="document", task="t", outputs=("dense",))
    assert list(found) == ["dense"]
    assert [(options["role"], options["task"], options["outputs"]) for _, options in model.asked] == [
        ("document", "t", ("dense",))
    ]


@pytest.mark.parametrize(
    "weights", [{}, {"dense": 0.0}, {"dense": -1.0}, {"dense": float("nan")}, {"dense": float("inf")}]
)
def test_weights_that_rank_nothing_are_refused(weights):
    with pytest.raises(SearchError, match="the weights are"):
        HybridEncoder(Model(), weights)


def test_every_part_of_the_fingerprint_counts():
    one = HybridEncoder(Model(), {"dense": 1.0, "sparse": 0.3})
    assert one.fingerprint() == HybridEncoder(Model(), {"sparse": 0.3, "dense": 1.0}).fingerprint()
    others = [
        dataclasses.replace(one, encoder=Model("another")),
        dataclasses.replace(one, weights={"dense": 1.0, "sparse": 0.30000001}),
        dataclasses.replace(one, weights={"dense": 1.0, "multivector": 0.3}),
        dataclasses.replace(one, weights={"dense": 0.3, "sparse": 1.0}),
    ]
    assert len({one.fingerprint(), *(other.fingerprint() for other in others)}) == 5
