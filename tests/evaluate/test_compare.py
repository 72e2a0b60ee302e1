"""Differences between models and how sure they are."""

import json
import math

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from embedsmith.core.errors import EvaluationError, ModelError
from embedsmith.evaluate import HybridEncoder, Results, TaskResult, evaluate
from embedsmith.evaluate.compare import Comparison, Difference, Interval, resampled, spearman_rows
from embedsmith.search.cached import CachedEncoder
from tests.evaluate.examples import NamedEncoder, small_tasks
from tests.evaluate.fakes import HashEncoder


def results(width: int):
    return evaluate(NamedEncoder(width), list(small_tasks().values()))


def queries(values, ids=None):
    values = np.asarray(values, dtype=np.float64)
    names = ids or [str(n) for n in range(len(values))]
    return TaskResult(
        "t", "retrieval", "ndcg_at_10", {"ndcg_at_10": float(values.mean())}, {}, names, {"ndcg_at_10": values}
    )


def test_every_main_score_is_found_again_from_its_items():
    for result in results(8):
        whole = np.arange(len(next(iter(result.items.values()))))[None, :]
        assert resampled(result, whole)[0] == pytest.approx(result.main_score, abs=1e-9), result.task


def test_resampled_correlations_and_precisions_equal_the_libraries():
    found = {result.task: result for result in results(8)}
    choice = np.random.default_rng(0).integers(0, 50, (7, 50))
    sts, pairs = found["sts"], found["pairs"]
    for row, value in zip(choice, resampled(sts, choice)):
        assert value == pytest.approx(spearmanr(sts.items["cosine"][row], sts.items["score"][row])[0])
    for row, value in zip(choice, resampled(pairs, choice)):
        expected = average_precision_score(pairs.items["label"][row], pairs.items["cosine"][row])
        assert value == pytest.approx(expected)
    assert math.isnan(spearman_rows(np.ones((1, 4)), np.arange(4.0)[None])[0])


def test_the_bootstrap_interval_of_a_mean_is_the_textbook_one():
    values = np.random.default_rng(1).normal(0.5, 0.1, 400)
    interval = Interval.of(queries(values))
    error = values.std() / math.sqrt(400)
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_pairing_finds_a_small_difference_in_noise_and_none_where_there_is_none():
    chance = np.random.default_rng(2)
    base, noise = chance.uniform(0, 1, 300), chance.normal(0, 0.02, 300)
    better = Difference.of(queries(base + 0.01 + noise), queries(base))
    assert better.clear
    assert better.p_value < 0.01
    assert Interval.of(queries(base)).high - Interval.of(queries(base)).low > 5 * (
        better.interval.high - better.interval.low
    )
    same = Difference.of(queries(base), queries(base))
    assert (same.interval.low, same.interval.high, same.p_value, same.clear) == (0.0, 0.0, 1.0, False)


def test_results_of_other_items_or_tasks_are_not_paired():
    with pytest.raises(EvaluationError, match="different items"):
        Difference.of(queries([1.0, 0.0]), queries([1.0, 0.0], ["a", "b"]))
    other = TaskResult("u", "retrieval", "ndcg_at_10", {"ndcg_at_10": 1.0})
    with pytest.raises(EvaluationError, match="not the same task"):
        Difference.of(queries([1.0]), other)
    with pytest.raises(EvaluationError, match="other tasks"):
        Comparison.of([("a", Results((queries([1.0]),))), ("b", Results((other,)))])


def test_results_without_items_are_compared_without_confidence():
    bare = lambda score: TaskResult("t", "retrieval", "ndcg_at_10", {"ndcg_at_10": score})
    gap = Difference.of(bare(0.5), bare(0.4))
    assert gap.interval.value == pytest.approx(0.1)
    assert math.isnan(gap.interval.low)
    assert not gap.clear


