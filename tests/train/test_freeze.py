"""What is frozen keeps its bits, also over a stop; what is not moves; impossible wishes are refused in clear words."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from embedsmith.core.errors import RecipeError
from embedsmith.core.recipe import parse
from embedsmith.models import load
from embedsmith.train import Recipe, TrainConfig, loop, rehearse, train

PARTS = {
    "embeddings": lambda name: name.startswith("embeddings.") and "LayerNorm" not in name,
    "layers 1": lambda name: "layer.1." in name,
    "layers 0-1": lambda name: "layer." in name,
}


@pytest.mark.parametrize("parts", [["embeddings"], ["layers 1"], ["embeddings", "layers 0-1"]])
def test_frozen_weights_keep_their_bits_and_the_others_move(tree, bert, parts):
    tree["train"] |= {"steps": 3, "freeze": parts[0] if len(parts) == 1 else parts}
    folder = train(parse(Recipe, tree))
    before, after = load_file(Path(bert) / "model.safetensors"), load_file(folder / "model.safetensors")
    frozen = {name for name in after if any(PARTS[part](name) for part in parts)}
    assert {name for name in after if torch.equal(before[name], after[name])} == frozen
    assert frozen


def test_a_frozen_backbone_leaves_its_head_to_train_and_goes_on_after_a_stop(tree, bert, tmp_path, monkeypatch, caplog):
    tree["model"] |= {"head": {"out": 8}}
    tree["train"] |= {"steps": 4, "freeze": "backbone", "checkpoint_every": 2}
    with caplog.at_level(logging.INFO, "embedsmith"):
        whole = train(parse(Recipe, tree | {"output": str(tmp_path / "whole")}))
    count = sum(p.numel() for p in load(str(whole)).projections.parameters())
    assert f"{count:,} of " in caplog.text
    update, seen = loop.update, []

    def dies(run, draw):
        seen.append(run)
        if len(seen) == 4:
            raise RuntimeError("power cut")
        return update(run, draw)

    monkeypatch.setattr(loop, "update", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        train(parse(Recipe, tree))
    monkeypatch.setattr(loop, "update", update)
    folder = train(parse(Recipe, tree))
    before = load_file(Path(bert) / "model.safetensors")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, before[name]), name
    head = "2_Dense/model.safetensors"
    assert torch.equal(load_file(folder / head)["linear.weight"], load_file(whole / head)["linear.weight"])
    first = load_file(Path(tree["output"]) / f"checkpoints/step-2/model/{head}")["linear.weight"]
    assert not torch.equal(load_file(folder / head)["linear.weight"], first)
    assert json.loads((Path(tree["output"]) / "finished.json").read_text())["steps"] == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"freeze": "layers 0-9"}}, "'layers 0-9' of a model with 2 layers\n  expected: layers 0 to 1"),
        ({"train": {"freeze": "layers 1-0"}}, "the lower layer first"),
        ({"train": {"freeze": "layer 1"}}, "expected: backbone, embeddings, or layers such as 'layers 0-5'"),
        ({"train": {"freeze": "backbone"}}, "leaves nothing of the model to train"),
        ({"train": {"freeze": "embeddings"}, "model": {"lora": {"r": 2}}}, "train.freeze with model.lora"),
        ({"train": {"freeze": "embeddings"}, "model": {"new_tokens": ["zzz"]}}, "what new tokens mean would not be"),
    ],
)
def test_what_cannot_be_frozen_is_said(tree, changes, words):
    for key, change in changes.items():
        tree[key] |= change
    with pytest.raises(RecipeError, match=words):
        rehearse(parse(Recipe, tree))


def test_python_callers_are_checked_too():
    assert TrainConfig(freeze="backbone").freeze == ("backbone",)
    with pytest.raises(RecipeError, match="freeze: 'heads'"):
        TrainConfig(freeze=("heads",))
