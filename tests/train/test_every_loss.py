"""Every registered loss trains a model from a recipe."""

import json

import pytest

from embedsmith.core.recipe import parse
from embedsmith.core.shelf import losses
from embedsmith.train import Recipe, train

ALL_HEADS = ["dense", "sparse", "multivector"]
PAIRS = {"angle", "codiemb_sts", "cosent", "mid_nce", "pearson", "pro", "rank_kl"}
LABELS = {"classifier", "supervised_contrastive"}
ARGUMENTS = {
    "classifier": {"classes": 3},
    "mid_nce": {"threshold": 0.5},
    "matryoshka": {"inner": "infonce", "dims": [4, 16]},
    "sum": {"parts": ["infonce", "uniformity"]},
    "weighted": {"inner": "infonce", "weight": 0.5},
    "symmetric": {"inner": "infonce"},
    "per_head": {"inner": "infonce", "weights": {"dense": 1.0, "sparse": 0.3}},
}
NEEDS = {
    "flops": {"heads": ["sparse"]},
    "retromae": {"heads": ["retromae"], "max_length": 32},
    "mntp": {"heads": ["mntp"], "max_length": 32},
    "tsdae": {"heads": ["tsdae"], "max_length": 32},
    "m3_self_distillation": {"heads": ALL_HEADS},
    "per_head": {"heads": ["dense", "sparse"]},
}


@pytest.fixture(scope="session")
def rows(tmp_path_factory, files):
    """pairs with teacher scores, scored pairs, and labelled texts."""
    folder = tmp_path_factory.mktemp("rows")
    pairs = [json.loads(line) for line in (files / "pairs.jsonl").read_text().splitlines()]
    labelled = [{"text": row["query"], "label": f"class {number % 3}"} for number, row in enumerate(pairs)]
    taught = [row | {"pos_scores": [0.9], "neg_scores": [0.2, 0.4]} for row in pairs]
    for name, some in (("pairs", taught), ("labelled", labelled)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return {"pairs": folder / "pairs.jsonl", "labels": folder / "labelled.jsonl", "scored": files / "scored.jsonl"}


@pytest.mark.parametrize("name", [entry.name for entry in losses.entries()])
def test_a_loss_trains_from_a_recipe(name, bert, rows, tmp_path):
    kind = "scored" if name in PAIRS else "labels" if name in LABELS else "pairs"
    loss = {"type": name, **ARGUMENTS.get(name, {})}
    source = {"path": str(rows[kind]), "batch_size": 8, "loss": loss}
    if kind == "scored":
        source |= {"task": "sts", "score_range": [0, 1]}
    if other := {"teacher_vectors": "teacher", "teacher_neighbours": "teacher", "gist_embed": "guide"}.get(name):
        source |= {other: str(bert_with_pooling(bert, tmp_path))}
    tree = {
        "model": {"path": str(bert), "pooling": "mean", **NEEDS.get(name, {})},
        "data": [source],
        "train": {"steps": 2, "log_every": 1, "log_with": [], "precision": "fp32"},
        "output": str(tmp_path / "run"),
    }
    train(parse(Recipe, tree))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(line["gradient_norm"] > 0 for line in lines)


def bert_with_pooling(bert, tmp_path):
    import embedsmith

    embedsmith.load(str(bert), pooling="mean").save(tmp_path / "teacher")
    return tmp_path / "teacher"
