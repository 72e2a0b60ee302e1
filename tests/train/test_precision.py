"""16 bits and what is not waited for: weights are cast once a step, fp16 scales its loss as torch's GradScaler does,
and a step reads its device once."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from embedsmith.core import transfer
from embedsmith.core.errors import RecipeError, TrainingError
from embedsmith.core.recipe import parse
from embedsmith.train import Recipe, checkpoint, engine, journal, loop
from embedsmith.train import step as step_module
from embedsmith.train.build import choose_precision, make_accelerator
from embedsmith.train.checkpoint import RunState
from embedsmith.train.config import TrainConfig
from embedsmith.train.engine import check_shard
from embedsmith.train.step import Memory
from tests.ranks import on_ranks
from tests.tinybert import tiny_bert
from tests.train.test_loop import assert_equal_weights, metrics, run, weights
from tests.train.test_loop import on_cpu as train_on_cpu
from tests.train.test_not_finite import poisoned, settings, skipped


@pytest.fixture
def built(tree):
    def build(precision, memory=None):
        recipe = parse(Recipe, tree | {"train": tree["train"] | {"precision": precision}})
        made = loop.build(recipe, make_accelerator(recipe))
        torch.manual_seed(3)
        return made if memory is None else replace(made, memory=memory)

    return build


class Counts(TorchDispatchMode):
    """Casts of a model's weights to 16 bits, and numbers read from tensors, in the block."""

    def __init__(self, model):
        super().__init__()
        self.weights = {p.data_ptr() for p in model.parameters()}
        self.casts, self.reads, self.operations = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, self.operations = kwargs or {}, self.operations + 1
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.weights:
            key = args[0].data_ptr()
            self.casts[key] = self.casts.get(key, 0) + (kwargs.get("dtype") in (torch.bfloat16, torch.float16))
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs)


KEPT, REPLAYED = Memory(40), Memory(40, 80)


@pytest.mark.parametrize(
    ("memory", "most"), [(Memory(10**6), 1), (KEPT, 1), (REPLAYED, 2)], ids=["one", "kept", "replayed"]
)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_are_cast_once_a_step_and_not_once_a_chunk(built, precision, memory, most):
    """Where chunks are replayed once more: a cast without a graph is of no use to those with one."""
    made = built(precision, memory)
    draw = made.feed.draw(0)
    chunks = memory.plan(draw[0].length_N)
    assert (len(chunks) > 3) == (memory.chunk_tokens == 40)
    assert all(chunk.keep for chunk in chunks) == (memory is not REPLAYED)
    with Counts(made.model) as counts:
        loop.update(made, draw)
    assert len(counts.casts) > 5
    assert set(counts.casts.values()) == {most}


