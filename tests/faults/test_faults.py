"""A bounded part of `python -m bench.faults`: some files, kills, full disks, limits, pairs, ranks and strangers."""

import random

import pytest

from tests.faults.fuzz import inputs
from tests.faults.hostile import CASES, hostile_round
from tests.faults.mutate import mutations, verdict_of
from tests.faults.rank_rounds import DIFFERENCES, LOST, rank_round
from tests.faults.rounds import Undisturbed, full_round, kill_moments, kill_round, limit_round, pair_round, small_disk
from tests.faults.workplace import MAKING

BY_NAME = {command.name: command for command in MAKING}
ALL = pytest.mark.slow


def test_wrong_files_are_refused_and_harmless_changes_are_not(judge):
    chosen = list(inputs(judge.base, seed=1, each=1, share=0.05))
    assert len(chosen) > 10
    wrong = [(str(one), found.fault, found.text) for one in chosen if (found := judge.judge(one))]
    assert not wrong


@pytest.fixture(scope="module")
def undisturbed(judge):
    known = {}

    def of(name):
        if name not in known:
            known[name] = Undisturbed(judge, BY_NAME[name])
        return known[name]

    return of


@pytest.mark.parametrize("name", ["encode", "train", *(pytest.param(n, marks=ALL) for n in BY_NAME)])
def test_a_killed_command_goes_on_to_the_same_result(judge, undisturbed, name):
    good = undisturbed(name)
    for moment in kill_moments(good, 3, random.Random(name)):
        assert kill_round(judge, BY_NAME[name], good, moment) is None, moment


@pytest.mark.parametrize("name", ["curate", *(pytest.param(n, marks=ALL) for n in BY_NAME)])
def test_a_limit_of_file_size_is_told_and_loses_nothing(judge, undisturbed, name):
    assert limit_round(judge, BY_NAME[name], undisturbed(name), 0.4) is None


@pytest.mark.parametrize("name", ["merge", *(pytest.param(n, marks=ALL) for n in BY_NAME)])
def test_a_full_disk_is_told_and_loses_nothing(judge, undisturbed, name, tmp_path):
    with small_disk(tmp_path / "disk", "300m") as disk:
        if disk is None:
            pytest.skip("mounting a small disk is not allowed here")
        assert full_round(judge, BY_NAME[name], undisturbed(name), 0.5, disk, over=True) is None


@pytest.mark.parametrize("name", ["mine", *(pytest.param(n, marks=ALL) for n in BY_NAME)])
def test_of_two_writers_one_succeeds(judge, undisturbed, name):
    assert pair_round(judge, BY_NAME[name], undisturbed(name)) is None


@pytest.mark.parametrize("case", ["model", *(pytest.param(n, marks=ALL) for n in (*DIFFERENCES, *LOST))])
def test_ranks_that_differ_or_are_lost_end_in_an_error(judge, case):
    assert rank_round(judge, case, seconds=2.0) is None


@pytest.mark.parametrize(
    "case", ["pickled weights", "weights outside the folder", *(pytest.param(n, marks=ALL) for n in CASES)]
)
def test_no_payload_of_a_stranger_runs(judge, case):
    assert hostile_round(judge, case) is None


def test_verdicts_follow_from_a_reading_of_our_own(tmp_path):
    good = b'{"a": 1}\n{"a": 2}\n'
    assert verdict_of("x.jsonl", good, good.replace(b"\n", b"\r\n")) == "same"
    assert verdict_of("x.jsonl", good, good[:-3]) == "refuse"
    assert verdict_of("x.jsonl", good, good.replace(b"1", b"3")) == "either"
    assert verdict_of("x.yaml", b"a: 1\n", b"a: 1\na: 1\n") == "refuse"
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert {one.verdict for one in mutations(tmp_path / "x.json", random.Random(0))} == {"same", "refuse", "either"}
