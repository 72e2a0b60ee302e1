"""Search: candidates in place, searchers on known surfaces, stopping."""

import csv
import json
import math
import typing
from dataclasses import MISSING, fields

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from embedsmith.calibrate.objective import Objective, Scorer, reduced_task
from embedsmith.calibrate.probe import Probe
from embedsmith.calibrate.search import GreedySoup, Point, Search, Study, evolution, grid
from embedsmith.calibrate.self_positioning import Descent
from embedsmith.core.errors import RecipeError
from embedsmith.core.shelf import merge_methods
from embedsmith.data import Source
from embedsmith.evaluate import Results, RetrievalTask, STSTask, TaskResult
from embedsmith.merge.recipe import Bounds, ParentSpec
from tests.merge.family import family, job, merged, sentences


def tasks(count=12):
    texts = sentences(3 * count, seed=4)
    corpus = {f"d{n}": texts[n] for n in range(count)}
    queries = {f"q{n}": texts[count + n] for n in range(count)}
    retrieval = RetrievalTask("find", queries, corpus, {f"q{n}": {f"d{n}": 1} for n in range(count)})
    graded = STSTask("alike", texts[:count], texts[-count:], [n / count for n in range(count)])
    return retrieval, graded


def scorer(**settings):
    return Scorer(Objective(tasks=("find", "alike"), **settings), tasks())


def results(find, alike):
    """Results whose items are the given values (retrieval) and similarities (pairs)."""
    pairs = {"similarity": np.asarray(alike), "cosine": np.asarray(alike), "score": np.arange(len(alike), dtype=float)}
    spearman = float(spearmanr(alike, pairs["score"])[0])
    ids = [str(n) for n in range(len(find))]
    return Results(
        (
            TaskResult(
                "find",
                "retrieval",
                "ndcg_at_10",
                {"ndcg_at_10": float(np.mean(find))},
                {},
                ids,
                {"ndcg_at_10": np.asarray(find)},
            ),
            TaskResult(
                "alike",
                "sts",
                "cosine_spearman",
                {"cosine_spearman": spearman},
                {},
                [str(n) for n in range(len(alike))],
                pairs,
            ),
        )
    )


def drive(searcher, surface, limit=400):
    """Run a searcher on a function of the point; every point it asked for."""
    seen, values = [], None
    while len(seen) < limit:
        try:
            wanted = searcher.send(values)
        except StopIteration:
            break
        values = [surface(point) for point in wanted]
        seen += wanted
    return seen


def hill(point):
    """Best at weights (0.7, 0.2, 0.1) and length 0.9."""
    distance = sum((w - t) ** 2 for w, t in zip(point.weights, (0.7, 0.2, 0.1)))
    return -distance - (point.length - 0.9) ** 2


def test_a_grid_has_every_point_of_the_simplex_once():
    seen = drive(grid(3, 4, (0.8, 1.0)), hill)
    assert len(seen) == len(set(seen)) == 2 * 15
    assert all(sum(point.weights) == pytest.approx(1) for point in seen)


def test_cma_es_climbs():
    seen = drive(evolution(3, Point((1 / 3,) * 3, 1.2), (0.5, 1.5), 0.3, 0), hill)
    best = max(seen, key=hill)
    assert best.weights == pytest.approx((0.7, 0.2, 0.1), abs=0.03)
    assert best.length == pytest.approx(0.9, abs=0.05)
    assert all(0.5 <= point.length <= 1.5 for point in seen)


def test_values_are_weighted_normalised_or_the_worst():
    one = results([1.0, 0.5], [0.0, 1.0, 2.0])
    plain = scorer(weights={"find": 3.0})
    assert plain.value(one) == pytest.approx((3 * 0.75 + 1.0) / 4)
    assert scorer(weights={"find": 3.0}, aggregate="min").value(one) == pytest.approx(0.75)
    parents = [results([0.5, 0.5], [0.0, 1.0, 2.0]), results([1.0, 1.0], [2.0, 1.0, 0.0])]
    scaled = scorer(normalise=True).bounded(parents)
    assert scaled.value(one) == pytest.approx((0.5 + 1.0) / 2)


def test_the_gain_is_paired():
    """A merge better by 0.1 on every query is clearly better, however much queries differ."""
    base = np.linspace(0, 0.8, 40)
    same = list(np.random.default_rng(0).permutation(40).astype(float))
    value, low, high = scorer().gain(results(base + 0.1, same), results(base, same))
    assert value == pytest.approx(0.05)
    assert low == pytest.approx(0.05)
    assert high == pytest.approx(0.05)


def test_the_search_stops_when_nothing_is_gained(tmp_path):
    """Rounds whose best does not move end it; with a least gain of minus infinity all points are scored."""
    live = family(tmp_path, parents=2)
    counts = []
    for least_gain in (10.0, -1e9):
        config = Search(goal=Objective(tasks=("x",)), steps=2, lengths=(0.2, 0.4, 0.6, 0.8), least_gain=least_gain)
        study = Study(live, scorer(), config)
        study.run(grid(2, 2, config.lengths), lambda: None)
        counts.append(len(study.trials))
    assert counts == [9, 12]


def test_a_budget_ends_it(tmp_path):
    study = Study(family(tmp_path, parents=2), scorer(), Search(goal=Objective(tasks=("x",)), evaluations=4))
    assert study.run(grid(2, 4, (1.0,)), lambda: None) == "budget spent"
    assert len(study.trials) == 4


