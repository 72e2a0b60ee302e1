"""Batches of P classes with K texts of each: exact in every batch, other rows in every pass, the same on all ranks."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedsmith.core.errors import RecipeError
from embedsmith.data import BatchPlan, PlanConfig, PlannedSource, Record, RecordSet
from embedsmith.data.plan.classes import ClassBatches
from embedsmith.losses import SupervisedContrastive
from embedsmith.train.feed import Supply, plan_of


def records(counts):
    return [
        Record(f"text {label}-{n}", task="classification", label=label)
        for label, count in enumerate(counts)
        for n in range(count)
    ]


def planned(counts, batch_size, texts, world=1, seed=0):
    order = ClassBatches.of(records(counts), batch_size, texts, "labels")
    source = PlannedSource(sum(counts), batch_size, name="labels", task="classification", order=order)
    return BatchPlan((source,), seed, world), order


def most_batches(counts, classes, texts):
    """Tried one after the other, from the definition: every batch takes the classes with most groups left."""
    groups, batches = [count // texts for count in counts], 0
    while sum(group > 0 for group in groups) >= classes:
        for place in sorted(range(len(groups)), key=lambda c: -groups[c])[:classes]:
            groups[place] -= 1
        batches += 1
    return batches


@given(
    counts=st.lists(st.integers(0, 40), min_size=2, max_size=9),
    classes=st.integers(1, 4),
    texts=st.integers(2, 5),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_every_batch_has_so_many_classes_with_so_many_texts(counts, classes, texts, seed):
    label_N = np.repeat(np.arange(len(counts)), counts)
    order = ClassBatches(label_N, classes, texts)
    assert order.batches == most_batches(counts, classes, texts)
    drawn = order(np.random.default_rng(seed))
    assert sorted(drawn.tolist()) == list(range(sum(counts)))
    for batch in drawn[: order.batches * classes * texts].reshape(order.batches, classes * texts):
        assert sorted(Counter(label_N[batch].tolist()).values()) == [texts] * classes


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_plan_of_classes_is_accounted_for_and_the_same_on_all_ranks(world):
    counts = (30, 9, 8, 8, 3)
    plan, order = planned(counts, 8, 4, world)
    label_N = order.label_N
    (account,) = plan.account(0)
    assert account.rows == account.seen + sum(account.unseen.values())
    assert account.unseen == {"no full batch": account.rows - 8 * order.batches}
    seen = []
    for step in range(3 * plan.steps_per_epoch):
        rows = plan.at(step).rows
        assert sorted(Counter(label_N[rows].tolist()).values()) == [4, 4]
        assert np.array_equal(rows, planned(counts, 8, 4, 1)[0].at(step).rows)
        assert np.array_equal(rows, np.concatenate([plan.at(step).rows_of(r, world) for r in range(world)]))
        seen.append(rows)
    assert len(np.unique(np.concatenate(seen))) > account.seen, "another pass leaves others out"


def test_what_cannot_be_batched_by_class_is_refused():
    with pytest.raises(RecipeError, match="a batch_size that is a multiple of per_class"):
        ClassBatches.of(records((8, 8)), 10, 4, "labels")
    with pytest.raises(RecipeError, match="a batch_size that is a multiple of per_class"):
        ClassBatches.of(records((8, 8)), None, 4, "labels")
    with pytest.raises(RecipeError, match=r"4 classes, and 2 have so many rows(?s:.*)batch_size=8"):
        ClassBatches.of(records((8, 8, 3)), 16, 4, "labels")
    unknown = [replace(record, label=None) for record in records((1,))]
    with pytest.raises(RecipeError, match="1 of 17 rows have no class"):
        ClassBatches.of([*records((8, 8)), *unknown], 8, 4, "labels")
    found = RecordSet("labels", "classification", records((8, 8)), "0")
    supply = Supply(found, SupervisedContrastive(), 8, 1.0, 1, 0, per_class=4)
    assert plan_of([supply], 1).steps_per_epoch == 2
    for config in (PlanConfig(lengths="auto"), PlanConfig(duplicates="forbid")):
        with pytest.raises(RecipeError, match="another rule of which rows meet"):
            plan_of([supply], 1, config)
