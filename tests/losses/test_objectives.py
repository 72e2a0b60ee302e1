"""Guides, grades and the memory of earlier steps: equal to sentence-transformers where it has them, to plain loops, in
blocks and on several ranks; and what is logged of a loss at several widths."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from embedsmith.core.batch import RetrievalBatch, Side
from embedsmith.core.collectives import rank, world_size
from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.reps import Dense
from embedsmith.losses import F2LLM, CrossBatchBalance, GISTEmbed, InfoNCE, Matryoshka, PerHead, Sum, Symmetric
from embedsmith.losses.terms import CrossBatchMemory
from tests.losses.examples import RETRIEVAL, Retrieval, Tiny, make_batch, make_extras, run
from tests.losses.world import World, everything, known_positives, mean, queries
from tests.ranks import on_ranks

T = 0.2
PLAIN = RETRIEVAL["plain"]


class Given(nn.Module):
    """A model of sentence-transformers that gives what it is asked for."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer, self.max_seq_length = tokenizer, 8

    def forward(self, features):
        return {"sentence_embedding": features["vector"]}


def one_batch(tables, count):
    """A batch of `count` queries with a positive and a negative each; `tables`: vectors of the model and the guide."""
    ids = torch.arange(3 * count)
    sides = [
        Side({name: Dense(F.normalize(table[rows], dim=-1)) for name, table in tables.items()})
        for rows in (ids[:count], ids[count:])
    ]
    return RetrievalBatch(
        task="retrieval",
        query=sides[0],
        document=sides[1],
        query_id_Q=ids[:count],
        positive_id_QP=ids[count : 2 * count, None],
        negative_id_QM=ids[2 * count :, None],
        document_id_N=ids[count:],
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (GISTEmbed(0.05), {}),
        (GISTEmbed(0.05, margin=0.1), {"margin": 0.1}),
        (GISTEmbed(0.05, relative_margin=0.3), {"margin": 0.3, "margin_strategy": "relative"}),
        (GISTEmbed(0.05, queries=False, positives=False), {"contrast_anchors": False, "contrast_positives": False}),
        (GISTEmbed(0.05, block_size=4), {}),
    ],
    ids=str,
)
def test_gist_embed_is_that_of_sentence_transformers(ours, theirs, bert):
    from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss
    from transformers import AutoTokenizer

    model = Given(AutoTokenizer.from_pretrained(bert))
    torch.manual_seed(5)
    count = 7
    tables = {name: torch.randn(3 * count, 6, dtype=torch.float64) for name in ("dense", "guide")}
    tables["guide"][:count] += tables["guide"][count : 2 * count]  # a guide that finds most positives
    leaf = tables["dense"].clone().requires_grad_()
    features = [{"vector": side} for side in leaf.split(count)]
    guide = Given(model.tokenizer)
    loss = GISTEmbedLoss(model, guide, temperature=0.05, **theirs)
    guides = iter(tables["guide"].split(count))
    guide.forward = lambda features: {"sentence_embedding": next(guides)}
    expected = loss(features, None)
    (gradient,) = torch.autograd.grad(expected, leaf)

    own = tables["dense"].clone().requires_grad_()
    batch = one_batch({"dense": own.detach(), "guide": tables["guide"]}, count)
    value = ours(batch).value
    value.backward()
    whole = torch.cat([side.local["dense"].vector_ND.grad for side in batch.sides()])
    F.normalize(own, dim=-1).backward(whole)
    assert value.item() == pytest.approx(expected.item(), abs=1e-9)
    torch.testing.assert_close(own.grad, gradient, rtol=0, atol=1e-9)


def test_a_batch_without_a_guide_is_a_data_error():
    batch, _ = make_batch(Tiny(), PLAIN, GISTEmbed())
    for side in batch.sides():
        del side.local["guide"]
    with pytest.raises(DataError, match="set `guide` for this source"):
        GISTEmbed()(batch)


def test_grades_of_one_and_none_are_plain_infonce_and_a_single_grade_is_too():
    plain = run(InfoNCE(T), PLAIN)[0].item()
    batch, _ = make_batch(Tiny(), PLAIN, InfoNCE(T))
    nobody = replace(batch, positive_grade_QP=None, negative_grade_QM=None)
    for grades in ("weights", "soft"):
        assert InfoNCE(T, grades=grades)(nobody).value.item() == pytest.approx(plain, abs=1e-12)


