"""M3's three stages from one recipe: stopped in any of them, the same command goes on and ends with the same bits."""

import json
from pathlib import Path

import pytest
import torch

from embedsmith.cli.stages import PipelineRecipe, run
from embedsmith.core.recipe import load_recipe
from embedsmith.models import load
from embedsmith.train import loop
from tests.models import lm
from tests.tinybert import WORDS

RECIPE = Path(__file__).parent.parent.parent / "recipes" / "m3.yaml"
STAGES = ("pretrain", "weak", "unified")


def recipe(tmp_path, name):
    rows = [
        {"query": f"{a} {b}", "pos": [f"the {a} {b} {a}"], "neg": [f"{b} tree"]}
        for a in WORDS[2:8]
        for b in WORDS[8:12]
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    quick = [
        "train.steps=4",
        "train.epochs=null",
        "train.log_with=[]",
        "train.precision=fp32",
        "train.checkpoint_every=1",
    ]
    changes = [f"stages.{place}.recipe.{change}" for place in range(3) for change in quick]
    changes += [f"stages.{place}.recipe.data.0.path={pairs}" for place in range(3)]
    changes += [f"stages.{place}.recipe.train.batch_size=8" for place in (0, 1)]
    changes += ["stages.0.recipe.model.positions=64", "stages.2.recipe.data.0.batch_size=8"]
    changes += [f"stages.0.recipe.model.path={lm.folder(tmp_path / 'lm')}", f"output={tmp_path / name}"]
    return load_recipe(RECIPE, PipelineRecipe, changes)


def weights(folder):
    return load(str(folder), device="cpu").state_dict()


@pytest.mark.parametrize("stage", range(3))
def test_stopped_anywhere_it_goes_on_and_ends_the_same(tmp_path, monkeypatch, stage):
    whole = run(recipe(tmp_path, "whole"))
    update, calls = loop.update, []

    def dying(run_, parts):
        calls.append(run_.state.step)
        if len(calls) == 4 * stage + 3:
            raise KeyboardInterrupt
        return update(run_, parts)

    monkeypatch.setattr(loop, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(tmp_path, "stopped"))
    assert sorted(json.loads((tmp_path / "stopped" / "pipeline.json").read_text() if stage else "{}")) == sorted(
        STAGES[:stage]
    )
    again = run(recipe(tmp_path, "stopped"))
    assert len(calls) == 13, "no step is taken twice but the one that failed"
    for name in STAGES:
        one, other = weights(whole[name]), weights(again[name])
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_what_the_stages_make(tmp_path):
    made = run(recipe(tmp_path, "run"))
    models = {name: load(str(folder), device="cpu") for name, folder in made.items()}
    assert models["pretrain"].outputs == ("dense", "middle", "retromae")
    assert models["weak"].outputs == ("dense", "middle")
    assert models["unified"].outputs == ("dense", "middle", "sparse", "multivector")
    assert {model.max_length for model in models.values()} == {64}
    lines = [json.loads(line) for line in (tmp_path / "run" / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    assert {"masked/pairs", "decoded/pairs"} <= set(lines[-1])
    assert any(not torch.equal(*pair) for pair in zip(*(m.backbone.parameters() for m in list(models.values())[:2])))
