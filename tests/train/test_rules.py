"""The rules of `train.balance` equal the formulas of their papers, written as loops over float64 numbers; and the
penalty of L2-SP does."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from embedsmith.core.errors import RecipeError, TrainingError
from embedsmith.core.settings import to_plain
from embedsmith.core.shelf import balances
from embedsmith.train.anchor import Anchor
from embedsmith.train.balance import Fixed, GradNorm, PCGrad, TaskRule, Uncertainty
from embedsmith.train.by_task import GroupedWeights
from embedsmith.train.config import AnchorConfig


def gradients_of(tasks, size, seed):
    chance = random.Random(seed)
    return [[chance.gauss(0, 1 + task) for _ in range(size)] for task in range(tasks)]


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def gram(gradients):
    return torch.tensor([[dot(a, b) for b in gradients] for a in gradients], dtype=torch.float64)


def combined(factors, gradients):
    return [math.fsum(f * g[i] for f, g in zip(factors, gradients, strict=True)) for i in range(len(gradients[0]))]


def of(values):
    return torch.tensor(values, dtype=torch.float64)


def naive_pcgrad(gradients, seed):
    """Algorithm 1 on whole vectors."""
    chance, total = np.random.default_rng(seed), [0.0] * len(gradients[0])
    for one in range(len(gradients)):
        projected = list(gradients[one])
        for other in chance.permutation(len(gradients)):
            theirs = gradients[other]
            if other != one and dot(projected, theirs) < 0:
                factor = dot(projected, theirs) / dot(theirs, theirs)
                projected = [p - factor * t for p, t in zip(projected, theirs, strict=True)]
        total = [t + p for t, p in zip(total, projected, strict=True)]
    return total


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_pcgrad_is_the_papers_projection(tasks):
    changed = 0
    for seed in range(20):
        gradients = gradients_of(tasks, 6, seed)
        factor_K, _ = PCGrad()(gram(gradients), torch.ones(tasks, dtype=torch.float64), {}, seed)
        assert combined(factor_K.tolist(), gradients) == pytest.approx(naive_pcgrad(gradients, seed), abs=1e-9)
        changed += any(factor != 1 for factor in factor_K.tolist())
    assert changed >= 10, "gradients without conflict prove nothing"


def test_pcgrad_leaves_gradients_that_agree_and_takes_out_what_does_not():
    assert PCGrad()(of([[1.0, 0.2], [0.2, 1.0]]), of([1, 1]), {}, 0)[0].tolist() == [1, 1]
    left, right = [1.0, 0.0], [-1.0, 1.0]
    factors = PCGrad()(gram([left, right]), of([1, 1]), {}, 0)[0].tolist()
    # left without what points along right: (1/2, 1/2); right without what points along left: (0, 1)
    assert combined(factors, [left, right]) == pytest.approx([0.5, 1.5])


def test_uncertainty_goes_down_the_gradient_of_the_papers_loss():
    """By finite differences of L(s) = sum_k L_k / sigma_k^2 + log sigma_k, sigma^2 = e^s."""
    rule, losses = Uncertainty(rate=0.1), [3.0, 0.2, 0.0]
    state = rule.begin(["a", "b", "c"])
    assert rule(torch.eye(3), of(losses), state, 0)[0].tolist() == [1, 1, 1]

    def objective(s):
        sigmas = [math.sqrt(math.exp(v)) for v in s]
        return math.fsum(loss / sigma**2 + math.log(sigma) for loss, sigma in zip(losses, sigmas, strict=True))

    for _ in range(5):
        s = state["log_variance_K"].tolist()
        factor_K, state = rule(torch.eye(3), of(losses), state, 0)
        assert factor_K.tolist() == pytest.approx([1 / math.exp(v) for v in s])
        for place, after in enumerate(state["log_variance_K"].tolist()):
            up, down = list(s), list(s)
            up[place] += 1e-6
            down[place] -= 1e-6
            assert after == pytest.approx(s[place] - 0.1 * (objective(up) - objective(down)) / 2e-6, abs=1e-7)
    for _ in range(500):
        factor_K, state = rule(torch.eye(3), of(losses), state, 0)
    assert factor_K[:2].tolist() == pytest.approx([1 / 6.0, 1 / 0.4], rel=1e-3)


def naive_gradnorm(rule, norms, losses, weights, firsts):
    tasks = len(norms)
    ratios = [loss / first for loss, first in zip(losses, firsts, strict=True)]
    relative = [ratio / (math.fsum(ratios) / tasks) for ratio in ratios]
    pulls = [w * n for w, n in zip(weights, norms, strict=True)]
    mean = math.fsum(pulls) / tasks
    targets = [mean * r**rule.alpha for r in relative]

    def objective(w):  # the targets held fixed
        return math.fsum(abs(v * n - t) for v, n, t in zip(w, norms, targets, strict=True))

    moved = []
    for place in range(tasks):
        up, down = list(weights), list(weights)
        up[place] += 1e-7
        down[place] -= 1e-7
        moved.append(max(weights[place] - rule.rate / mean * (objective(up) - objective(down)) / 2e-7, 0.01))
    return [w * tasks / math.fsum(moved) for w in moved]


def test_gradnorm_goes_down_the_gradient_of_the_papers_loss():
    rule, chance = GradNorm(alpha=0.7, rate=0.05), random.Random(3)
    state, weights, firsts = rule.begin(["a", "b", "c"]), [1.0, 1.0, 1.0], None
    for step in range(12):
        gradients = gradients_of(3, 5, step)
        losses = [chance.uniform(0.5, 3) for _ in range(3)]
        firsts = firsts or losses
        factor_K, state = rule(gram(gradients), of(losses), state, 0)
        assert factor_K.tolist() == pytest.approx(weights), "a step uses the weights from before its update"
        norms = [math.sqrt(dot(g, g)) for g in gradients]
        weights = naive_gradnorm(rule, norms, losses, weights, firsts)
        assert state["weight_K"].tolist() == pytest.approx(weights, abs=1e-6)
        assert math.fsum(weights) == pytest.approx(3)


def test_gradnorm_without_alpha_makes_the_norms_equal():
    rule = GradNorm(alpha=0.0, rate=0.01)
    state = rule.begin(["a", "b"])
    for _ in range(400):
        factor_K, state = rule(of([[9.0, 0], [0, 1.0]]), of([1.0, 5.0]), state, 0)
    assert (factor_K * of([3.0, 1.0])).tolist() == pytest.approx([1.5, 1.5], abs=0.05)


@pytest.mark.parametrize("rule", [Uncertainty(), GradNorm()])
def test_a_task_without_a_loss_or_a_gradient_moves_nothing_to_infinity(rule):
    state = rule.begin(["a", "b"])
    for losses in ([0.0, 0.0], [0.0, 1.0], [2.0, 1.0]):
        factor_K, state = rule(torch.zeros(2, 2, dtype=torch.float64), of(losses), state, 0)
        assert torch.isfinite(factor_K).all()
        assert all(torch.isfinite(tensor).all() for tensor in state.values())
    with pytest.raises(TrainingError, match=r"below 0[^$]*pcgrad"):
        rule(torch.eye(2), of([1.0, -0.5]), state, 0)


def test_fixed_weights_are_those_of_the_names():
    rule = Fixed(weights={"sts": 0.5})
    assert rule(torch.eye(2), of([1, 1]), rule.begin(["retrieval", "sts"]), 0)[0].tolist() == [1, 0.5]
    with pytest.raises(RecipeError, match="did you mean 'sts'"):
        Fixed(weights={"stt": 0.5}).begin(["retrieval", "sts"])


def test_every_rule_says_what_it_is_and_comes_back_from_a_recipe():
    for entry in balances.entries(plugins=False):
        assert entry.formula
        assert entry.source
        assert balances.build(to_plain(entry.thing())) == entry.thing()
        assert entry.name == "conan" or issubclass(entry.thing, TaskRule)


def test_inner_products_and_the_sum_of_gradients_are_those_of_loops():
    parameters = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))]
    weights = GroupedWeights(parameters, {"all": [0, 1]})
    torch.manual_seed(0)
    first, second = ([torch.randn(2, 3), torch.randn(4)] for _ in range(2))
    second[1] = None  # a weight that the second task does not read
    gram_PKK = weights.inner_products([first, second])
    for place, (left, right) in enumerate(zip(first, second, strict=True)):
        right = torch.zeros_like(left) if right is None else right
        pairs = [[dot(a.flatten().tolist(), b.flatten().tolist()) for b in (left, right)] for a in (left, right)]
        torch.testing.assert_close(gram_PKK[place], of(pairs), rtol=1e-5, atol=1e-6)
    expected = [2 * first[0] + 0.5 * second[0], 2 * first[1]]
    weights.give([2.0, 0.5], [first, second])
    for parameter, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted)


def test_l2_sp_is_the_papers_penalty():
    """Its value by loops, its gradient by autograd; a weight without a gradient is left alone."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.unread = nn.Linear(3, 2).double(), nn.Linear(2, 2).double()

        def fingerprint(self):
            return "start"

    start, model, extras = Pair(), Pair(), nn.Linear(2, 1, bias=False).double()
    for parameter in (*model.read.parameters(), *extras.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    anchor = Anchor.of(AnchorConfig(l2_sp=0.3, l2_new=0.7), start, model, extras)
    penalty = anchor.pull(scale=4.0)
    apart = [
        a - b
        for p, q in zip(model.read.parameters(), start.read.parameters(), strict=True)
        for a, b in zip(p.flatten().tolist(), q.flatten().tolist(), strict=True)
    ]
    new = extras.weight.flatten().tolist()
    assert float(penalty) == pytest.approx(0.15 * dot(apart, apart) + 0.35 * dot(new, new))
    free = [p.detach().clone().requires_grad_() for p in (*model.read.parameters(), extras.weight)]
    value = sum(0.15 * (p - q.detach()).square().sum() for p, q in zip(free, start.read.parameters(), strict=False))
    (4.0 * (value + 0.35 * free[-1].square().sum())).backward()
    for wanted, parameter in zip(free, (*model.read.parameters(), extras.weight), strict=True):
        torch.testing.assert_close(parameter.grad, wanted.grad)
    assert all(parameter.grad is None for parameter in model.unread.parameters())
