"""Sweeps: ranges in a recipe, what is tried, stopped, pruned, shared and refused; and one real one of each kind.

Most run on a training that is made up: its scores are a formula of the recipe, and it tells of its evaluations and
resumes as the real one does."""

import fcntl
import json
import multiprocessing
import os
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import embedsmith
from embedsmith.cli import stages, sweep_study, sweep_trial
from embedsmith.cli.sweep_recipe import SearchRange, ranges_in, sweep_schema
from embedsmith.cli.sweep_study import SharedStudy
from embedsmith.cli.sweeping import read_sweep, run_sweep
from embedsmith.core.errors import CheckpointError, DataError, ModelError, RecipeError, TrainingError
from embedsmith.core.recipe import load_recipe, parse
from embedsmith.evaluate.result import Results, TaskResult
from embedsmith.report import write_report
from embedsmith.report.pareto import ScoredStep, SweepRecord, SweepTrial
from embedsmith.train import Recipe
from embedsmith.train.scoring import tell_watch

SHIPPED = Path(__file__).parents[2] / "recipes" / "sweep.yaml"


def formula(recipe, step):
    """Two objectives at odds, both better with more steps: the best rates are 1e-4 for one and 1e-2 for the other."""
    from math import log10

    rate, done = log10(recipe.train.learning_rate), step / recipe.train.steps
    return {"here": 0.9 - 0.1 * (rate + 4) ** 2 + 0.1 * done, "outside": 0.8 - 0.1 * (rate + 2) ** 2 + 0.1 * done}


def results(scores):
    return Results(tuple(TaskResult(name, "sts", "m", {"m": value, "n": -value}) for name, value in scores.items()))


class Pretended:
    """A training that only scores. `stops`: (trial, step) after whose evaluation it is killed, once each."""

    def __init__(self, stops=(), fails=lambda recipe: None):
        self.stops, self.fails, self.steps = set(stops), fails, []

    def __call__(self, recipe):
        output = Path(recipe.output)
        output.mkdir(parents=True, exist_ok=True)
        metrics, number = output / "metrics.jsonl", int(output.name)
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        done = json.loads(lines[-1])["step"] if lines else -1
        for step in range(0, recipe.train.steps + 1, recipe.evaluate.every):
            if step <= done:
                continue
            if step and (error := self.fails(recipe)) is not None:
                raise error
            scores = {f"score/{name}": value for name, value in formula(recipe, step).items()}
            with metrics.open("a") as file:
                file.write(json.dumps({"step": step, **scores}) + "\n")
            self.steps.append((number, step))
            if (number, step) in self.stops:
                self.stops.discard((number, step))
                raise KeyboardInterrupt
            if 0 < step < recipe.train.steps:
                tell_watch(output)
        for name, step in (("before", 0), ("after", recipe.train.steps)):
            (output / "evaluation").mkdir(exist_ok=True)
            results(formula(recipe, step)).save(output / "evaluation" / f"{name}.json")
        (output / "model").mkdir(exist_ok=True)
        return output / "model"


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A database with Optuna's tables, which take long to make."""
    path = tmp_path_factory.mktemp("tables") / "optuna.db"
    sweep_study._close(sweep_study._storage(path))
    return path


@pytest.fixture
def quick(monkeypatch, tables):
    """Pages are written where a test reads them."""
    real = sweep_study._storage
    monkeypatch.setattr(
        sweep_study, "_storage", lambda path: real(path if path.exists() else shutil.copy(tables, path))
    )
    monkeypatch.setattr(sweep_study, "write_report", lambda folder: None)


@pytest.fixture
def pretended(monkeypatch, quick):
    monkeypatch.setattr(sweep_trial, "train", made := Pretended())
    return made


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("here", "outside"):
        (tmp_path / f"{name}.jsonl").write_text('{"text1": "a", "text2": "b", "score": 0.5}\n')
    return {
        "model": {"path": "model"},
        "data": [{"path": "pairs.jsonl", "batch_size": {"from": [8, 16]}}],
        "train": {"learning_rate": {"log": ["1e-5", 1e-1]}, "steps": 4, "log_with": []},
        "evaluate": {"tasks": ["here.jsonl", "outside.jsonl"], "every": 2},
        "output": str(tmp_path / "out"),
        "sweep": {
            "trials": 8,
            "startup": 4,
            "prune": False,
            "objectives": {"here": "here", "kept": {"forgetting": ["outside"]}},
        },
    }


