"""`init`: recipes for the data that is shown, copies of shipped ones, and shipped ones found by name."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from embedsmith.cli import app
from embedsmith.cli.verbs.starting import start_recipe
from embedsmith.core.errors import CheckpointError, RecipeError
from embedsmith.core.shelf import verbs
from embedsmith.core.shipped import names_recipe, recipe_file, shipped_recipes

ROWS = {
    "pairs.csv": ["question,answer", *(f"the cat {n},a dog number {n}" for n in range(60))],
    "问答.jsonl": [
        json.dumps({"anchor": f"第{n}个问题是什么", "positive": f"这是第{n}个回答" * 9, "negative": f"别的{n}"})
        for n in range(60)
    ],
    "scored.jsonl": [json.dumps({"sentence1": f"猫 {n}", "sentence2": f"狗 {n}", "score": n % 6}) for n in range(40)],
    "labels.jsonl": [json.dumps({"text": f"the cat {n}", "label": "ab"[n % 2]}) for n in range(60)],
    "few.jsonl": [json.dumps({"query": f"the cat {n}", "pos": ["a dog"]}) for n in range(5)],
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with a file of every kind."""
    monkeypatch.chdir(tmp_path)
    for name, lines in ROWS.items():
        Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("data", "model", "task", "length", "batch"),
    [
        (["pairs.csv"], "sentence-transformers/all-MiniLM-L6-v2", "retrieval", 32, 4),
        (["问答.jsonl", "scored.jsonl"], "BAAI/bge-small-zh-v1.5", "retrieval", 128, 4),
        (["labels.jsonl"], "sentence-transformers/all-MiniLM-L6-v2", "classification", 32, 4),
        (["few.jsonl"], "sentence-transformers/all-MiniLM-L6-v2", "retrieval", 32, 4),
    ],
)
def test_what_is_written_follows_from_the_data_and_rehearses(here, typed, bert, data, model, task, length, batch):
    flags = [part for name in data for part in ("--data", name)]
    out, err, code = typed("init", *flags)
    assert code == 0, err
    text = Path("recipe.yaml").read_text(encoding="utf-8")
    tree = yaml.safe_load(text)
    assert (tree["model"]["path"], tree["model"]["max_length"]) == (model, length)
    assert (tree["data"][0]["task"], tree["data"][0]["batch_size"]) == (task, batch)
    held = [] if data == ["few.jsonl"] else [f"{name.partition('.')[0]}-split" for name in data]
    assert [Path(name).parent.name for name in tree.get("evaluate", {}).get("tasks", [])] == held
    assert all(" # " in line for line in text.splitlines() if re.match(r" .*: [^\[]*\d", line))
    assert f"{len(ROWS[data[0]]) - data[0].endswith('csv')} rows, {task}" in out
    assert "next: embedsmith train recipe.yaml" in out
    _, err, code = typed(
        "train", "recipe.yaml", "--dry-run", f"model.path={bert}", "model.max_length=16", "model.pooling=mean"
    )
    assert code == 0, err
    assert "are in the training data" not in err


def test_a_model_on_this_disk_is_asked_for_its_tokens_and_pooling(here, typed, bert):
    _, err, code = typed("init", "first", "--data", "pairs.csv", "--model", bert)
    assert code == 0, err
    text = Path("first/recipe.yaml").read_text(encoding="utf-8")
    assert "pooling: mean  # the folder does not say" in text
    assert "counted with its tokenizer" in text
    _, err, code = typed("train", "first/recipe.yaml", "--dry-run")
    assert code == 0, err


