"""CoDiEmb's invariants (specification A.5) where rows share no text, go by length, or both, on one to eight ranks."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from tests.plans import epoch_of, plan_from

from embedsmith.core.errors import RecipeError
from embedsmith.data import PlanConfig, RowFacts
from embedsmith.data.plan import passes

RANKS = range(1, 9)
SIZES = (900, 257, 140)
PLANS = {
    "apart": (PlanConfig(), True),
    "groups": (PlanConfig(lengths=(40, 100)), False),
    "automatic groups, apart": (PlanConfig(lengths="auto"), True),
    "tokens, apart": (PlanConfig(batch_tokens=9600, multiple=24), True),
}


def facts(size, seed=0, queries=400, positives=600):
    """Rows that share queries and positives with a few others each, of 5 to 200 tokens."""
    chance = np.random.default_rng(seed)
    count_N = chance.integers(1, 3, size)
    return RowFacts(
        chance.integers(0, queries, size),
        chance.integers(10_000, 10_000 + positives, count_N.sum()),
        np.concatenate([[0], np.cumsum(count_N)]),
        chance.integers(5, 201, size).astype(np.int32),
    )


def texts_of(known, row):
    positives = known.positive_id_P[known.offset_N1[row] : known.offset_N1[row + 1]]
    return {int(known.query_id_N[row]), *positives.tolist()}


def plan_for(kind, world, seed=3, **changes):
    config, apart = PLANS[kind]
    if config.batch_tokens:
        config = replace(config, multiple=world, batch_tokens=3200 * world)
    batches = (None,) * 3 if config.batch_tokens else (24 * world, 8 * world, 3 * world)
    known = tuple(facts(size, place) for place, size in enumerate(SIZES))
    values = dict(seed=seed, world=world, config=config, facts=known, apart=(apart,) * 3, texts=(2,) * 3)
    return plan_from(SIZES, batches, **(values | changes))


every_plan = pytest.mark.parametrize("kind", PLANS)
every_world = pytest.mark.parametrize("world", RANKS)


@every_plan
@every_world
def test_slices_of_ranks_are_equal_disjoint_and_together_the_batch(kind, world):
    plan = plan_for(kind, world)
    for planned in epoch_of(plan):
        slices = [planned.rows_of(rank, world) for rank in range(world)]
        assert len({len(rows) for rows in slices}) == 1
        assert len(slices[0]) > 0
        assert sorted(np.concatenate(slices)) == sorted(planned.rows)
        assert len(set(planned.rows.tolist())) == len(planned.rows)


@every_plan
@every_world
def test_an_epoch_uses_each_row_once_or_counts_it_with_a_reason(kind, world):
    plan = plan_for(kind, world)
    for epoch in range(2):
        seen = [Counter(), Counter(), Counter()]
        for planned in epoch_of(plan, epoch):
            seen[planned.source].update(planned.rows.tolist())
        for source, account in enumerate(plan.account(epoch)):
            assert max(seen[source].values()) == 1
            assert len(seen[source]) == account.seen == account.drawn
            assert account.seen + sum(account.unseen.values()) == account.rows == SIZES[source]
            assert account.unseen.get("no full batch", 0) < max(plan.cuts[source].rows_G)
            assert "not reached" not in account.unseen


@pytest.mark.parametrize("kind", [kind for kind, (_, apart) in PLANS.items() if apart])
@every_world
def test_no_two_rows_of_a_batch_share_a_text(kind, world):
    plan = plan_for(kind, world)
    for epoch in range(2):
        for planned in epoch_of(plan, epoch):
            texts = Counter(text for row in planned.rows for text in texts_of(plan.sources[planned.source].facts, row))
            assert max(texts.values()) == 1


def test_rows_do_share_texts_where_nothing_forbids_it():
    """Otherwise the test above would hold for any plan."""
    plan = plan_for("apart", 1, apart=(False,) * 3)
    shared = 0
    for planned in epoch_of(plan):
        texts = Counter(text for row in planned.rows for text in texts_of(plan.sources[planned.source].facts, row))
        shared += sum(count - 1 for count in texts.values())
    assert shared > 50


@every_plan
@every_world
def test_a_resumed_run_has_the_same_batches_in_any_order_of_asking(kind, world):
    one, other = plan_for(kind, world), plan_for(kind, world)
    last = one.steps_per_epoch
    for step in (last + 1, 0, last // 2, 3 * last, 1):
        first, second = one.at(step), other.at(step)
        assert (first.source, first.visit, first.rows.tolist()) == (second.source, second.visit, second.rows.tolist())


@every_plan
def test_epochs_and_seeds_differ(kind):
    first, second, other = epoch_of(plan_for(kind, 2)), epoch_of(plan_for(kind, 2), 1), epoch_of(plan_for(kind, 2, 4))
    for different in (second, other):
        assert sorted(p.rows.tolist() for p in first) != sorted(p.rows.tolist() for p in different)


@every_plan
@pytest.mark.parametrize(("before", "after"), [(1, 4), (8, 2), (4, 8), (3, 6)])
def test_another_number_of_ranks_in_the_middle_of_an_epoch_keeps_it_a_partition(kind, before, after):
    config, apart = PLANS[kind]
    sizes = (None,) * 3 if config.batch_tokens else (48, 24, 24)
    known = tuple(facts(size, place) for place, size in enumerate(SIZES))
    plans = [
        plan_from(SIZES, sizes, 3, world, config=config, facts=known, apart=(apart,) * 3) for world in (before, after)
    ]
    assert plans[0].steps_per_epoch == plans[1].steps_per_epoch
    half = plans[0].steps_per_epoch // 2
    steps = epoch_of(plans[0])[:half] + epoch_of(plans[1])[half:]
    seen = Counter((planned.source, row) for planned in steps for row in planned.rows.tolist())
    assert max(seen.values()) == 1
    trimmed = sum(account.unseen.get("ranks", 0) for plan in plans for account in plan.account(0))
    left = sum(sum(account.unseen.values()) for account in plans[0].account(0))
    assert len(seen) >= sum(SIZES) - left - trimmed


def test_rows_that_can_not_be_set_apart_are_left_out_of_a_pass_and_counted(caplog):
    """One query has 30 rows, and a pass 20 batches."""
    query_id_N = np.where(np.arange(200) < 30, 7, np.arange(200) + 100)
    known = RowFacts(query_id_N, np.arange(200) + 1000, np.arange(201), np.full(200, 9, np.int32))
    plan = plan_from((200,), (10,), facts=(known,), names=("faq",), world=2)
    account = plan.account(0)[0]
    assert account.unseen["shares a text"] >= 10
    assert account.seen + sum(account.unseen.values()) == 200
    assert "source 'faq': 10 of 200 rows find no batch in a pass" in caplog.text
    for planned in epoch_of(plan):
        assert (query_id_N[planned.rows] == 7).sum() <= 1
        assert len(planned.rows) % 2 == 0
    used = {row for epoch in range(12) for planned in epoch_of(plan, epoch) for row in planned.rows.tolist()}
    assert len(used) == 200  # others are left out in other epochs


@pytest.mark.parametrize("size", [2, 100])
def test_a_source_of_one_text_is_refused_with_its_name_and_a_remedy(size):
    known = RowFacts(np.arange(size), np.full(size, 1000), np.arange(size + 1), np.full(size, 9, np.int32))
    with pytest.raises(RecipeError, match=r"source 'faq'.* rows find no batch(.|\n)*plan.duplicates=allow") as caught:
        plan_from((size,), (50,), facts=(known,), names=("faq",))
    assert f"of {size} rows" in str(caught.value)
    assert plan_from((size,), (50,), facts=(known,), apart=(False,)).unused_rows == (0,)


def test_a_large_source_of_which_most_rows_would_be_left_out_is_refused(monkeypatch):
    monkeypatch.setattr(passes, "SMALL", 99)
    with pytest.raises(RecipeError, match=r"96 of 100 rows find no batch(.|\n)*plan.duplicates=allow"):
        plan_from((100,), (50,), facts=(repeated(np.arange(100) % 2),))


def repeated(query_id_N, positive_id_N=None):
    """Rows of these queries, with positives of their own where none are given."""
    size = len(query_id_N)
    positive_id_N = np.arange(size) if positive_id_N is None else positive_id_N
    return RowFacts(query_id_N, positive_id_N + 10_000, np.arange(size + 1), np.full(size, 9, np.int32))


TENS, ODD = np.arange(40) % 10, np.arange(40) % 7
SMALL_SOURCES = {  # query ids, positive ids, batch size, rows of a reduced batch, rows left out of an epoch
    "10 queries": (TENS, None, 32, 10, 0),
    "10 positives": (np.arange(40), TENS, 32, 10, 0),
    "fewer rows than a batch": (TENS, None, 64, 10, 0),
    "2 queries, which tie": (np.asarray([0, 0, 1, 1]), None, 4, 2, 0),
    "one row twice": (np.asarray([0, 0, 1]), None, 32, 2, 1),
    "an uneven number": (ODD, None, 32, 7, 5),
    "one query in most rows": (np.where(np.arange(40) < 31, 99, np.arange(40)), None, 32, 3, 18),
    "one query in half of the rows": (np.where(np.arange(40) < 20, 99, np.arange(40)), None, 32, 21, 19),
}


@pytest.mark.parametrize("name", SMALL_SOURCES)
def test_a_batch_larger_than_the_distinct_texts_is_reduced_and_said_and_counts_add_up(name, caplog):
    query_id_N, positive_id_N, batch, rows, left = SMALL_SOURCES[name]
    known, size = repeated(query_id_N, positive_id_N), len(query_id_N)
    plan = plan_from((size,), (batch,), facts=(known,), names=("faq",))
    wanted = min(batch, size)
    assert f"source 'faq': its batches have {rows} rows instead of {wanted}" in caplog.text
    assert plan.unused_rows == (left,)
    for epoch in range(4):
        account, steps = plan.account(epoch)[0], epoch_of(plan, epoch)
        assert account.steps == len(steps)
        assert account.drawn == account.seen == sum(len(planned.rows) for planned in steps)
        assert account.seen + sum(account.unseen.values()) == size
        for planned in steps:
            texts = Counter(text for row in planned.rows for text in texts_of(known, row))
            assert max(texts.values()) == 1
    used = {row for epoch in range(60) for planned in epoch_of(plan, epoch) for row in planned.rows.tolist()}
    assert len(used) >= 0.9 * size  # others are left out in other epochs


def test_reduced_batches_are_the_same_on_two_ranks_and_cut_to_their_multiple():
    one, two, four = (plan_from((40,), (32,), world=world, facts=(repeated(TENS),)) for world in (1, 2, 4))
    assert [p.rows.tolist() for p in epoch_of(one)] == [p.rows.tolist() for p in epoch_of(two)]
    assert [len(planned.rows) for planned in epoch_of(four)] == [8] * 4
    assert four.account(0)[0].unseen == {"ranks": 8}
    assert four.summary() == [": , 40 rows, 4 steps of 8 an epoch, 8 rows left out (ranks)"]
    with pytest.raises(RecipeError, match=r"batches of 10 rows, of which no two share a text, .* by 16 ranks"):
        plan_from((40,), (32,), world=16, facts=(repeated(TENS),))


def test_batches_of_unlike_size_are_counted_in_words():
    """One query has 30 rows, and a pass 20 batches: some have a row less."""
    query_id_N = np.where(np.arange(200) < 30, 7, np.arange(200) + 100)
    said = plan_from((200,), (10,), facts=(repeated(query_id_N),), names=("faq",)).summary()[0]
    assert "200 rows, 20 steps of" in said
    assert "to 10 an epoch (190 rows), 10 rows left out (shares a text)" in said


@pytest.mark.parametrize(("small", "why"), [("drop", "too small"), ("pad", None)])
def test_a_source_that_is_dropped_or_padded_is_not_reduced(small, why):
    others = repeated(np.arange(64))
    one_twice = repeated(np.where(np.arange(50) < 2, 0, np.arange(50)))
    plan = plan_from((64, 50), (64, 64), facts=(others, one_twice), config=PlanConfig(small=small))
    assert plan.cuts[1].instead_of is None
    assert (why in plan.account(0)[1].unseen) if why else plan.cuts[1].padded


def test_batches_by_length_are_reduced_too():
    known = replace(repeated(np.arange(400) % 10), length_N=np.where(np.arange(400) % 2, 10, 90).astype(np.int32))
    plan = plan_from((400,), (None,), facts=(known,), config=PlanConfig(batch_tokens=9600))
    assert max(plan.cuts[0].rows_G) <= 10
    assert plan.account(0)[0].unseen.get("shares a text", 0) == 0


def test_two_rows_that_are_one_text_both_ways_count_as_sharing():
    """A query that is another row's positive would be contrasted with itself."""
    known = RowFacts(np.asarray([1, 2]), np.asarray([2, 3]), np.arange(3), np.full(2, 9, np.int32))
    plan = plan_from((2,), (1,), facts=(known,))
    assert plan.cuts[0].shared.texts == 1
    assert plan.cuts[0].shared.row_E.tolist() == [0, 1]


def test_a_text_twice_in_one_row_only_is_not_shared():
    known = RowFacts(np.asarray([1, 2]), np.asarray([1, 1, 3]), np.asarray([0, 2, 3]), np.full(2, 9, np.int32))
    assert plan_from((2,), (2,), facts=(known,)).cuts[0].shared.texts == 0


def test_rows_are_set_apart_even_where_batches_are_nearly_full_of_shared_texts():
    """40 documents of 24 rows each and 40 batches of 24: every batch holds more than half of the documents."""
    known = RowFacts(np.arange(960), np.arange(960) % 40 + 10**6, np.arange(961), np.full(960, 9, np.int32))
    plan = plan_from((960,), (24,), facts=(known,))
    assert plan.account(0)[0].seen > 0.97 * 960
