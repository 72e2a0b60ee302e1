"""Labelled texts: what is asked of the encoder, and what the figures mean."""

import math
import warnings

import numpy as np
import pytest
import sklearn.cluster

from embedsmith.core.errors import EvaluationError
from embedsmith.evaluate import ClassificationTask, ClusteringTask, PairClassificationTask, evaluate
from embedsmith.evaluate.metrics import average_precision, best_thresholds
from tests.evaluate.examples import small_tasks
from tests.evaluate.fakes import ConstantEncoder, HashEncoder, TableEncoder, WordEncoder


def naive_ap(similarity, label):
    """Precision at each threshold, weighted by the recall it adds; float64 loops."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(similarity), reverse=True):
        kept = [y for s, y in zip(similarity, label) if s >= threshold]
        recall = sum(kept) / sum(label)
        total, before = total + (recall - before) * sum(kept) / len(kept), recall
    return total


def naive_best(similarity, label):
    accuracy, best = 0.0, (0.0, 0.0, 0.0)
    for threshold in sorted(set(similarity), reverse=True)[:-1]:
        said = [s >= threshold for s in similarity]
        accuracy = max(accuracy, sum(p == bool(y) for p, y in zip(said, label)) / len(label))
        hits = sum(p and y for p, y in zip(said, label))
        precision, recall = hits / sum(said), hits / sum(label)
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        best = max(best, (f1, precision, recall), key=lambda each: each[0])
    return {"accuracy": accuracy, "f1": best[0], "precision": best[1], "recall": best[2]}


@pytest.mark.parametrize("seed", range(5))
def test_pair_figures_equal_loops_with_ties(seed):
    chance = np.random.default_rng(seed)
    similarity, label = chance.integers(0, 6, 30) / 5, chance.integers(0, 2, 30)
    assert average_precision(similarity, label) == pytest.approx(naive_ap(similarity.tolist(), label.tolist()))
    assert best_thresholds(similarity, label) == pytest.approx(naive_best(similarity.tolist(), label.tolist()))


def test_pairs_that_belong_together_are_separated():
    table = {"a": (1.0, 0.0), "b": (0.9, 0.1), "c": (0.0, 1.0), "d": (-1.0, 0.2)}
    task = PairClassificationTask("t", ["a", "a", "b"], ["b", "c", "d"], [1, 0, 0])
    result = evaluate(TableEncoder(table), [task])[0]
    assert (result.metric, result.main_score, result.scores["cosine_accuracy"]) == ("cosine_ap", 1.0, 1.0)
    assert result.items["label"].tolist() == [1.0, 0.0, 0.0]


def test_a_head_without_vectors_is_compared_by_its_own_similarity_and_cannot_be_clustered():
    tasks = small_tasks()
    assert evaluate(WordEncoder(), [tasks["pairs"]], head="sparse")[0].metric == "ap"
    with pytest.raises(EvaluationError, match="one vector a text"):
        evaluate(WordEncoder(), [tasks["clusters"]], head="sparse")


def test_few_texts_of_every_label_are_drawn_and_another_few_each_time():
    labels = ["x", "y"] * 10 + ["z"] * 2
    draws = ClassificationTask("t", labels, labels, ["text"], ["x"], samples_per_label=3, experiments=4).draws()
    assert all(sorted(labels[row] for row in draw) == ["x"] * 3 + ["y"] * 3 + ["z"] * 2 for draw in draws)
    assert len({tuple(draw) for draw in draws}) == 4


def test_a_probe_learns_what_vectors_tell_and_nothing_from_noise():
    vectors = {f"{label}{n}": (float(label == "x"), n / 100) for label in "xy" for n in range(40)}
    train, test = list(vectors)[::2], list(vectors)[1::2]
    task = ClassificationTask("t", train, [text[0] for text in train], test, [text[0] for text in test])
    result = evaluate(TableEncoder(vectors), [task])[0]
    assert result.main_score == 1.0
    assert result.counts == {"texts": 40, "labels": 2, "experiments": 10}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that it has not converged after its 100 steps is the protocol
        assert 0.2 < evaluate(HashEncoder(), [task])[0].main_score < 0.8


def test_clusters_are_sought_as_mteb_seeks_them(monkeypatch):
    """`AbsTaskClustering` of mteb 2."""
    given, real = [], sklearn.cluster.MiniBatchKMeans
    monkeypatch.setattr(sklearn.cluster, "MiniBatchKMeans", lambda **named: given.append(named) or real(**named))
    evaluate(HashEncoder(), [ClusteringTask("t", [f"text {n}" for n in range(12)], list("aabbcc" * 2))])
    assert given == [{"n_clusters": 3, "batch_size": 512, "init": "k-means++", "n_init": 1, "random_state": 42}]


def test_texts_of_one_label_lie_together():
    vectors = {
        f"{label}{n}": (float(label == "x"), float(label == "y"), n / 1000) for label in "xyz" for n in range(20)
    }
    task = ClusteringTask("t", list(vectors), [text[0] for text in vectors], sample=100)
    assert evaluate(TableEncoder(vectors), [task])[0].main_score == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["pairs", "classes", "clusters", "search", "rerank", "sts"])
def test_a_constant_model_is_scored_or_undefined_and_told(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluate(ConstantEncoder(), [small_tasks()[name]])[0]
    assert any("same" in note for note in result.notes)
    assert math.isnan(result.main_score) or result.main_score < 0.9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PairClassificationTask("t", ["a"], ["b"], [1]), "0 and 1, both"),
        (lambda: PairClassificationTask("t", ["a", "b"], ["b"], [1, 0]), "2, 1 and 2"),
        (lambda: ClassificationTask("t", ["a", "b"], ["x", "x"], ["c"], ["x"]), "one label only"),
        (lambda: ClassificationTask("t", ["a", "b"], ["x", "y"], ["c"], ["z"]), "'z' has no training text"),
        (lambda: ClusteringTask("t", [], []), "0 texts"),
    ],
)
def test_tasks_that_cannot_be_scored_say_why(make, message):
    with pytest.raises(EvaluationError, match=message):
        make()
