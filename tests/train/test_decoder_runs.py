"""Runs on a tiny decoder: adapters and softmask, stopped and continued."""

import importlib.util
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from embedsmith.core.errors import MissingExtraError, RecipeError
from embedsmith.core.recipe import parse
from embedsmith.core.tokens import packed_rows
from embedsmith.models import load, lora
from embedsmith.train import Recipe, TrainConfig, loop, train
from embedsmith.train.engine import Fsdp2, check_shard
from tests.models import lm
from tests.models.families import tiny
from tests.models.test_decoders import TEXTS, byte_tokenizer
from tests.ranks import on_ranks


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    tiny("qwen3", vocab_size=280).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model", [{"pooling": "last", "lora": {"r": 4}}, {"pooling": "mean", "attention": "softmask"}])
def test_a_run_that_dies_and_continues_ends_with_the_same_bits(tree, decoder, tmp_path, monkeypatch, model):
    tree = tree | {"model": {"path": str(decoder), "max_length": 48, **model}}
    tree["train"] = tree["train"] | {"steps": 6, "checkpoint_every": 2}
    train(parse(Recipe, tree | {"output": str(tmp_path / "whole")}))
    update, seen = loop.update, []

    def dies(run, parts):
        seen.append(run.model.progress)
        if len(seen) == 5:
            raise RuntimeError("power cut")
        return update(run, parts)

    monkeypatch.setattr(loop, "update", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        train(parse(Recipe, tree))
    monkeypatch.setattr(loop, "update", update)
    folder = train(parse(Recipe, tree))
    for name, tensor in load_file(tmp_path / "whole/model/model.safetensors").items():
        assert (load_file(folder / "model.safetensors")[name] == tensor).all(), name
    assert not (folder / "adapter_config.json").exists()
    checkpoint = Path(tree["output"]) / "checkpoints/step-6/model"
    assert (checkpoint / "adapter_config.json").exists() == ("lora" in model)
    np.testing.assert_allclose(load(str(checkpoint)).encode(TEXTS), load(str(folder)).encode(TEXTS), atol=1e-5)
    if "lora" not in model:
        assert json.loads((folder / "embedding_config.json").read_text())["attention"]["mode"] == "bidirectional"
        assert load(str(folder)).encode(TEXTS).shape == (5, 16)


def test_a_packed_run_equals_the_padded_one(tree, decoder, tmp_path, monkeypatch):
    """With replayed chunks too; and no padding is computed. `auto` is decided when the model is loaded."""
    tree["train"] |= {"steps": 3, "token_budget": 256, "log_with": []}
    monkeypatch.setattr("embedsmith.models.packing._is_fast", lambda backbone: packing == "auto")
    for packing in (False, True, "auto"):
        model = {"path": str(decoder), "max_length": 48, "pooling": "last", "attention": "causal", "packing": packing}
        train(parse(Recipe, tree | {"model": model, "output": str(tmp_path / str(packing))}))
    padded = load_file(tmp_path / "False/model/model.safetensors")
    shares = {}
    for name in ("False", "True", "auto"):
        weights = load_file(tmp_path / name / "model/model.safetensors")
        for key, tensor in padded.items():
            torch.testing.assert_close(weights[key], tensor, rtol=0, atol=2e-5)
        assert metrics(tmp_path / name) == pytest.approx(metrics(tmp_path / "False"), rel=1e-4)
        line = (tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]
        shares[name] = json.loads(line)["padding_share"]
    assert shares["False"] > 0.01
    assert shares["True"] == shares["auto"] == 0


WIDTHS = [4, 8]


def test_a_decoder_learns_its_pairs_at_every_width_and_spread_apart(tree, decoder, tmp_path):
    """64 pairs that have nothing in common but to be pairs; a spread-out term lowers the cosine of strangers."""
    chance = random.Random(0)
    word = lambda: "".join(chance.sample("abcdefghijklmnopqrstuvwxyz", 6))
    pairs = [{"query": word(), "pos": [word()]} for _ in range(64)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    contrast = {"type": "matryoshka", "dims": WIDTHS, "inner": {"type": "infonce", "temperature": 0.05}}
    cosine = {}
    for spread in (0.0, 1.0):
        loss = {"type": "sum", "parts": [contrast, {"type": "uniformity"}], "weights": [1.0, spread]}
        source = {"path": str(tmp_path / "pairs.jsonl"), "batch_size": 64, "loss": loss}
        settings = tree["train"] | {"steps": 80, "learning_rate": 1e-2, "checkpoint_every": 80, "log_with": []}
        model = {"path": str(decoder), "max_length": 16, "pooling": "mean", "attention": "bidirectional"}
        run = {"model": model, "data": [source], "train": settings, "output": str(tmp_path / str(spread))}
        tuned = load(str(train(parse(Recipe, run))))
        query_ND = torch.from_numpy(tuned.encode([row["query"] for row in pairs]))
        document_ND = torch.from_numpy(tuned.encode([row["pos"][0] for row in pairs]))
        for width in (*WIDTHS, query_ND.shape[1]):
            query_NW, document_NW = (F.normalize(side[:, :width], dim=-1) for side in (query_ND, document_ND))
            assert ((query_NW @ document_NW.T).argmax(1) == torch.arange(64)).all(), (spread, width)
        cosine[spread] = float((document_ND @ document_ND.T)[~torch.eye(64, dtype=torch.bool)].mean())
    assert cosine[1.0] < cosine[0.0] - 0.005, f"{cosine}; 64 vectors cannot have less than -1/63"


def test_packed_rows_fill_their_budget():
    length_N = np.array([5, 1, 9, 3, 3, 30, 2])
    chunks = packed_rows(length_N, 12)
    assert [chunk.tolist() for chunk in chunks] == [[5], [2], [0, 3, 4], [6, 1]]
    assert [len(chunk) for chunk in packed_rows(length_N, 100, max_rows=3)] == [3, 3, 1]


@pytest.mark.parametrize(("flag", "engine"), [("DEEPSPEED", "DeepSpeed"), ("FSDP", "FSDP")])
def test_a_launch_for_an_engine_that_would_do_nothing_is_refused(tree, monkeypatch, flag, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{flag}", "true")
    with pytest.raises(RecipeError, match=f"launched for {engine} of accelerate") as caught:
        train(parse(Recipe, tree))
    assert "train.shard=true" in str(caught.value)
    assert not Path(tree["output"]).exists()


LORA = {"pooling": "mean", "attention": "bidirectional", "lora": {"r": 4, "dropout": 0.0}}


def metrics(run):
    """Losses, and norms before clipping: Adam hides a wrong norm from the weights."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = lambda key: key.startswith("loss/") or key == "gradient_norm"
    return [value for line in lines for key, value in sorted(line.items()) if wanted(key)]


@pytest.mark.parametrize(
    ("key", "changes", "message"),
    [
        ("evaluate", {"tasks": ["x"]}, "scores under train.shard"),
        ("train", {"mining": {}}, "train.mining under train.shard"),
        ("model", {"heads": ["mntp"]}, "the head mntp under train.shard"),
        ("train", {}, "train.shard needs several processes"),
    ],
)
def test_what_shards_cannot_do_is_refused(tree, key, changes, message):
    tree["train"] |= {"shard": True}
    tree[key] = tree.get(key, {}) | changes
    with pytest.raises(RecipeError, match=message):
        check_shard(parse(Recipe, tree))


@pytest.mark.parametrize(("heads", "sparse", "said"), [("retromae", None, "retromae"), ("sparse", "splade", "splade")])
def test_a_head_that_lies_in_the_folder_is_refused_too(tmp_path, heads, sparse, said):
    folder = lm.folder(tmp_path / "lm")
    load(str(folder), pooling="cls", heads=(heads,), new_heads=True, sparse=sparse, device="cpu").save(
        tmp_path / "saved"
    )
    with pytest.raises(RecipeError, match=f"the head {said} under train.shard"):
        Fsdp2(load(str(tmp_path / "saved"), device="cpu"), nn.ModuleDict(), TrainConfig())


def sharded(tree):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    train(parse(Recipe, tree))


def test_zero_needs_its_extra_and_several_processes(tree, monkeypatch):
    tree["train"] |= {"shard": "zero2"}
    if importlib.util.find_spec("deepspeed") is None:
        with pytest.raises(MissingExtraError, match="deepspeed"):
            train(parse(Recipe, tree))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(RecipeError, match=r"train\.shard=zero2 needs several processes"):
        check_shard(parse(Recipe, tree))


@pytest.mark.dist
@pytest.mark.parametrize("engine", [True, "zero2"])
@pytest.mark.parametrize(
    "model", [{"pooling": "last"}, pytest.param(LORA | {"head": {"out": 8}}, marks=pytest.mark.slow)]
)
def test_shards_on_two_ranks_equal_one_process(tree, decoder, tmp_path, model, engine):
    """The same losses and weights as one process, with replayed chunks and with a resumed run; with everything in
    shards, and with a head that is whole."""
    if engine == "zero2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip('needs DeepSpeed: pip install "embedsmith[deepspeed]"')
    tree = tree | {"model": {"path": str(decoder), "max_length": 48, **model}}
    tree["train"] = tree["train"] | {"steps": 4, "checkpoint_every": 2, "token_budget": 256, "log_with": []}
    train(parse(Recipe, tree | {"output": str(tmp_path / "one")}))
    tree["train"] = tree["train"] | {"shard": engine}
    two = tree | {"output": str(tmp_path / "two")}
    on_ranks(2, sharded, tmp_path, two)
    one, several = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two"))
    assert one.keys() == several.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(several[name], tensor, rtol=0, atol=2e-5)
    assert metrics(tmp_path / "one") == pytest.approx(metrics(tmp_path / "two"), rel=1e-4)
    start = load_file(decoder / "model.safetensors")
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 1e-3
    for path in (tmp_path / "two/model", tmp_path / "two/checkpoints/step-4"):
        shutil.rmtree(path)
    (tmp_path / "two/finished.json").unlink()
    on_ranks(2, sharded, tmp_path, two)
    for name, tensor in load_file(tmp_path / "two/model/model.safetensors").items():
        torch.testing.assert_close(tensor, one[name], rtol=0, atol=2e-5)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "together"), [(2, None), (4, None), (4, 2)])
def test_shards_of_packed_rows_with_layers_computed_again_equal_one_process(tree, decoder, tmp_path, ranks, together):
    """As a decoder of 7B weights is trained: FSDP2, on one axis or two, activation checkpointing, packed sequences."""
    model = {"path": str(decoder), "max_length": 48, "pooling": "last", "attention": "causal"}
    tree["train"] = tree["train"] | {"steps": 4, "checkpoint_every": 2, "token_budget": 256, "log_with": []}
    train(parse(Recipe, tree | {"model": model, "output": str(tmp_path / "one")}))
    tree = tree | {"model": model | {"packing": True, "gradient_checkpointing": True}}
    tree["train"] = tree["train"] | {"shard": True, "shard_ranks": together}
    several = tree | {"output": str(tmp_path / "several")}
    held = on_ranks(ranks, held_in_shards, tmp_path, several)
    assert len(set(held)) == 1
    assert held[0] == pytest.approx(1 / (together or ranks), abs=0.05)
    one = load_file(tmp_path / "one/model/model.safetensors")
    for _ in range(2):
        for name, tensor in load_file(tmp_path / "several/model/model.safetensors").items():
            torch.testing.assert_close(tensor, one[name], rtol=0, atol=2e-5)
        assert metrics(tmp_path / "one") == pytest.approx(metrics(tmp_path / "several"), rel=1e-4)
        for path in (tmp_path / "several/model", tmp_path / "several/checkpoints/step-4"):
            shutil.rmtree(path)
        (tmp_path / "several/finished.json").unlink()
        on_ranks(ranks, sharded, tmp_path, several)


def held_in_shards(tree):
    """What a rank holds of the weights of the backbone, as a share."""
    held = []
    made = Fsdp2.__init__

    def counting(self, *given):
        made(self, *given)
        weights = list(self.model.backbone.parameters())
        held.append(sum(w.to_local().numel() for w in weights) / sum(w.numel() for w in weights))

    Fsdp2.__init__ = counting
    sharded(tree)
    return round(held[0], 3)


def test_ranks_that_make_no_whole_copies_are_refused(tree, monkeypatch):
    with pytest.raises(RecipeError, match=r"train\.shard_ranks without train\.shard=true"):
        parse(Recipe, tree | {"train": tree["train"] | {"shard_ranks": 2}})
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("embedsmith.train.engine.world_size", lambda: 4)
    with pytest.raises(RecipeError, match=r"train\.shard_ranks=3 of 4 ranks"):
        check_shard(parse(Recipe, tree | {"train": tree["train"] | {"shard": True, "shard_ranks": 3}}))


def test_an_adapter_that_16_bits_cannot_hold_is_no_lost_run(tree, decoder, tmp_path, monkeypatch, caplog):
    """What will be written is said at the start; at the end the adapter lies beside its base, and loads."""
    monkeypatch.setattr(lora, "SAME", 1.1)
    tree = tree | {
        "model": {"path": str(decoder), "max_length": 48, "dtype": "bfloat16", "lora": {"r": 4}, "pooling": "last"}
    }
    tree["train"] = tree["train"] | {"steps": 2, "log_with": []}
    with caplog.at_level("INFO"):
        folder = train(parse(Recipe, tree))
    assert "the adapter alone, to be loaded with its base" in caplog.text
    assert f"{folder} holds the adapter alone, beside its base {decoder}" in caplog.text
    assert (folder / "adapter_config.json").is_file()
    assert (tmp_path / "run" / "finished.json").is_file()
    assert train(parse(Recipe, tree)) == folder, "the same command says that it is finished"
    left = load(str(folder), dtype="bfloat16").encode(["a text"])
    step = tmp_path / "run" / "checkpoints" / "step-2" / "model"
    assert (left == load(str(step), dtype="bfloat16").encode(["a text"])).all()
