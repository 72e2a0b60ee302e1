"""Shares and order of the steps."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from tests.plans import epoch_of, plan_from

from embedsmith.core.errors import RecipeError
from embedsmith.data import PlanConfig
from embedsmith.data.plan.config import _spread

TASKS = ("retrieval", "sts", "retrieval")
SIZES = (640, 64, 320)


def plan_of(sizes=SIZES, tasks=TASKS, batch=16, weights=None, small="shrink", **config):
    config = PlanConfig(small=small, **config)
    return plan_from(sizes, (batch,) * len(sizes), 5, tasks=tasks, weights=weights, config=config)


def tasks_of(plan, epoch=0):
    return [TASKS[planned.source] for planned in epoch_of(plan, epoch)]


def test_proportional_is_the_default():
    assert plan_of().steps_of == (40, 4, 20)


def test_balanced_gives_every_task_the_same_steps_and_shortens_none():
    plan = plan_of(schedule="balanced")
    assert plan.steps_of == (40, 60, 20)
    assert plan.account(0)[1].drawn == 60 * 16
    assert plan.account(0)[1].seen == 64


def test_a_cycled_source_sees_every_row_equally_often():
    rows = Counter(r for p in epoch_of(plan_of(schedule="balanced")) if p.source == 1 for r in p.rows.tolist())
    assert set(rows.values()) == {15}


@pytest.mark.parametrize(
    ("ratio", "steps"),
    [
        ({"retrieval": 3.0, "sts": 1.0}, (40, 20, 20)),
        ({"retrieval": 60.0, "sts": 4.0}, (40, 4, 20)),
        ({"retrieval": 1.0, "sts": 2.0}, (40, 120, 20)),
        ({"retrieval": 100.0, "sts": 1.0}, (267, 4, 133)),
    ],
)
def test_ratio_gives_tasks_their_shares(ratio, steps):
    assert plan_of(schedule="ratio", ratio=ratio).steps_of == steps


@pytest.mark.parametrize(("temperature", "steps"), [(1.0, (40, 4, 20)), (0.0, (22, 21, 21)), (0.5, (32, 10, 22))])
def test_temperature_lies_between_equal_and_proportional(temperature, steps):
    """Shares of rows ** temperature, in as many steps: 25.3 : 8 : 17.9 of 64 at one half."""
    plan = plan_of(schedule="temperature", temperature=temperature)
    assert plan.steps_of == steps
    assert plan.steps_per_epoch == 64


def test_what_an_epoch_does_not_reach_is_counted_and_comes_in_the_next():
    plan = plan_of(schedule="temperature", temperature=0.5)
    assert plan.account(0)[0].unseen == {"not reached": 128}
    rows = Counter(r for e in range(5) for p in epoch_of(plan, e) if p.source == 0 for r in p.rows.tolist())
    assert set(rows.values()) == {4}  # five epochs of 32 steps are four passes of 40


def test_a_weight_below_one_sees_the_other_half_in_the_next_epoch():
    plan = plan_of((64,), ("sts",), weights=(0.5,))
    halves = [{r for p in epoch_of(plan, epoch) for r in p.rows.tolist()} for epoch in (0, 1)]
    assert len(halves[0]) == len(halves[1]) == 32
    assert not halves[0] & halves[1]


def test_strict_alternates_tasks_and_spreads_sources():
    plan = plan_of(schedule="balanced", order="strict")
    tasks = tasks_of(plan)
    assert all(a != b for a, b in pairwise(tasks))
    retrieval = [planned.source for planned in epoch_of(plan) if planned.source != 1]
    assert all(retrieval[start : start + 3].count(2) == 1 for start in range(0, 60, 3))
    assert tasks == tasks_of(plan, 1)


def test_sequential_runs_through_one_source_after_the_other_in_a_drawn_order():
    plan = plan_of(order="sequential")
    orders = set()
    for epoch in range(12):
        sources = [planned.source for planned in epoch_of(plan, epoch)]
        runs = [source for place, source in enumerate(sources) if place == 0 or sources[place - 1] != source]
        assert sorted(runs) == [0, 1, 2]
        orders.add(tuple(runs))
    assert len(orders) > 3


def test_a_shuffled_epoch_has_the_steps_asked_for_in_no_order():
    tasks = tasks_of(plan_of(schedule="balanced"))
    assert Counter(tasks) == {"retrieval": 60, "sts": 60}
    assert any(a == b for a, b in pairwise(tasks))


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        ({"retrieval": 1.0, "stss": 1.0}, "no source has the task 'stss' .did you mean 'sts'"),
        ({"retrieval": 1.0}, "no share for the task 'sts'"),
    ],
)
def test_a_ratio_names_the_tasks_there_are(ratio, message):
    with pytest.raises(RecipeError, match=message):
        plan_of(schedule="ratio", ratio=ratio)


def test_a_small_source_repeats_rows_to_fill_its_batch_if_asked(caplog):
    plan = plan_of((64, 5), ("sts", "sts"), small="pad")
    rows = next(planned.rows for planned in epoch_of(plan) if planned.source == 1)
    assert sorted(Counter(rows.tolist()).values()) == [3, 3, 3, 3, 4]
    assert plan.account(0)[1].seen == 5
    assert "has 5 rows, fewer than its batch_size 16: rows are repeated to fill 16" in caplog.text


def test_a_small_source_is_left_out_only_if_asked_and_with_a_warning(caplog):
    plan = plan_of((64, 5), ("sts", "sts"), small="drop")
    assert {planned.source for planned in epoch_of(plan)} == {0}
    assert plan.account(0)[1].unseen == {"too small": 5}
    assert "has 5 rows, fewer than its batch_size 16: it is left out" in caplog.text
    with pytest.raises(RecipeError, match="every source is too small"):
        plan_of((5,), ("sts",), small="drop")


def test_one_row_makes_a_batch_of_one():
    plan = plan_of((1,), ("sts",))
    assert [planned.rows.tolist() for planned in epoch_of(plan)] == [[0]]


def test_an_order_of_its_own_is_followed():
    """Streams say in which order they can be read."""
    blocks = lambda chance: np.concatenate([np.arange(16) + 16 * block for block in chance.permutation(4)])
    plan = plan_from((64,), (16,), orders=(blocks,))
    for planned in epoch_of(plan):
        assert planned.rows.tolist() == list(range(planned.rows[0], planned.rows[0] + 16))
    assert sorted(int(planned.rows[0]) for planned in epoch_of(plan)) == [0, 16, 32, 48]


def test_steps_of_each_source_stand_at_the_middles_of_equal_parts_of_the_way():
    assert _spread([1, 3]).tolist() == [1, 0, 1, 1]  # at 1/2; at 1/6, 1/2 and 5/6
    assert _spread([2, 5, 0]).tolist() == [1, 0, 1, 1, 1, 0, 1]
