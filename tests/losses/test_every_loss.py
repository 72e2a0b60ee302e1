"""What holds for every registered loss: its naive reference, gradients, precision, recipe, bad arguments, ranks."""

from dataclasses import fields, replace

import pytest
import torch

from embedsmith.core.collectives import rank, world_size
from embedsmith.core.errors import RecipeError
from embedsmith.core.reps import Sparse
from embedsmith.core.settings import to_plain
from embedsmith.core.shelf import losses
from embedsmith.losses import CrossBatchBalance, Flops, InfoNCE, M3SelfDistillation, Uniformity, Weighted
from tests.losses.cases import CASES, REFUSED, every_case, examples_for
from tests.losses.examples import PAIRS, RETRIEVAL, WIDTH, Tiny, make_batch, make_extras, run
from tests.losses.naive import REFERENCES, reference
from tests.ranks import on_ranks

EVERY = every_case()
NAMED = [f"{name}-{number}" for number, (name, _) in enumerate(EVERY)]
each_loss = pytest.mark.parametrize(("name", "loss"), EVERY, ids=NAMED)


def test_every_registered_loss_is_walked():
    registered = {entry.name for entry in losses.entries()}
    assert registered == set(CASES) == set(REFERENCES) == set(REFUSED)
    for entry in losses.entries():
        assert entry.formula, entry.name
        assert entry.source, entry.name
        assert len(entry.thing.__doc__.splitlines()) > 3, entry.name


@each_loss
def test_equals_the_naive_loop(name, loss):
    examples = examples_for(loss)
    assert examples
    for label, example in examples.items():
        value, gradients = run(loss, example)
        assert value.item() == pytest.approx(reference(loss, example), abs=1e-9), label
        assert all(torch.isfinite(gradient).all() for gradient in gradients), label


@each_loss
def test_an_undefined_batch_gives_a_connected_zero(name, loss):
    for label, example in examples_for(loss, undefined=True).items():
        expected = reference(loss, example)
        value, gradients = run(loss, example)  # backward fails on a value without a graph
        assert value.item() == pytest.approx(expected, abs=1e-9), label
        assert all(torch.isfinite(gradient).all() for gradient in gradients), label


RAMPS = [
    M3SelfDistillation(0.2, start_step=2, ramp_steps=3),
    M3SelfDistillation(0.2, start_step=2),
    Flops(0.3, 0.7, ramp_steps=3),
    Weighted(InfoNCE(), 2.0, warmup_steps=3),
]


@pytest.mark.parametrize("loss", RAMPS, ids=str)
def test_what_grows_with_the_steps_ends_where_it_should(loss):
    """Before it, at its first step, in it, at its end and long after."""
    found = []
    for step in (0, 1, 2, 3, 4, 5, 50):
        example = replace(RETRIEVAL["plain"], step=step)
        found.append(run(loss, example)[0].item())
        assert found[-1] == pytest.approx(reference(loss, example), abs=1e-9), step
    assert found[-1] == found[-2] != found[0]


def has_fixed_weights(loss):
    """Losses that hold some of their own scores fixed, so that the gradient is not the derivative of the value; and
    flops, which has none where a word's weight is 0 in one place and a kink in the next."""
    text = repr(loss)
    fixed = "hardness_weight=0.0" not in text and "hardness_weight" in text
    focal = "focal_gamma" in text and "focal_gamma=0.0" not in text
    words = ("M3Self", "RetroMAE", "MNTP", "TSDAE", "Flops", "LambdaLoss")
    return fixed or focal or any(word in text for word in words)


