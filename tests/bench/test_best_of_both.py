"""The bench of one recipe for both tasks: its verdicts, how it chooses, and all of it on a tiny model."""

import json

import pytest
from bench import best_of_both
from bench.best_of_both import Bench, changed, chosen_scale, verdicts
from bench.best_of_both_data import Setting

import embedsmith
from embedsmith.evaluate import load_task
from tests.tinybert import WORDS, tiny_bert

GAINS = ("r", "s")


def row(r, s, out):
    return [{"r": r - 1, "s": s, "out": out, "far": out + 1, "mean": 0}, {"r": r + 1, "s": s, "out": out, "far": out}]


def test_targets_are_judged_by_means_over_seeds():
    rows = {
        "start": row(50, 70, 40),
        "best of both": row(60, 74, 40.1),
        "joint, all steps": row(58.5, 73.4, 30),
        "joint, a run's steps": row(60, 72.1, 30),
        "retrieval alone": row(60.5, 60, 0),
        "similarity alone": row(0, 75, 0),
    }
    told = {name: met for name, (met, _) in verdicts(rows, GAINS).items()}
    assert told == {
        "1.0 above joint of bench.merging on r and s": None,
        "1.0 above joint, a run's steps on r and s": False,
        "1.0 above joint, all steps on r and s": True,
        "95 % of the gain of retrieval alone on r": True,
        "95 % of the gain of similarity alone on s": False,
        "no other set more than 0.3 below the start, their mean above it": True,
    }
    (met, words) = list(verdicts(rows | {"best of both": row(60, 74, 39.6)}, GAINS).values())[-1]
    assert (met, words) == (False, "mean -0.40, worst out -0.40")


def test_the_scale_is_the_best_of_those_that_forget_little():
    start = {"in": 50.0, "probe": 40.0}
    found = {0.5: {"in": 55.0, "probe": 40.2}, 0.8: {"in": 57.0, "probe": 39.8}, 1.0: {"in": 58.0, "probe": 39.0}}
    assert chosen_scale(found, start, ["in"], ["probe"]) == 0.8
    assert chosen_scale({s: x | {"probe": 39.0 - s} for s, x in found.items()}, start, ["in"], ["probe"]) == 0.5


def test_a_change_reaches_its_key_alone():
    recipe = {"data": [{"loss": "a"}, {"loss": "b"}], "train": {"lr": 1}}
    assert changed(recipe, {"data.1.loss": "c", "train.plan.ratio": {"sts": 1}}) == {
        "data": [{"loss": "a"}, {"loss": "c"}],
        "train": {"lr": 1, "plan": {"ratio": {"sts": 1}}},
    }
    assert recipe["data"][1]["loss"] == "b"


@pytest.mark.slow
def test_every_arm_is_trained_scored_and_searched(tmp_path, monkeypatch):
    embedsmith.load(str(tiny_bert(tmp_path / "bert")), pooling="mean").save(tmp_path / "base")
    pairs = [{"query": f"{a} {b}", "pos": [f"the {a} {b} {a}"]} for a in WORDS[2:8] for b in WORDS[8:12]]
    graded = [{"text1": f"{w} cat", "text2": f"{WORDS[-i]} dog", "score": i / 16} for i, w in enumerate(WORDS)]
    files = {
        "debian-dev": pairs,
        "stsb-en-dev": graded,
        "outside": graded[4:],
        "texts": [{"text": each["query"]} for each in pairs],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in files}
    of_task = {"retrieval": "debian-dev", "sts": "stsb-en-dev"}
    tasks = [load_task(paths[name]) for name in (*of_task.values(), "outside")]
    fakes = {
        "sources": lambda setting, templates, work: [{**one, "path": paths[of_task[one["task"]]]} for one in templates],
        "unlabelled": lambda work: paths["texts"],
        "probes": lambda work: [],
        "development": lambda setting, work: tasks,
        "tests": lambda setting, study: tasks,
        "chosen_scale": lambda found, *_: max(found),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(best_of_both, name, fake)
    results = tmp_path / "results.json"
    setting = Setting("english", {"path": str(tmp_path / "base")}, ("pairs", "graded"), 16)
    bench = Bench(setting, 4, 2, tmp_path / "work", results)
    for arm in [*bench.arms("train"), *bench.arms("ablations")]:
        bench.scored(arm, 0)
    bench.table()
    kept = json.loads(results.read_text())
    every = {*bench.arms("train"), *bench.arms("ablations")}
    assert {run["arm"] for run in kept["runs"] if run["part"] == "tests"} == every
    assert len(kept["summary"]["english, 4 steps"]["verdicts"]) == 6
    count = len(kept["runs"])
    bench.scored("distilled from these", 0)
    assert len(json.loads(results.read_text())["runs"]) == count
