"""The state machine of live negatives, against scripted scores."""

import numpy as np
import pytest
import torch

from embedsmith.core.errors import CheckpointError
from embedsmith.core.recipe import parse
from embedsmith.mining import LiveNegatives
from embedsmith.mining.live import EMPTY, LiveState
from embedsmith.mining.selection import conan_window


def state(size=50, rows=1, negatives=2, lag=0, **config):
    return LiveState(parse(LiveNegatives, config), [size] * rows, negatives, lag)


def see(live, step, scores, rows=(0,), positive=1.0):
    """Draw the batch of a step and score its negatives."""
    row_Q = np.array(rows)
    drawn = live.draw(row_Q, step)
    score_QS = np.broadcast_to(np.asarray(scores, np.float32), drawn.shape)
    live.observe(step, row_Q, drawn, score_QS, np.full(len(rows), positive, np.float32))
    if live.due(step):
        live.check(step)
    return drawn


@pytest.mark.parametrize(("n", "rounds"), [(2, [(8, 10), (10, 12), (12, 14)]), (12, [(0, 12), (10, 22), (22, 34)])])
def test_windows_are_those_of_the_paper(n, rounds):
    """The i-th replacement takes ranks (i - 1) n + 10 to i n + 10."""
    for round_, (start, stop) in enumerate(rounds):
        assert conan_window(round_, n, 10, 100) == slice(start, stop)
    assert conan_window(7, 3, 10, 20) == slice(17, 20)
    assert conan_window(0, 5, 10, 3) == slice(0, 3)


@pytest.mark.parametrize(
    ("first", "later", "replaced"),
    [(0.7, 0.60, True), (0.7, 0.62, False), (0.95, 0.82, False), (0.2, -0.1, True), (0.9, -0.9, True)],
)
def test_v1_table(first, later, replaced):
    """The determinism table of the specification; a negative score is easy, whatever its size."""
    live = state(rule="scheduled", every=2)
    assert see(live, 0, first).tolist() == [[8, 9]]
    see(live, 1, later)
    assert see(live, 2, later).tolist() == ([[10, 11]] if replaced else [[8, 9]])


@pytest.mark.parametrize(
    ("first", "later", "replaced"),
    [(0.39, None, True), (0.8, 0.66, True), (0.9, 0.72, False), (0.8, 0.68, False), (0.41, None, False)],
)
def test_v2_table(first, later, replaced):
    live = state()
    see(live, 0, first)
    if later is not None:
        see(live, 1, later)
    assert see(live, 2, 0.9).tolist() == ([[10, 11]] if replaced else [[8, 9]])


def test_v1_judges_the_mean_and_v2_each_negative():
    scores = [[0.9, 0.7], [0.9, 0.5]]
    v1, v2 = state(rule="scheduled", every=1), state()
    for live in (v1, v2):
        for step, row in enumerate(scores):
            see(live, step, row)
    assert v1.draw(np.array([0]), 2).tolist() == [[8, 9]]  # 1.15 * 0.7 > 0.8
    assert v2.draw(np.array([0]), 2).tolist() == [[8, 10]]


def test_the_first_score_is_measured_again_after_a_replacement():
    live = state()
    see(live, 0, 0.8)
    see(live, 1, 0.6)
    see(live, 2, 0.6)  # S0 of the new ones
    assert see(live, 3, 0.6).tolist() == [[10, 11]]
    assert live.replaced == 2


def test_a_replacement_waits_for_the_lag_and_stale_scores_do_not_count():
    live = state(lag=2)
    drawn = [see(live, step, score)[0, 0] for step, score in enumerate([0.8, 0.6, 0.1, 0.1, 0.9, 0.9])]
    assert drawn == [8, 8, 8, 8, 10, 10]
    assert live.draw(np.array([0]), 3)[0, 0] in (8, 10)
    assert live.replaced == 2


def test_a_draw_is_the_same_at_any_time_within_the_lag():
    live = state(lag=2, rows=4)
    rows = np.arange(4)
    ahead = {step: live.draw(rows, step) for step in range(3)}
    for step in range(12):
        drawn = see(live, step, [0.9 - 0.15 * step, 0.3], rows=rows)
        np.testing.assert_array_equal(ahead[step], drawn)
        ahead[step + 3] = live.draw(rows, step + 3)
    assert live.replaced > 0


