"""Memory of a card: what fits is measured, and where it runs out a step is done again with half as much at once. No
card is needed: a toy one counts what is kept for the backward pass."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from embedsmith.core.collectives import rank
from embedsmith.core.errors import EvaluationError, TrainingError
from embedsmith.core.recipe import parse
from embedsmith.evaluate import evaluate, load_task
from embedsmith.models import load
from embedsmith.train import Recipe, budget, engine, loop
from embedsmith.train import step as step_module
from embedsmith.train.budget import WORTH, at_most, measured_budget
from embedsmith.train.build import derive_memory, make_accelerator
from embedsmith.train.config import TrainConfig
from embedsmith.train.step import Memory
from tests.ranks import on_ranks
from tests.tinybert import tiny_bert
from tests.train.test_loop import on_cpu as train_on_cpu
from tests.train.test_loop import weights


class ToyCard:
    """Bytes are those of tensors kept for a backward pass; `free_bytes` are there."""

    name = "toy card"

    def __init__(self, free_bytes=10**9):
        self.free_bytes = free_bytes

    def free(self):
        return self.free_bytes

    def peak(self, act):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            act()
        return sum(kept)


@pytest.fixture
def built(tree):
    """Builds the run anew: every time with the same weights and random state."""

    def build(card=None, **changes):
        recipe = parse(Recipe, tree | {"train": tree["train"] | changes})
        run = loop.build(recipe, make_accelerator(recipe))
        run.memory = Memory(10**6)
        return replace(run, card=card or ToyCard(), fitted=card is None)

    return build


def out_of_memory(*_):
    raise torch.OutOfMemoryError("toy card is full")


def fail_once(run, where, patch):
    """The next step lacks memory once: in its last chunk's forward pass, in the loss, or late in its backward pass."""
    if where == "backward":
        words = run.model.backbone.get_input_embeddings().weight  # its gradient is the last to be there

        def hook(gradient):
            handle.remove()
            out_of_memory()

        handle = words.register_hook(hook)
        return
    module, name = (step_module.Side, "settle") if where == "loss" else (loop.Run, "encode")
    real = getattr(module, name)

    def failing(*given):
        result = real(*given)
        patch.setattr(module, name, real)
        return out_of_memory() if where == "loss" else (result, out_of_memory())

    patch.setattr(module, name, failing)


def state_of(run):
    return [p.detach().clone() for p in run.model.parameters()]


def two_steps(run):
    torch.manual_seed(3)
    done = [loop.update(run, run.feed.draw(step)) for step in range(2)]
    return [(output.value.item(), norm) for output, _, norm in done]


