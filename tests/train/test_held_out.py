"""`evaluate.held_out`: what is scored is not trained on, the same texts from the first step to the last resume."""

import json
from pathlib import Path

import pytest

from embedsmith.core.errors import DataError, ModelError, RecipeError
from embedsmith.core.recipe import parse, read_tree
from embedsmith.data import Source, read_source, text_id
from embedsmith.train import Recipe, loop, rehearse
from embedsmith.train.held_out import with_held_out
from tests.train.test_loop import assert_equal_weights, metrics, run, weights


@pytest.fixture
def held(tree):
    tree["train"] |= {"steps": 4, "log_with": []}
    tree["evaluate"] = {"held_out": 3, "before": False}
    return tree


def texts(path):
    return {text_id(t) for r in read_source(Source(path=str(path))).records for t in (r.query, *r.positives)}


def test_the_parts_share_no_text_and_the_scored_one_is_scored_before_and_after(held, typed):
    held["evaluate"]["before"] = True
    output = run(held).parent
    parts = output / "held-out"
    asked = [json.loads(line)["text"] for line in (parts / "pairs/pairs-test/queries.jsonl").open()]
    answers = [json.loads(line)["text"] for line in (parts / "pairs/pairs-test/corpus.jsonl").open()]
    assert len(asked) == 3
    assert not {*map(text_id, asked), *map(text_id, answers)} & texts(parts / "pairs/pairs-train.jsonl")
    scored, rest = parts / "scored/scored-test.jsonl", parts / "scored/scored-train.jsonl"
    assert (len(scored.read_text().splitlines()), len(rest.read_text().splitlines())) == (2, 22)  # a tenth of 24
    assert not texts(scored) & texts(rest)
    first, last = metrics(output)[0], metrics(output)[-1]
    for line in (first, last):
        assert {"score/pairs-test", "score/scored-test"} <= line.keys()
    assert "loss/pairs" in {key for line in metrics(output) for key in line}
    assert read_tree(output / "recipe.yaml")["data"][0]["path"] == held["data"][0]["path"]  # as it was given
    report = (output / "report.html").read_text()
    assert "pairs-test" in report
    assert any(text in report for text in asked)
    for part, seen in (("pairs-test", False), ("pairs-train.jsonl", True)):
        _, err, code = typed("evaluate", output / "model", "-t", parts / "pairs" / part)
        assert (code, "in the training data" in err) == (0, seen), err


def test_scores_keep_the_range_that_the_whole_file_has(held):
    """The lowest and the highest score of a file may be held out."""
    rows = [{"text1": f"cat {n}", "text2": f"dog {n}", "score": 5 * (n == 0)} for n in range(20)]
    held["data"] = [{"rows": rows, "name": "rows", "task": "sts", "batch_size": 4}]
    output = run(held).parent
    kept = [json.loads(line) for line in (output / "held-out/rows/rows-train.jsonl").open()]
    test = [json.loads(line) for line in (output / "held-out/rows/rows-test.jsonl").open()]
    assert {row["score"] for row in [*kept, *test]} == {0.0, 1.0}


def test_a_run_goes_on_with_the_parts_that_it_began_with(held, tmp_path, monkeypatch):
    source = tmp_path / "mine.jsonl"
    source.write_text(Path(held["data"][0]["path"]).read_text())
    held["data"][0]["path"] = str(source)
    whole = run(held | {"output": str(tmp_path / "whole")}).parent
    update = loop.update
    monkeypatch.setattr(loop, "update", lambda run_, draw: update(run_, draw) if run_.state.step < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(held)
    monkeypatch.undo()
    source.write_text("".join(reversed(source.read_text().splitlines(keepends=True))))
    assert_equal_weights(weights(run(held).parent), weights(whole))


def test_runs_of_other_seeds_are_scored_on_the_same_texts(held, tmp_path):
    asked = []
    for seed in (0, 1):
        held["train"]["seed"] = seed
        (task, _) = with_held_out(parse(Recipe, held), tmp_path / str(seed)).evaluate.tasks
        asked.append((Path(task) / "queries.jsonl").read_text())
    assert asked[0] == asked[1]


def test_a_start_that_failed_claims_nothing(held):
    right = held["model"]["path"]
    held["model"]["path"] = right + "-nowhere"
    with pytest.raises(ModelError):
        run(held)
    held["model"]["path"], held["evaluate"]["held_out"] = right, 2
    assert len((run(held).parent / "held-out/pairs/pairs-test/queries.jsonl").read_text().splitlines()) == 2
    held["evaluate"]["held_out"] = 4
    folder = parse(Recipe, held).output
    loop.train(parse(Recipe, held), overwrite=True)
    assert len((Path(folder) / "held-out/pairs/pairs-test/queries.jsonl").read_text().splitlines()) == 4


def test_a_dry_run_names_what_would_be_scored_and_writes_nothing(held, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert "evaluated: pairs-test, scored-test, at the end" in rehearse(parse(Recipe, held))
    held["evaluate"] |= {"before": True, "every": 2}
    told = rehearse(parse(Recipe, held))
    assert "evaluated: pairs-test, scored-test, before the first step, every 2 steps and at the end" in told
    assert sorted(tmp_path.rglob("*")) == before


def test_sources_of_one_name_have_parts_of_their_own(held):
    held["data"] = [held["data"][0], held["data"][0] | {"limit": 20, "loss": {"type": "infonce", "temperature": 0.1}}]
    output = run(held).parent
    assert sorted(path.name for path in (output / "held-out").iterdir()) == ["pairs-0", "pairs-1"]


def test_a_stream_and_a_single_row_name_the_way_out(held, tmp_path):
    held["data"][0] |= {"streaming": True}
    with pytest.raises(RecipeError, match=r"evaluate\.held_out=null evaluate\.tasks"):
        run(held)
    held["data"] = [{"rows": [{"query": "cat", "pos": ["dog"]}], "name": "one"}]
    with pytest.raises(DataError, match=r"evaluate\.held_out=null"):
        run(held)
    assert not (tmp_path / "run" / "recipe.yaml").exists()
