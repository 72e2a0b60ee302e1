"""Conan's balance: the layouts of one step over ranks give the same loss and the same weights."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from embedsmith.core.errors import RecipeError
from embedsmith.core.recipe import parse
from embedsmith.train import Recipe, train
from tests.ranks import on_ranks
from tests.tinybert import tiny_bert


def balanced(tree, folder, **balance):
    """Two steps of both parts without dropout; 12 queries a step, so that 1, 2 and 3 ranks can share them."""
    data = [
        tree["data"][0] | {"batch_size": 12, "negatives": 2, "loss": "cross_batch_balance"},
        tree["data"][1] | {"batch_size": 12},
    ]
    settings = tree["train"] | {"steps": 2, "log_with": [], "balance": balance}
    return tree | {"data": data, "train": settings, "output": str(folder)}


def weights(folder):
    return load_file(Path(folder) / "model" / "model.safetensors")


def work(trees):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    for tree in trees:
        train(parse(Recipe, tree))


@pytest.fixture
def plain(tree, tmp_path):
    return tree | {"model": {"path": str(tiny_bert(tmp_path / "plain", dropout=0.0)), "pooling": "mean"}}


@pytest.mark.dist
def test_layouts_of_the_balanced_loss_agree(plain, tmp_path):
    train(parse(Recipe, balanced(plain, tmp_path / "one")))
    expected = weights(tmp_path / "one")
    for world, layouts in ((2, {"own": {}, "spread": {"spread_negatives": True}}), (3, {"split": {"mode": "split"}})):
        trees = [balanced(plain, tmp_path / name, **balance) for name, balance in layouts.items()]
        on_ranks(world, work, tmp_path, trees)
        for name in layouts:
            for key, tensor in weights(tmp_path / name).items():
                torch.testing.assert_close(tensor, expected[key], rtol=0, atol=2e-5, msg=f"{name}: {key}")
    start = load_file(tmp_path / "plain" / "model.safetensors")
    assert max(float((start[key] - expected[key]).abs().max()) for key in start) > 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [({"data": 1}, "retrieval source and a source of scored pairs"), ({"mode": "split"}, "at least one rank each")],
)
def test_what_cannot_be_balanced_is_refused(tree, tmp_path, change, words):
    balance = {"mode": change["mode"]} if "mode" in change else {}
    wrong = balanced(tree, tmp_path / "run", **balance)
    if "data" in change:
        wrong["data"] = wrong["data"][:1]
    with pytest.raises(RecipeError, match=words):
        train(parse(Recipe, wrong))