@pytest.mark.parametrize("where", ["forward", "loss", "backward"])
def test_a_step_without_memory_for_it_is_done_again_with_half_as_much_at_once(built, monkeypatch, where, caplog):
    """With dropout, so to the bits only if the random state is restored; and no gradient of the first try is left."""
    run, calm = built(), built()
    taken = sum(chunk.tokens for chunk in run.memory.plan(run.feed.draw(0)[0].length_N))
    calm.memory = at_most(calm.memory, taken // 2)
    wanted = two_steps(calm)
    fail_once(run, where, monkeypatch)
    assert two_steps(run) == wanted
    assert all(map(torch.equal, state_of(run), state_of(calm)))
    assert (run.state.token_budget, run.state.card) == (taken // 2, "toy card")
    assert caplog.text.count(f"out of memory on toy card; it is done again with at most {taken // 2:,} tokens") == 1


def test_the_gradient_is_that_of_a_step_that_had_the_memory(built, tree, tmp_path, monkeypatch):
    tree["model"]["path"] = str(tiny_bert(tmp_path / "plain", dropout=0.0))
    run, whole = built(), built()
    fail_once(run, "backward", monkeypatch)
    (_, _, norm), (_, _, wanted) = (loop.update(each, each.feed.draw(0)) for each in (run, whole))
    assert norm == pytest.approx(wanted, rel=1e-5)
    for found, expected in zip(state_of(run), state_of(whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_halving_ends_where_texts_are_encoded_one_by_one(built, monkeypatch):
    run = built()
    monkeypatch.setattr(loop.Run, "encode", out_of_memory)
    draw = run.feed.draw(0)
    longest = int(draw[0].length_N.max())
    with pytest.raises(TrainingError, match=rf"(?s)toy card.*one text of {longest} tokens.*model.max_length"):
        loop.update(run, draw)
    assert run.memory.chunk_tokens == longest


@pytest.mark.parametrize("where", ["a step", "the probe"])
def test_a_backward_pass_that_cannot_be_compiled_is_done_without(built, monkeypatch, where, caplog):
    """torch may compile it only when it is needed: the step is begun anew, with the same random state."""
    run, calm = (built(ToyCard(), batch_size=8) for _ in range(2))
    run.fitted = calm.fitted = where == "a step"
    words = run.model.backbone.get_input_embeddings().weight
    monkeypatch.setattr(run.model.backbone, "_compiled_call_impl", run.model.backbone._call_impl)

    def hook(gradient):
        handle.remove()
        raise TorchDynamoException("no such instruction\n\nand much more")

    handle = words.register_hook(hook)
    assert two_steps(run) == two_steps(calm)
    assert run.model.backbone._compiled_call_impl is None
    assert caplog.text.count("compile: off, BertModel cannot be compiled: no such instruction\n") == 1
    handle = words.register_hook(hook)
    with pytest.raises(TorchDynamoException):
        loop.update(run, run.feed.draw(2))


def test_without_a_card_of_its_own_a_lack_of_memory_names_the_key(built, monkeypatch):
    run = replace(built(), card=None)
    monkeypatch.setattr(loop.Run, "encode", out_of_memory)
    draw = run.feed.draw(0)
    taken = len(draw[0]) * int(draw[0].length_N.max())
    with pytest.raises(TrainingError, match=rf"(?s)toy card is full.*train.token_budget={taken // 2},"):
        loop.update(run, draw)


def test_the_loss_of_several_ranks_cannot_be_begun_anew(monkeypatch):
    monkeypatch.setattr(step_module, "world_size", lambda: 2)
    monkeypatch.setattr(step_module, "_health", out_of_memory)
    from tests.train.test_step import reference

    with pytest.raises(TrainingError, match=r"(?s)the loss needs more memory.*train.token_budget"):
        reference("dense")


def lacking_on_one(tree):
    """Rank 1 alone lacks memory: in the forward pass of step 1, in the backward pass of step 2."""
    built, real = loop.build, loop.run_step

    def build(*given, **named):
        return replace(built(*given, **named), card=ToyCard(), fitted=True, memory=Memory(10**6))

    def run_step(encode, *given, **how):
        where = places.pop(given[-1].step, None) if rank() == 1 else None
        if where is not None:
            fail_once(encode.__self__, where, pytest.MonkeyPatch())
        return real(encode, *given, **how)

    places = {1: "forward", 2: "backward"}
    loop.build, loop.run_step = build, run_step
    train_on_cpu(tree)


@pytest.mark.dist
def test_ranks_begin_a_step_anew_together(tree, tmp_path):
    tree["model"]["path"] = str(tiny_bert(tmp_path / "plain", dropout=0.0))
    tree["train"] |= {"steps": 3, "log_with": [], "checkpoint_every": 3}
    one = weights(loop.train(parse(Recipe, tree | {"output": str(tmp_path / "one")})).parent)
    on_ranks(2, lacking_on_one, tmp_path, tree | {"output": str(tmp_path / "two")})
    for name, tensor in weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, one[name], rtol=0, atol=2e-5)
    state = json.loads((tmp_path / "two/checkpoints/step-3/state.json").read_text())
    assert state["card"] == "toy card"
    assert 10 < state["token_budget"] < 200


def fitted_shards(tree):
    """Budget, chunks and norm of a first step on a rank's own card, and what is said of it."""
    recipe = parse(Recipe, tree)
    run = replace(loop.build(recipe, make_accelerator(recipe)), card=ToyCard(10**8 >> rank()))
    said = []
    budget.log.info = lambda text, *values: said.append(text % values)
    draw = run.feed.draw(0)
    _, _, norm = loop.update(run, draw)
    assert all(p.grad is None or torch.isfinite(p.grad.to_local()).all() for p in run.model.backbone.parameters())
    return run.memory.chunk_tokens, len(run.memory.plan(draw[0].length_N)), norm, run.state.card, said


@pytest.mark.dist
def test_ranks_with_shards_take_what_fits_the_smallest_of_their_cards(tree, tmp_path):
    """The passes of the probe are collectives too: every rank makes the same."""
    tree["train"] |= {"shard": True, "log_with": []}
    (budgets, chunks, norms, cards, said) = zip(*on_ranks(2, fitted_shards, tmp_path, tree), strict=True)
    assert len(set(budgets)) == 1
    assert budgets[0] > 1000
    assert (chunks, cards) == ((1, 1), ("toy card", "toy card"))
    assert norms[0] == norms[1] > 0
    assert said[0][-1] == f"toy card: up to {budgets[0]:,} tokens at once, as another rank has room for no more"
    assert said[1][-1].endswith(f"up to {budgets[0]:,} tokens at once")


def test_where_no_step_can_be_begun_anew_the_probe_is_not_either_and_less_is_taken(caplog):
    """Other ranks wait in a pass of the probe."""
    tried = []

    def probe(texts):
        tried.append(texts)
        return out_of_memory() if texts > 128 else 16 * texts

    with pytest.raises(TrainingError, match="one text of 16 tokens"):
        measured_budget(ToyCard(), probe, 16, held=0, repeats=False)
    assert tried == [128, 128, 256]
    sizes = []
    card = ToyCard(10**5)
    card.peak = lambda act: (act(), 1000 + 160 * sizes[-1])[1]
    count = lambda texts: sizes.append(texts) or 16 * texts
    assert [measured_budget(card, count, 16, 0, repeats=one) for one in (True, False)] == [7920, 5940]
    caplog.set_level("INFO")
    card.free_bytes, card.peak = 10**9, lambda act: (act(), 10**8 + 160_000 * sizes[-1])[1]
    measured_budget(card, count, 16, 4 * 10**8)
    said = "toy card: 1.0 GB free, 0.5 GB for every step and 0.01 MB a token: up to 40,000 tokens at once"
    assert caplog.messages[-1] == said


def test_what_zero2_will_hold_and_how_its_gradients_are_tried(monkeypatch):
    """DeepSpeed is not asked: gradients go nowhere."""
    weight = torch.nn.Parameter(torch.ones(30))
    groups = [{"params": [weight]}]
    inner = SimpleNamespace(state={})
    one = SimpleNamespace(zero=SimpleNamespace(param_groups=groups, inner=inner), bytes_a_weight=8)
    monkeypatch.setattr(engine, "world_size", lambda: 4)
    assert engine.Zero2.to_hold.fget(one) == (8 + 4) * 8 + 4 * engine.BUCKET_OF_ZERO2
    inner.state = {"is": "there"}
    assert engine.Zero2.to_hold.fget(one) == 4 * 8 + 4 * engine.BUCKET_OF_ZERO2
    engine.Zero2.try_backward(one, (weight * 2).sum())
    assert weight.grad is None


@pytest.mark.parametrize("free_bytes", [2 * 10**7, 10**8])
def test_a_card_takes_a_step_in_one_chunk_unless_it_does_not_fit(built, caplog, free_bytes):
    caplog.set_level("INFO")
    run = built(ToyCard(free_bytes), batch_size=40)
    random = torch.get_rng_state()
    loop.fit_to_card(run, run.card)
    budget = run.memory.chunk_tokens
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in run.model.parameters())
    assert caplog.text.count(f"up to {budget:,} tokens at once") == 1
    assert (run.state.token_budget, run.state.card) == (budget, "toy card")
    length = run.model.max_length
    assert run.card.peak(lambda: run.probe(budget // length)) < 0.85 * free_bytes
    assert run.card.peak(lambda: run.probe(2 * budget // length)) > free_bytes
    fitting = torch.full((budget // 9,), 9).numpy()
    assert len(run.memory.plan(fitting)) == 1
    chunks = run.memory.plan(torch.full((2 * budget // 9,), 9).numpy())
    assert sum(chunk.tokens for chunk in chunks if chunk.keep) <= budget


def test_a_card_that_cannot_take_one_text_says_so(built, monkeypatch):
    run = built(ToyCard(10**5))
    with pytest.raises(TrainingError, match=rf"(?s)too little memory.*one text of {run.model.max_length}.*max_length"):
        loop.update(run, run.feed.draw(0))
    run = built(ToyCard())
    monkeypatch.setattr(loop.Run, "encode", out_of_memory)
    with pytest.raises(TrainingError, match="too little memory"):
        loop.update(run, run.feed.draw(0))


def test_a_run_that_goes_on_keeps_its_budget_on_such_a_card_and_measures_another(built):
    run = built(ToyCard())
    run.state = replace(run.state, token_budget=77, card="toy card")
    loop.fit_to_card(run, run.card)
    assert (run.memory.chunk_tokens, run.memory.kept_tokens) == (77, 77)
    run.state = replace(run.state, card="another card")
    loop.fit_to_card(run, run.card)
    assert run.state.card == "toy card"
    assert run.memory.chunk_tokens > 77


def test_the_recipe_s_own_budget_is_not_measured(built):
    run = built(ToyCard(1), token_budget=50)
    run.memory = derive_memory(run.recipe.train, torch.device("cuda"))
    loop.fit_to_card(run, run.card)
    assert run.memory == Memory(50, 50, None, WORTH)
    assert derive_memory(TrainConfig(micro_batch=3), torch.device("cuda")) == Memory(2**31, None, 3, WORTH)


def test_the_chunks_of_a_cpu_are_as_they_were():
    cpu = torch.device("cpu")
    assert derive_memory(TrainConfig(), cpu) == Memory(2048, None, None, 128)
    assert derive_memory(TrainConfig(micro_batch=3), cpu) == Memory(2048, None, 3, 128)
    assert derive_memory(TrainConfig(token_budget=50), cpu) == Memory(50, 50, None, 128)


def test_an_evaluation_without_memory_goes_on_with_less_or_names_the_task(bert, files, monkeypatch):
    task = load_task(str(files / "scored.jsonl"))
    model = load(str(bert), pooling="mean")
    expected = evaluate(model, [task])[0].main_score
    forward, sizes = model.forward, []

    def on_a_card_with_room_for(most):
        def lacking(padded, outputs):
            sizes.append(padded.id_NT.numel())
            return forward(padded, outputs) if sizes[-1] <= most else out_of_memory()

        monkeypatch.setattr(model, "forward", lacking)

    on_a_card_with_room_for(100)
    assert evaluate(model, [task])[0].main_score == pytest.approx(expected, abs=1e-6)
    assert max(sizes) > 100 >= sizes[-1]
    on_a_card_with_room_for(3)
    with pytest.raises(EvaluationError, match=rf"(?s)task {task.name}.*one text.*max_length.*evaluate.tasks"):
        evaluate(model, [task])


def test_a_validation_loss_without_memory_is_computed_with_less(built, monkeypatch):
    run = built()
    run.model.eval()
    wanted = run.loss(*run.feed.draw(0)).item()
    fail_once(run, "forward", monkeypatch)
    assert run.loss(*run.feed.draw(0)).item() == pytest.approx(wanted, abs=1e-5)
    assert run.state.token_budget == run.memory.chunk_tokens < 10**6


def test_steps_that_several_threads_drew_are_those_of_one(built):
    run = built()
    for (tokens, parts), (wanted, _) in zip(run.draws(), run.feed.run_ahead(0, run.steps), strict=True):
        assert tokens.id_S.tolist() == wanted.id_S.tolist()
        assert parts[0].source in ("pairs", "scored")


def test_the_budget_by_hand():
    """1,000 bytes for every step, 10 a token, 20,000 that the optimizer will hold, of 100,000; the probe runs out of
    memory with more than `most` texts of 16 tokens."""

    class Card(ToyCard):
        def peak(self, act):
            before = len(tokens)
            act()
            return 1000 + 10 * sum(tokens[before:])

    def probe(most, texts):
        tokens.append(16 * texts)
        return out_of_memory() if texts > most else tokens[-1]

    tokens = []
    for most in (10**6, 2):
        assert measured_budget(Card(10**5), partial(probe, most), 16, held=20_000) == int(0.8 * 79_000 / 10)
    with pytest.raises(TrainingError, match="one text of 16 tokens"):
        measured_budget(Card(21_150), partial(probe, 10**6), 16, held=20_000)