def test_a_candidate_is_the_merge_and_nothing_is_written(tmp_path):
    live = family(tmp_path, parents=2)
    before = sorted(tmp_path.rglob("*"))
    study = Study(live, scorer(), Search(goal=Objective(tasks=("x",)), family="average"))
    study.try_out(Point((0.25, 0.75), 0.5))
    for name, parameter in live.model.named_parameters():
        expected = live.base[name] + 0.125 * live.deltas[0][name] + 0.375 * live.deltas[1][name]
        torch.testing.assert_close(parameter.data, expected)
    assert sorted(tmp_path.rglob("*")) == before


def test_parts_of_tasks_lie_within_each_other():
    find, alike = tasks()
    small, large = (reduced_task(find, n, d, 0) for n, d in ((3, 5), (6, 9)))
    assert set(small.queries) <= set(large.queries)
    assert set(small.qrels) == set(small.queries)
    assert all(document in small.corpus for grades in small.qrels.values() for document in grades)
    assert len(small.corpus) == 5
    assert set(reduced_task(alike, 3, 2, 0).text1) <= set(reduced_task(alike, 6, 2, 0).text1)


@pytest.fixture
def dev(tmp_path):
    """The tasks as files."""
    find, alike = tasks()
    (tmp_path / "find" / "qrels").mkdir(parents=True)
    write(tmp_path / "find" / "corpus.jsonl", [{"_id": k, "title": "", "text": v} for k, v in find.corpus.items()])
    write(tmp_path / "find" / "queries.jsonl", [{"_id": k, "text": v} for k, v in find.queries.items()])
    lines = ["query-id\tcorpus-id\tscore", *(f"q{n}\td{n}\t1" for n in range(len(find.queries)))]
    (tmp_path / "find" / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    rows = zip(alike.text1, alike.text2, alike.score)
    write(tmp_path / "alike.jsonl", [{"text1": a, "text2": b, "score": s} for a, b, s in rows])
    return [str(tmp_path / "find"), str(tmp_path / "alike.jsonl")]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("searcher", ["grid", "cma", "self_positioning"])
def test_every_searcher_finds_something_no_worse_than_its_trials(tmp_path, dev, folders, searcher):
    live = family(tmp_path, parents=2)
    config = Search(
        goal=Objective(tasks=tuple(dev[:1]), hold_out=tuple(dev[1:])),
        searcher=searcher,
        evaluations=12,
        steps=2,
        lengths=(0.5, 1.0),
        probe=None if searcher != "self_positioning" else probe_of(folders),
        position=POSITION,
        report=str(tmp_path / "report.json"),
    )
    found = config.run(live)
    assert found.best.value == max(t.value for t in found.trials)
    assert len(found.trials) <= 13
    assert set(found.held_out) == {"merge", *live.names}
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["trials"]) == len(list(csv.DictReader((tmp_path / "report.csv").open())))
    live.place(found.best.coefficient_GM)
    again = found.best.results.main_scores()
    assert Objective(tasks=tuple(dev[:1])).scorer().results(live).main_scores() == pytest.approx(again)


def probe_of(folders):
    return Probe(sources=(Source(path=str(folders / "pairs.jsonl")),), negatives=2)


POSITION = Descent(steps=2, check_every=1, batch_size=4, held_out=0.5)


@pytest.mark.parametrize("kind", ["search", "greedy_soup"])
def test_a_recipe_can_search(folders, dev, kind):
    method = merge_methods.build(
        {"type": kind, "goal": {"tasks": dev}} | ({"steps": 2, "lengths": [1.0]} if kind == "search" else {})
    )
    one = job(folders)
    assert all(tensor.isfinite().all() for tensor in merged(one, method.prepare(one)).values())


def test_wrong_settings_are_errors(dev):
    with pytest.raises(RecipeError, match="probe"):
        Search(goal=Objective(tasks=("x",)), searcher="self_positioning")
    with pytest.raises(RecipeError, match="nobody"):
        Objective(tasks=tuple(dev), weights={"nobody": 1.0}).scorer()
    with pytest.raises(RecipeError, match="lengths"):
        Search(goal=Objective(tasks=("x",)), lengths=())


def test_greedy_soup_keeps_what_helps():
    gains = [0.5, 0.9, 0.1, 0.8]

    def evaluate(coef):
        return 0.95 if coef[3] > 0 and not coef[0] and not coef[2] else 0.4

    coef, history = GreedySoup(goal=Objective(tasks=("none",))).chosen(gains, evaluate)
    assert coef.tolist() == [0, 0.5, 0, 0.5]
    assert history == [0.9, 0.95, 0.4, 0.4]


def holds_float(hint):
    return hint is float or any(map(holds_float, typing.get_args(hint)))


SETTINGS = [*(entry.thing for entry in merge_methods.entries(plugins=False)), ParentSpec, Bounds, Objective, Descent]
FLOATS = [
    (cls, name, hint)
    for cls in SETTINGS
    for name, hint in typing.get_type_hints(cls).items()
    if holds_float(hint) and typing.get_origin(hint) is not typing.ClassVar
]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("cls", "name", "hint"), FLOATS, ids=[f"{cls.__name__}.{name}" for cls, name, _ in FLOATS])
def test_no_setting_is_nan_or_infinite(cls, name, hint, bad):
    """Where the value is wrong, other settings need not be given: the ranges are checked first."""
    value = {tuple: (bad,), dict: {"x": bad}}.get(typing.get_origin(hint), bad)
    with pytest.raises(RecipeError, match=f"^(?s:.*){name} is "):
        cls(**{**dict.fromkeys(required(cls), ("x",)), name: value})


def required(cls):
    return [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]


def test_the_weights_of_a_goal_sum_to_something(dev):
    with pytest.raises(RecipeError, match="sum above 0"):
        Objective(tasks=tuple(dev[:1]), weights={"find": 0.0}).scorer()