def test_exhausted_pools_stay_or_ask_for_new_ones():
    stay, remine = state(size=4), state(size=4, refill="remine")
    for live in (stay, remine):
        assert live.draw(np.array([0]), 0).tolist() == [[0, 1]]  # too short for an offset of 10: its top first
        for step in range(4):
            see(live, step, 0.1)
        assert live.draw(np.array([0]), 9).tolist() == [[2, 3]]
        assert live.exhausted_N.all()
    assert not stay.wants_new_pools(9)
    assert remine.wants_new_pools(9)
    remine.install_pools(np.arange(20, dtype=np.int32)[None], np.array([20]))
    assert remine.generation == 1
    assert remine.draw(np.array([0]), 10).tolist() == [[8, 9]]
    assert not remine.wants_new_pools(9)
    assert state(remine_every=5).wants_new_pools(4)


def test_a_pool_smaller_than_the_negatives_leaves_slots_empty():
    live = state(size=1, negatives=3)
    assert see(live, 0, 0.1).tolist() == [[0, EMPTY, EMPTY]]
    assert see(live, 1, 0.1).tolist() == [[0, EMPTY, EMPTY]]


def test_the_guard_replaces_what_scores_above_the_positive():
    off, on = state(), state(guard=0.95)
    for live in (off, on):
        see(live, 0, [0.9, 0.7], positive=0.8)
        assert live.curves()["suspect"] == 0.5
    assert off.draw(np.array([0]), 1).tolist() == [[8, 9]]
    assert on.draw(np.array([0]), 1).tolist() == [[10, 9]]


def test_a_negative_that_is_never_scored_gives_way():
    """A known positive or a repeated text is not drawn, so it has no score."""
    live = state()
    see(live, 0, [float("nan"), 0.9])
    assert live.draw(np.array([0]), 1).tolist() == [[10, 9]]


def test_a_row_whose_pool_is_exhausted_does_not_hold_up_the_others():
    live = LiveState(parse(LiveNegatives, {"rule": "scheduled", "every": 2}), [4, 60], 2, 0)
    for step, score in enumerate([0.7, 0.6, 0.35, 0.3, 0.2, 0.15]):
        see(live, step, score, rows=(0, 1))
    assert live.exhausted_N.tolist() == [True, False]
    assert live.draw(np.array([1]), 9).tolist() == [[14, 15]]


def test_a_state_that_was_taken_stays_as_it_was():
    live = state()
    see(live, 0, 0.9)
    taken = live.state_dict()
    kept = {name: value.clone() for name, value in taken.items() if torch.is_tensor(value)}
    assert kept
    see(live, 1, 0.3)
    assert all(torch.equal(taken[name], value) for name, value in kept.items())


def test_rows_seen_once_are_scored_again_the_longest_ago_first():
    live = state(rows=6, rule="scheduled", every=4)
    for step, rows in enumerate([(0, 1), (2, 3), (4, 0)]):
        see(live, step, 0.7, rows=rows)
    assert live.to_rescore(3, 3).tolist() == [1, 2, 3]
    row_Q = live.to_rescore(3, 2)
    live.observe(3, row_Q, live.draw(row_Q, 99), np.full((2, 2), 0.5, np.float32), np.ones(2, np.float32))
    live.check(3)
    assert live.draw(np.arange(6), 9)[:, 0].tolist() == [8, 10, 10, 8, 8, 8]


def test_the_curves_count():
    live = state()
    see(live, 0, [0.3, 0.6])
    assert live.curves() == pytest.approx({"hardness": 0.45, "suspect": 0.0, "replaced": 1.0, "exhausted": 0.0})
    assert live.curves()["replaced"] == 0


@pytest.mark.parametrize("rule", ["each_loss", "scheduled"])
def test_a_state_goes_on_after_a_checkpoint_as_if_there_was_none(rule, tmp_path):
    def play(live, steps):
        drawn = []
        for step in steps:
            chance = np.random.default_rng(step)
            rows = chance.permutation(8)[:4]
            drawn.append(see(live, step, chance.random((4, 2)), rows=rows).tolist())
        return drawn

    make = lambda: state(rows=8, lag=2, rule=rule, every=3)
    whole, first, second = make(), make(), make()
    expected = play(whole, range(40))
    play(first, range(17))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert play(second, range(17, 40)) == expected[17:]
    assert second.digest() == whole.digest()
    assert whole.replaced == second.replaced > 10


def test_a_state_of_other_rows_is_refused():
    with pytest.raises(CheckpointError, match="live negatives of"):
        state(rows=3).load_state_dict(state(rows=4).state_dict())
