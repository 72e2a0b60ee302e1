"""docs/promises.md: every test it names is there, and the bound of memory on fewer rows."""

import ast
import re
from pathlib import Path

import pytest
from bench.memory import measured, rows_to

from tests.faults.fuzz import copied
from tests.faults.workplace import MAKING

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "promises.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_every_promise_has_its_test(file, name):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_one():
    text = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    promises = [part for part in text.split("\n\n") if part.startswith("**")]
    assert len(promises) > 10
    assert all("::test_" in promise for promise in promises)


def test_verbs_take_little_memory_on_many_rows(judge):
    place = copied(judge.base, judge.scratch / "many", MAKING[0])
    rows_to(place, 20_000)
    for verb, mib, _ in measured(judge.server, place, ["inspect", "curate"], steps=10):
        assert mib < 100, verb
