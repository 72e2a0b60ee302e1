"""Runs whose steps go task by task: rules, the start that holds the model, conflicts that are measured, probes."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml

import embedsmith as es
from embedsmith.core.errors import CheckpointError, RecipeError
from embedsmith.core.recipe import parse
from embedsmith.train import Recipe, loop, train
from embedsmith.train.by_task import ConflictMeter, GroupedWeights
from embedsmith.train.config import ConflictConfig
from embedsmith.train.step import run_step
from tests.ranks import on_ranks
from tests.tinybert import WORDS, tiny_bert
from tests.train.test_loop import assert_equal_weights, metrics, run, weights

RULES = {
    "fixed": {"type": "fixed", "weights": {"sts": 0.5}},
    "pcgrad": "pcgrad",
    "uncertainty": {"type": "uncertainty", "rate": 0.1},
    "gradnorm": {"type": "gradnorm", "by": "source"},
}
SLOW, OTHERS = pytest.mark.slow, ("fixed", "pcgrad", "uncertainty")


def changed(tree, **train):
    return tree | {"train": tree["train"] | {"steps": 4, "log_with": []} | train}


@pytest.fixture
def still(tree, tmp_path):
    """Without dropout: ranks and layouts draw their own."""
    return tree | {"model": {"path": str(tiny_bert(tmp_path / "still", dropout=0.0)), "pooling": "mean"}}


@pytest.fixture
def texts(files, tmp_path):
    lines = [json.loads(line)["query"] for line in (files / "pairs.jsonl").read_text().splitlines()]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return {"path": str(path), "format": "texts", "batch_size": 8}


def assert_close_weights(left, right, atol=2e-5):
    for name, tensor in left.items():
        if name.endswith("key.bias"):  # its gradient is 0 but for rounding, which Adam makes as large as any other
            continue
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=atol, msg=name)


def test_equal_weights_give_the_gradient_of_the_sum_of_the_losses(still, monkeypatch):
    """A step of two tasks, part by part, against one backward pass through both losses."""
    seen = {}

    def both(run_, draw):
        run_.engine.optimizer.zero_grad()
        run_step(run_.encode, *draw, run_.memory)
        seen["whole"] = [None if p.grad is None else p.grad.clone() for p in run_.by_task.weights.parameters]
        run_.engine.optimizer.zero_grad()
        made = update(run_, draw)
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in seen["whole"] if g is not None]))
        assert made[2] == pytest.approx(float(norm), rel=1e-4)
        for parameter, wanted in zip(run_.by_task.weights.parameters, seen["whole"], strict=True):
            if wanted is not None:
                torch.testing.assert_close(parameter.grad, wanted / max(norm, 1.0), rtol=1e-3, atol=1e-5)
        assert {part.task for part in draw[1]} == {"retrieval", "sts"}
        return made

    update = loop.update
    monkeypatch.setattr(loop, "update", both)
    run(changed(still, balance="fixed", steps=2))
    assert seen


@pytest.mark.parametrize("name", ["gradnorm", *(pytest.param(name, marks=SLOW) for name in OTHERS)])
def test_a_rule_that_is_stopped_goes_on_to_the_same_bits(tree, tmp_path, monkeypatch, name):
    """Dropout is on, and what the rule remembers lies in the checkpoint of step 2."""
    tree = changed(tree, balance=RULES[name], anchor={"l2_sp": 0.1}, conflict={"every": 1, "share": 1.0})
    run(tree, output=str(tmp_path / "whole"))
    update = loop.update

    def dying(run_, draw):
        if run_.state.step == 3:
            raise KeyboardInterrupt
        return update(run_, draw)

    monkeypatch.setattr(loop, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tree)
    monkeypatch.setattr(loop, "update", update)
    run(tree)
    assert_equal_weights(weights(tree["output"]), weights(tmp_path / "whole"))
    timed = {"tokens_per_second": 0, "wait": 0, "conflict_time": 0}
    ours, theirs = ([line | timed for line in metrics(folder)] for folder in (tree["output"], tmp_path / "whole"))
    assert ours == theirs
    told = {key for line in ours for key in line}
    assert {"weight/pairs", "weight/scored", "loss/l2_sp"} <= told
    a, b = ("pairs", "scored") if name == "gradnorm" else ("retrieval", "sts")
    assert {f"cosine/{a}~{b}", f"cosine/{a}~{b}/layers 0-1", f"cosine/{a}~{b}/embeddings"} <= told | {
        key.replace("layer 0", "layers 0-1") for key in told
    }
    weight = [line["weight/scored"] for line in ours if "weight/scored" in line]
    assert weight[0] == {"fixed": 0.5}.get(name, pytest.approx(weight[0]))
    if name in ("uncertainty", "gradnorm"):
        assert len(set(weight)) == 4, "it learns at every step, and from a checkpoint too"


def work(trees):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    for tree in trees:
        train(parse(Recipe, tree))


@pytest.mark.dist
@pytest.mark.parametrize("names", [["gradnorm"], pytest.param(OTHERS, marks=SLOW)])
def test_two_processes_equal_one(still, texts, tmp_path, names):
    """Rules, beside both that holds the model to its start; neither; and with weights in shards."""
    held = {"l2_sp": 0.5, "texts": texts}
    trees = {name: changed(still, balance=RULES[name], steps=3, anchor=held) for name in names}
    if names == ["gradnorm"]:
        trees["alone"] = changed(still, steps=3, anchor=held, conflict={"every": 2, "share": 1.0})
        trees["shards"] = changed(still, balance="pcgrad", steps=3, anchor={"l2_sp": 0.5}, shard=True)
    together = [tree | {"output": str(tmp_path / "two" / name)} for name, tree in trees.items()]
    on_ranks(2, work, tmp_path, together)
    for name, tree in trees.items():
        alone = tree | {"output": str(tmp_path / "one" / name), "train": tree["train"] | {"shard": False}}
        train(parse(Recipe, alone))
        assert_close_weights(weights(tmp_path / "two" / name), weights(tmp_path / "one" / name))
        for ours, theirs in zip(metrics(tmp_path / "two" / name), metrics(tmp_path / "one" / name), strict=True):
            for key in theirs:
                if key.startswith(("loss/", "weight/", "cosine/")):
                    assert ours[key] == pytest.approx(theirs[key], abs=2e-4), (name, key)


def test_both_anchors_keep_the_model_nearer_to_its_start(still, texts, tmp_path):
    start = es.load(still["model"]["path"], pooling="mean")
    words = [json.loads(line)["text"] for line in Path(texts["path"]).read_text().splitlines()]

    def moved(name, **train):
        folder = run(changed(still, steps=8, learning_rate=3e-3, **train), output=str(tmp_path / name))
        after = es.load(str(folder))
        apart = 1 - (start.encode(words) * after.encode(words)).sum(1).mean()
        began = dict(start.named_parameters())
        return float(apart), sum(float((p - began[n]).detach().square().sum()) for n, p in after.named_parameters())

    free, l2_sp = moved("free"), moved("l2_sp", anchor={"l2_sp": 3.0})
    vectors = moved("vectors", anchor={"texts": texts, "weight": 20.0, "loss": "teacher_vectors"})
    assert l2_sp[1] < 0.7 * free[1]
    assert vectors[0] < 0.7 * free[0]


def test_conflict_is_measured_and_changes_nothing(tree, tmp_path):
    """Steps of one source: gradients of neighbouring steps are compared. The weights are those of a run without."""
    run(changed(tree, steps=12), output=str(tmp_path / "plain"))
    run(changed(tree, steps=12, conflict={"every": 4, "share": 1.0}))
    assert_equal_weights(weights(tree["output"]), weights(tmp_path / "plain"))
    found = [line for line in metrics(tree["output"]) if "cosine/pairs~scored" in line]
    assert found
    for line in found:
        assert -1 <= line["cosine/pairs~scored"] <= 1
        assert 0 <= line["conflict_share/pairs~scored"] <= 1
        assert 0 < line["conflict_time"] < 1


def meter(**config):
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    made = GroupedWeights(parameters, {"low": [0], "high": [1]})
    return ConflictMeter(ConflictConfig(**{"every": 3, "share": 1.0} | config), made, ["a", "b"])


def test_cosines_are_those_of_whole_gradients_and_of_each_group():
    a, b = [torch.tensor([1.0, 2, 2]), torch.tensor([3.0, 0])], [torch.tensor([2.0, -1, 2]), torch.tensor([-1.0, 5])]
    made = meter()
    made.of_one(0, "a", a)
    for each in a:
        each.zero_()  # the next step's gradients come into the same memory
    assert made.taken() == {}
    made.of_one(1, "b", b)
    values = made.taken()
    norms = (9 + 9) ** 0.5 * (9 + 26) ** 0.5
    assert values["cosine/a~b"] == pytest.approx((4 - 3) / norms)
    assert values["cosine/a~b/low"] == pytest.approx(4 / 9)
    assert values["cosine/a~b/high"] == pytest.approx(-3 / (3 * 26**0.5))
    assert values["conflict_share/a~b"] == 0.5
    made.of_one(2, "b", b)
    assert made.taken() == {}, "the measurement is over"
    made.of_one(3, "b", b)
    made.of_one(4, "b", [-each for each in b])
    assert made.taken()["cosine/b~b"] == pytest.approx(-1)


def test_a_weight_that_no_task_reaches_keeps_no_gradient_and_those_behind_it_get_theirs():
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    made = GroupedWeights(parameters, {"all": [0, 1]})
    made.give([2.0, 1.0], [[None, torch.tensor([1.0, 2.0])], [None, torch.tensor([-1.0, 5.0])]])
    assert parameters[0].grad is None
    assert parameters[1].grad.tolist() == [1.0, 9.0]


def test_measuring_keeps_to_its_share_of_the_time():
    made = meter(share=0.01)
    made.seconds, made.began = 5.0, made.began - 100  # 5 % of the time so far
    gradient = [torch.ones(3), torch.ones(2)]
    made.of_one(0, "a", gradient)
    made.of_one(1, "b", gradient)
    assert made.taken() == {}
    made.began -= 1000
    made.of_one(3, "a", gradient)
    made.of_one(4, "b", gradient)
    assert made.taken()["cosine/a~b"] == pytest.approx(1)


@pytest.fixture
def probe(tmp_path):
    """Pairs that are in no training file."""
    path = tmp_path / "probe.jsonl"
    words = [" ".join(WORDS[n : n + 3]) for n in range(11)]
    rows = [{"text1": words[n], "text2": words[n + 1], "score": n / 9} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_forgetting_is_told_on_probes_also_after_a_stop(tree, probe, monkeypatch):
    tree = changed(tree) | {"evaluate": {"tasks": [probe], "probes": [probe], "every": 2}}
    update = loop.update

    def dying(run_, draw):
        if run_.state.step == 3:
            raise KeyboardInterrupt
        return update(run_, draw)

    monkeypatch.setattr(loop, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tree)
    monkeypatch.setattr(loop, "update", update)
    run(tree)
    scores = {line["step"]: line["score/probe"] for line in metrics(tree["output"]) if "score/probe" in line}
    told = {line["step"]: line["forgetting/probe"] for line in metrics(tree["output"]) if "forgetting/probe" in line}
    assert told == {step: pytest.approx(scores[0] - scores[step]) for step in (2, 4)}


def test_a_probe_that_is_trained_on_is_refused(tree, files):
    path = str(files / "scored.jsonl")
    with pytest.raises(RecipeError, match="probe") as caught:
        run(changed(tree) | {"evaluate": {"tasks": [path], "probes": [path]}})
    assert "scored" in str(caught.value)
    assert "split" in str(caught.value)


def test_another_model_in_the_place_of_the_start_is_refused(still, tmp_path, monkeypatch):
    tree = changed(still, anchor={"l2_sp": 0.1})
    update = loop.update

    def dying(run_, draw):
        if run_.state.step == 3:
            raise KeyboardInterrupt
        return update(run_, draw)

    monkeypatch.setattr(loop, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tree)
    tiny_bert(tmp_path / "still", seed=1)
    monkeypatch.setattr(loop, "update", update)
    with pytest.raises(CheckpointError, match="the run began with"):
        run(tree)


REFUSED = {
    "one task": (lambda tree: tree["data"].pop(), {"balance": "pcgrad"}, "needs two tasks or more.*retrieval"),
    "one source": (lambda tree: tree["data"].pop(), {"conflict": {}}, "compares sources, and here is one: pairs"),
    "sources of one task": (
        lambda tree: tree["data"].__setitem__(1, tree["data"][0] | {"name": "more"}),
        {"balance": "gradnorm"},
        "set train.balance.by=source",
    ),
    "a name": (lambda tree: None, {"balance": {"type": "fixed", "weights": {"st": 1}}}, "did you mean 'sts'"),
    "zero2": (lambda tree: None, {"balance": "pcgrad", "shard": "zero2"}, "train.balance under train.shard=zero2"),
    "split": (
        lambda tree: None,
        {"balance": {"mode": "split"}, "conflict": {}},
        "no rank has the gradients of both tasks",
    ),
    "nothing": (lambda tree: None, {"anchor": {}}, "holds nothing"),
    "a loss without teacher": (
        lambda tree: None,
        {"anchor": {"texts": {"path": "pairs.jsonl"}, "loss": "infonce"}},
        "does not learn from the vectors of a teacher",
    ),
    "adapters": (lambda tree: tree["model"].__setitem__("lora", {}), {"anchor": {"l2_sp": 1}}, "under adapters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_with_a_fix(tree, files, name):
    change, settings, words = REFUSED[name]
    change(tree)
    if "texts" in (anchor := settings.get("anchor", {})):
        anchor["texts"]["path"] = str(files / "pairs.jsonl")
    with pytest.raises(RecipeError, match=f"(?s){words}") as caught:
        run(changed(tree, **settings))
    assert "to fix: " in str(caught.value) or "expected" in str(caught.value)
    assert yaml.safe_dump(settings)
