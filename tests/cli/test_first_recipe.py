"""The numbers of `init --data`: what each follows from."""

import json
from pathlib import Path

import pytest
import yaml

from embedsmith.cli import first_recipe as module
from embedsmith.cli.first_recipe import copy_recipe, first_recipe
from tests.claims import watch_claims


def rows_to(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [str(path)]


@pytest.fixture
def recipe_of(tmp_path, monkeypatch):
    """The recipe for some rows, and its text; with `config`, for a model whose folder says that and nothing else."""
    monkeypatch.chdir(tmp_path)

    def made(rows, config=None):
        model = None
        if config is not None:
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "config.json").write_text(json.dumps(config))
            model = "model"
        path, _ = first_recipe(rows_to(Path("pairs.jsonl"), rows), Path("."), model)
        text = path.read_text(encoding="utf-8")
        return yaml.safe_load(text), text

    return made


def pairs(count, words=3):
    return [{"query": f"question {n}", "pos": [f"answer {n} " + "cat " * words]} for n in range(count)]


@pytest.mark.parametrize(
    ("rows", "trained", "batch", "passes"),
    [(60, 54, 4, 3), (900, 810, 64, 3)],
)
def test_batch_and_steps_follow_from_the_rows(recipe_of, rows, trained, batch, passes):
    tree, text = recipe_of(pairs(rows))
    assert tree["data"][0]["batch_size"] == batch
    assert tree["train"]["steps"] == passes * (trained // batch)
    assert f"{passes} passes over {trained:,} rows" in text


@pytest.mark.parametrize(
    ("config", "words", "length"),
    [
        ({"max_position_embeddings": 512}, 600, 512),
        ({"max_position_embeddings": 514, "model_type": "xlm-roberta"}, 600, 512),
        ({"max_position_embeddings": 514, "model_type": "camembert"}, 600, 512),
        ({"max_position_embeddings": 300}, 300, 300),
        ({}, 600, 512),
        ({"max_position_embeddings": 32768}, 9000, 8192),
        ({"max_position_embeddings": 512}, 90, 128),
    ],
)
def test_the_length_is_that_of_the_texts_within_what_the_model_takes(recipe_of, config, words, length):
    assert recipe_of(pairs(10, words), config)[0]["model"]["max_length"] == length


def test_texts_of_negatives_are_measured_and_four_of_them_are_drawn(recipe_of):
    long = ["dog " * 90 for _ in range(6)]
    tree, text = recipe_of([one | {"neg": [f"{n} {each}" for each in long]} for n, one in enumerate(pairs(10))])
    assert tree["model"]["max_length"] == 128
    assert "negatives: 4  # drawn for each query, of at most 6" in text


@pytest.mark.parametrize(("hidden", "rate"), [(384, 5e-5), (385, 2e-5), (1024, 2e-5), (1025, 1e-5), (None, 2e-5)])
def test_large_models_get_a_low_rate(recipe_of, hidden, rate):
    tree, _ = recipe_of(pairs(10), {} if hidden is None else {"hidden_size": hidden})
    assert tree["train"]["learning_rate"] == rate


def test_a_text_of_many_rows_may_come_twice_in_a_batch(recipe_of):
    tree, text = recipe_of([{"query": f"question {n}", "pos": [f"answer {n % 2}"]} for n in range(60)])
    assert tree["train"]["plan"] == {"duplicates": "allow"}
    assert "is in 30 rows" in text


def test_a_single_row_is_a_batch_of_its_own_and_said_to_be_few(tmp_path):
    path, told = first_recipe(rows_to(tmp_path / "pairs.jsonl", pairs(1)), tmp_path, None)
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert tree["data"][0]["batch_size"] == 1
    assert "plan" not in tree["train"]
    assert "few rows (1)" in told


def test_texts_without_a_letter(recipe_of):
    assert recipe_of([{"query": "?" * (n + 1), "pos": ["!" * (n + 1)]} for n in range(5)])[0]["data"]


@pytest.mark.parametrize("shipped", [True, False])
def test_what_is_written_is_claimed_first(tmp_path, monkeypatch, shipped):
    path = tmp_path / ("joint.yaml" if shipped else "recipe.yaml")
    claims = watch_claims(monkeypatch, module, path, "atomic_file")
    if shipped:
        copy_recipe("joint", tmp_path)
    else:
        first_recipe(rows_to(tmp_path / "pairs.jsonl", pairs(5)), tmp_path, None)
    assert claims == [True]
