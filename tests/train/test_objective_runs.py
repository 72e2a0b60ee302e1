"""What the newer objectives need of a run: a memory that survives a stop, guides, batches by class, counted lengths."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from embedsmith.core.errors import RecipeError
from embedsmith.core.recipe import parse
from embedsmith.data import PlanConfig, Record, RecordSet
from embedsmith.losses import InfoNCE
from embedsmith.models import load
from embedsmith.train import Recipe, loop, train
from embedsmith.train.feed import Supply, plan_of


def run(tree):
    return train(parse(Recipe, tree))


def pairs(tree, **source):
    train_ = tree["train"] | {"steps": 6, "log_with": []}
    return tree | {"data": [tree["data"][0] | source], "train": train_}


def test_a_memory_survives_a_stop_bit_for_bit(tree, tmp_path, monkeypatch):
    tree = pairs(tree, loss={"type": "infonce", "memory": 12, "temperature": 0.1})
    whole = run(tree | {"output": str(tmp_path / "whole")})
    update = loop.update

    def dies(run_, draw):
        if run_.state.step == 4:
            raise KeyboardInterrupt
        return update(run_, draw)

    monkeypatch.setattr(loop, "update", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tree)
    kept = torch.load(tmp_path / "run" / "checkpoints" / "step-4" / "training.pt", weights_only=True)["extras"]
    assert (kept["memory.id_X"] >= 0).all()
    monkeypatch.setattr(loop, "update", update)
    again = run(tree)
    without = run(pairs(tree, loss={"type": "infonce", "temperature": 0.1}) | {"output": str(tmp_path / "without")})
    weights = [load_file(folder / "model.safetensors") for folder in (whole, again, without)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_guides_that_are_missing_or_read_by_nobody_are_refused(tree, bert):
    with pytest.raises(RecipeError, match=r"reads a guide(?s:.*)as guide: FOLDER"):
        run(pairs(tree, loss="gist_embed"))
    with pytest.raises(RecipeError, match="reads no guide"):
        run(pairs(tree, guide=str(bert)))
    with pytest.raises(RecipeError, match="reads a teacher"):
        run(pairs(tree, loss="teacher_vectors"))


def test_rows_of_a_class_meet(tree, tmp_path):
    file = tmp_path / "labels.jsonl"
    rows = [{"text": f"the cat {'abcdefgh'[n % 8]} {'uvwxyz'[n // 8]}", "label": f"class {n % 8}"} for n in range(48)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(file), "batch_size": 12, "per_class": 4, "loss": "supervised_contrastive"}
    settings = tree["train"] | {"steps": 2, "log_with": []}
    run(tree | {"data": [source], "train": settings})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss/labels"] > 0 for line in lines)


def test_length_groups_go_by_counted_tokens(bert):
    model = load(str(bert), pooling="mean", prompts={"query": "the cat "}, device="cpu")
    texts = ["zyx" * n for n in range(1, 9)] + ["the big old dog " * n for n in range(1, 9)]
    records = [
        Record(text, (text[::-1],), (f"{text} far",), instruction="by a tree " if n == 3 else None)
        for n, text in enumerate(texts)
    ]
    supply = Supply(RecordSet("pairs", "retrieval", records, "0"), InfoNCE(), 4, 1.0, 1, 1)
    plan = plan_of([supply], 1, PlanConfig(lengths="auto"), max_length=32, model=model)
    expected = [
        max(
            len(model.tokenize([record.query], "query", "retrieval", [record.instruction]).id_S),
            *(len(model.tokenize([other], "document").id_S) for other in (*record.positives, *record.negatives)),
        )
        for record in records
    ]
    assert plan.sources[0].facts.length_N.tolist() == expected
    assert (
        plan_of([supply], 1, PlanConfig(lengths="auto"), max_length=32).sources[0].facts.length_N.tolist() != expected
    )
    assert np.all(plan.at(0).length <= 32)
