"""Candidates of all ranks or of a rank's own, head by head: equal to plain loops in one process, forward and backward,
and nothing of a head that stays local is sent."""

import math

import pytest
import torch

from embedsmith.core import batch as batch_module
from embedsmith.core.batch import Side
from embedsmith.core.collectives import rank, world_size
from embedsmith.core.errors import RecipeError
from embedsmith.losses import InfoNCE, M3SelfDistillation, Matryoshka, PerHead
from tests.losses.examples import RETRIEVAL, TEXTS, Tiny, make_batch, run
from tests.losses.world import unique
from tests.ranks import on_ranks

T = 0.2
HEADS = ("dense", "sparse", "multivector")
M3 = {"temperature": T, "weights": dict.fromkeys(HEADS, 1.0) | {"sparse": 0.3}, "lambdas": dict.fromkeys(HEADS, 0.7)}
CASES = {
    "infonce, own": InfoNCE(T, cross_device=False),
    "infonce, all": InfoNCE(T, cross_device=("dense",)),
    "infonce, both ways, own": InfoNCE(T, "multivector", symmetric=True, cross_device=False),
    "infonce, own, in blocks": InfoNCE(T, "sparse", cross_device=(), block_size=3),
    "per head": PerHead(InfoNCE(T, cross_device=("dense",)), {"dense": 1.0, "multivector": 0.5}),
    "m3, own": M3SelfDistillation(**M3, cross_device=False),
    "m3, dense": M3SelfDistillation(**M3, cross_device=("dense",)),
    "m3, dense and sparse, in blocks": M3SelfDistillation(**M3, cross_device=("dense", "sparse"), block_size=2),
    "m3, all": M3SelfDistillation(**M3, cross_device=HEADS),
}
EXAMPLES = ("adversarial", "plain")


def shares(example, world):
    return [example.rows(rows.tolist()) for rows in torch.arange(len(example)).tensor_split(world)]


class Scores:
    """Scores of texts by a model, each made once, with gradient."""

    def __init__(self, model):
        everything = model(torch.arange(TEXTS), HEADS)
        self.rows = {head: [tensor.unbind(0) for tensor in everything[head].tensors()] for head in HEADS}
        self.made = {}

    def __call__(self, head, a, b):
        if (head, a, b) not in self.made:
            self.made[head, a, b] = self._score(head, a, b)
        return self.made[head, a, b]

    def _score(self, head, a, b):
        left, right = ([column[text] for column in self.rows[head]] for text in (a, b))
        if head == "dense":
            return (left[0] * right[0]).sum()
        if head == "sparse":
            total = torch.zeros((), dtype=torch.float64)
            for coordinate in set(left[0].tolist()) & set(right[0].tolist()):
                best = [weight[word == coordinate].max() for word, weight in (left, right)]
                total = total + best[0] * best[1]
            return total
        asked, given = (vector[real] for vector, real in (left, right))
        return torch.stack([torch.stack([(q * d).sum() for d in given]).max() for q in asked]).mean()


def queries(example):
    """Each query with its positives, and the documents of the example that are not known to be its positives."""
    every = unique([d for row in (*example.positive, *example.negative) for d in row])
    for row, query in enumerate(example.query):
        known = {d for other, q in enumerate(example.query) if q == query for d in example.positive[other]}
        if query >= 0 and unique(example.positive[row]):
            yield query, unique(example.positive[row]), [d for d in every if d not in known]


def back(example):
    """The example seen from its positives, with the queries as documents."""
    documents = unique([d for row in example.positive for d in row])
    for document in documents:
        asked = unique([q for q, row in zip(example.query, example.positive, strict=True) if document in row])
        yield document, asked, [q for q in unique(example.query) if q not in asked]


def contrast(score, examples, head, found=queries):
    """The mean over all queries of all examples, each among the documents of its example."""
    values = []
    for query, positives, others in (one for example in examples for one in found(example)):
        rest = [(score(head, query, d) / T).exp() for d in others]
        up = [(score(head, query, d) / T).exp() for d in positives]
        values.append(torch.stack([-(p / (p + sum(rest))).log() for p in up]).mean())
    return torch.stack(values).mean()


def distilled(score, examples, loss):
    """L_ensemble and L'_h of each head, over the documents of each example."""
    rows = []
    for query, positives, others in (one for example in examples for one in queries(example)):
        terms = []
        for positive in positives:
            logits = {h: torch.stack([score(h, query, d) / T for d in (positive, *others)]) for h in loss.weights}
            together = sum(loss.weights[h] * logits[h] for h in loss.weights)
            teacher = together.detach().softmax(0)
            taught = [-(teacher * logits[h].log_softmax(0)).sum() for h in loss.weights]
            terms.append(torch.stack([-together.log_softmax(0)[0], *taught]))
        rows.append(torch.stack(terms).mean(0))
    return torch.stack(rows).mean(0)


