"""Length groups and token budgets (M3's efficient batching)."""

import numpy as np
import pytest
from tests.plans import epoch_of, plan_from

from embedsmith.core.errors import RecipeError
from embedsmith.data import PlanConfig, RowFacts
from embedsmith.data.plan.passes import _shareable

WORLD = 4


def lengths(values):
    values = np.asarray(values, np.int32)
    return RowFacts(np.arange(len(values)), np.arange(len(values)) + 10**6, np.arange(len(values) + 1), values)


def mixed_lengths(size=2000, seed=0):
    return lengths(np.random.default_rng(seed).lognormal(4, 1, size).clip(4, 512).astype(int))


def plan_of(known, batch_size, world=WORLD, **config):
    return plan_from((len(known),), (batch_size,), 1, world, config=PlanConfig(**config), facts=(known,))


@pytest.mark.parametrize(("rows", "shared"), [(0, 1), (1, 1), (3, 3), (5, 4), (11, 6), (13, 12), (25, 24)])
def test_as_many_rows_as_ranks_can_share(rows, shared):
    """12 is what they have to be a multiple of, or a divisor."""
    assert _shareable(rows, 12) == shared


def test_rows_of_a_batch_are_of_one_group_or_carried_from_a_shorter_one():
    known = mixed_lengths()
    edges = np.asarray([50, 100, 300])
    crossed = 0
    for planned in epoch_of(plan_of(known, 32, lengths=tuple(edges))):
        groups = np.searchsorted(edges, known.length_N[planned.rows], side="right")
        crossed += len(set(groups.tolist())) > 1
    assert crossed <= len(edges)


def test_a_group_begins_at_its_edge():
    """Left-closed, as in the released code: 500 tokens are of the second group."""
    plan = plan_of(lengths([499] * 8 + [500] * 8), 8, 1, lengths=(500,))
    assert [known.tolist() for known in (plan.cuts[0].group_N,)] == [[0] * 8 + [1] * 8]
    assert {len(set(planned.length.tolist())) for planned in epoch_of(plan)} == {1}


def test_each_group_has_its_own_batch_size():
    plan = plan_of(lengths([10] * 96 + [600] * 64 + [2000] * 16), None, 1, lengths=(500, 1000), batch_sizes=(48, 32, 8))
    assert sorted((len(p.rows), int(p.length.max())) for p in epoch_of(plan)) == [
        *[(8, 2000)] * 2,
        *[(32, 600)] * 2,
        *[(48, 10)] * 2,
    ]


def test_a_token_budget_is_kept_and_nearly_used():
    known = mixed_lengths(20_000)
    plan = plan_from((20_000,), (None,), world=WORLD, config=PlanConfig(batch_tokens=32768), facts=(known,), texts=(3,))
    cost = np.asarray([len(p.rows) * 3 * int(p.length.max()) for p in epoch_of(plan)])
    assert cost.max() <= 32768
    assert np.median(cost) > 0.8 * 32768
    real = sum(int(p.length.sum()) * 3 for p in epoch_of(plan))
    assert real / cost.sum() > 0.9
    assert all(len(p.rows) % 4 == 0 for p in epoch_of(plan))


def test_ranks_get_about_the_same_tokens():
    known = mixed_lengths(4000)
    shares = {True: [], False: []}
    for planned in epoch_of(plan_of(known, 64, lengths=(512,))):
        dealt = [int(known.length_N[planned.rows_of(rank, WORLD)].sum()) for rank in range(WORLD)]
        cut = [int(known.length_N[rows].sum()) for rows in np.split(planned.rows, WORLD)]
        shares[True].append(max(dealt) / np.mean(dealt))
        shares[False].append(max(cut) / np.mean(cut))
    assert np.mean(shares[True]) < 1.1 < 1.2 < np.mean(shares[False])


def test_the_longest_rows_are_seen_however_few():
    known = lengths([10] * 1000 + [500] * 3)
    plan = plan_of(known, 64, lengths=(400,))
    seen = {row for epoch in range(12) for planned in epoch_of(plan, epoch) for row in planned.rows.tolist()}
    assert {1000, 1001, 1002} <= seen


def test_automatic_groups_waste_little_and_have_several_batches():
    known = mixed_lengths(20_000)
    plan = plan_of(known, 64, lengths="auto")
    assert all(batches >= 3 for batches in plan.cuts[0].batches_G)
    padded = sum(len(p.rows) * int(p.length.max()) for p in epoch_of(plan))
    assert sum(int(p.length.sum()) for p in epoch_of(plan)) / padded > 0.85
    assert plan.unused_rows[0] < 64


def test_batches_of_all_lengths_come_mixed():
    plan = plan_of(mixed_lengths(5000), 64, lengths="auto")
    means = np.asarray([p.length.mean() for p in epoch_of(plan)])
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.3


def test_a_source_smaller_than_any_batch_makes_one():
    plan = plan_of(lengths([10, 20, 30, 40, 50]), 64, lengths=(25,))
    assert [len(planned.rows) for planned in epoch_of(plan)] == [4]
    assert plan.account(0)[0].unseen == {"ranks": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (100, 50)}, "ascending"),
        ({"lengths": (0, 50)}, "lengths is .*(.|\n)*greater than 0"),
        ({"lengths": (50,), "batch_sizes": (8,)}, "1 values for 1 edges"),
        ({"batch_sizes": (8,)}, "0 edges"),
        ({"lengths": (50,), "batch_sizes": (8, 4), "batch_tokens": 100}, "both set"),
        ({"batch_tokens": 0}, "batch_tokens is 0(.|\n)*greater than 0"),
        ({"temperature": 2.0}, "temperature is 2.0(.|\n)*less than or equal to 1"),
        ({"schedule": "ratio"}, "set both"),
        ({"ratio": {"sts": 1.0}}, "set both"),
        ({"schedule": "ratio", "ratio": {"sts": 0.0}}, "ratio is .*(.|\n)*greater than 0"),
    ],
)
def test_what_a_recipe_may_not_say(changes, message):
    with pytest.raises(RecipeError, match=message):
        PlanConfig(**changes)


def test_batches_that_ranks_cannot_share_are_refused_with_the_remedy():
    known = lengths([10] * 60)
    with pytest.raises(RecipeError, match=r"8 rows, by length, cannot be shared equally by 3(.|\n)*multiple"):
        plan_from((60,), (None,), world=3, config=PlanConfig(batch_tokens=160), facts=(known,))
    assert plan_from((60,), (None,), world=3, config=PlanConfig(batch_tokens=120, multiple=3), facts=(known,))
    with pytest.raises(RecipeError, match="batches of 1 rows"):
        plan_from((60,), (None,), world=2, config=PlanConfig(batch_tokens=20), facts=(known,))
