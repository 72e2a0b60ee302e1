"""The learning rate is a function of the step; groups get what they were promised."""

import math

import pytest
import torch
from torch import nn

from embedsmith.core.errors import RecipeError
from embedsmith.train.config import TrainConfig
from embedsmith.train.engine import WholeCopies, adamw, learning_rate, set_learning_rate

NOTHING = nn.ModuleDict()


def rates(steps=10, **changes):
    config = TrainConfig(learning_rate=1.0, **changes)
    return [learning_rate(config, step, steps, 1.0) for step in range(steps)]


def test_linear_with_warmup_by_hand():
    assert rates(warmup=0.2) == pytest.approx([0.5, 1.0, *(1 - k / 8 for k in range(8))])


def test_cosine_ends_above_the_floor_by_hand():
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert rates(schedule="cosine", warmup=2, min_learning_rate=0.1)[2:] == pytest.approx(expected)


def test_constant_stays():
    assert rates(schedule="constant", warmup=0) == [1.0] * 10


def test_warmup_is_a_share_below_one_and_steps_from_one():
    for warmup, steps in ((0.25, 3), (4, 4)):
        assert rates(warmup=warmup).index(1.0) == steps - 1


def test_a_floor_above_a_groups_peak_does_not_raise_it():
    config = TrainConfig(learning_rate=1.0, min_learning_rate=0.5, warmup=0)
    assert learning_rate(config, 9, 10, peak=0.1) == pytest.approx(0.1)


def model():
    return nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2), "norm": nn.LayerNorm(3)})


def test_groups_by_pattern_and_no_decay_on_vectors():
    config = TrainConfig(learning_rate=1.0, group_learning_rates={r"^head\.": 5.0}, weight_decay=0.3)
    optimizer = adamw(model(), NOTHING, config)
    found = {(g["peak_lr"], g["weight_decay"]): sum(p.numel() for p in g["params"]) for g in optimizer.param_groups}
    assert found == {(1.0, 0.3): 9, (1.0, 0.0): 3 + 6, (5.0, 0.3): 6, (5.0, 0.0): 2}
    set_learning_rate(optimizer, config, 9, 10)
    main = learning_rate(config, 9, 10, 1.0)
    assert {g["lr"] for g in optimizer.param_groups} == {main, 5 * main}


def test_the_first_pattern_that_matches_wins_and_later_parameters_follow_frozen_ones():
    net = model()
    net["body"].requires_grad_(False)
    rates = {r"^head\.": 5.0, r"head\.weight": 7.0, "norm": 3.0}
    with pytest.raises(RecipeError, match=r"no parameter matches \['head\\\\.weight'\]"):
        adamw(net, NOTHING, TrainConfig(learning_rate=1.0, group_learning_rates=rates))
    net["head"].bias.requires_grad_(False)
    rates = {r"^head\.weight": 5.0, r"head|norm": 3.0}
    optimizer = adamw(net, NOTHING, TrainConfig(learning_rate=1.0, group_learning_rates=rates))
    found = {group["peak_lr"]: sum(p.numel() for p in group["params"]) for group in optimizer.param_groups}
    assert found == {5.0: 6, 3.0: 6}


def test_frozen_parameters_are_left_out_and_idle_patterns_are_errors():
    net = model()
    net["body"].requires_grad_(False)
    optimizer = adamw(net, NOTHING, TrainConfig())
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == 8 + 6
    with pytest.raises(RecipeError, match="no parameter matches"):
        adamw(net, NOTHING, TrainConfig(group_learning_rates={"haed": 1.0}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"learning_rate": -1.0},
        {"steps": 1, "epochs": 1.0},
        {"micro_batch": 1, "token_budget": 1},
        {"warmup": -1},
    ],
)
def test_impossible_settings_are_refused_at_once(wrong):
    with pytest.raises(RecipeError):
        TrainConfig(**wrong)


def test_adamw_matches_its_formula():
    """One step from zero state: w - lr * (g / (|g| + eps) + decay * w)."""
    parameter = nn.Parameter(torch.tensor([[2.0]]))
    optimizer = adamw(nn.ParameterDict({"w": parameter}), NOTHING, TrainConfig(learning_rate=0.1, weight_decay=0.5))
    parameter.grad = torch.tensor([[3.0]])
    optimizer.step()
    assert parameter.item() == pytest.approx(2.0 - 0.1 * (1.0 + 0.5 * 2.0), abs=1e-6)


@pytest.mark.parametrize(("limit", "scale"), [(0.5, 10.0), (0.5, 1e-3), (None, 10.0)])
def test_clipping_bounds_the_norm_over_all_parameters_and_returns_the_one_before(limit, scale):
    """That of the losses' own parameters among them; a smaller gradient stays as it is."""
    torch.manual_seed(0)
    net, extras = model(), nn.ModuleDict({"temperature": nn.Linear(1, 1)})
    engine = WholeCopies(net, extras, TrainConfig(clip_norm=limit))
    for parameter in engine.parameters:
        parameter.grad = scale * torch.randn_like(parameter)
    before = torch.cat([p.grad.flatten().clone() for p in engine.parameters])
    assert engine.step() == pytest.approx(before.norm().item())
    after = torch.cat([p.grad.flatten() for p in engine.parameters])
    wanted = before if limit is None else before * min(1.0, limit / before.norm().item())
    torch.testing.assert_close(after, wanted, rtol=1e-5, atol=1e-6)
