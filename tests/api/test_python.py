"""embedsmith from Python: every verb is a function, whatever was imported first; its example runs."""

import doctest
import inspect
import json
import pickle
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import embedsmith
from embedsmith.api.tokenizing import job_of
from embedsmith.core.errors import CheckpointError, EvaluationError, RecipeError

FUNCTIONS = (
    *("application", "compare", "curate", "evaluate", "export", "index", "merge", "mine", "plan", "search", "serve"),
    *("split", "sweep", "tokenize", "train"),
)
OTHERS = ("Recipe", "Source", "distil", "load", "load_reranker")


def verb(name):
    thing = getattr(embedsmith, name)
    return embedsmith._verb(thing.__name__) if inspect.ismodule(thing) else thing


@pytest.mark.parametrize("name", [*FUNCTIONS, *OTHERS])
def test_help_shows_an_example_that_runs(name, workplace):
    thing = getattr(embedsmith, name)
    assert ">>> import embedsmith as es" in pydoc.render_doc(thing)
    assert ">>>" in inspect.getdoc(thing)
    assert list(inspect.signature(thing).parameters) == list(inspect.signature(verb(name)).parameters)
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder(recurse=False).find(verb(name), name):
        runner.run(test)
    assert runner.tries >= 2
    assert runner.failures == 0


def test_rows_are_no_task_and_the_way_out_is_named(workplace):
    with pytest.raises(EvaluationError, match=r"a dict is no task(.|\n)*embedsmith\.split\(rows\)\.test"):
        embedsmith.evaluate("my-model", [{"query": "a", "positive": "b"}])


def test_a_shipped_recipe_of_tokens_and_a_split_that_holds_nothing(workplace):
    assert job_of(["tokenize"], {"out": "here"}, ["data.0.path=mine.jsonl"]).data[0].path == "mine.jsonl"
    (workplace / "tokenize").mkdir()  # what is there goes first
    with pytest.raises(RecipeError, match="--model"):
        job_of(["tokenize"], {"out": "here"}, [])
    with pytest.raises(RecipeError, match="test is 0"):
        embedsmith.split("pairs.jsonl", test=0)


