"""What a report proposes: each rule answers to its figures, and each command can be typed as it stands."""

import json
import math
import shlex
from dataclasses import replace

import numpy as np
import pytest
import yaml

from embedsmith.core.recipe import parse
from embedsmith.evaluate import Results, TaskResult
from embedsmith.evaluate.compare import Difference, Interval
from embedsmith.report.next_steps import RULES, Evidence, next_steps
from embedsmith.report.run_folder import folder_page
from embedsmith.train import Recipe, train

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PAIRS = {"path": "pairs.jsonl", "task": "retrieval", "batch_size": 64, "loss": {"type": "infonce", "temperature": 0.05}}
QUIET = Evidence("runs/a", {"model": {"path": MODEL}, "data": [PAIRS], "evaluate": {"tasks": ["t"]}}, (), True)


def curve(key, *values):
    return tuple({"step": 10 * (place + 1), key: value} for place, value in enumerate(values))


def change(value, low, high):
    return Difference("cranfield", "ndcg_at_10", Interval(value, low, high), 0.01, 50)


def with_data(**settings):
    return {**QUIET.recipe, "data": [{**PAIRS, **settings}]}


def found(right, other):
    items = {"similarity_relevant": np.array(right), "similarity_other": np.array(other)}
    return Results((TaskResult("faq", "retrieval", "m", {"m": 0.5}, items=items),))


FORGETS = replace(QUIET, changes=(change(-0.02, -0.03, -0.01),))
CASES = {
    "stopped": (replace(QUIET, finished=False), "Finish it", "train runs/a/recipe.yaml"),
    "not scored": (
        replace(QUIET, recipe={"model": {"path": MODEL}, "data": [PAIRS]}),
        "Score it",
        "--tasks pairs.jsonl",
    ),
    "forgets": (FORGETS, "Go half of the way", "scale: 0.5"),
    "learns by heart": (
        replace(QUIET, lines=curve("validation_loss/p", 2.0, 1.0, 1.1, 1.3)),
        "Stop earlier",
        "train.steps=20",
    ),
    "best before the end": (replace(QUIET, lines=curve("score/t", 0.5, 0.7, 0.6)), "Keep the best", "final=best"),
    "cut": (
        replace(QUIET, cut={"p": {"texts": 10, "cut": 2, "longest": 900, "max_length": 128}}),
        "Read more of each text",
        "model.max_length=256",
    ),
    "easy": (replace(QUIET, lines=curve("loss/p", 0.1, 0.1, 0.1)), "harder negatives", "data.0.negatives=4"),
    "confused": (
        replace(QUIET, after=found([0.5, 0.6, 0.7], [0.55, 0.2, 0.1])),
        "lower temperature",
        "data.0.loss.temperature=0.025",
    ),
    "still falls": (replace(QUIET, lines=curve("loss/p", 4.0, 3.5, 3.0, 2.5)), "Train longer", "train.steps=80"),
    "chance": (replace(QUIET, changes=(change(0.01, -0.01, 0.03),)), "move further", "learning_rate=4e-05"),
    "small batch": (replace(QUIET, recipe=with_data(batch_size=8)), "larger batches", "data.0.batch_size=32"),
}


@pytest.mark.parametrize(("evidence", "what", "command"), CASES.values(), ids=CASES)
def test_a_figure_brings_its_step_to_the_top(evidence, what, command):
    first = next_steps(evidence)[0]
    assert what.lower() in first.what.lower()
    assert command in first.command
    assert all(what.lower() not in step.what.lower() for step in next_steps(QUIET)), "and only where it is so"


def test_there_are_always_three_and_none_without_a_recipe():
    for evidence, _, _ in (*CASES.values(), (QUIET, "", "")):
        assert len({step.command for step in next_steps(evidence)}) == (3 if evidence.finished else 1)
    assert next_steps(replace(QUIET, recipe={})) == []


