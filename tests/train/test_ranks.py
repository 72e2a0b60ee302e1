"""Several processes: they agree before the first step, end together when one of them fails or is lost, and each draws
its own dropout."""

import os
import signal
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from embedsmith.core.collectives import rank
from embedsmith.core.errors import EmbedsmithError
from embedsmith.core.recipe import parse
from embedsmith.train import Recipe, loop, train
from tests.ranks import on_ranks
from tests.tinybert import tiny_bert
from tests.train.test_loop import assert_equal_weights, weights


def short(tree, **changes):
    return tree | {"train": tree["train"] | {"log_with": [], "steps": 4} | changes}


@contextmanager
def before_each_update(act):
    """`act(step)` before every optimizer step."""
    real = loop.update

    def update(run, draw):
        act(run.state.step)
        return real(run, draw)

    loop.update = update
    try:
        yield
    finally:
        loop.update = real


def message_of(tree):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        train(parse(Recipe, tree))
    except EmbedsmithError as error:
        return str(error)
    return "trained"


def with_changes(trees):
    """Every rank with its own tree, for each of several pairs of trees."""
    return [message_of(pair[rank()]) for pair in trees]


@pytest.mark.dist
def test_ranks_that_differ_are_refused_with_what_differs(tree, bert, tmp_path):
    tree = short(tree)
    other = tiny_bert(tmp_path / "other", seed=1)
    again = tiny_bert(tmp_path / "again")  # the same weights elsewhere, as on another machine
    words = tiny_bert(tmp_path / "words")
    path = words / "tokenizer.json"
    path.write_text(path.read_text().replace('"cat"', '"cut"'))
    model = tree["model"]
    pairs = [
        (tree, short(tree, learning_rate=2e-3)),
        (tree, short(tree, steps=5)),
        (tree, tree | {"data": tree["data"][:1]}),
        (tree, tree | {"model": model | {"path": str(other)}}),
        (tree, tree | {"model": model | {"path": str(words)}}),
        (tree, tree | {"model": model | {"path": str(again)}}),
    ]
    first, second = on_ranks(2, with_changes, tmp_path, pairs)
    assert first == second, "every rank says the same"
    assert "train.learning_rate is 0.001 on rank 0, 0.002 on rank 1" in first[0]
    assert "train.steps is 4 on rank 0, 5 on rank 1" in first[1]
    assert "data.1.path" not in first[2]
    assert "data.1.task is sts on rank 0, nothing on rank 1" in first[2]
    assert "the model (weights, settings, tokenizer) is" in first[3]
    assert "the model (weights, settings, tokenizer) is" in first[4]
    assert first[5] == "trained"


def killed(tree):
    def act(step):
        if step == 2 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with before_each_update(act):
        return message_of(tree)


@pytest.mark.dist
def test_a_lost_process_ends_the_others_with_an_error_of_ours_and_the_run_goes_on(tree, tmp_path):
    message, lost = on_ranks(2, killed, tmp_path, short(tree), may_die=True)
    assert lost is None
    assert "rank 0 lost another process of this run" in message
    (tmp_path / "rank0.pt").unlink()
    assert on_ranks(2, message_of, tmp_path, short(tree)) == ["trained", "trained"]


def disk_full(tree):
    """Only the first rank writes, and fails to."""
    real = loop.Checkpoints._write
    loop.Checkpoints._write = _no_room
    try:
        return message_of(tree)
    finally:
        loop.Checkpoints._write = real


def _no_room(self, *given):
    from embedsmith.core.errors import CheckpointError

    raise CheckpointError("no space left on the disk")


def dropout(tree, stop):
    """The random state before each step, of a run that stops before step `stop` and goes on."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    states = {}

    def act(step):
        if step == stop and len(states) <= stop:
            states[step] = None
            raise KeyboardInterrupt
        states[step] = torch.get_rng_state()

    with before_each_update(act):
        for _ in range(1 if stop is None else 2):
            with suppress(KeyboardInterrupt):
                train(parse(Recipe, tree))
    return states


def several(tree, folder):
    whole, stopped = (short(tree | {"output": f"{folder}/{name}"}) for name in ("whole", "stopped"))
    return dropout(whole, None), dropout(stopped, 3), disk_full(short(tree))


@pytest.mark.dist
def test_every_rank_draws_its_own_dropout_from_the_start_and_after_a_resume(tree, tmp_path):
    found = on_ranks(2, several, tmp_path, tree, str(tmp_path))
    for whole, stopped, message in found:
        assert "no space left" in message
        assert whole.keys() == stopped.keys() == {0, 1, 2, 3}
        for step, state in whole.items():
            assert torch.equal(state, stopped[step]), step
    for step in range(4):
        assert not torch.equal(found[0][0][step], found[1][0][step]), step
    assert_equal_weights(weights(Path(tmp_path, "whole")), weights(Path(tmp_path, "stopped")))
