"""Which tests a mutant gets, what is not run again, and what the table counts. Making mutants needs cosmic-ray."""

import pytest
from bench import mutation

TESTS = {
    "digest": "now",
    "lines": {"search/a.py": {"3": ["t::slow", "t::quick"], "4": []}},
    "modules": {"search/a.py": ["t::other", "t::quick", "t::slow"]},
    "all": ["t::quick", "t::slow", "t::other", "t::elsewhere", "t::ranks"],
    "seconds": {"t::quick": 0.1, "t::slow": 9, "t::other": 1, "t::ranks": 5},
    "several": ["t::ranks"],
}


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("search/a.py", 3, ["t::quick", "t::slow", "t::ranks"]),  # the quickest first, several processes last
        ("search/a.py", 4, ["t::quick", "t::other", "t::slow", "t::ranks"]),  # runs at import: all that use the module
        (
            "search/b.py",
            1,
            ["t::elsewhere", "t::quick", "t::other", "t::slow", "t::ranks"],
        ),  # nobody is known to run it
    ],
)
def test_the_tests_of_a_mutant(module, line, expected):
    assert mutation.chosen({"module": module, "line": line}, TESTS) == expected


def test_killed_once_is_killed_and_a_survivor_meets_new_tests():
    assert not mutation.settled(None, TESTS)
    assert mutation.settled({"killed_by": "t::quick", "tests": "before"}, TESTS)
    assert mutation.settled({"killed_by": None, "tests": "now"}, TESTS)
    assert not mutation.settled({"killed_by": None, "tests": "before"}, TESTS)


def test_equivalent_mutants_do_not_count_and_survivors_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(mutation, "EQUIVALENT", tmp_path / "reasons.yaml")
    mutation.EQUIVALENT.write_text("same: only the speed changes\n")
    found = [
        {"key": key, "room": "search", "module": "search/a.py", "line": 1, "operator": "X", "before": "b", "after": "c"}
        | {"killed_by": killed}
        for key, killed in (("dead", "t::quick"), ("late", "time"), ("same", None), ("lives", None))
    ]
    table = mutation.table(found)
    assert "search" in table
    assert table.splitlines()[-4].split() == ["all", "4", "1", "2", "66.7"]
    assert "lives search/a.py:1" in table
    assert "same search/a.py" not in table