@pytest.mark.parametrize(("name", "loss"), [(n, one) for n, one in EVERY if not has_fixed_weights(one)], ids=str)
def test_gradcheck(name, loss):
    def fill(representation, remaining):
        """A weight of 0 is padding, and no variable."""
        kept = lambda tensor: tensor != 0 if isinstance(representation, Sparse) else 1
        return representation.map(lambda old: next(remaining) * kept(old) if old.is_floating_point() else old)

    for example in list(examples_for(loss).values())[:2]:
        model, extras = Tiny(), make_extras(loss)
        batch, made = make_batch(model, example, loss, extras, leaves=False)
        reps = [representation for pair, _ in made for _, representation in sorted(pair.items())]
        inputs = [t.detach().clone().requires_grad_() for r in reps for t in r.floating()]

        def value(*tensors, batch=batch, made=made):
            remaining = iter(tensors)
            for pair, side in made:
                for head, representation in sorted(pair.items()):
                    side.local = {**side.local, head: fill(representation, remaining)}
            return loss(replace(batch)).value

        assert torch.autograd.gradcheck(value, inputs, eps=1e-6, atol=1e-5, fast_mode=True)


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_finite_in_half_precision_at_temperature_001(name, loss, dtype):
    sharp = {f.name: 0.01 for f in fields(loss) if f.name.endswith("temperature") and f.name != "learn_temperature"}
    for example in examples_for(loss).values():
        value, gradients = run(replace(loss, **sharp), example, dtype)
        assert value.dtype == torch.float32
        assert torch.isfinite(value)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


@each_loss
def test_recipe_round_trip(name, loss):
    plain = to_plain(loss)
    assert plain["type"] == name
    assert losses.build(plain) == loss


@pytest.mark.parametrize(("name", "arguments"), [(n, a) for n, cases in REFUSED.items() for a in cases], ids=str)
def test_bad_arguments_are_recipe_errors(name, arguments):
    cls = losses.get(name)
    if any(isinstance(value, dict) and "type" in value for value in arguments.values()):
        with pytest.raises(ValueError):
            losses.build({"type": name, **arguments})
        return
    with pytest.raises(RecipeError) as caught:
        cls(**arguments)
    place, _, what = str(caught.value).partition(": ")
    assert place == name, "the loss is named where it stands"
    assert what
    with pytest.raises(ValueError):
        losses.build({"type": name, **arguments})


@each_loss
def test_unknown_fields_are_refused(name, loss):
    with pytest.raises(ValueError):
        losses.build({**to_plain(loss), "temprature": 1.0})


def shared_examples(loss):
    """Examples of eight rows for two and four ranks; the six rows of "plain" are shared unevenly by four."""
    wanted = [RETRIEVAL["adversarial"], RETRIEVAL["labels"], PAIRS["ties"]]
    wanted += [RETRIEVAL["plain"]] if type(loss) in (InfoNCE, CrossBatchBalance, Uniformity) else []
    return [example for example in wanted if example in examples_for(loss).values()]


def walk():
    """On a rank: value and gradients of every case on every example, each rank with its rows."""
    results = []
    for _, loss in EVERY:
        for example in shared_examples(loss):
            rows = torch.arange(len(example)).tensor_split(world_size())[rank()].tolist()
            results.append(run(loss, example.rows(rows)))
    return results


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_ranks_equal_one(world, tmp_path):
    torch.set_num_threads(1)
    expected = walk()
    ranks = on_ranks(world, walk, tmp_path)
    labels = [f"{loss} on {example}" for _, loss in EVERY for example in shared_examples(loss)]
    assert len(expected) == len(labels) > len(EVERY)
    for label, one, several in zip(labels, expected, zip(*ranks, strict=True), strict=True):
        mean = torch.stack([value for value, _ in several]).mean()
        assert mean.item() == pytest.approx(one[0].item(), abs=1e-10), label
        for a, b in zip(one[1], several[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda text, label=label: f"{label}\n{text}")


def test_the_examples_move_every_parameter():
    """Guards the rank test against comparing zeros: each case has a gradient on some example."""
    for name, loss in EVERY:
        total = sum(float(g.abs().sum()) for e in shared_examples(loss) for g in run(loss, e)[1])
        assert total > 1e-4, (name, loss)
    assert WIDTH == 8
