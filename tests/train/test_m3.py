"""Training three heads: stops and resumes, what is logged, BGE-M3's folders, SPLADE and pre-training in the step."""

import json
import logging

import pytest
import torch

from embedsmith.core.batch import Side
from embedsmith.core.recipe import parse
from embedsmith.core.reps import Sparse
from embedsmith.losses import Flops, InfoNCE, Sum
from embedsmith.models import load
from embedsmith.train import Recipe, loop, train
from embedsmith.train.journal import Meter
from embedsmith.train.step import Memory, run_step, sparse_activity
from tests.models import lm
from tests.tinybert import WORDS
from tests.train.tiny import assert_same, gradients, retrieval_part

HEADS = ["dense", "sparse", "multivector"]


def run(tree, **changes):
    return train(parse(Recipe, tree | changes))


def beir(folder):
    """Five documents and five questions."""
    (folder / "qrels").mkdir(parents=True)
    rows = [(f"{number}", f"the {word} cat sat by the {word} tree") for number, word in enumerate(WORDS[10:15])]
    lines = [json.dumps({"_id": number, "text": text}) + "\n" for number, text in rows]
    (folder / "corpus.jsonl").write_text("".join(lines))
    asked = [json.dumps({"_id": number, "text": text.split()[1]}) + "\n" for number, text in rows]
    (folder / "queries.jsonl").write_text("".join(asked))
    judged = "".join(f"{number}\t{number}\t1\n" for number, _ in rows)
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    return folder


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def m3(tree, files):
    """Three heads, distillation from step 3 on, with a ramp, Matryoshka on the dense one, small chunks."""
    loss = {"type": "m3_self_distillation", "temperature": 0.1, "start_step": 3, "ramp_steps": 4}
    tree["model"] |= {"heads": HEADS, "multivector_dim": 8}
    whole = {"type": "matryoshka", "dims": [8], "inner": loss}
    tree["data"] = [{"path": str(files / "pairs.jsonl"), "batch_size": 8, "negatives": 1, "loss": whole}]
    tree["train"] |= {"steps": 8, "token_budget": 64, "log_with": []}
    return tree


@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_stop_before_or_in_the_distillation_changes_nothing(m3, tmp_path, monkeypatch, stop_at):
    run(m3, output=str(tmp_path / "whole"))
    update = loop.update

    def dying(run_, parts):
        if run_.state.step == stop_at:
            raise KeyboardInterrupt
        return update(run_, parts)

    monkeypatch.setattr(loop, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        run(m3)
    monkeypatch.setattr(loop, "update", update)
    run(m3)
    one, other = (load(str(tmp_path / name / "model"), device="cpu").state_dict() for name in ("whole", "run"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [line["loss/pairs"] for line in metrics(tmp_path / "run")] == [
        line["loss/pairs"] for line in metrics(tmp_path / "whole")
    ]


def test_each_head_is_logged_and_scored(m3, tmp_path):
    folder = beir(tmp_path / "beir")
    run(m3, evaluate={"tasks": [str(folder)], "heads": ["sparse", "multivector", "hybrid"], "every": 4})
    lines = metrics(tmp_path / "run")
    steps = [line for line in lines if "loss/pairs" in line]
    wanted = [*HEADS, "ensemble", "distilled", "sparse_active", "sparse_empty", "sparse_zero"]
    assert all(f"{name}/pairs" in line for line in steps for name in wanted)
    scored = [line for line in lines if "score/beir" in line]
    assert [line["step"] for line in scored] == [0, 4, 8]
    assert all(f"score/beir/{head}" in line for line in scored for head in ("sparse", "multivector", "hybrid"))


def test_the_activity_of_a_sparse_head():
    weight_NT = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 2.0]])
    sides = [Side({"sparse": Sparse(torch.arange(6).view(2, 3), weight_NT)}) for _ in range(2)]
    assert {name: float(value) for name, value in sparse_activity(sides).items()} == pytest.approx(
        {"sparse_active": 1.0, "sparse_empty": 0.5, "sparse_zero": 4 / 6}
    )
    none = [Side({"sparse": Sparse(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3))})]
    assert float(sparse_activity(none)["sparse_zero"]) == 1


def test_a_dead_sparse_head_is_told_once(m3, caplog):
    watcher = Meter()
    with caplog.at_level(logging.WARNING, "embedsmith"):
        for value in (0.4, 0.9, 1.0):
            watcher.warn_of_empty_vectors({"sparse_empty/pairs": value, "loss/pairs": 1.0})
    assert caplog.text.count("pairs: 90% of the texts have an empty sparse vector") == 1
    assert "100%" not in caplog.text


def test_a_dead_head_in_a_run_is_told(m3, bert, tmp_path, caplog):
    model = load(str(bert), pooling="mean", heads=("sparse",), new_heads=True, device="cpu")
    model.token_heads["sparse"].linear.bias.data.fill_(-100.0)
    model.save(tmp_path / "dead")
    m3["model"] = {"path": str(tmp_path / "dead")}
    m3["data"][0]["loss"] = {"type": "per_head", "inner": "infonce", "weights": {"dense": 1.0, "sparse": 0.1}}
    with caplog.at_level(logging.WARNING, "embedsmith"):
        run(m3)
    assert caplog.text.count("100% of the texts have an empty sparse vector") == 1


def test_a_bge_m3_folder_is_loaded_trained_and_written(m3, tmp_path):
    """XLM-R in the root, both heads' files in half precision, as the published model's."""
    folder = lm.folder(tmp_path / "m3", "xlm-roberta")
    sparse, colbert = torch.nn.Linear(16, 1).half(), torch.nn.Linear(16, 16).half()
    torch.save(sparse.state_dict(), folder / "sparse_linear.pt")
    torch.save(colbert.state_dict(), folder / "colbert_linear.pt")
    m3["model"] = {"path": str(folder), "pooling": "cls", "max_length": 32}
    saved = run(m3)
    assert {path.name for path in saved.glob("*.pt")} == {"sparse_linear.pt", "colbert_linear.pt"}
    for name, linear in (("sparse_linear.pt", sparse), ("colbert_linear.pt", colbert)):
        state = torch.load(saved / name, weights_only=True)
        assert {key: value.shape for key, value in state.items()} == {
            key: value.shape for key, value in linear.state_dict().items()
        }
        assert not torch.allclose(state["weight"], linear.weight.float(), atol=1e-6), "it was trained"
    reps = load(str(saved), device="cpu").represent(["the cat", ""], role="query", outputs=HEADS)
    assert set(reps) == set(HEADS)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_splade_replayed_equals_kept(tmp_path, kind):
    """Through the step, with the regulariser, in chunks that are all replayed but one."""
    found = []
    for kept in (None, 1):
        folder = lm.folder(tmp_path / f"{kept}", kind)
        pooling = "last" if kind == "llama" else "cls"
        heads = {"heads": ("sparse",), "sparse": "splade", "sparse_terms": 9}
        model = load(str(folder), pooling=pooling, device="cpu", **heads)
        loss = Sum((InfoNCE(0.5, "sparse"), Flops(0.1, 0.1)))

        def encode(tokens, heads, rows, model=model):
            return model(tokens.pad(model.pad_id, rows=rows), heads)

        run_step(encode, *retrieval_part(loss), Memory(24, kept))
        found.append(gradients(model))
    assert_same(*found, atol=1e-4)
