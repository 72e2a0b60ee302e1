"""`scripts/measure.py`: the numbers of a small tree, counted by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "measure.py"

FIRST = '''"""A module."""

import os
from typing import (
    Any,
)


def shared(value: Any) -> Any:
    """A docstring
    does not count."""
    return _once(value)


def _once(value: Any) -> Any:
    return _twice(_twice(_twice(value)))


def _twice(value: Any) -> Any:
    return value


class Thing:
    def __init__(self) -> None:
        self.place = os.curdir
'''
SECOND = '''from typing import TYPE_CHECKING


async def shared() -> None:
    def inner() -> None:
        """Only a docstring."""

    inner()
'''


def printed(*arguments: str) -> str:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def test_numbers_of_a_tree(tmp_path: Path) -> None:
    for room, text in (("one", FIRST), ("two", SECOND)):
        (tmp_path / room).mkdir()
        (tmp_path / room / "same.py").write_text(text)
        (tmp_path / room / "__init__.py").write_text("")
    lines = printed(str(tmp_path)).splitlines()
    found = {name: value for value, name in (line.split(maxsplit=1) for line in lines)}
    assert found["files"] == "4"
    assert found["files under 100 lines"] == "2"
    count = FIRST.count("\n") + SECOND.count("\n")
    assert found["lines"] == str(count)
    assert found["functions and methods"] == "6"
    assert found["public names"] == "3"
    assert found["lines a public name"] == f"{count / 3:.1f}"
    assert found["private functions used once"] == "1"
    assert found["... in % of all functions"] == "16.7"
    assert found["import lines, %"] == f"{100 * 5 / count:.1f}"
    assert found["names defined in two files or more"] == "1"
    assert found["file names in two rooms or more"] == "1"
    assert found["files with TYPE_CHECKING"] == "1"
    assert found["function lines, median"] == "2"
    assert found["function lines, longest"] == "5"
    assert lines[-1].endswith("same.py:shared")
    assert "met" not in lines[0]


def test_the_table_of_the_package_has_what_was_and_what_is_wanted() -> None:
    first, *rows = printed().splitlines()
    assert first.split() == ["number", "at", "69c5e05", "now", "target", "met"]
    row = next(row for row in rows if row.startswith("lines a public name"))
    assert "33.7" in row
    assert "at least 42.0" in row
    assert row.endswith(("yes", "no"))


def test_a_folder_without_code(tmp_path: Path) -> None:
    assert "0  files" in printed(str(tmp_path))