@pytest.mark.parametrize("memory", [KEPT, REPLAYED, Memory(40, 1)], ids=["kept", "some", "all"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_one_cast_gives_the_gradient_of_many(built, tree, monkeypatch, memory, checkpointed):
    """To the bits, with dropout: no weight loses its gradient to a cast that was made without a graph."""
    tree["model"]["gradient_checkpointing"] = checkpointed
    states = []
    for one_cast in (loop.Run.one_cast, lambda self: nullcontext()):
        monkeypatch.setattr(loop.Run, "one_cast", one_cast)
        made = built("bf16", memory)
        output = loop.differentiated(made, made.feed.draw(0))
        states.append({name: p.grad for name, p in made.model.named_parameters()} | {"loss": output.value})
    for name, wanted in states[1].items():
        found = states[0][name]
        assert (found is None) == (wanted is None), name
        assert wanted is None or torch.equal(found, wanted), name
    assert sum(gradient is not None for gradient in states[0].values()) > 20


def test_a_step_on_a_device_reads_it_once(built, monkeypatch):
    """The values' check and the norm in one read, and none for the numbers that are logged until they are."""
    made = built("fp32", Memory(10**6))
    made.deferred = True
    real, reads = transfer.read, []
    for module in (engine, journal, step_module):
        monkeypatch.setattr(module, "read", lambda values: reads.append(len(values)) or real(values))
    draws, meter = [made.feed.draw(step) for step in range(3)], journal.Meter()
    loop.update(made, draws[0])
    reads.clear()
    encoded, encode = [], loop.Run.encode

    def counted(self, *given):
        with Counts(self.model) as within:
            reps = encode(self, *given)
        encoded.append(within.reads)
        return reps

    monkeypatch.setattr(loop.Run, "encode", counted)
    with Counts(made.model) as counts:
        for draw in draws[1:]:
            output, rate, norm = loop.update(made, draw)
            meter.add(output)
    assert reads == [4, 4]
    assert counts.reads == sum(encoded), "beside what transformers asks of a padding mask"
    with Counts(made.model) as counts:
        meter.report(rate, norm, type("Bar", (), {"note": print})())
    assert (len(reads), counts.reads) == (3, 0)


@pytest.mark.parametrize("what", ["a representation", "the loss"])
def test_a_value_that_is_not_finite_is_named_before_any_weight_is_changed(built, monkeypatch, what):
    made = built("fp32")
    made.deferred = True
    if what == "the loss":
        real = step_module._health
        monkeypatch.setattr(step_module, "_health", lambda batches, total: real(batches, total * float("inf")))
    else:
        encode = loop.Run.encode
        nan = lambda rep: rep.map(lambda tensor: tensor * float("nan"))
        monkeypatch.setattr(loop.Run, "encode", lambda *given: {h: nan(rep) for h, rep in encode(*given).items()})
    before = [p.detach().clone() for p in made.model.parameters()]
    draw = made.feed.draw(0)
    with pytest.raises(TrainingError, match=rf"step 0, source {draw[1][0].source}.*{what} is not finite"):
        loop.update(made, draw)
    assert all(map(torch.equal, before, made.model.parameters()))


def test_the_loss_scale_follows_torch_s_own(monkeypatch):
    monkeypatch.setattr(checkpoint, "GROWTH_STEPS", 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer, state = torch.optim.SGD([weight], lr=0.0), RunState(loss_scale=2.0**16)
    for norm in [1, 1, 1, 1, float("inf"), 1, 1, float("nan"), float("inf"), 1, 1, 1, 1, 1, 1, 1]:
        scaler.scale(torch.zeros(1))
        weight.grad = torch.tensor([float(norm)])
        scaler.step(optimizer)
        scaler.update()
        state = state.after(float(norm))
        assert (state.loss_scale, state.scaled_steps) == (scaler.get_scale(), scaler._get_growth_tracker())
    assert (state.step, state.overflowed_steps, state.skipped_steps) == (16, 3, 0)


def test_a_gradient_that_no_scale_helps_is_a_fault():
    state = RunState(loss_scale=4.0)
    for _ in range(5):
        state = state.after(float("nan"))
    assert (state.loss_scale, state.overflowed_steps) == (1.0, 2)
    assert (state.skipped_steps, state.skipped_in_a_row) == (3, 3)
    assert state.after(1.0).skipped_in_a_row == 0


def test_fp16_has_the_gradient_of_fp32_whatever_the_scale(built, tree, tmp_path):
    tree["model"]["path"] = str(tiny_bert(tmp_path / "plain", dropout=0.0))
    found, norm = {}, {}
    for precision, scale in (("fp32", None), ("fp16", 1.0), ("fp16", 2.0**12)):
        made = built(precision)
        made.state = replace(made.state, loss_scale=scale)
        norm[scale] = loop.update(made, made.feed.draw(0))[2]
        found[scale] = torch.cat([p.grad.flatten() for p in made.model.parameters() if p.grad is not None])
    for scale in (1.0, 2.0**12):
        assert torch.cosine_similarity(found[None], found[scale], dim=0) > 0.999
        assert norm[scale] == pytest.approx(norm[None], rel=0.02), "before clipping"


def test_a_run_in_fp16_skips_what_overflows_and_goes_on_with_the_same_bits(tree, tmp_path, monkeypatch, caplog):
    """Overflows are counted apart from faults, however many in a row; the scale comes back with the checkpoint. The
    first step overflows by itself, as the first scale is meant to."""
    monkeypatch.setattr(checkpoint, "GROWTH_STEPS", 2)
    tree = settings(tree, precision="fp16", max_skipped_steps=0, checkpoint_every=1)
    with poisoned({2, 3}):
        run(tree, output=str(tmp_path / "whole"))
        with monkeypatch.context() as patch:
            update = loop.update
            patch.setattr(loop, "update", lambda r, p: update(r, p) if r.state.step < 4 else 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(tree)
        run(tree)
    assert_equal_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    steps = [weights(tmp_path / "run/checkpoints" / f"step-{step}") for step in (2, 4, 5)]
    assert_equal_weights(steps[0], steps[1])
    assert not torch.equal(next(iter(steps[1].values())), next(iter(steps[2].values())))
    lines = [metrics(tmp_path / name) for name in ("run", "whole")]
    for key in ("loss_scale", "overflowed_steps"):
        told = [{line["step"]: line[key] for line in each if key in line} for each in lines]
        assert told[0] == told[1]
    assert "not finite" not in caplog.text
    assert told[0] == {1: 1, 3: 2, 4: 3}
    assert skipped(tmp_path / "run") == {}
    assert json.loads((tmp_path / "run/finished.json").read_text())["overflowed_steps"] == 3
    assert json.loads((tmp_path / "run/checkpoints/step-4/state.json").read_text())["loss_scale"] == 2.0**13


def overflowing(tree):
    with poisoned({1}, on_rank=1):
        train_on_cpu(tree)


@pytest.mark.dist
def test_ranks_in_fp16_agree_also_where_one_of_them_overflows(tree, tmp_path):
    tree = settings(tree, precision="fp16", steps=3)
    on_ranks(2, overflowing, tmp_path, tree)
    state = json.loads((tmp_path / "run/checkpoints/step-3/state.json").read_text())
    assert (state["overflowed_steps"], state["loss_scale"]) == (2, 2.0**14), "the first step overflows by itself"


def test_a_card_without_bf16_is_told_of_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "old card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    with pytest.raises(RecipeError, match=r"(?s)old card.*train.precision=fp16"):
        choose_precision(TrainConfig(precision="bf16"))
    assert choose_precision(TrainConfig(precision="fp16")) == "fp16"
    assert choose_precision(TrainConfig()) == "fp32"


@pytest.mark.parametrize(
    "wrong",
    [
        {"shard": "zero2", "precision": "fp16"},
        {"shard": True, "optimizer": "muon"},
        {"shard": "zero2", "optimizer": "adamw8bit"},
    ],
)
def test_what_shards_cannot_do_is_refused_with_a_fix(tree, wrong):
    with pytest.raises(RecipeError, match=r"(?s)train.shard.*set train"):
        check_shard(parse(Recipe, settings(tree, **wrong)))


def test_copies_to_a_card_are_pinned_and_not_waited_for(monkeypatch):
    done = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: done.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **how: done.append((device, how)) or tensor)
    transfer.to_device(torch.zeros(2).numpy(), "cuda")
    assert done == ["pinned", ("cuda", {"non_blocking": True})]
    done.clear()
    transfer.to_device(torch.zeros(2), "cpu")
    assert done == [("cpu", {"non_blocking": True})]
