"""Names of other tools are named in the error with what to use here; a recipe of another verb is recognised."""

import json
import re

import pytest
import yaml

from embedsmith.core.aliases import _KEYS, _THINGS, name_here
from embedsmith.core.errors import RecipeError
from embedsmith.core.recipe import parse
from embedsmith.core.shelf import SHELVES
from embedsmith.curate import CurateRecipe
from embedsmith.merge import MergeRecipe
from embedsmith.mining import MineRecipe
from embedsmith.models import ModelConfig
from embedsmith.train import EvaluateConfig, Recipe, TrainConfig

TRAIN = {"model": {"path": "m"}, "data": [{"path": "d"}], "output": "o"}
MERGE = {"parents": ["a"], "output": "o", "method": "slerp"}


@pytest.mark.parametrize("kind", _THINGS)
def test_what_an_alias_names_is_on_the_shelf_and_the_alias_is_not(kind):
    shelf = next(shelf for shelf in SHELVES if shelf.kind == kind)
    for alias, text in _THINGS[kind].items():
        assert alias not in shelf.names()
        if text.startswith("model."):
            assert text.split(",")[0].removeprefix("model.") in ModelConfig.__dataclass_fields__
            continue
        named = re.findall(r"type: (\w+)", text) or [text]
        assert [shelf.get(name) for name in named]
        if text.startswith("{"):
            shelf.build(yaml.safe_load(text.split(";")[0]))


def test_what_an_alias_of_a_key_names_is_a_key():
    sections = {"train": TrainConfig, "evaluate": EvaluateConfig, "model": ModelConfig}
    known = {f"{name}.{key}" for name, section in sections.items() for key in section.__dataclass_fields__}
    known |= {*Recipe.__dataclass_fields__, *MergeRecipe.__dataclass_fields__, "negatives", "temperature", "dims"}
    for alias, text in _KEYS.items():
        assert re.match(r"[\w.]+", text)[0] in known, alias


@pytest.mark.parametrize("name", ["mnrl", "MultipleNegativesRankingLoss", "multiple_negatives_ranking", "InfoNCELoss"])
def test_spelling_does_not_matter(name):
    found = name_here("loss", name)
    assert found is None if name == "InfoNCELoss" else found == "type: infonce"


@pytest.mark.parametrize(
    ("schema", "tree", "message"),
    [
        (Recipe, {"data": [{"path": "d", "loss": "CoSENTLoss"}]}, r"data\.0\.loss: unknown loss.*use type: cosent"),
        (Recipe, {"data": [{"path": "d", "loss": {"type": "infonce", "temprature": 1}}]}, "mean 'temperature'"),
        (
            Recipe,
            {"data": [{"path": "d", "loss": {"type": "sum", "parts": [{"type": "matryoshka", "dimz": [1]}]}}]},
            r"data\.0\.loss\.parts\.0\.dimz: unknown key \(did you mean 'dims'",
        ),
        (Recipe, {"data": [{"path": "d", "loss": {"typ": "infonce"}}]}, "write type: infonce in the place of typ"),
        (Recipe, {"train": {"num_train_epochs": 3}}, r"it is train\.epochs here"),
        (Recipe, {"steps": 3}, r"it belongs in train: train\.steps"),
        (Recipe, {"batches": "mixed"}, r"it belongs in train\.plan: train\.plan\.batches"),
        (Recipe, {"model": {"path": "m", "pooling": "avg"}}, r"model\.pooling: unknown pooling 'avg'.*use mean"),
        (MergeRecipe, {"method": {"type": "ties", "densty": 1}}, r"method\.densty: unknown key .*'density'"),
        (MergeRecipe, {"method": "dare_ties"}, r"use \{type: dare, then: ties\}"),
        (MergeRecipe, {"parents": [{"path": "a", "wieght": 1}]}, r"parents\.0\.wieght: unknown key .*'weight'"),
        (
            CurateRecipe,
            {"input": {"path": "a"}, "output": "o.jsonl", "steps": [{"type": "length", "query_mn": 3}]},
            r"steps\.0\.query_mn: unknown key .*'query_min'",
        ),
        (
            MineRecipe,
            {"data": {"path": "a"}, "output": "o.jsonl", "searchers": [{"type": "embedding", "modl": "x"}]},
            r"searchers\.0\.modl: unknown key .*'model'",
        ),
    ],
)
def test_a_wrong_name_anywhere_in_a_recipe_is_told_with_the_right_one(schema, tree, message):
    base = {Recipe: TRAIN, MergeRecipe: MERGE}.get(schema, {})
    with pytest.raises(RecipeError, match=f"(?s){message}") as raised:
        parse(schema, base | tree)
    assert "ParentSpec" not in str(raised.value)
    assert "string" not in str(raised.value)


RECIPES = {
    "train": TRAIN,
    "merge": MERGE,
    "mine": {"data": {"path": "d"}, "output": "o.jsonl", "searchers": ["bm25"]},
    "curate": {"input": {"path": "d"}, "output": "o.jsonl", "steps": []},
    "tokenize": {"model": {"path": "m"}, "data": [{"path": "d"}], "out": "o"},
    "run": {"output": "o", "stages": []},
}


@pytest.mark.parametrize("verb", ["train", "merge", "mine", "curate", "run", "tokenize", "inspect"])
def test_a_recipe_of_another_verb_is_recognised(verb, typed, tmp_path):
    for other, tree in RECIPES.items():
        path = tmp_path / f"{other}.yaml"
        path.write_text(json.dumps(tree))
        if other != ("train" if verb == "inspect" else verb):
            out, err, code = typed(verb, path)
            assert (out, code) == ("", 1)
            assert f"this looks like a recipe of {other}\n  to fix: embedsmith {other} {path}\n" in err


def test_the_name_of_a_recipe_of_another_verb_is_recognised(typed):
    for verb, name, other in (("mine", "joint", "train"), ("curate", "joint", "train"), ("train", "merge", "merge")):
        _, err, code = typed(verb, name)
        assert code == 1
        assert f"this looks like a recipe of {other}\n  to fix: embedsmith {other} {name}\n" in err
