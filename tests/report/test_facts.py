"""A run's report as plain values: what is told of items, and of folders that lack something."""

import json

import numpy as np
import pytest

from embedsmith.core.errors import EvaluationError
from embedsmith.evaluate.result import Results, TaskResult
from embedsmith.report import run_facts


def scored(task, values, **items):
    """A retrieval task whose queries q0, q1, ... have these values."""

    columns = {"ndcg_at_10": values, **items}
    return TaskResult(
        task,
        "retrieval",
        "ndcg_at_10",
        {"ndcg_at_10": sum(values) / len(values)},
        item_ids=[f"q{n}" for n in range(len(values))],
        items={name: np.array(column) for name, column in columns.items()},
    )


@pytest.fixture
def folder(tmp_path):
    """Scored before and after on a task whose files lie beside; of 130 queries 120 fell, 9 rose and one stayed."""
    task = tmp_path / "birds"
    (task / "qrels").mkdir(parents=True)
    rows = lambda name, kind: "".join(
        json.dumps({"_id": f"{name}{n}", "text": f"{kind} {n}"}) + "\n" for n in range(130)
    )
    (task / "queries.jsonl").write_text(rows("q", "which bird"))
    (task / "corpus.jsonl").write_text(rows("d", "the bird"))
    lines = [f"q{n}\td{n}\t2\nq{n}\td{(n + 1) % 130}\t1" for n in range(130)]
    (task / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    (run / "recipe.yaml").write_text(f"evaluate: {{tasks: [{json.dumps(str(task))}]}}\n")
    before = [0.9] * 120 + [0.1] * 9 + [0.5]
    after = [0.9 - (n + 1) / 200 - 0.2 for n in range(120)] + [0.8] * 9 + [0.505]
    for name, values in (("before", before), ("after", after)):
        Results((scored("birds", values),)).save(run / "evaluation" / f"{name}.json", items=True)
    return run


def test_items_are_told_worst_first_with_the_texts_of_the_task(folder):
    (task,) = run_facts(folder)["tasks"]
    assert (task["items"], task["worse"], task["better"]) == (130, 120, 9)
    assert task["clear"]
    assert task["low"] < task["difference"] < task["high"] < 0
    fell = [item for item in task["moved"] if item["change"] < 0]
    assert [item["id"] for item in fell] == [f"q{n}" for n in range(119, 19, -1)], "the hundred that fell most"
    assert fell[0]["texts"] == {"query": "which bird 119", "right": "the bird 119"}, "the text of the higher grade"
    assert (fell[0]["rank"], fell[0]["right"], fell[0]["people"]) == (None, None, None)
    assert len(task["moved"]) - len(fell) == 9


def test_tasks_that_clearly_lost_come_first_and_an_undefined_score_is_null(folder):
    before = {"noisy": [1.0, 0.0], "lost": [0.2] * 20, "odd": [float("nan")] * 20}
    after = {"noisy": [0.0, 0.7], "lost": [0.1] * 20, "odd": [0.3] * 20}
    for name, values in (("before", before), ("after", after)):
        results = tuple(scored(task, each) for task, each in values.items())
        Results(results).save(folder / "evaluation" / f"{name}.json", items=True)
    facts = run_facts(folder)
    json.dumps(facts, allow_nan=False)
    assert [task["task"] for task in facts["tasks"]] == ["lost", "noisy", "odd"]
    odd = next(task for task in facts["tasks"] if task["task"] == "odd")
    assert (odd["before"], odd["difference"], odd["clear"]) == (None, None, False)


def test_a_run_that_was_scored_once_or_not_at_all(folder):
    (folder / "evaluation" / "before.json").unlink()
    (task,) = run_facts(folder)["tasks"]
    assert (task["before"], task["difference"], task["moved"]) == (None, None, [])
    (folder / "evaluation" / "after.json").write_text("{")
    facts = run_facts(folder)
    assert (facts["tasks"], facts["problems"]) == ([], ["evaluation/after.json could not be read"])


def test_long_curves_are_thinned_and_keep_their_ends(folder):
    steps = [*range(1, 2001)]
    lines = [{"step": step, "loss/a": 2.0 / step, "learning_rate": 1.0} for step in steps]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2001, "loss/a": NaN}\n'
    (folder / "metrics.jsonl").write_text(text)
    curves = {curve["name"]: curve["series"] for curve in run_facts(folder)["curves"]}
    (series,) = curves["loss"]
    assert len(series["points"]) == 300
    assert (series["points"][0], series["points"][-1]) == ((1, 2.0), (2000, 0.001))
    assert curves["score"] == []


def test_no_run_is_no_report(tmp_path):
    with pytest.raises(EvaluationError, match="nothing to report on"):
        run_facts(tmp_path)