def test_blocks_of_guides_and_grades_equal_the_whole():
    for loss in (InfoNCE(T, guide_margin=0.0, include_qq=True), InfoNCE(T, grades="soft"), GISTEmbed(T)):
        for example in (RETRIEVAL["adversarial"], RETRIEVAL["labels"]):
            whole, gradients = run(loss, example)
            for size in (1, 3):
                value, chunked = run(replace(loss, block_size=size), example)
                assert value.item() == pytest.approx(whole.item(), abs=1e-12)
                for a, b in zip(chunked, gradients, strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# ---- memory

STEPS = [
    RETRIEVAL["adversarial"],
    Retrieval([0, 8, 9, 3], [[18], [19], [31], [32]], [[33, 10], [34, 20], [35, 36], [37, 19]]),
    Retrieval([0, 1, 8, 5], [[10], [38], [19], [39]], [[21, 22], [45, 46], [47, 48], [18, 31]]),
]
LABELLED = [replace(step, label=[query % 3 for query in step.query]) for step in STEPS]


def trained(loss, steps, source="a"):
    """Value and gradients of every step, what is kept of one used in the next; this rank has its rows."""
    model, extras = Tiny(), make_extras(loss)
    results = []
    for example in steps:
        rows = torch.arange(len(example)).tensor_split(world_size())[rank()].tolist()
        batch, _ = make_batch(model, example.rows(rows), loss, extras)
        batch = replace(batch, source=source)
        output = loss(batch)
        output.value.backward()
        for side in batch.sides():
            side.settle()
        results.append((output.value.detach(), batch.query.local["dense"].vector_ND.grad.clone()))
        loss.remember(batch)
    return results, extras


def naive(steps, size):
    """The same from the definition: texts kept newest first, by their numbers within a step."""
    kept, values = [], []
    for example in steps:
        world = World(example, Tiny(), {})
        key_of = example.query if example.label is None else example.label
        here = everything(world)
        rows = []
        for row, query, positives, _ in queries(world):
            if not positives:
                continue
            known = known_positives(world, row, True)
            older = {d: keys for d, keys in reversed(kept) if d not in here}  # the newest of each text
            pool = [d for d in here if d not in known] + [d for d, key in older.items() if key != key_of[row]]
            z = math.fsum(math.exp(world.score("dense", query, d) / T) for d in pool)
            ups = [math.exp(world.score("dense", query, d) / T) for d in positives]
            rows.append(mean([-math.log(up / (up + z)) for up in ups]))
        values.append(mean(rows))
        asked = {}
        for row, positives in enumerate(example.positive):
            for d in positives:
                asked.setdefault(d, []).append(key_of[row])
        kept = ([(d, min(asked[d]) if d in asked else None) for d in sorted(here)] + kept)[:size]
    return values


@pytest.mark.parametrize("steps", [STEPS, LABELLED], ids=["texts", "classes"])
@pytest.mark.parametrize("size", [5, 100])
def test_the_memory_equals_a_plain_loop(steps, size):
    found, _ = trained(InfoNCE(T, memory=size), steps)
    assert [value.item() for value, _ in found] == pytest.approx(naive(steps, size), abs=1e-9)
    without, _ = trained(InfoNCE(T), steps)
    assert found[0][0] == without[0][0], "nothing is kept before the first step"
    assert found[2][0] > without[2][0] + 1e-3


def test_the_memory_keeps_sources_apart_waits_and_is_not_measured():
    loss = InfoNCE(T, memory=100)
    _, extras = trained(loss, STEPS[:2], source="another")
    batch, _ = make_batch(Tiny(), STEPS[2], loss, extras)
    plain = InfoNCE(T)(batch).value.item()
    assert loss(replace(batch, source="a")).value.item() == plain
    assert loss(replace(batch, source="another")).value.item() > plain
    late = replace(loss, memory_after=4)  # the examples are at step 3
    assert late(replace(batch, source="another")).value.item() == plain
    measured = replace(batch, source="another", extras={})
    assert loss(measured).value.item() == plain


def test_documents_search_in_no_memory_of_documents():
    both = [InfoNCE(T, memory=100, symmetric=True), Symmetric(InfoNCE(T, memory=100))]
    for loss in both:
        found, extras = trained(loss, STEPS)
        assert isinstance(extras["memory"], CrossBatchMemory)
        one_way = [value for value, _ in trained(InfoNCE(T, memory=100), STEPS)[0]]
        plain = [
            trained(InfoNCE(T, symmetric=True), [s])[0][0][0] * 2 - trained(InfoNCE(T), [s])[0][0][0] for s in STEPS
        ]
        for (value, _), there, back in zip(found, one_way, plain, strict=True):
            assert value.item() == pytest.approx((there + back).item() / 2, abs=1e-10)


def test_a_memory_in_other_losses_is_kept_and_only_of_dense_vectors():
    for loss in (Sum((InfoNCE(T, memory=9),)), Matryoshka(InfoNCE(T, memory=9), (4,))):
        _, extras = trained(loss, STEPS[:1])
        assert (extras["memory"].id_X >= 0).sum() == 9
    with pytest.raises(RecipeError, match="memory of a Sparse head"):
        trained(PerHead(InfoNCE(T, memory=9), {"sparse": 1.0}), STEPS)


def test_what_is_not_finite_is_not_kept():
    memory = CrossBatchMemory(4, 6)
    table = torch.randn(6, 6)
    table[3] = float("nan")
    memory.add(one_batch({"dense": table}, 2), "dense")
    assert memory.id_X.tolist() == [2, 4, 5, -1]
    assert torch.isfinite(memory.vector_XD).all()


def blocks_of_memory():
    """On a rank: the memory in blocks and as a whole, and what is kept."""
    results = [
        trained(replace(InfoNCE(T, memory=size), block_size=block), LABELLED) for size in (5, 30) for block in (None, 2)
    ]
    return [(found, extras["memory"].id_X.tolist()) for found, extras in results]


@pytest.mark.dist
def test_the_memory_is_the_same_on_two_ranks_and_in_blocks(tmp_path):
    torch.set_num_threads(1)
    expected = blocks_of_memory()
    ranks = on_ranks(2, blocks_of_memory, tmp_path)
    for case, (found, kept) in enumerate(expected):
        assert [theirs[case][1] for theirs in ranks] == [kept, kept]
        for step, (value, gradient) in enumerate(found):
            theirs = [one[case][0][step] for one in ranks]
            assert torch.stack([v for v, _ in theirs]).mean().item() == pytest.approx(value.item(), abs=1e-10)
            whole = torch.cat([g for _, g in theirs]) / 2  # gradients are averaged over ranks
            torch.testing.assert_close(whole, gradient, rtol=0, atol=1e-10)
    for a, b in ((0, 1), (2, 3)):
        for (value, gradient), (in_blocks, other) in zip(expected[a][0], expected[b][0], strict=True):
            assert in_blocks.item() == pytest.approx(value.item(), abs=1e-12)
            torch.testing.assert_close(other, gradient, rtol=0, atol=1e-12)


# ---- what is logged


def test_parts_at_several_widths_are_means_as_the_loss_is():
    loss = Matryoshka(F2LLM(T), (4, 2), (0.5, 2.0))
    batch, _ = make_batch(Tiny(), PLAIN, loss)
    output = loss(batch)
    assert sum(output.parts[name].item() for name in ("hard", "in_batch")) == pytest.approx(output.value.item())
    each = [float(F2LLM(T)(replace(batch, widths=(width,))).parts["hard"]) for width in (8, 4, 2)]
    expected = (each[0] + 0.5 * each[1] + 2.0 * each[2]) / 3.5
    assert output.parts["hard"].item() == pytest.approx(expected)
    mixed = Matryoshka(PerHead(InfoNCE(T), {"dense": 1.0, "sparse": 1.0}), (4,))
    batch, _ = make_batch(Tiny(), PLAIN, mixed)
    output = mixed(batch)
    assert output.parts["dense"].item() + output.parts["sparse"].item() == pytest.approx(output.value.item())


def counted(ranks, spread):
    rows = Retrieval([0, 1, 0, 3], [[10], [11], [12], [13]], [[20, 21], [22, 11], [23, 10], [-1, -1]])
    if spread:
        rows = replace(rows, negative=[slots[rank() :: ranks] for slots in rows.negative])
    elif ranks > 1:
        rows = rows.rows([2 * rank(), 2 * rank() + 1])
    batch, _ = make_batch(Tiny(), rows, CrossBatchBalance(T))
    return CrossBatchBalance(T)(batch).parts["negatives"].item()


@pytest.mark.dist
def test_the_negatives_of_a_query_are_counted_wherever_they_lie(tmp_path):
    """Query 0 stands in two rows and has 20, 21, 23 (10 is its positive); 1 has 22, and 3 has none."""
    expected = (3 + 1 + 3 + 0) / 4
    assert counted(1, False) == pytest.approx(expected)
    for spread in (False, True):
        folder = tmp_path / str(spread)
        folder.mkdir()
        for found in on_ranks(2, counted, folder, 2, spread):
            assert found == pytest.approx(expected)
