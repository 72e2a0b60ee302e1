"""The learning rate is a function of the step; groups get what they were promised."""

import copy
import io
import math
import sys

import pytest
import torch
from torch import nn

from embedsmith.core.errors import MissingExtraError, RecipeError
from embedsmith.train.config import TrainConfig
from embedsmith.train.engine import WholeCopies, learning_rate, set_learning_rate
from embedsmith.train.optimizers import adamw, make_optimizer

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


class Layers(nn.Module):
    """A backbone with a table, a matrix and a vector; a head beside it."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict({"words": nn.Embedding(5, 4), "body": nn.Linear(4, 6)})
        self.head = nn.Linear(6, 2)


def naive_muon(weight, gradients, rate, decay):
    """Momentum 0.95 with Nesterov's step, orthogonalised, scaled to the size of AdamW's update."""
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
        update = (0.05 * gradient + 0.95 * momentum).bfloat16()
        update = update.T if weight.shape[0] > weight.shape[1] else update
        update = update / update.norm()
        for _ in range(5):
            square = update @ update.T
            update = 3.4445 * update + (-4.775 * square + 2.0315 * square @ square) @ update
        update = update.T if weight.shape[0] > weight.shape[1] else update
        weight = weight * (1 - rate * decay) - rate * 0.2 * max(weight.shape) ** 0.5 * update.float()
    return weight


def naive_adamw(weight, gradients, rate, decay):
    first = second = torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        weight = weight * (1 - rate * decay)
        weight = weight - rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return weight


def steps_of(optimizer, net, gradients):
    for step in range(len(next(iter(gradients.values())))):
        for name, parameter in net.named_parameters():
            parameter.grad = gradients[name][step].clone()
        optimizer.step()


def random_gradients(net, count=3):
    torch.manual_seed(1)
    return {name: [torch.randn_like(p) for _ in range(count)] for name, p in net.named_parameters()}


def test_muon_moves_the_matrices_of_layers_and_adamw_the_rest():
    """Each as written out in a loop, with the rates of groups and no decay of vectors."""
    torch.manual_seed(0)
    net = Layers()
    config = TrainConfig(learning_rate=0.02, weight_decay=0.1, optimizer="muon", group_learning_rates={"head": 0.1})
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    gradients = random_gradients(net)
    steps_of(make_optimizer(net, NOTHING, config), net, gradients)
    for name, found in net.named_parameters():
        naive = naive_muon if name == "backbone.body.weight" else naive_adamw
        decay = 0.1 if found.dim() == 2 else 0.0
        wanted = naive(start[name], gradients[name], 0.1 if "head" in name else 0.02, decay)
        torch.testing.assert_close(found.detach(), wanted, rtol=0, atol=2e-3 if naive is naive_muon else 1e-5)
        assert (found - start[name]).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["adamw", "muon", "adamw8bit"])
def test_an_optimizer_goes_on_from_its_state(kind):
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    net = nn.Module()
    net.backbone = nn.ModuleDict({"words": nn.Embedding(70, 64), "body": nn.Linear(64, 80)})
    gradients = random_gradients(net, 4)
    config = TrainConfig(learning_rate=0.01, optimizer=kind)
    whole, stopped = copy.deepcopy(net), copy.deepcopy(net)
    steps_of(make_optimizer(whole, NOTHING, config), whole, gradients)
    optimizer = make_optimizer(stopped, NOTHING, config)
    steps_of(optimizer, stopped, {name: each[:2] for name, each in gradients.items()})
    kept = io.BytesIO()
    torch.save(optimizer.state_dict(), kept)
    kept.seek(0)
    again = make_optimizer(stopped, NOTHING, config)
    again.load_state_dict(torch.load(kept, weights_only=True))
    steps_of(again, stopped, {name: each[2:] for name, each in gradients.items()})
    for found, wanted in zip(stopped.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_adamw_in_8_bits_is_near_adamw_and_holds_a_quarter_of_its_state():
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    nets = [nn.ModuleDict({"body": nn.Linear(64, 80)})]
    nets.append(copy.deepcopy(nets[0]))
    start, gradients = nets[0]["body"].weight.detach().clone(), random_gradients(nets[0])
    optimizers = [
        make_optimizer(net, NOTHING, TrainConfig(learning_rate=0.01, optimizer=kind))
        for net, kind in zip(nets, ("adamw", "adamw8bit"), strict=True)
    ]
    for optimizer, net in zip(optimizers, nets, strict=True):
        steps_of(optimizer, net, gradients)
    moved = [(net["body"].weight.detach() - start).flatten() for net in nets]
    assert torch.cosine_similarity(*moved, dim=0) > 0.99
    state = optimizers[1].state[nets[1]["body"].weight]
    assert (state["state1"].dtype, state["state2"].dtype) == (torch.uint8, torch.uint8)
    assert {group["peak_lr"] for group in optimizers[1].param_groups} == {0.01}


def test_what_an_optimizer_needs_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(MissingExtraError, match=r"(?s)bitsandbytes.*embedsmith\[optim\]"):
        make_optimizer(Layers(), NOTHING, TrainConfig(optimizer="adamw8bit"))
    frozen = Layers()
    frozen.backbone["body"].requires_grad_(False)
    with pytest.raises(RecipeError, match=r"(?s)muon.*train.optimizer=adamw"):
        make_optimizer(frozen, NOTHING, TrainConfig(optimizer="muon"))