def swept(tree, *overrides, **options):
    return run_sweep(read_sweep(tree, overrides), **options)


def told(found):
    """What a sweep found, without its times."""
    return [replace(trial, seconds=0.0) for trial in found.trials]


def test_widths_and_heads_of_a_run_can_be_objectives(recipe, pretended, monkeypatch):
    plain, saved, scored = formula, results, {}

    def with_columns(recipe, step):
        main = plain(recipe, step)
        scores = main | {"here/16": 1 - main["here"], "here/sparse": main["here"] / 2}
        scored[recipe.train.learning_rate, step] = scores
        return scores

    monkeypatch.setitem(globals(), "formula", with_columns)
    monkeypatch.setitem(globals(), "results", lambda all: saved({n: v for n, v in all.items() if "/" not in n}))
    recipe["evaluate"] |= {"dims": [16], "heads": ["sparse"]}
    recipe["sweep"] |= {"objectives": {"narrow": "here/16", "lexical": {"forgetting": ["here/sparse"]}}, "trials": 2}
    for trial in swept(recipe).trials:
        start, end = (scored[trial.changes["train.learning_rate"], step] for step in (0, 4))
        assert trial.values == {"narrow": end["here/16"], "lexical": start["here/sparse"] - end["here/sparse"]}


def test_the_schema_of_a_sweep_takes_a_range_wherever_a_value_may_stand(recipe):
    validator = pytest.importorskip("jsonschema").Draft202012Validator(sweep_schema())
    shipped = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    assert not list(validator.iter_errors(shipped))
    assert not list(validator.iter_errors(recipe))
    for key, value in (("learning_rate", {"log": 5}), ("learning_rat", 1e-5), ("steps", {"logs": [1, 2]})):
        assert list(validator.iter_errors(recipe | {"train": recipe["train"] | {key: value}})), key
    assert list(validator.iter_errors(recipe | {"sweep": {"trails": 3}}))


# Ranges.


def test_ranges_are_found_wherever_a_value_may_stand():
    tree = {
        "a": {"log": ["1e-6", 1e-4]},
        "b": [{"c": {"range": [1, 8]}}, {"d": {"range": [0, 0.5]}}],
        "e": {"from": [64, "x", {"type": "infonce"}, [1], None, True]},
        "f": {"log": [2, 512]},
        "plain": {"logs": [1, 2], "more": {"log": 1, "range": 2}},
    }
    found = {one.name: one for one in ranges_in(tree)}
    assert list(found) == ["a", "b.0.c", "b.1.d", "e", "f"]
    assert found["a"].ends == (1e-6, 1e-4)
    assert found["a"].log
    assert found["b.0.c"].place == ("b", 0, "c")
    assert found["e"].ends == (64, "x", {"type": "infonce"}, [1], None, True)
    drawn = {name: one.distribution() for name, one in found.items()}
    assert [type(one).__name__.removesuffix("Distribution") for one in drawn.values()] == [
        *("Float", "Int", "Float", "Categorical", "Int")
    ]
    assert [one.log for name, one in drawn.items() if name != "e"] == [True, False, False, True]
    assert [found["e"].value(text) for text in drawn["e"].choices] == list(found["e"].choices)
    assert found["a"].value(1.23456e-5) == 1.235e-5
    assert SearchRange(("a",), 0.12344, 1.0).value(0.123441) == 0.12344, "rounding does not leave the range"
    assert SearchRange(("a",), 0.0, 0.98766).value(0.98766) == 0.98766
    assert found["f"].value(100_001) == 100_001


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"from": []}, "is no list of choices"),
        ({"from": 3}, "is no list of choices"),
        ({"log": [0, 1]}, "a lower end above 0 and below the upper one"),
        ({"range": [2, 2]}, "a lower end below the upper one"),
        ({"range": [1, 2, 3]}, r"is no range of numbers\n  expected: \{range: \[0.01, 0.1\]\}"),
        ({"log": ["a", 2]}, "is no range of numbers"),
        ({"log": 5}, "is no range of numbers"),
        ({"range": [True, 2]}, "is no range of numbers"),
        ({"range": [0, float("inf")]}, "is no range of numbers"),
        ({"range": [0, 1e-4]}, r"Input should be greater than 0 \(got 0"),
        ({"log": [1e-6, 1e-4], "x": 1}, "valid number"),
        ({"from": [1e-5, -1e-5]}, r"train.learning_rate: Input should be greater than 0 \(got -1e-05\)"),
        (1e-4, r"(?s)no range to search.*'train.learning_rate=\{log: \[1e-6, 1e-4\]\}'"),
    ],
)
def test_a_range_that_is_none_or_that_the_schema_refuses_costs_no_trial(recipe, pretended, given, words):
    recipe["data"][0]["batch_size"] = {"from": [8, 16]} if isinstance(given, dict) else 8
    recipe["train"]["learning_rate"] = given
    with pytest.raises(RecipeError, match=words):
        swept(recipe)
    assert not Path(recipe["output"]).exists()
    assert pretended.steps == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["sweep.objectives.a=[hear]"], "(?s)sweep.objectives.a: no task.*'hear'.*did you mean 'here'.*here, outside"),
        (["sweep.objectives.a={score: [here], forgetting: [here]}"], "(?s)score and forgetting in one.*two objectives"),
        (["sweep.objectives.a={scores: [here]}"], "sweep: objectives.a.scores: unknown key"),
        (["sweep.objectives.a=[]", "sweep.trails=3"], "sweep: trails: unknown key.*did you mean 'trials'"),
        (["evaluate.before=false"], "(?s)outside is scored once.*evaluate.before=true"),
        (["evaluate.tasks=[]"], "(?s)nothing is scored.*evaluate.held_out=500"),
        (["evaluate={held_out: 9}"], "no task that the recipe scores is called 'here'"),
        (["sweep.objectives.a=[here/16]"], r"(?s)no training scores the width 16.*evaluate.dims=\[16\]"),
        (["sweep.objectives.a=[here/sparse]"], r"(?s)no training scores the head sparse.*evaluate.heads=\[sparse\]"),
        (["sweep.sampler=cma"], "'tpe' or 'nsga2'"),
        (["sweep.startup=1"], "greater than or equal to 2"),
    ],
)
def test_what_is_searched_for_must_be_scored(recipe, pretended, changes, words):
    with pytest.raises(RecipeError, match=words):
        swept(recipe, *changes)
    assert pretended.steps == []