def test_a_room_and_its_verb_are_one_whatever_is_imported_first():
    code = """
import embedsmith.train.loop
import embedsmith.train.loop as loop, embedsmith.search as room
from embedsmith import train
from embedsmith.search import exact_top_k
assert embedsmith.train is train and callable(train) and train.loop is loop, train
assert room is embedsmith.search and callable(room) and room.exact_top_k is exact_top_k
import pickle, types
assert pickle.loads(pickle.dumps(train)) is train and isinstance(train, types.ModuleType)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_function_travels_to_another_process():
    for name in FUNCTIONS:
        thing = getattr(embedsmith, name)
        assert pickle.loads(pickle.dumps(thing)) is thing  # noqa: S301  (our own bytes)


@pytest.mark.slow
def test_the_type_checker_sees_functions(tmp_path):
    (tmp_path / "user.py").write_text(
        "import embedsmith\nimport embedsmith.train.loop\nfrom embedsmith.search import exact_top_k\n"
        "reveal_type(embedsmith.train)\nreveal_type(embedsmith.search)\nreveal_type(exact_top_k)\n"
        "reveal_type(embedsmith.train(model='m', data='d'))\n"
    )
    api = pytest.importorskip("mypy.api")
    shown = api.run(
        ["--no-incremental", "--follow-imports=silent", "--ignore-missing-imports", str(tmp_path / "user.py")]
    )[0]
    lines = [line for line in shown.splitlines() if "Revealed" in line]
    assert len(lines) == 4, shown
    assert all("def (" in line for line in lines[:3]), shown
    assert "Trained" in lines[3], shown


def test_a_run_says_what_it_scored_and_the_same_call_finds_it(workplace, capsys):
    call = dict(model="my-model", data=["pairs.jsonl", {"path": "scored.jsonl"}], steps=2, batch_size=8)
    run = embedsmith.train(**call, evaluate="scored.jsonl")
    assert str(run.output).startswith("runs/my-model-")
    assert set(run.scores) == set(run.scores_before) == {"scored"}
    assert "before" in str(run)
    assert "scored" in repr(run)
    again = embedsmith.train(**call, evaluate="scored.jsonl")
    assert (again.folder, again.scores) == (run.folder, run.scores)
    assert embedsmith.train(**{**call, "steps": 1}).output != run.output


def test_a_recipe_in_a_file_or_a_dict_takes_changes_and_a_whole_one_none(tree, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(tree))
    for given in (str(path), path, tree):
        name = f"out-{type(given).__name__}"
        run = embedsmith.train(given, steps=1, model={"max_length": 8}, output=tmp_path / name)
        assert run.model.max_length == 8
        assert (run.output.name, run.model.settings.pooling) == (name, "mean")
    whole = embedsmith.train.Recipe
    assert whole is embedsmith.Recipe


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: embedsmith.train(model="m", data="d", stepz=3), "did you mean 'steps'"),
        (lambda: embedsmith.train(model={"path": "m", "poling": "mean"}, data="d"), "did you mean 'pooling'"),
        (lambda: embedsmith.train(model="m", data={"path": "d", "tsk": "sts"}), "did you mean 'task'"),
        (lambda: embedsmith.mine(data="d", searchers="bm25", output="o.jsonl", selct={}), "did you mean 'select'"),
        (lambda: embedsmith.merge(parents=["a"], output="o", metod="slerp"), "did you mean 'method'"),
        (lambda: embedsmith.curate(input="a", output="o.jsonl", stepz=[]), "did you mean 'steps'"),
    ],
)
def test_an_unknown_keyword_names_the_nearest_known_one(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=message):
        call()


def test_a_whole_recipe_takes_no_changes(tree):
    from embedsmith.core.recipe import parse

    recipe = parse(embedsmith.Recipe, tree)
    with pytest.raises(RecipeError, match=r"dataclasses\.replace"):
        embedsmith.train(recipe, steps=2)


def test_a_loaded_model_is_evaluated_compared_and_indexed(workplace):
    model = embedsmith.load("my-model")
    first = embedsmith.evaluate(model, ["scored.jsonl"])
    again = embedsmith.evaluate("my-model", embedsmith.evaluate.load_task("scored.jsonl"))
    assert first.main_scores() == again.main_scores()
    assert "scored" in str(first)
    compared = embedsmith.compare({"before": first, "after": model}, "scored.jsonl")
    assert "+0.00" in str(compared)
    with pytest.raises(EvaluationError, match="max_length of a model that is loaded"):
        embedsmith.evaluate(model, "scored.jsonl", max_length=8)
    with pytest.raises(RecipeError, match=r"model\.save\(FOLDER\)"):
        embedsmith.train(model=model, data="pairs.jsonl")
    written = embedsmith.index(model, [{"id": "a", "text": "a cat", "lang": "en"}, {"text": "a dog"}], "my-index")
    assert (written.new, written.size) == (2, 2)
    found = embedsmith.search("a cat", "my-index", model=model, filter={"lang": "en"})
    assert [hit.id for hit in found[0].hits] == ["a"]
    assert "a cat" in str(found[0])


def test_rows_in_memory_are_trained_on_and_other_rows_are_another_run(workplace):
    datasets = pytest.importorskip("datasets")
    rows = [{"query": f"cat {'a' * n}", "pos": [f"dog {'b' * n}"]} for n in range(1, 7)]
    call = dict(model="my-model", steps=1, batch_size=4)
    run = embedsmith.train(**call, data=rows)
    assert str(run) == f"model: {run.folder}"
    for same in ([{"rows": rows}], embedsmith.Source(rows=rows)):
        assert embedsmith.train(**call, data=same).output == run.output
    assert embedsmith.train(**call, data=rows[1:] + rows[:1]).output != run.output
    first, second = (datasets.Dataset.from_list(part) for part in (rows[:5], rows[1:]))
    there = embedsmith.train(**call, data=first, output="runs/dataset")
    assert (there.folder / "config.json").exists()
    with pytest.raises(CheckpointError, match="another recipe"):
        embedsmith.train(**call, data=second, output="runs/dataset")


def test_the_page_of_the_python_api_runs_from_top_to_bottom(workplace, capsys):
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 5
    names = {}
    for block in blocks:
        quick = re.sub(r"steps=\d{2,}", "steps=2", block).replace("128", "32")
        exec(quick, names)  # noqa: S102  (our own page)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("before", "after", "We ship within two days."))
    assert all(f"es.{name}(" in page for name in FUNCTIONS)
