"""Every figure equals a plain float64 loop written from its definition."""

import math

import numpy as np
import pytest

from embedsmith.evaluate.metrics import CUTS, correlations, cosines, ranking_scores


def random_collection(seed: int, ties: bool) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, float]]]:
    random = np.random.default_rng(seed)
    documents = [f"d{number}" for number in range(40)]
    qrels, run = {}, {}
    for query in (f"q{number}" for number in range(12)):
        judged = random.choice(documents, size=8, replace=False)
        grades = random.integers(0, 4, size=8)
        grades[0] = 1 + int(random.integers(0, 3))
        qrels[query] = {str(document): int(grade) for document, grade in zip(judged, grades, strict=True)}
        scores = random.integers(0, 6, size=40) / 8 if ties else random.random(40)
        run[query] = {document: float(score) for document, score in zip(documents, scores, strict=True)}
    return qrels, run


def ranking(scores: dict[str, float]) -> list[str]:
    """Best first; equal scores by document id, descending."""
    return sorted(sorted(scores, reverse=True), key=lambda document: -scores[document])


def naive(grades: dict[str, int], order: list[str], k: int) -> dict[str, float]:
    gains = [max(grades.get(document, 0), 0) for document in order]
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
def test_ranking_figures_equal_their_definitions(ties: bool) -> None:
    qrels, run = random_collection(0, ties)
    values = ranking_scores(qrels, run)
    for place, query in enumerate(run):
        order = ranking(run[query])
        for k in CUTS:
            for name, expected in naive(qrels[query], order, k).items():
                assert values[f"{name}_at_{k}"][place] == pytest.approx(expected, abs=1e-9), (name, k, query)


def test_a_query_with_an_empty_ranking_scores_zero() -> None:
    values = ranking_scores({"q": {"a": 1}, "r": {"a": 1}}, {"q": {"a": 1.0}, "r": {}}, (1,))
    assert values["ndcg_at_1"].tolist() == [1.0, 0.0]


def test_spearman_and_pearson_equal_plain_loops() -> None:
    random = np.random.default_rng(1)
    left, right = random.integers(0, 9, 60).astype(float), random.random(60)

    def pearson(a: np.ndarray, b: np.ndarray) -> float:
        pairs = [((x - a.mean()) * (y - b.mean())) for x, y in zip(a, b, strict=True)]
        return sum(pairs) / math.sqrt(sum((a - a.mean()) ** 2) * sum((b - b.mean()) ** 2))

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.array([(sum(values < x) + 1 + sum(values <= x)) / 2 for x in values])

    assert correlations(left, right) == pytest.approx((pearson(ranks(left), ranks(right)), pearson(left, right)))


@pytest.mark.parametrize("flat", [np.full(5, 0.3), 0.3 + 1e-12 * np.arange(5)])
def test_a_flat_side_has_no_correlation(flat: np.ndarray, recwarn: pytest.WarningsRecorder) -> None:
    assert all(math.isnan(value) for value in correlations(flat, np.arange(5.0)))
    assert all(math.isnan(value) for value in correlations(np.arange(5.0), np.full(5, 2.0)))
    assert all(math.isnan(value) for value in correlations(np.array([1.0]), np.array([1.0])))
    assert not recwarn.list


def test_cosines_equal_a_loop_and_a_zero_vector_is_far_from_all() -> None:
    random = np.random.default_rng(2)
    left, right = random.random((6, 3)).astype(np.float32), random.random((6, 3)).astype(np.float32)
    left[2] = 0.0
    for row, cosine in enumerate(cosines(left, right)):
        a, b = left[row].astype(float), right[row].astype(float)
        expected = 0.0 if row == 2 else (a @ b) / math.sqrt((a @ a) * (b @ b))
        assert cosine == pytest.approx(expected, abs=1e-12)


def test_pairs_of_equal_vectors_are_tied() -> None:
    vectors = np.random.default_rng(3).standard_normal((200, 7)).astype(np.float32)
    assert set(cosines(vectors, vectors.copy())) == {1.0}