def test_a_comparison_is_a_table_and_plain_json():
    made = Comparison.of([("narrow", results(2)), ("wide", results(32))])
    plain = json.loads(json.dumps(made.as_dict(), allow_nan=False))
    assert plain["baseline"] == "narrow"
    assert len(plain["differences"]["wide"]) == len(small_tasks())
    assert made.table().row_count == len(small_tasks()) + 1


def test_results_survive_their_file(tmp_path):
    before = results(8)
    before.save(tmp_path / "r.json", items=True)
    after = Results.load(tmp_path / "r.json")
    assert after.as_dict(items=True) == before.as_dict(items=True)
    for text, message in (("[1]", "bad.json: the file holds a list"), ('{"tasks": 1}', "bad.json: no results")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(EvaluationError, match=message):
            Results.load(tmp_path / "bad.json")


class Interrupted(NamedEncoder):
    """Stops, as by Ctrl-C, at its nth call."""

    stop = 3

    def represent(self, texts, **options):
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        return super().represent(texts, **options)


def test_an_interrupted_evaluation_continues_where_it_was(tmp_path):
    tasks = [small_tasks()[name] for name in ("sts", "pairs", "search")]
    expected = evaluate(NamedEncoder(), tasks)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Interrupted(), tasks, cache=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2
    again = NamedEncoder()
    results = evaluate(again, tasks, cache=tmp_path)
    assert len(again.calls) == 2, "only the task that was not finished is scored"
    assert [r.as_dict()["scores"] for r in results] == [r.as_dict()["scores"] for r in expected]


def test_kept_results_are_those_of_the_same_model_and_task(tmp_path):
    sts = small_tasks()["sts"]
    evaluate(NamedEncoder(8), [sts], cache=tmp_path)
    for encoder, task in ((NamedEncoder(9), sts), (NamedEncoder(8), small_tasks(seed=1)["sts"])):
        evaluate(encoder, [task], cache=tmp_path)
        assert encoder.calls
    for file in tmp_path.glob("*.json"):
        file.write_text("{half")
    encoder = NamedEncoder(8)
    evaluate(encoder, [sts], cache=tmp_path)
    assert encoder.calls, "an unreadable file is as good as none"


def test_an_encoder_that_cannot_say_which_it_is_keeps_nothing(tmp_path):
    with pytest.raises(ModelError, match="fingerprint"):
        evaluate(HashEncoder(), [small_tasks()["sts"]], cache=tmp_path)


def test_cached_vectors_are_those_of_the_model_and_are_not_computed_twice(tmp_path):
    task, inner = small_tasks()["search"], NamedEncoder()
    expected = evaluate(inner, [task])[0].items["ndcg_at_10"]
    calls = len(inner.calls)
    first = evaluate(CachedEncoder.of(inner, tmp_path), [task])[0]
    assert len(inner.calls) == 2 * calls
    second = evaluate(CachedEncoder.of(inner, tmp_path), [task])[0]
    assert len(inner.calls) == 2 * calls
    for result in (first, second):
        assert result.items["ndcg_at_10"].tolist() == expected.tolist()
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(b"half")
    evaluate(CachedEncoder.of(inner, tmp_path), [task])
    assert len(inner.calls) == 3 * calls


def test_the_fingerprint_of_a_hybrid_tells_its_weights():
    one, other = (HybridEncoder(NamedEncoder(), {"dense": weight}).fingerprint() for weight in (1.0, 2.0))
    assert one != other


def test_long_paths_are_shown_by_their_ends():
    result = evaluate(NamedEncoder(), [small_tasks()["sts"]])
    folder = "/a/folder/far/down/in/a/very/deep/tree/of/runs"
    made = Comparison.of([(f"{folder}/one/model", result), ("org/name", result)])
    assert made.short().models == ("…/one/model", "org/name")
    assert list(made.as_dict()["scores"]) == [f"{folder}/one/model", "org/name"]
    alike = Comparison.of([(f"{folder}/one/model", result), (f"{folder}/two/one/model", result)])
    assert alike.short().models == alike.models
