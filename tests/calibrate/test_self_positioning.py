"""Self-Positioning: the projected gradient is autograd's, and descent finds what it should."""

import numpy as np
import pytest
import torch
from torch.func import functional_call

from embedsmith.calibrate.probe import TaskBatches
from embedsmith.calibrate.self_positioning import Descent, Position, Positioning
from embedsmith.core.batch import Side
from embedsmith.data import Source
from embedsmith.merge.methods.formulas import karcher, sequential_slerp
from tests.merge.family import family, retrieval_records, sts_records

SOURCES = (Source(path="pairs", task="retrieval"), Source(path="graded", task="sts"))


def batches(live, config):
    sets = [retrieval_records(), sts_records()]
    return TaskBatches.whole(live, SOURCES, sets, config.batch_size, config.seed).split(config.held_out)


def descended(live, config):
    return Positioning(live, batches(live, config), config).descend()


def position(live, config):
    """A place where nothing is special: unequal weights, blocks apart, a length below 1."""
    generator = torch.Generator().manual_seed(3)
    start = Position.start(live.parents, len(live.group_names))
    with torch.no_grad():
        start.log_weight_M += 0.3 * torch.randn(live.parents, generator=generator, dtype=torch.float64)
        if config.per_block:
            start.offset_GM += 0.2 * torch.randn(start.offset_GM.shape, generator=generator, dtype=torch.float64)
        start.length.fill_(0.8)
    return start


def by_autograd(live, parts, where, config):
    """The objective with one graph from the position through the merged weights to the losses."""
    coefficient_GM = where.coefficients(live.gram(), config.mode)
    theta = {
        name: base + sum(coefficient_GM[live.groups[name], i] * live.deltas[i][name] for i in range(live.parents))
        for name, base in live.base.items()
    }
    total = where.price(coefficient_GM, config)
    for tokens, part in parts:
        places = np.split(np.arange(len(tokens)), [part.ids.sizes[0]])
        padded = [tokens.pad(live.model.pad_id, rows=rows) for rows in places]
        left, right = (functional_call(live.model, theta, (each, ("dense",))) for each in padded)
        sides = [Side({}), Side({})]
        for side, reps in zip(sides, (left, right), strict=True):
            side.local = reps
        total = total + part.weight * part.loss(part.ids.with_sides(*sides, task=part.task)).value
    leaves = [where.log_weight_M, where.offset_GM, where.length]
    return torch.autograd.grad(total, leaves, allow_unused=True)


@pytest.mark.parametrize("mode", ["paper", "karcher", "simplex", "free"])
@pytest.mark.parametrize("per_block", [False, True])
def test_the_projected_gradient_is_autograds(tmp_path, mode, per_block):
    live = family(tmp_path, per_block=per_block)
    config = Descent(mode=mode, per_block=per_block, batch_size=6, mu=0.03)
    where = position(live, config)
    parts = batches(live, config).at(2)
    expected = by_autograd(live, parts, where, config)
    Positioning(live, batches(live, config), config).step(parts, where)
    for tensor, gradient in zip((where.log_weight_M, where.offset_GM, where.length), expected, strict=True):
        if gradient is not None:
            assert gradient.abs().max() > 1e-6
            torch.testing.assert_close(tensor.grad, gradient, rtol=1e-9, atol=1e-12)


def test_gradients_do_not_stay_in_the_model(tmp_path):
    live = family(tmp_path)
    config = Descent(batch_size=4)
    Positioning(live, batches(live, config), config).step(batches(live, config).at(0), position(live, config))
    assert all(p.grad is None for p in live.model.parameters())


def test_descent_lowers_the_objective_and_leaves_the_model_there(tmp_path):
    live = family(tmp_path, prompts={})  # weights drawn at random, with which the held-out texts happen to gain
    config = Descent(steps=20, batch_size=6, check_every=5, learning_rate=0.05, length_learning_rate=0.05)
    found = descended(live, config)
    held = [entry["held_out"] for entry in found.trajectory if "held_out" in entry]
    assert found.objective == min(held) < held[0]
    for name, parameter in live.model.named_parameters():
        expected = live.base[name] + sum(float(found.coefficient_GM[0, i]) * live.deltas[i][name] for i in range(3))
        torch.testing.assert_close(parameter.data, expected)


def test_a_higher_price_makes_a_shorter_merge(tmp_path):
    live = family(tmp_path)
    lengths = []
    for mu in (0.0, 1.0):
        config = Descent(steps=15, batch_size=6, check_every=15, mu=mu, length_learning_rate=0.03)
        lengths.append(descended(live, config).trajectory[-1]["length"])
    assert lengths[0] > lengths[1] + 0.05


def test_starts_see_the_same_batches_and_the_best_end_counts(tmp_path):
    live = family(tmp_path)
    config = Descent(steps=4, batch_size=6, check_every=2, starts=("uniform", "best_parent"))
    both = descended(live, config)
    alone = [
        descended(live, Descent(steps=4, batch_size=6, check_every=2, starts=(s,))) for s in ("uniform", "best_parent")
    ]
    assert both.objective == min(end.objective for end in alone)


def gram_of(vectors):
    return vectors @ vectors.T


def test_gradients_of_directions_are_finite_differences():
    generator = torch.Generator().manual_seed(0)
    gram = gram_of(torch.randn(3, 5, generator=generator, dtype=torch.float64))
    weight = torch.tensor([0.5, 1.5, 0.8], dtype=torch.float64, requires_grad=True)
    for turn in (sequential_slerp, karcher):
        assert torch.autograd.gradcheck(lambda w, turn=turn: turn(gram, w), (weight,), atol=1e-6)


def test_parallel_task_vectors_have_a_finite_gradient():
    """Two copies of one parent: the arc has no direction, and the weights must not become NaN."""
    vector = torch.tensor([[1.0, 2.0], [1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    for turn in (sequential_slerp, karcher):
        merged = turn(gram_of(vector), weight)
        (gradient,) = torch.autograd.grad(merged.square().sum(), weight)
        assert gradient.isfinite().all()