def naive(loss, score, example, world):
    whole, parts = [example], shares(example, world)
    view = lambda head: whole if loss.cross_device is True or head in (loss.cross_device or ()) else parts
    if isinstance(loss, InfoNCE):
        value = contrast(score, view(loss.head), loss.head)
        return (value + contrast(score, view(loss.head), loss.head, back)) / 2 if loss.symmetric else value
    each = {head: contrast(score, view(head), head) for head in HEADS}
    ensemble, *taught = distilled(score, whole if view("multivector") is whole else parts, loss)
    contrasted = (sum(loss.lambdas[h] * each[h] for h in HEADS) + ensemble) / 4
    return (contrasted + sum(loss.lambdas[h] * own for h, own in zip(HEADS, taught, strict=True)) / 3) / 2


def expected(loss, example, world):
    model = Tiny()
    score = Scores(model)
    if isinstance(loss, PerHead):
        value = sum(w * naive(loss._on(head), score, example, world) for head, w in loss.weights.items())
    else:
        value = naive(loss, score, example, world)
    value.backward()
    return value.item(), [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def on_a_rank():
    """Value and gradients of every case, and the bytes that the gathers of each brought."""
    results, gathered = [], []
    real = batch_module.gather_rows

    def counted(tensor, group=None):
        made = real(tensor, group)
        if world_size(group) > 1 and tensor.is_floating_point():
            gathered.append(made.numel() * made.element_size())
        return made

    batch_module.gather_rows = counted
    for loss in CASES.values():
        for name in EXAMPLES:
            gathered.clear()
            value, gradients = run(loss, shares(RETRIEVAL[name], world_size())[rank()])
            results.append((value, gradients, sum(gathered)))
    return results


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_several_ranks_equal_plain_loops_and_send_what_they_should(world, tmp_path):
    torch.set_num_threads(1)
    ranks = on_ranks(world, on_a_rank, tmp_path)
    labels = [(label, loss, RETRIEVAL[name]) for label, loss in CASES.items() for name in EXAMPLES]
    sent = {}
    for (label, loss, example), several in zip(labels, zip(*ranks, strict=True), strict=True):
        value, gradients = expected(loss, example, world)
        mean = math.fsum(float(one[0]) for one in several) / world
        assert mean == pytest.approx(value, abs=1e-10), label
        for a, b in zip(gradients, several[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda text, label=label: f"{label}\n{text}")
        sent[label] = several[0][2]
    rows = max(len(part.documents) for part in shares(RETRIEVAL["plain"], world))
    dense = world * rows * 8 * 8  # numbers of a vector, bytes of a number
    assert {label: bytes_ for label, bytes_ in sent.items() if "own" in label} == dict.fromkeys(
        [label for label in CASES if "own" in label], 0
    )
    assert sent["infonce, all"] == sent["per head"] == sent["m3, dense"] == dense
    assert sent["m3, all"] > sent["m3, dense and sparse, in blocks"] > dense


@pytest.mark.parametrize("cross_device", [True, False, ("dense",), HEADS])
def test_on_one_rank_nothing_changes(cross_device):
    plain = run(M3SelfDistillation(**M3), RETRIEVAL["adversarial"])
    other = run(M3SelfDistillation(**M3, cross_device=cross_device), RETRIEVAL["adversarial"])
    torch.testing.assert_close(other, plain, rtol=0, atol=1e-12)


def test_widths_reach_the_heads_that_cross():
    whole = run(Matryoshka(M3SelfDistillation(**M3), (4,)), RETRIEVAL["plain"])
    mixed = run(Matryoshka(M3SelfDistillation(**M3, cross_device=("dense",)), (4,)), RETRIEVAL["plain"])
    torch.testing.assert_close(mixed, whole, rtol=0, atol=1e-12)


def test_the_gathered_view_is_asked_for_only_where_it_is_needed(monkeypatch):
    asked = []
    monkeypatch.setattr(Side, "all", lambda side, head: asked.append((side.group, head)) or side.local[head])
    loss = M3SelfDistillation(**M3, cross_device=("dense",))
    batch, _ = make_batch(Tiny(), RETRIEVAL["plain"], loss)
    loss(batch)
    assert {head for group, head in asked if group is None} == {"dense"}


def test_heads_that_the_loss_does_not_have_are_refused():
    with pytest.raises(RecipeError, match="cross_device names colbert"):
        M3SelfDistillation(**M3, cross_device=("colbert",))