# What is tried, and what is left.


def test_the_front_is_left_as_recipes_that_run_and_what_is_beaten_goes(recipe, pretended, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_study, "write_report", write_report)
    found = swept(recipe)
    assert [trial.number for trial in found.trials] == list(range(8))
    assert {trial.state for trial in found.trials} == {"finished"}
    for trial in found.trials:
        tried = parse(Recipe, read_sweep(recipe).tried(trial.changes))
        assert tried.data[0].batch_size in (8, 16)
        scores = formula(tried, 4)
        assert trial.values == {"here": scores["here"], "kept": formula(tried, 0)["outside"] - scores["outside"]}
        assert trial.start == {"here": formula(tried, 0)["here"], "kept": 0.0}
        assert [(point.run, point.step) for point in trial.curve] == [(".", 2), (".", 4)]
        assert trial.curve[-1].values == pytest.approx(trial.values)
    points = {trial.number: (trial.values["here"], -trial.values["kept"]) for trial in found.trials}
    beaten = {
        number
        for number, point in points.items()
        if any(other != point and all(a >= b for a, b in zip(other, point)) for other in points.values())
    }
    best = {trial.number for trial in found.best}
    assert len({points[number] for number in points.keys() - beaten}) == len(best)
    assert best <= points.keys() - beaten
    assert [path.exists() for path in found.recipes] == [True] * len(best)
    assert {int(path.name) for path in (tmp_path / "out/trials").iterdir()} == best
    for trial, path in zip(found.best, found.recipes, strict=True):
        again = load_recipe(path, Recipe)
        assert again.train.learning_rate == trial.changes["train.learning_rate"]
        assert again.data[0].batch_size == trial.changes["data.0.batch_size"]
        assert again.output == str(tmp_path / f"out-{trial.name}")
        assert f"# Run: embedsmith train {path}" in path.read_text()
    page = (tmp_path / "out/report.html").read_text()
    assert all(f"embedsmith train {path}" in page for path in found.recipes)
    assert "kept against here" in page
    write_report(tmp_path / "out", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page
    assert f"{len(found.trials)} trials: 8 finished" in str(found)


def test_tpe_finds_more_than_chance_and_one_objective_is_the_mean_of_all_tasks(recipe, pretended):
    del recipe["sweep"]["objectives"]
    first = swept(recipe, "sweep.startup=5", "sweep.trials=5")
    more = swept(recipe, "sweep.startup=5", "sweep.trials=16")
    assert told(first) == told(more)[:5], "a sweep may get more trials"
    for trial in more.trials:
        scores = formula(parse(Recipe, read_sweep(recipe).tried(trial.changes)), 4)
        assert trial.values == {"score": pytest.approx(sum(scores.values()) / 2)}
    best = max(trial.values["score"] for trial in more.trials)
    assert best > 0.83, "0.85 is the highest there is, at 1e-3"
    assert best > max(trial.values["score"] for trial in first.trials)
    assert [trial.values["score"] for trial in more.best] == [best]
    assert "score of each trial" in write_report(more.output).read_text()


def test_another_metric_of_a_task_is_an_objective_too(recipe, pretended):
    found = swept(recipe, "sweep.objectives={low: here/n}", "sweep.trials=2")
    for each in found.trials:
        tried = parse(Recipe, read_sweep(recipe).tried(each.changes))
        assert each.values == {"low": -formula(tried, 4)["here"]}
    assert all(trial.curve == () for trial in found.trials), "its course is told by no journal"


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_sweep_that_was_stopped_ends_as_one_that_was_not(recipe, monkeypatch, quick, tmp_path, sampler):
    settings = [f"sweep.sampler={sampler}", "sweep.prune=true", "sweep.trials=7", "sweep.startup=3"]
    monkeypatch.setattr(sweep_trial, "train", whole := Pretended())
    undisturbed = swept(recipe, *settings)
    other = recipe | {"output": str(tmp_path / "other")}
    monkeypatch.setattr(sweep_trial, "train", halting := Pretended({(1, 2), (3, 0), (5, 2)}))
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            swept(other, *settings)
    with monkeypatch.context() as patch:  # killed when a trial is written down and the sampler was not told
        patch.setattr(SharedStudy, "_tell", lambda self, trial: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            swept(other, *settings)
    continued = swept(other, *settings)
    assert told(continued) == told(undisturbed)
    assert halting.steps == whole.steps, "nothing is done twice"
    files = {path.name: path.read_bytes() for path in (tmp_path / "other/best").iterdir()}
    assert files.keys() == {path.name for path in (tmp_path / "out/best").iterdir()}
    before = {path: path.read_bytes() for path in (tmp_path / "other").rglob("*") if path.is_file()}
    swept(other, *settings)
    assert {path: path.read_bytes() for path in (tmp_path / "other").rglob("*") if path.is_file()} == before
    assert halting.steps == whole.steps, "finished is finished"


def test_another_seed_is_another_sweep_and_draws_are_not_repeated(recipe, pretended, tmp_path):
    rates = {}
    for seed in (0, 1):
        found = swept(recipe | {"output": str(tmp_path / f"s{seed}")}, f"sweep.seed={seed}", "sweep.trials=3")
        rates[seed] = [trial.changes["train.learning_rate"] for trial in found.trials]
    assert len({*rates[0], *rates[1]}) == 6


# Pruning.


def trial(number, curve, **values):
    points = tuple(ScoredStep(".", step, dict(zip("ab", pair))) for step, pair in curve.items())
    return SweepTrial(number, "finished", {}, values or {"a": 1.0, "b": 1.0}, curve=points)


def test_a_trial_is_behind_where_its_best_is_below_the_median_in_every_objective():
    curves = [
        {2: (0.1, 5.0), 4: (0.6, 4.0)},
        {2: (0.5, 3.0), 4: (0.4, 3.5)},
        {2: (0.3, 2.0)},
        {2: (0.9, 9.0), 4: (0.1, 9.0)},
    ]
    others = tuple(trial(number, curve) for number, curve in enumerate(curves))
    record = SweepRecord("train", "tpe", {"a": "high", "b": "low"}, {}, others)
    for step in (2, 4):
        a = statistics.median(max(x for s, (x, _) in curve.items() if s <= step) for curve in curves)
        b = statistics.median(min(y for s, (_, y) in curve.items() if s <= step) for curve in curves)
        for mine, behind in (
            ((a - 0.01, b + 0.1), True),
            ((a, b + 0.1), False),
            ((a - 0.01, b), False),
            ((a + 0.1, b - 1), False),
        ):
            own = (ScoredStep(".", step, {"a": mine[0], "b": mine[1]}),)
            assert record.behind(".", step, own) == behind, (step, mine)
            early = (ScoredStep(".", 1, {"a": 9.0}), *own)
            assert not record.behind(".", step, early), "its best so far counts"
    assert not record.behind("other", 2, (ScoredStep("other", 2, {"a": -1.0, "b": 99.0}),)), "of another run of it"
    pruned = replace(record, trials=tuple(replace(each, state="pruned") for each in others))
    assert not pruned.behind(".", 2, (ScoredStep(".", 2, {"a": -1.0, "b": 99.0}),)), "only finished ones count"


def test_a_trial_that_is_behind_ends_at_an_evaluation(recipe, pretended, tmp_path):
    del recipe["sweep"]["objectives"]
    found = swept(recipe, "sweep.prune=true", "sweep.trials=10", "sweep.startup=3")
    states = [trial.state for trial in found.trials]
    assert states[:3] == ["finished"] * 3
    assert {"pruned", "finished"} == set(states[3:])
    for ended in (trial for trial in found.trials if trial.state == "pruned"):
        assert (ended.values, [point.step for point in ended.curve]) == ({}, [2])
        assert (ended.number, 4) not in pretended.steps
        before = [trial for trial in found.trials[: ended.number] if trial.state == "finished"]
        median = statistics.median(trial.curve[0].values["score"] for trial in before)
        assert ended.curve[0].values["score"] < median
    assert f"{states.count('pruned')} pruned" in str(found)
    front = SweepRecord.read(tmp_path / "out").front()
    assert {each.state for each in front} == {"finished"}


# What goes wrong.


def test_a_trial_that_diverges_is_counted_and_what_is_the_recipes_fault_ends_the_sweep(recipe, monkeypatch, quick):
    wrong = lambda r: TrainingError("the gradient is not finite") if r.train.learning_rate > 1e-3 else None
    monkeypatch.setattr(sweep_trial, "train", Pretended(fails=wrong))
    found = swept(recipe)
    failed = [trial for trial in found.trials if trial.state == "failed"]
    assert 0 < len(failed) < 8
    assert len(found.trials) == 8
    assert {trial.why for trial in failed} == {"the gradient is not finite"}
    assert f"{8 - len(failed)} finished, {len(failed)} failed" in str(found)
    assert "failed: the gradient is not finite" in write_report(found.output).read_text()
    assert all(trial.changes["train.learning_rate"] <= 1e-3 for trial in found.best)
    full = Pretended(fails=lambda r: CheckpointError("no space left on the disk"))
    monkeypatch.setattr(sweep_trial, "train", full)
    with pytest.raises(CheckpointError, match="no space left"):
        swept(recipe, "output=full")
    for error in (ModelError("there is no such folder"), DataError("no rows")):

        def missing(recipe, error=error):
            raise error

        monkeypatch.setattr(sweep_trial, "train", missing)
        with pytest.raises(type(error)):
            swept(recipe, f"output=missing-{type(error).__name__}")


def test_scores_that_are_undefined_and_values_that_are_wrong_together_are_failures(recipe, pretended, monkeypatch):
    whole = formula
    monkeypatch.setattr("tests.cli.test_sweep.formula", lambda r, s: whole(r, s) | {"here": float("nan")})
    assert {trial.why for trial in swept(recipe, "sweep.trials=2").trials} == {"here is undefined"}
    monkeypatch.setattr("tests.cli.test_sweep.formula", whole)
    recipe["train"] |= {"micro_batch": {"from": [None, 4]}, "token_budget": {"from": [None, 64]}}
    found = swept(recipe, "output=together", "sweep.trials=8")
    both = [
        each
        for each in found.trials
        if None not in (each.changes["train.micro_batch"], each.changes["train.token_budget"])
    ]
    assert both
    assert {each.state for each in both} == {"failed"}
    assert "micro_batch and token_budget are both set" in both[0].why
    assert {each.state for each in found.trials if each not in both} == {"finished"}


def test_a_sweep_of_another_recipe_and_a_folder_of_something_else_are_refused(recipe, pretended, tmp_path):
    swept(recipe, "sweep.trials=2")
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for change in (
        "train.steps=6",
        "train.learning_rate={log: [1e-5, 1e-2]}",
        "sweep.seed=3",
        "sweep.objectives={a: here}",
    ):
        with pytest.raises(
            CheckpointError, match=r"(?s)a sweep of another recipe.*output=FOLDER.*--overwrite"
        ) as error:
            swept(recipe, "sweep.trials=2", change)
        assert change.partition("=")[0] in str(error.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    again = swept(recipe, "sweep.trials=3", "train.steps=6", overwrite=True)
    assert len(again.trials) == 3
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"thesis.tex"):
        swept(recipe, overwrite=True)
    assert (out / "thesis.tex").exists()
    (out / "study/optuna.db").write_bytes(b"no database" * 100)
    with pytest.raises(CheckpointError, match=r"(?s)the study cannot be used.*--overwrite"):
        swept(recipe, "sweep.trials=4", "train.steps=6")
    (out / "study/optuna.db").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)the study of these trials is gone.*--overwrite"):
        swept(recipe, "sweep.trials=4", "train.steps=6")


def test_all_folders_stay_where_that_is_wanted(recipe, pretended, tmp_path):
    swept(recipe, "sweep.keep=all", "sweep.trials=4")
    assert len(list((tmp_path / "out/trials").iterdir())) == 4
    swept(recipe, "sweep.keep=best", "sweep.trials=4")
    assert len(list((tmp_path / "out/trials").iterdir())) == len(list((tmp_path / "out/best").iterdir()))


# Several processes.


def _help(tree, ready):
    real = sweep_trial.train

    def slowly(recipe):
        ready.wait(60)  # so that each has a trial in hand before one is over
        return real(recipe)

    sweep_trial.train = slowly
    run_sweep(read_sweep(tree))


def test_processes_share_one_sweep_and_a_claimed_trial_is_left_alone(recipe, pretended, tmp_path, caplog):
    caplog.set_level("INFO")
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(2)
    recipe["sweep"] |= {"trials": 2, "startup": 2}
    helpers = [context.Process(target=_help, args=(recipe, ready)) for _ in range(2)]
    for helper in helpers:
        helper.start()
    for helper in helpers:
        helper.join(120)
    assert [helper.exitcode for helper in helpers] == [0, 0]
    record = SweepRecord.read(tmp_path / "out")
    assert [trial.number for trial in record.trials] == [0, 1]
    assert len({trial.changes["train.learning_rate"] for trial in record.trials}) == 2
    assert len(list((tmp_path / "out/best").iterdir())) == len(record.front())

    sweep_trial.train.stops.add((2, 0))
    with pytest.raises(KeyboardInterrupt):
        swept(recipe, "sweep.trials=3")
    lock = tmp_path / "out/trials/.0002.embedsmith.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        found = swept(recipe, "sweep.trials=3")
        assert len(found.trials) == 2, "it is another's"
        assert any(line.startswith("trial 2 is left alone") for line in caplog.messages)
        with pytest.raises(CheckpointError, match="in use by"):
            swept(recipe, overwrite=True)
    assert len(swept(recipe, "sweep.trials=3").trials) == 3


# The real thing.


def test_a_real_sweep_from_python_warns_of_a_probe_that_is_trained_on(bert, files, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    recipe = {
        "model": {"path": str(bert), "pooling": "mean"},
        "data": [{"path": str(files / "scored.jsonl"), "task": "sts", "batch_size": 8, "score_range": [0, 1]}],
        "train": {"steps": 2, "precision": "fp32", "log_with": [], "keep_checkpoints": 1},
        "evaluate": {"tasks": [str(files / "scored.jsonl")], "every": 1},
        "output": "runs/sweep",
    }
    ranges = {"train.learning_rate": {"log": [1e-5, 1e-3]}}
    found = embedsmith.sweep(recipe, ranges, trials=1, objectives={"kept": {"forgetting": "scored"}})
    assert "texts are in the training data" in caplog.text
    (only,) = found.trials
    after = json.loads(Path("runs/sweep/trials/0000/evaluation/after.json").read_text())["tasks"][0]["main_score"]
    before = json.loads(Path("runs/sweep/trials/0000/evaluation/before.json").read_text())["tasks"][0]["main_score"]
    assert only.values == {"kept": before - after}
    assert [point.step for point in only.curve] == [1, 2]
    assert only.curve[-1].values == only.values
    assert yaml.safe_load(found.recipes[0].read_text())["output"] == "runs/sweep-trial-0000"


def test_stages_are_swept_too(monkeypatch, quick, recipe, tmp_path):
    """A pipeline: the start is scored, two parts are trained, merged and scored."""
    made = []

    def pretend(tree, where):
        output = Path(tree["output"])
        output.parent.mkdir(parents=True, exist_ok=True)
        made.append((where, tree))
        if "tasks" not in tree:
            output.mkdir()
        else:
            weight = float(Path(tree["model"], "weight").read_text()) if Path(tree["model"]).is_dir() else 0.5
            results({"here": weight, "outside": 0.9 - weight}).save(output)
        if "parents" in tree:
            (output / "weight").write_text(str(tree["parents"][0]["weight"]))
        return output

    for verb in ("train", "merge", "evaluate"):
        monkeypatch.setitem(stages.VERBS, verb, stages.StageKind(pretend, stages.VERBS[verb].suffix))
    monkeypatch.setattr(sweep_trial, "_of_run", lambda output: [])
    part = {"model": {"path": "m"}, "data": [{"path": "pairs.jsonl"}], "train": {"steps": {"range": [1, 9]}}}
    parents = [{"path": "${one}", "weight": {"range": [0.0, 0.9]}}, {"path": "m", "weight": 1.0}]
    tree = {
        "output": str(tmp_path / "out"),
        "stages": [
            {"name": "start", "verb": "evaluate", "recipe": {"model": "m", "tasks": ["here.jsonl", "outside.jsonl"]}},
            {"name": "one", "verb": "train", "recipe": part},
            {"name": "both", "verb": "merge", "recipe": {"base": "m", "parents": parents, "method": "average"}},
            {
                "name": "end",
                "verb": "evaluate",
                "recipe": {"model": "${both}", "tasks": ["here.jsonl", "outside.jsonl"]},
            },
        ],
        "sweep": {"trials": 3, "objectives": {"here": "here", "kept": {"forgetting": ["outside"]}}},
    }
    found = swept(tree)
    key = "stages.2.recipe.parents.0.weight"
    assert list(found.trials[0].changes) == ["stages.1.recipe.train.steps", key]
    for each in found.trials:
        weight = each.changes[key]
        assert each.values == pytest.approx({"here": weight, "kept": 0.4 - (0.9 - weight)})
        assert each.start == pytest.approx({"here": 0.5, "kept": 0.0})
    assert "# Run: embedsmith run" in found.recipes[0].read_text()
    assert (
        load_recipe(found.recipes[0], stages.PipelineRecipe).stages[2].recipe["parents"][0]["weight"]
        == (found.best[0].changes[key])
    )
    count = len(made)
    tree["stages"][2]["recipe"]["parents"][0]["weight"] = {"from": ["heavy", 0.5]}
    with pytest.raises(RecipeError, match=r"(?s)stage both.*weight.*heavy"):
        swept(tree, "output=refused")
    del tree["stages"][0]
    with pytest.raises(RecipeError, match=r"(?s)outside is scored once.*an evaluate stage of the model to start from"):
        swept(tree | {"sweep": tree["sweep"]}, "stages.1.recipe.parents.0.weight=0.5", "output=refused")
    assert len(made) == count


def test_the_shipped_recipe_takes_two_steps(bert, files, tmp_path, typed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = [
        f"model.path={bert}",
        *("model.max_length=16", "model.pooling=mean", "train.steps=2", "train.log_with=[]", "sweep.trials=1"),
        *(f"data.{place}.path={files / name}.jsonl" for place, name in enumerate(("pairs", "scored"))),
        *("data.0.batch_size={from: [4, 8]}", "data.1.batch_size=4", "evaluate.every=1"),
    ]
    out, err, code = typed("sweep", "sweep", *changes)
    assert code == 0, err
    assert "1 trial: 1 finished" in out
    (only,) = json.loads(Path("runs/sweep/sweep.json").read_text())["trials"]
    assert only["values"].keys() == only["start"].keys() == {"retrieval", "similarity"}
    assert Path("runs/sweep/report.html").exists()
    _, err, code = typed("train", SHIPPED)
    assert code == 1
    assert "to fix: embedsmith sweep sweep\n" in err
    assert os.listdir("runs/sweep/best") == ["trial-0000.yaml"]
