"""Whatever the memory, and on however many ranks, the gradient is the same."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from embedsmith.core.batch import Progress, Side
from embedsmith.core.collectives import average_gradients, rank, world_size
from embedsmith.core.errors import TrainingError
from embedsmith.core.reps import Dense
from embedsmith.losses import CoSENT, InfoNCE, M3SelfDistillation, Matryoshka
from embedsmith.train.step import Memory, evaluate_parts, run_step
from tests.ranks import on_ranks
from tests.train.tiny import WHOLE, TinyHeads, assert_same, gradients, pair_part, retrieval_part, together, tokens

HEADS = ["dense", "sparse", "multivector"]
MEMORIES = [
    Memory(10**9, None, 1),
    Memory(20, None),
    Memory(20, 20),
    Memory(30, 60),
    Memory(10**9, None, 7),
    Memory(1, 1),
]


def make_part(head, rank_=0, world=1):
    if head == "pairs":
        return pair_part(CoSENT(), rank_, world)
    if head == "m3":  # all heads and their ensemble, in the middle of the change to distillation, Matryoshka on dense
        loss = Matryoshka(M3SelfDistillation(0.1, start_step=0, ramp_steps=2), (3, 8))
        return retrieval_part(loss, rank_, world)
    return retrieval_part(InfoNCE(temperature=0.1, head=head), rank_, world)


def reference(head, dropout=0.0, memory=WHOLE):
    model = TinyHeads(dropout)
    torch.manual_seed(7)
    output = run_step(model, *make_part(head), memory)
    return output, gradients(model)


def test_the_step_equals_autograd_written_out():
    """No leaves, no chunks: cross-entropy over the candidates, differentiated in one graph."""
    texts, [part] = make_part("dense")
    model = TinyHeads()
    query, document = model(texts, ["dense"])["dense"].vector_ND.split(part.ids.sizes)
    batch = part.ids.with_sides(*(Side({"dense": Dense(vector)}) for vector in (query, document)), task="retrieval")
    target_Q = torch.searchsorted(batch.document_id_N, batch.positive_id_QP[:, 0])
    expected = F.cross_entropy(query @ document.T / 0.1, target_Q)
    expected.backward()
    output, got = reference("dense")
    assert output.value.item() == pytest.approx(expected.item(), abs=1e-12)
    assert_same(got, gradients(model))


@pytest.mark.parametrize("memory", MEMORIES, ids=str)
@pytest.mark.parametrize("head", [*HEADS, "m3", "pairs"])
def test_memory_does_not_change_the_gradient(head, memory):
    expected_output, expected = reference(head)
    output, got = reference(head, memory=memory)
    assert output.value.item() == pytest.approx(expected_output.value.item(), abs=1e-12)
    assert_same(got, expected)


def test_a_learnable_temperature_gets_the_same_gradient_in_every_mode():
    found = []
    for memory in [WHOLE, *MEMORIES]:
        loss = InfoNCE(temperature=0.1, learn_temperature=True)
        extras = dict(loss.extras(8))
        run_step(TinyHeads(), *retrieval_part(loss), memory, extras)
        found.append(next(extras["temperature"].parameters()).grad.item())
    assert found == pytest.approx([found[0]] * len(found), rel=1e-6)
    assert abs(found[0]) > 1e-3


@pytest.mark.parametrize("head", HEADS)
def test_replay_draws_the_same_dropout(head):
    """Equal chunks, with and without replay: dropout differs between chunks but not between a chunk and its replay."""
    kept_output, kept = reference(head, dropout=0.3, memory=Memory(30, None))
    replayed_output, replayed = reference(head, dropout=0.3, memory=Memory(30, 30))
    assert kept_output.replayed_chunks == 0
    assert replayed_output.replayed_chunks > 2
    assert kept_output.value.item() == replayed_output.value.item()
    assert_same(replayed, kept)


def test_replay_leaves_the_random_state_as_the_plain_pass_does():
    states = []
    for memory in (Memory(30, None), Memory(30, 30)):
        reference("dense", dropout=0.3, memory=memory)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_chunks_are_of_similar_length_and_only_the_overflow_is_replayed():
    length_N = tokens(40, 5).length_N
    chunks = Memory(20, 60).plan(length_N)
    assert sorted(row for chunk in chunks for row in chunk.rows) == list(range(40))
    sizes = [len(c.rows) * length_N[c.rows].max() for c in chunks]
    assert max(sizes) <= 20
    assert sum(size for size, c in zip(sizes, chunks) if c.keep) <= 60
    assert 2 <= sum(c.keep for c in chunks) < len(chunks)
    assert sum(sizes) < 1.2 * length_N.sum()


def test_at_least_one_chunk_keeps_its_graph_and_the_others_are_encoded_without_one():
    """A budget below every chunk keeps the last all the same: replaying it would save nothing."""
    graphs, model = [], TinyHeads()

    def encode(texts, heads, rows):
        graphs.append(torch.is_grad_enabled())
        return model(texts, heads, rows)

    memory = Memory(30, 1)
    planned = memory.plan(make_part("dense")[0].length_N)
    assert [chunk.keep for chunk in planned] == [False] * (len(planned) - 1) + [True]
    output = run_step(encode, *make_part("dense"), memory)
    assert graphs == [False] * (len(planned) - 1) + [True] + [True] * (len(planned) - 1)
    assert output.replayed_chunks == len(planned) - 1


@pytest.mark.parametrize("head", HEADS)
def test_what_a_step_reports_holds_no_graph(head):
    output, _ = reference(head)
    numbers = [output.value, *(number for part in output.parts.values() for number in part.values())]
    assert len(numbers) > 1
    assert not any(number.requires_grad for number in numbers)


def test_validation_draws_no_graph_and_weighs_its_parts():
    model, graphs = TinyHeads(), []

    def encode(texts, heads, rows):
        graphs.append(torch.is_grad_enabled())
        return model(texts, heads, rows)

    texts, parts = together(retrieval_part(InfoNCE(temperature=0.1), weight=0.5), pair_part(CoSENT(), weight=2.0))
    loss = evaluate_parts(encode, texts, parts, Memory(30), {}, Progress())
    first, second = (reference(head)[0].value.item() for head in ("dense", "pairs"))
    assert loss.item() == pytest.approx(0.5 * first + 2.0 * second, abs=1e-12)
    assert len(graphs) > 2
    assert not any(graphs)


def test_two_parts_add_up_with_their_weights():
    model = TinyHeads()
    both = together(retrieval_part(InfoNCE(temperature=0.1), weight=0.5), pair_part(CoSENT(), weight=2.0))
    run_step(model, *both, Memory(20, 20))
    both = gradients(model)
    _, first = reference("dense")
    _, second = reference("pairs")
    assert_same(both, [0.5 * a + 2.0 * b for a, b in zip(first, second)])


def one_rank():
    """The averaged gradient of every case; one start of processes for all of them, because starting is slow."""
    found = {}
    for head in [*HEADS, "m3", "pairs"]:
        for name, memory in (("whole", WHOLE), ("replayed", Memory(20, 20))):
            model = TinyHeads()
            run_step(model, *make_part(head, rank(), world_size()), memory)
            average_gradients(model.parameters())
            found[f"{head}, {name}"] = gradients(model)
    found["undefined"] = undefined_on_one_rank(3)
    return found


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world, tmp_path):
    results = on_ranks(world, one_rank, tmp_path)
    for case, got in results[0].items():
        if case != "undefined":
            assert_same(got, reference(case.split(",")[0])[1])
        for other in results[1:]:
            assert_same(other[case], got, atol=0)


def undefined_on_one_rank(steps):
    """At the step of its own number a rank meets a single pair, for which the local form of CoSENT is undefined.
    No rank may wait for another because of it."""
    model = TinyHeads()
    for step in range(steps):
        part = pair_part(CoSENT(cross_device=False), rank(), world_size())
        if step == rank():
            part = pair_part(CoSENT(cross_device=False), pairs=1)
        run_step(model, *part, WHOLE, progress=Progress(step, steps))
        average_gradients(model.parameters())
    return gradients(model)


def test_a_value_that_is_not_finite_is_named_before_any_gradient_is_touched():
    class Broken(TinyHeads):
        def forward(self, batch, heads, rows):
            reps = super().forward(batch, heads, rows)
            return {"dense": Dense(reps["dense"].vector_ND * float("nan"))}

    model = Broken()
    with warnings.catch_warnings(), pytest.raises(TrainingError, match=r"^step 3, source retrieval.*representation"):
        warnings.simplefilter("error")  # of a number that is read with its graph
        run_step(model, *retrieval_part(InfoNCE()), WHOLE, progress=Progress(3, 10))
    assert all(p.grad is None for p in model.parameters())
