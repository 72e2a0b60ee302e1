"""Gradients, losses and weights that are not finite: steps are skipped and counted, nothing broken is written, and the
error says where to go back to."""

import math
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from embedsmith.core.collectives import rank, world_size
from embedsmith.core.errors import ModelError, TrainingError
from embedsmith.losses import CoSENT
from embedsmith.train import loop
from embedsmith.train.step import run_step
from tests.ranks import on_ranks
from tests.tinybert import tiny_bert
from tests.train.test_loop import assert_equal_weights, metrics, run, weights
from tests.train.test_loop import on_cpu as train_on_cpu
from tests.train.tiny import WHOLE, TinyHeads, pair_part


@contextmanager
def poisoned(steps, number=math.nan, on_rank=0):
    """One number of the gradient of some steps is not finite, the loss is."""
    real = loop.run_step

    def run_step(encode, tokens, parts, memory, extras, progress, **how):
        output = real(encode, tokens, parts, memory, extras, progress, **how)
        if progress.step in steps and rank() == on_rank:
            gradient = next(p.grad for p in encode.__self__.model.parameters() if p.grad is not None)
            getattr(gradient, "_local_tensor", gradient).view(-1)[0] = number
        return output

    loop.run_step = run_step
    try:
        yield
    finally:
        loop.run_step = real


def settings(tree, **changes):
    return tree | {"train": tree["train"] | {"log_with": [], "keep_checkpoints": 20, "steps": 8} | changes}


def skipped(output):
    return {line["step"]: line["skipped_steps"] for line in metrics(output) if "skipped_steps" in line}


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(tree, tmp_path, caplog):
    with poisoned({3, 4, 7}):
        run(settings(tree, checkpoint_every=1))
    assert skipped(tmp_path / "run") == {4: 1, 5: 2, 8: 3}
    assert caplog.text.count("step 4 is skipped") == caplog.text.count("is skipped") == 1
    steps = [weights(tmp_path / "run" / "checkpoints" / f"step-{step}") for step in range(3, 7)]
    assert_equal_weights(steps[0], steps[1])
    assert_equal_weights(steps[0], steps[2])
    assert not torch.equal(next(iter(steps[0].values())), next(iter(steps[3].values())))
    assert '"skipped_steps": 3' in (tmp_path / "run" / "finished.json").read_text()


def test_a_run_with_skipped_steps_that_is_stopped_ends_with_the_same_bits(tree, tmp_path, monkeypatch):
    with poisoned({3, 4, 5}, math.inf):
        run(settings(tree, max_skipped_steps=3), output=str(tmp_path / "whole"))
        with monkeypatch.context() as patch:
            update = loop.update
            patch.setattr(loop, "update", lambda r, p: update(r, p) if r.state.step < 5 else 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(settings(tree, max_skipped_steps=3))
        run(settings(tree, max_skipped_steps=3))
    assert_equal_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert skipped(tmp_path / "run") == skipped(tmp_path / "whole") == {4: 1, 5: 2, 6: 3}


def test_too_many_in_a_row_end_the_run_also_counted_across_a_resume_and_the_way_back_works(tree, tmp_path):
    with poisoned({3, 4, 5}):
        for _ in range(2):  # the second time from step 4, where one had been skipped
            with pytest.raises(TrainingError, match=r"step 6.*3 steps in a row") as found:
                run(settings(tree, max_skipped_steps=2))
    path = re.search(r"model\.path=(\S+),", str(found.value))[1]
    assert path == str(tmp_path / "run" / "checkpoints" / "step-4" / "model")
    calmer = settings(tree, learning_rate=1e-4, steps=1)
    run(calmer, model=tree["model"] | {"path": path}, output=str(tmp_path / "calmer"))


def test_a_run_that_fails_before_its_first_checkpoint_says_so(tree):
    with poisoned({0}), pytest.raises(TrainingError, match=r"(?s)step 1: .*no checkpoint was written yet"):
        run(settings(tree, max_skipped_steps=0))


def test_weights_that_are_not_finite_are_not_written_and_prune_nothing(tree, tmp_path, monkeypatch):
    """In the last step, after which the model would be written."""
    update = loop.update

    def breaking(run_, draw):
        result = update(run_, draw)
        if run_.state.step == 7:
            with torch.no_grad():
                next(run_.model.parameters()).view(-1)[0] = math.inf
        return result

    monkeypatch.setattr(loop, "update", breaking)
    with pytest.raises(ModelError, match=r"(?s)weights are not finite.*step-6"):
        run(settings(tree, keep_checkpoints=1))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-6"]
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.setattr(loop, "update", update)
    run(settings(tree, keep_checkpoints=1))


def on_two(tree, number):
    """One rank's gradient alone is not finite: whole copies, shards, beyond the limit; then one rank's loss alone."""
    messages = []
    with poisoned({1, 2}, number, on_rank=1):
        for name, changes in (("copies", {}), ("shards", {"shard": True}), ("limit", {"max_skipped_steps": 1})):
            try:
                train_on_cpu(settings(tree | {"output": f"{tree['output']}-{name}"}, **changes))
            except TrainingError as error:
                messages.append(str(error))
    try:
        run_step(NotOnRankOne(), *pair_part(CoSENT(cross_device=False), rank(), world_size()), WHOLE)
    except TrainingError as error:
        messages.append(str(error))
    return messages


class NotOnRankOne(TinyHeads):
    def forward(self, *given):
        factor = math.nan if rank() == 1 else 1.0
        return {head: rep.map(lambda tensor: tensor * factor) for head, rep in super().forward(*given).items()}


@pytest.mark.dist
def test_all_ranks_decide_alike_where_one_of_them_has_the_fault(tree, tmp_path):
    model = {"path": str(tiny_bert(tmp_path / "plain", dropout=0.0)), "pooling": "mean"}
    tree = settings(tree | {"model": model}, steps=3)
    for limit, loss in on_ranks(2, on_two, tmp_path, tree, math.nan):
        assert "2 steps in a row" in limit
        assert "step-2" in limit
        assert "is not finite" in loss, "also where no other rank has read the value"
    for name in ("copies", "shards"):
        assert skipped(Path(f"{tree['output']}-{name}")) == {2: 1, 3: 2}, name
        for tensor in weights(f"{tree['output']}-{name}").values():
            assert bool(tensor.isfinite().all())