def test_nothing_is_replaced_unless_told(here):
    Path("recipe.yaml").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="was not made by this verb"):
            start_recipe(data=["pairs.csv"], overwrite=overwrite)
    assert (Path("recipe.yaml").read_text(), Path("pairs-split").exists()) == ("mine", False)
    start_recipe(["joint"])
    with pytest.raises(CheckpointError, match=r"joint\.yaml: there is a recipe already"):
        start_recipe(["joint", "."])
    start_recipe(["joint", "."], overwrite=True)
    copied = Path("joint.yaml").read_text(encoding="utf-8").partition("\n")[2]
    assert copied == shipped_recipes()["joint"].path.read_text(encoding="utf-8")
    Path("recipe.yaml").unlink()
    start_recipe(data=["pairs.csv"])
    with pytest.raises(CheckpointError, match=r"recipe\.yaml: there is a recipe already"):
        start_recipe(data=["pairs.csv"])
    start_recipe(data=["pairs.csv"], overwrite=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"places": ["jont"]}, "did you mean 'joint'"),
        ({"places": ["joint", "a", "b"]}, "3 names"),
        ({"places": ["joint"], "model": "x"}, "--model belongs to --data"),
        ({"places": ["a", "b"], "data": ["pairs.csv"]}, "2 folders: a, b"),
    ],
)
def test_wrong_words(here, arguments, message):
    with pytest.raises(RecipeError, match=message):
        start_recipe(**arguments)


def test_shipped_recipes_are_found_by_name_and_a_file_wins(here, typed):
    names = shipped_recipes()
    assert {"joint", "mine", "merge-ties", "curate-clean", "decoder/full", "accelerate/ddp"} <= names.keys()
    assert all(one.summary for one in names.values() if one.verb != "accelerate launch")
    for verb, name, found in [
        ("train", "joint", "joint"),
        ("train", "recipes/joint", "joint"),
        ("merge", "ties", "merge-ties"),
        ("merge", "merge", "merge"),
        ("curate", "clean", "curate-clean"),
        ("mine", "mine", "mine"),
        ("run", "m3", "m3"),
        ("train", "decoder/full", "decoder/full"),
    ]:
        assert recipe_file(name, verb) == names[found].path
        assert names[found].verb == verb
    for verb, name in [("train", "mixture"), ("curate", "curate-clean"), ("curate", "clean"), ("tokenize", "tokenize")]:
        assert names_recipe(name, verb), "where data may stand too"
    assert not names_recipe("clean", "mine")
    with pytest.raises(RecipeError, match="this looks like a recipe of train"):
        names_recipe("mixture", "mine")
    Path("joint").write_text("a: 1")
    assert not names_recipe("joint", "train")
    assert recipe_file("joint", "train") == Path("joint")
    with pytest.raises(RecipeError, match=r"^tie: cannot read the file.*did you mean 'ties'"):
        recipe_file("tie", "merge")
    for missing in ("joint.yaml", "recipes/joint.yml"):
        with pytest.raises(RecipeError, match=r"No such file(.|\n)*embedsmith train joint takes the recipe that ships"):
            recipe_file(missing, "train")
    for words, told in [
        (("list",), "best-of-both"),
        (("list", "loss"), "infonce"),
        (("list", "loss", "cosent"), "temperature"),
        (("list", "recipe"), "decoder/full"),
        (("list", "recipe", "joint"), "cosent"),
        (("init",), "joint"),
    ]:
        assert told in typed(*words)[0]
    for words in [
        ("train", "streaming"),
        ("mine", "mine"),
        ("curate", "clean"),
        ("run", "conan-weak"),
        ("inspect", "mixture"),
    ]:
        _, err, code = typed(*words)
        assert code == 1
        assert "data/" in err or "jsonl" in err or "hub id" in err  # it is read: what it names is not here


def examples():
    group = typer.main.get_command(app)
    return {name: (command, command.epilog or "") for name, command in group.commands.items()}


@pytest.mark.parametrize("name", [entry.name for entry in verbs.entries(plugins=False)])
def test_every_verb_shows_one_full_command_that_parses(name, typed):
    command, epilog = examples()[name]
    words = shlex.split(epilog.partition("Example:\n")[2])
    assert words[:2] == ["embedsmith", name]
    assert words[2:]
    command.make_context(name, words[2:])
    out, _, code = typed(name, "-h")
    assert (code, " ".join(words[:2]) in out) == (0, True)


def test_version_and_completion(typed):
    from embedsmith import __version__

    assert typed("--version")[0].strip() == f"embedsmith {__version__}"
    assert "--install-completion" in typed("-h")[0]
