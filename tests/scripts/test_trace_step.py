"""`scripts/trace_step.py`: it follows a step and an example through whatever layout the package has."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "trace_step.py"


@pytest.mark.slow
def test_three_numbers_and_what_is_behind_them() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--list"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, *sections = done.stdout.split("\n\n")
    now = {
        name: int(re.split(r" {2,}", line)[2])
        for line in head.splitlines()
        for name in ("functions", "changes of file", "forms of an example")
        if line.startswith(name)
    }
    listed = [section.splitlines()[1:] for section in sections]
    *threads, forms = [[line.strip() for line in lines] for lines in listed]
    assert len(threads) == 2, "the thread that trains and the one that draws ahead"
    functions = {line.rpartition(" (")[0] for lines in threads for line in lines}
    assert now["functions"] == len(functions) > 40
    assert now["changes of file"] > 40
    assert now["forms of an example"] == len(forms)
    names = [form.partition("  (")[0] for form in forms]
    assert names[0] == "text"
    assert "vectors" in names
    assert any(name.startswith("PaddedTokens") for name in names)
