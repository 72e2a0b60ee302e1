"""Figures of rankings equal trec_eval's, and plain loops written from their definitions."""

import math

import numpy as np
import pytest

from embedsmith.evaluate.metrics import CUTS, Floats, Graded, Ranking
from tests.evaluate.oracle import trec_scores

Run = dict[str, dict[str, float]]
Grades = dict[str, dict[str, int]]


def random_collection(seed: int, ties: bool) -> tuple[Grades, Run]:
    """Twelve queries with 0 to 40 documents found of 40; grades from -1 to 3, some of documents that do not exist."""
    random = np.random.default_rng(seed)
    documents = [f"d{number}" for number in range(44)]
    qrels, run = {}, {}
    for row, query in enumerate(f"q{number}" for number in range(12)):
        judged = random.choice(documents, size=8, replace=False)
        grades = random.integers(-1, 4, size=8)
        grades[0] = 1 + int(random.integers(0, 3))
        qrels[query] = {str(document): int(grade) for document, grade in zip(judged, grades, strict=True)}
        scores = random.integers(0, 6, size=40) / 8 if ties else random.random(40).astype(np.float32)
        found = random.permutation(40)[: 40 if row % 3 else row]
        run[query] = {documents[number]: float(scores[number]) for number in found}
    return qrels, run


def order(scores: dict[str, float]) -> list[str]:
    """Best first; equal scores by document id, descending."""
    return sorted(sorted(scores, reverse=True), key=lambda document: -scores[document])


def ours(qrels: Grades, run: Run, cuts: tuple[int, ...] = CUTS) -> dict[str, Floats]:
    documents = sorted({document for hits in run.values() for document in hits}, reverse=True)
    place = {document: number for number, document in enumerate(documents)}
    ranked = [[(hits[d], place[d]) for d in order(hits)] for hits in run.values()]
    rows = [
        (np.array([s for s, _ in row], np.float32), np.array([number for _, number in row], np.int64)) for row in ranked
    ]
    return Graded.of(Ranking.of(rows), qrels, list(run), place).scores(cuts)


def naive(grades: dict[str, int], ranked: list[str], k: int) -> dict[str, float]:
    gains = [max(grades.get(document, 0), 0) for document in ranked]
    best = sorted((max(grade, 0) for grade in grades.values()), reverse=True)
    discounted = lambda values: sum(gain / math.log2(place + 2) for place, gain in enumerate(values[:k]))
    relevant = sum(grade >= 1 for grade in grades.values())
    hits = [gain >= 1 for gain in gains[:k]]
    precisions = [sum(hits[: place + 1]) / (place + 1) for place, hit in enumerate(hits) if hit]
    return {
        "ndcg": discounted(gains) / discounted(best),
        "map": sum(precisions) / relevant,
        "recall": sum(hits) / relevant,
        "precision": sum(hits) / k,
        "accuracy": float(any(hits)),
        "mrr": next((1 / (place + 1) for place, hit in enumerate(hits) if hit), 0.0),
    }


@pytest.mark.parametrize("ties", [False, True])
def test_figures_equal_their_definitions(ties: bool) -> None:
    qrels, run = random_collection(0, ties)
    values = ours(qrels, run)
    for place, query in enumerate(run):
        for k in CUTS:
            for name, expected in naive(qrels[query], order(run[query]), k).items():
                assert values[f"{name}_at_{k}"][place] == pytest.approx(expected, abs=1e-12), (name, k, query)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_figures_equal_those_of_trec_eval(seed: int, ties: bool) -> None:
    qrels, run = random_collection(seed, ties)
    values, expected = ours(qrels, run), trec_scores(qrels, run)
    assert values.keys() == expected.keys()
    for name, value_Q in expected.items():
        np.testing.assert_allclose(values[name], value_Q, rtol=0, atol=1e-12, err_msg=name)


def test_a_query_with_an_empty_ranking_or_without_a_positive_scores_zero() -> None:
    qrels = {"q": {"a": 1}, "r": {"a": 1}, "s": {"a": 0}}
    values = ours(qrels, {"q": {"a": 1.0}, "r": {}, "s": {"a": 1.0}}, (1,))
    assert values["ndcg_at_1"].tolist() == [1.0, 0.0, 0.0]
    assert values["recall_at_1"].tolist() == [1.0, 0.0, 0.0]


def test_judgements_of_documents_that_are_not_there_count_as_not_found() -> None:
    values = ours({"q": {"x": 1, "y": 2}}, {"q": {"a": 1.0}}, (1,))
    assert [value_Q.tolist() for value_Q in values.values()] == [[0.0]] * 6


def test_a_document_taken_out_leaves_its_place_to_the_next() -> None:
    ranking = Ranking(np.array([[3.0, 2.0, 1.0]] * 3, np.float32), np.array([[5, 6, 7]] * 3))
    left = ranking.without(np.array([6, -1, 7])).first(2)
    assert left.index_Qk.tolist() == [[5, 7], [5, 6], [5, 6]]
    assert left.score_Qk.tolist() == [[3.0, 1.0], [3.0, 2.0], [3.0, 2.0]]
    assert ranking.without(np.array([6, -1, 7])).index_Qk.tolist() == [[5, 7, -1], [5, 6, 7], [5, 6, -1]]


def test_the_best_among_those_marked() -> None:
    ranking = Ranking(np.array([[3.0, 2.0]] * 2, np.float32), np.array([[5, 6]] * 2))
    score_Q, index_Q = ranking.best(np.array([[False, True], [False, False]]))
    assert index_Q.tolist() == [6, -1]
    assert score_Q[0] == 2.0
    assert math.isnan(score_Q[1])


def test_a_flat_ranking_is_one_where_nothing_is_told_apart() -> None:
    index_Qk = np.array([[1, 0, -1], [2, -1, -1]])
    assert Ranking(np.array([[2, 2 - 1e-6, -np.inf], [1, -np.inf, -np.inf]], np.float32), index_Qk).flat
    assert not Ranking(np.array([[2, 1, -np.inf], [1, -np.inf, -np.inf]], np.float32), index_Qk).flat
