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


def balanced(tree, folder, rows=12, **balance):
    """Two steps of both parts without dropout; 12 rows a step can be shared by 1, 2, 3 and 4 ranks, 20 by 1, 4, 5."""
    data = [
        tree["data"][0] | {"batch_size": rows, "negatives": 2, "loss": "cross_batch_balance"},
        tree["data"][1] | {"batch_size": rows},
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


OWN, SPREAD = {}, {"spread_negatives": True}
SPLIT, SPLIT_2 = {"mode": "split"}, {"mode": "split", "sts_ranks": 2}
LAYOUTS = [
    # what 2 and 3 ranks do is in what 4 and 5 do
    pytest.param(2, 12, {"own": OWN, "spread": SPREAD}, marks=pytest.mark.slow),
    pytest.param(3, 12, {"split 2+1": SPLIT}, marks=pytest.mark.slow),
    (4, 12, {"own": OWN, "spread": SPREAD, "split 3+1": SPLIT, "split 2+2": SPLIT_2}),
    (5, 20, {"own": OWN, "spread": SPREAD, "split 4+1, the paper's figure": SPLIT}),
    (5, 12, {"split 3+2": SPLIT_2}),
]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world", "rows", "layouts"), LAYOUTS, ids=lambda value: value if isinstance(value, int) else ""
)
def test_layouts_of_the_balanced_loss_agree(plain, tmp_path, world, rows, layouts):
    """On 5 ranks two negatives a query are spread so that most ranks hold none."""
    train(parse(Recipe, balanced(plain, tmp_path / "one", rows)))
    expected = weights(tmp_path / "one")
    on_ranks(world, work, tmp_path, [balanced(plain, tmp_path / name, rows, **b) for name, b in layouts.items()])
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
