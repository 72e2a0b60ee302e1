"""Every figure equals a plain float64 loop written from its definition."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from embedsmith.core.errors import EvaluationError
from embedsmith.core.shelf import metrics
from embedsmith.evaluate import evaluate
from embedsmith.evaluate.metrics import Floats, Graded, metric, pair_scores, paired_cosines
from tests.evaluate.examples import NamedEncoder, small_tasks
from tests.evaluate.fakes import HashEncoder


def correlations(similarity: np.ndarray, score: np.ndarray) -> tuple[float, ...]:
    return tuple(pair_scores("scored pairs", similarity, score).values())


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
    for row, cosine in enumerate(paired_cosines(left, right)):
        a, b = left[row].astype(float), right[row].astype(float)
        expected = 0.0 if row == 2 else (a @ b) / math.sqrt((a @ a) * (b @ b))
        assert cosine == pytest.approx(expected, abs=1e-12)


def test_pairs_of_equal_vectors_are_tied() -> None:
    vectors = np.random.default_rng(3).standard_normal((200, 7)).astype(np.float32)
    assert set(paired_cosines(vectors, vectors.copy())) == {1.0}


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics.names()
    monkeypatch.setattr(metrics, "_entries", dict(metrics._entries))


def test_a_metric_of_ones_own_is_computed_and_shown_where_it_applies(shelf: None, tmp_path: Path) -> None:
    tasks = small_tasks()
    evaluate(NamedEncoder(), [tasks["search"]], cache=tmp_path)

    @metric("gain_of_first", of="rankings")
    def gain_of_first(found: Graded, k: int) -> Floats:
        return found.grade_Qk[:, 0] * 1.0

    @metric("gap", of="scored pairs")
    def gap(similarity_N: Floats, score_N: Floats) -> float:
        return float(np.abs(similarity_N - score_N).mean())

    results = evaluate(NamedEncoder(), [tasks["search"], tasks["sts"]], cache=tmp_path)  # scored anew, with the metric
    assert results[0].items["gain_of_first_at_10"].shape == (len(results[0].item_ids),)
    assert "gain_of_first_at_10" not in results[1].scores
    assert list(results[1].scores)[-1] == "cosine_gap"
    file = io.StringIO()
    Console(file=file, width=300).print(results.table())
    assert "gain_of_first_at_10" in file.getvalue()
    assert "cosine_gap" in file.getvalue()


def test_a_metric_that_gives_no_value_a_query_is_refused(shelf: None) -> None:
    metric("one_number", of="rankings")(lambda found, k: 0.5)
    with pytest.raises(EvaluationError, match=r"'one_number' gave the shape \(\)"):
        evaluate(HashEncoder(), [small_tasks()["search"]])