def test_of_several_figures_the_gravest_comes_first():
    lines = curve("loss/p", 0.4, 0.3, 0.2, 0.1)
    asked = [step.what for step in next_steps(replace(FORGETS, lines=lines))]
    assert asked[0].startswith("Go half")
    assert "harder" in asked[1]
    assert asked[2] == "Train longer"


@pytest.fixture(scope="module")
def run(files, bert, tmp_path_factory):
    """A tiny run with tasks and validation, and one that has no similarity to learn."""
    folder = tmp_path_factory.mktemp("runs")
    pairs = {"path": str(files / "pairs.jsonl"), "task": "retrieval", "batch_size": 8, "negatives": 1}
    tree = {
        "model": {"path": str(bert), "pooling": "mean", "max_length": 6},
        "data": [{**pairs, "loss": {"type": "infonce", "temperature": 0.05}}],
        "train": {"steps": 4, "learning_rate": 1e-3, "checkpoint_every": 1, "log_every": 1, "precision": "fp32"},
        "evaluate": {"tasks": [str(files / "scored.jsonl")], "every": 2},
        "output": str(folder / "run"),
    }
    train(parse(Recipe, tree))
    return folder / "run"


def test_every_command_of_every_rule_can_be_typed(run, typed):
    """On a real run, with figures that make each rule speak; trainings and merges are rehearsed."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    lines = curve("loss/pairs", 0.04, 0.03, 0.02, 0.01) + curve("score/t", 0.5, 0.9, 0.5)
    lines += curve("validation_loss/pairs", 2.0, 1.0, 1.5)
    worse, unsure = change(-0.1, -0.2, -0.05), change(0.01, -0.1, 0.1)
    cut = json.loads((run / "cut.json").read_text())
    base = Evidence(str(run), recipe, lines, True, (worse,), found([0.5], [0.6]), cut)
    unscored = {**recipe, "evaluate": {}}
    others = (
        replace(base, changes=(), recipe=unscored),
        replace(base, changes=(unsure,)),
        replace(base, lines=curve("loss/pairs", 4.0, 3.0, 2.0, 1.0)),
    )
    steps = {rule.__name__: step for each in (base, *others) for rule in RULES if (step := rule(each))}
    assert set(steps) == {rule.__name__ for rule in RULES}
    steps["_finish"] = next_steps(replace(base, finished=False))[0]
    for name, step in steps.items():
        program, *words = shlex.split(step.command)
        assert program == "embedsmith"
        rehearsal = ["--dry-run"] if words[0] in ("train", "merge") and name != "_finish" else []
        _, err, code = typed(*words, *rehearsal)
        assert code in (0, None), f"{step.command}\n{err}"


def test_the_page_says_what_changed_what_to_try_and_nothing_that_is_not_set(run):
    text = folder_page(run)
    assert "<h2>What to try next</h2>" in text
    assert "<h2>What changed</h2>" in text
    assert text.count('class="command"') == 3
    shown = text.split("<h2>Recipe</h2>")[1].split("</section>")[0]
    assert "learning_rate: 0.001" in shown
    assert "null" not in shown
    assert "{}" not in shown
    assert math.isfinite(text.index("item by item"))


def test_rows_that_a_program_held_are_trained_on_by_its_own_call():
    """No file has them: a command that names the recipe could not read them."""
    held = replace(QUIET, recipe=with_data(rows="40 rows (0a1b2c3d) in memory", batch_size=8))
    commands = {step.what: step.command for step in next_steps(held)}
    changed = "micro_batch=None, token_budget=4096, output='runs/a-larger-batches', data={0: {'batch_size': 32}}"
    assert commands["Take larger batches"] == f"es.train(..., {changed})"
    (finish,) = next_steps(replace(held, finished=False))
    assert finish.command == "es.train(...)"
    unscored = replace(held, recipe={**held.recipe, "evaluate": {}})
    assert all("Score it" not in step.what for step in next_steps(unscored))
