"""The invariants of CoDiEmb's sampler (specification A.5), on one to eight ranks."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.plans import plan_from

from embedsmith.core.errors import RecipeError
from embedsmith.data import BatchPlan
from embedsmith.data.plan import separate
from embedsmith.data.plan.config import _apportion

RANKS = range(1, 9)
SIZES = (1000, 257, 64)


def plan_for(world, seed=3):
    return plan_from(SIZES, (24 * world, 8 * world, 3 * world), seed, world)


def epoch_of(plan, epoch=0):
    return [plan.at(epoch * plan.steps_per_epoch + step) for step in range(plan.steps_per_epoch)]


@pytest.mark.parametrize("world", RANKS)
def test_slices_of_ranks_are_equal_disjoint_and_together_the_batch(world):
    for planned in epoch_of(plan_for(world)):
        slices = [planned.rows_of(rank, world) for rank in range(world)]
        assert len({len(rows) for rows in slices}) == 1
        assert np.array_equal(np.concatenate(slices), planned.rows)
        assert len(set(planned.rows.tolist())) == len(planned.rows)


def test_a_plan_that_has_been_drawn_from_is_still_the_same_plan():
    drawn, fresh = plan_for(1), plan_for(1)
    drawn.at(0)
    assert drawn == fresh


@pytest.mark.parametrize("world", RANKS)
def test_an_epoch_uses_each_row_once_or_counts_it(world):
    plan = plan_for(world)
    for epoch in range(2):
        seen = [Counter(), Counter(), Counter()]
        for planned in epoch_of(plan, epoch):
            assert planned.epoch == epoch
            seen[planned.source].update(planned.rows.tolist())
        for source, size in enumerate(SIZES):
            assert max(seen[source].values()) == 1
            assert set(seen[source]) <= set(range(size))
            assert len(seen[source]) + plan.unused_rows[source] == size
            assert plan.unused_rows[source] == size % plan.sources[source].batch_size


@pytest.mark.parametrize("world", RANKS)
def test_every_rank_plans_the_same_from_the_same_numbers(world):
    one, other = plan_for(world), plan_for(world)
    for step in (0, 5, 40, 3, 200, 0):  # any order, over several epochs: no hidden state
        first, second = one.at(step), BatchPlan(**arguments(other)).at(step)
        assert (first.source, first.epoch, first.visit) == (second.source, second.epoch, second.visit)
        assert np.array_equal(first.rows, second.rows)


def arguments(plan):
    return {name: getattr(plan, name) for name in ("sources", "seed", "world")}


def test_epochs_and_seeds_differ():
    plan = plan_for(2)
    first, second, other = epoch_of(plan), epoch_of(plan, 1), epoch_of(plan_for(2, seed=4))
    for different in (second, other):
        assert [p.source for p in first] != [p.source for p in different]
        assert sorted(p.rows.tolist() for p in first) != sorted(p.rows.tolist() for p in different)


def test_the_number_of_ranks_does_not_change_the_batches():
    """So a run may be continued on another number of ranks."""
    one, four = plan_from(SIZES, (64, 32, 16), 1, world=1), plan_from(SIZES, (64, 32, 16), 1, world=4)
    assert all(np.array_equal(one.at(step).rows, four.at(step).rows) for step in range(30))


def test_batches_of_all_sources_are_shuffled_in_proportion():
    plan = plan_from((6400, 640), (64, 64))
    sources = [planned.source for planned in epoch_of(plan)]
    assert plan.steps_of == (100, 10)
    assert sources[:100] != [0] * 100
    assert sources[-10:] != [1] * 10


@pytest.mark.parametrize(("world", "rows"), [(1, 50), (4, 48), (7, 49), (8, 48)])
def test_a_source_smaller_than_its_batch_gets_a_smaller_batch_and_a_warning(world, rows, caplog):
    plan = plan_from((50,), (56 * 16,), world=world, names=("tiny",))
    assert [len(planned.rows) for planned in epoch_of(plan)] == [rows]
    assert plan.unused_rows == (50 - rows,)
    assert f"source 'tiny' has 50 rows, fewer than its batch_size 896: its batches have {rows} rows" in caplog.text


def test_a_weight_of_two_sees_each_row_twice_in_two_orders():
    plan = plan_from((64, 64), (8, 8), weights=(2.0, 1.0))
    steps = [planned for planned in epoch_of(plan) if planned.source == 0]
    assert [planned.visit for planned in steps] == [0] * 8 + [1] * 8
    passes = [np.concatenate([p.rows for p in steps if p.visit == visit]) for visit in (0, 1)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(64))
    assert not np.array_equal(*passes)
    assert {planned.visit for planned in epoch_of(plan, 1) if planned.source == 0} == {2, 3}


@pytest.mark.parametrize(("weight", "steps", "unused"), [(0.5, 4, 32), (1.5, 12, 0), (2.25, 18, 0), (0.01, 1, 56)])
def test_a_fraction_of_a_weight_is_part_of_a_pass(weight, steps, unused):
    plan = plan_from((64,), (8,), weights=(weight,))
    counts = Counter(row for planned in epoch_of(plan) for row in planned.rows.tolist())
    assert (plan.steps_per_epoch, plan.unused_rows) == (steps, (unused,))
    assert 64 - len(counts) == unused
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_sizes": (30,), "world": 4},
            "30 cannot be shared equally by 4 ranks\n.*set train.batch_size to 28 or 32",
        ),
        ({"batch_sizes": (3,), "world": 4}, "set train.batch_size to 4"),
        ({"batch_sizes": (0,)}, "batch_size 0"),
        ({"sizes": (0,)}, "the source is empty"),
        ({"sizes": (3,), "world": 4}, "3 rows cannot be shared by 4 ranks"),
        ({"weights": (0.0,)}, "weight 0.0 is not above 0"),
        ({"weights": (float("nan"),)}, "weight nan"),
        ({"sizes": (), "batch_sizes": ()}, "at least one source"),
    ],
)
def test_what_cannot_be_planned(changes, message):
    with pytest.raises(RecipeError, match=message):
        plan_from(**({"sizes": (100,), "batch_sizes": (32,)} | changes))


def test_the_plan_of_a_step_is_what_it_was():
    """A checkpoint holds only the number of the next step: another order would repeat rows after a resume."""
    planned = plan_from((10, 6), (4, 3), seed=7).at(5)
    assert (planned.source, planned.epoch, planned.visit, planned.rows.tolist()) == (0, 1, 1, [4, 8, 5, 0])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shares=st.lists(st.just(0.0) | st.floats(1e-3, 1e6), min_size=1, max_size=6).filter(any), total=st.integers(1, 40)
)
def test_units_are_whole_proportional_and_leave_nobody_out(shares, total):
    units = _apportion(shares, total)
    positive = [share for share in shares if share > 0]
    assert sum(units) == max(total, len(positive))
    assert all((unit >= 1) == (share > 0) for unit, share in zip(units, shares, strict=True))
    for unit, share in zip(units, shares, strict=True):
        exact = share * total / sum(shares)
        assert unit <= 1 or unit < exact + 1, "nobody gets more than the next whole number"
    assert _apportion([5.0, 3.0, 2.0], 10) == [5, 3, 2]
    assert _apportion([1000.0, 1.0, 0.0], 4) == [3, 1, 0]


def test_rows_that_do_not_clash_are_looked_at_once_and_those_that_always_do_not_for_ever(monkeypatch):
    looked = []
    real = separate._clashing
    monkeypatch.setattr(separate, "_clashing", lambda *given: looked.append(1) or real(*given))

    def of(query_ids):
        ids = np.asarray(query_ids)
        count = len(ids)
        facts = separate.RowFacts(ids, np.arange(100, 100 + count), np.arange(count + 1), np.ones(count, np.int32))
        seating = separate.Seating(np.arange(count), np.arange(count) // 4, count // 4, np.asarray([count]))
        looked.clear()
        return seating.separate(separate.Shared.of(facts), np.random.default_rng(0)), len(looked)

    left, rounds = of([0, 1, 2, 3, 0, 1, 2, 3])
    assert (left.tolist(), rounds) == ([], 1)
    left, rounds = of([0, 0, 0, 0, 1, 2, 3, 4])  # four rows of one text in two batches: two find no place
    assert len(left) == 2
    assert separate.PATIENCE_FOR_FEW <= rounds < 2 * separate.PATIENCE_FOR_FEW < separate.ROUNDS
