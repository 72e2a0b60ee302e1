#!/usr/bin/env python3
"""How shattered the code is: the numbers of the redesign, beside those of the frozen commit and the targets.

    python scripts/measure.py                       the table of src/embedsmith
    python scripts/measure.py src/embedsmith/train  the numbers of one room alone

Nothing fails here: a number reached by hiding names, cramming lines or dropping docstrings is not reached, and that
only a reader sees.
"""

from __future__ import annotations

import ast
import os
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "embedsmith"
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Counts:
    """What is counted in every `.py` file below a folder."""

    files: int = 0
    small_files: int = 0  # under 100 lines; an `__init__.py` does not count
    lines: int = 0
    import_lines: int = 0
    type_checking: int = 0  # files in which the word stands
    private: int = 0  # functions whose name begins with one underscore
    used_once: int = 0  # of those, the ones whose file has their name twice: their definition and one use
    lengths: list[tuple[int, str]] = field(default_factory=list)  # of every function and method, without its docstring
    # Functions and classes of modules without a leading underscore, with the files that define them.
    names: dict[str, set[Path]] = field(default_factory=lambda: defaultdict(set))
    file_names: dict[str, set[Path]] = field(default_factory=lambda: defaultdict(set))  # with the folders that have it

    def add(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        tree, lines = ast.parse(text), text.count("\n")
        words = Counter(re.findall(r"\w+", text))
        self.files += 1
        self.lines += lines
        self.type_checking += "TYPE_CHECKING" in words
        if path.name != "__init__.py":
            self.small_files += lines < 100
            self.file_names[path.name].add(path.parent)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.import_lines += _lines_of(node)
            if isinstance(node, Function):
                self._add_function(node, path, words)
        for node in tree.body:
            if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
                self.names[node.name].add(path)

    def _add_function(self, node: Function, path: Path, words: Counter[str]) -> None:
        docstring = _lines_of(node.body[0]) if ast.get_docstring(node, clean=False) is not None else 0
        self.lengths.append((_lines_of(node) - docstring, f"{os.path.relpath(path)}:{node.name}"))
        if node.name.startswith("_") and not node.name.startswith("__"):
            self.private += 1
            self.used_once += words[node.name] == 2

    @property
    def public_names(self) -> int:
        """A name that two files define counts twice."""
        return sum(len(where) for where in self.names.values())

    @property
    def sizes(self) -> list[int]:
        return sorted(size for size, _ in self.lengths)


def _lines_of(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def count(root: Path) -> Counts:
    counts = Counts()
    for path in sorted(root.rglob("*.py")):
        counts.add(path)
    return counts


def _shared(places: dict[str, set[Path]]) -> int:
    return sum(len(where) > 1 for where in places.values())


@dataclass(frozen=True)
class Number:
    """One row of the table. `frozen`: its value at 69c5e05. `target`: the most it may be, or with `least` the least."""

    name: str
    of: Callable[[Counts], float]
    frozen: float
    target: float | None = None
    least: bool = False
    digits: int = 0

    def text(self, value: float) -> str:
        return f"{value:,.{self.digits}f}"

    def met(self, value: float) -> bool:
        assert self.target is not None
        return value >= self.target if self.least else value <= self.target


# The column of 69c5e05 was obtained by running this file on a checkout of that commit:
# `git worktree add --detach ../frozen 69c5e05; python scripts/measure.py ../frozen/src/embedsmith`.
NUMBERS = (
    Number("lines", lambda c: c.lines, 38059, 33000),
    Number("files", lambda c: c.files, 251, 195),
    Number("files under 100 lines", lambda c: c.small_files, 66),
    Number("functions and methods", lambda c: len(c.lengths), 2657),
    Number("public names", lambda c: c.public_names, 1131),
    Number("lines a public name", lambda c: c.lines / max(c.public_names, 1), 33.7, 42, least=True, digits=1),
    Number("private functions used once", lambda c: c.used_once, 590),
    Number("... in % of all functions", lambda c: 100 * c.used_once / max(len(c.lengths), 1), 22.2, 14, digits=1),
    Number("import lines, %", lambda c: 100 * c.import_lines / max(c.lines, 1), 8.5, 6.5, digits=1),
    Number("names defined in two files or more", lambda c: _shared(c.names), 47, 15),
    Number("file names in two rooms or more", lambda c: _shared(c.file_names), 25, 8),
    Number("files with TYPE_CHECKING", lambda c: c.type_checking, 20),
    Number("function lines, median", lambda c: statistics.median(c.sizes or [0]), 6, 10),
    Number("function lines, p90", lambda c: (c.sizes or [0])[int(0.9 * len(c.sizes))], 16),
    Number("function lines, longest", lambda c: max(c.sizes or [0]), 59, 60),
)


def numbers(counts: Counts) -> str:
    lines = [f"{number.text(number.of(counts)):>8}  {number.name}" for number in NUMBERS]
    return "\n".join([*lines, f"longest function: {max(counts.lengths, default=(0, 'none'))[1]}"])


def table(counts: Counts) -> str:
    """Every number, at 69c5e05, now, its target, and whether it is met."""
    lines = [f"{'number':36}{'at 69c5e05':>12}{'now':>10}{'target':>16}  met"]
    for number in NUMBERS:
        value = number.of(counts)
        target, met = "", ""
        if number.target is not None:
            target = f"{'at least' if number.least else 'at most'} {number.text(number.target)}"
            met = "yes" if number.met(value) else "no"
        row = f"{number.name:36}{number.text(number.frozen):>12}{number.text(value):>10}{target:>16}  {met}"
        lines.append(row.rstrip())
    return "\n".join([*lines, f"longest function: {max(counts.lengths, default=(0, 'none'))[1]}"])


def main(arguments: list[str]) -> str:
    if arguments and arguments[0] in ("-h", "--help"):
        return (__doc__ or "").strip()
    return numbers(count(Path(arguments[0]))) if arguments else table(count(PACKAGE))


if __name__ == "__main__":
    sys.stdout.write(main(sys.argv[1:]) + "\n")
