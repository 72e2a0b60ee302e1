"""The figures of the bench of conflicts: rank correlation with its interval, and what a pair of runs says."""

import math

import pytest
from bench import conflict
from bench.conflict import agreement, row_of


def test_what_predicts_well_is_told_from_what_does_not(monkeypatch):
    monkeypatch.setattr(conflict, "RESAMPLES", 500)
    monkeypatch.setattr(conflict, "SHUFFLES", 1000)
    hurt = [0.01 * n for n in range(12)]
    well = agreement([value**3 for value in hurt], hurt)
    assert well["rho"] == pytest.approx(1)
    assert well["low"] > 0.9
    assert well["chance"] < 0.001
    badly = agreement([5, 1, 9, 3, 11, 0, 7, 2, 8, 4, 10, 6], hurt)
    assert badly["low"] < 0 < badly["high"]
    assert badly["chance"] > 0.2
    assert agreement([-value for value in hurt], hurt)["rho"] == pytest.approx(-1)
    assert math.isnan(agreement([1, 1, 1], [1, 2, 3])["rho"])


def test_a_pair_is_compared_with_each_of_its_sets_alone():
    lines = [{"cosine/a~b": 0.1}, {"cosine/a~b": 0.3, "conflict_share/a~b": 0.5}]
    last = {"validation_loss/a": 1.1, "validation_loss/b": 3.0}
    made = {("b", "a"): [*lines, last], ("a",): [{"validation_loss/a": 9.0}, {"validation_loss/a": 1.0}]}
    made[("b",)] = [{"validation_loss/b": 2.0}]
    found = row_of(("b", "a"), made)
    assert found == {
        "cosine": pytest.approx(0.2),
        "conflict_share": 0.5,
        "hurt": pytest.approx((0.1 + 0.5) / 2),
    }
