"""A reader who does what a page says: writes its files, runs its Python, types its commands.

`Quick` does so in this process and cuts every training to a few steps; `Patient` gives the blocks to bash and to a new
Python, as they stand.
"""

import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedsmith.core.recipe import read_tree
from embedsmith.core.shipped import recipe_file
from tests.docs.blocks import Block
from tests.docs.prepare import Pool, write_rows


@dataclass(frozen=True)
class Quick:
    """`typed`: the fixture of this name. `steps`: how many a training takes. The current folder is the reader's."""

    pool: Pool
    typed: Callable[..., tuple[str, str, Any]]
    steps: int = 2

    def do(self, block: Block) -> None:
        """Errors: `AssertionError` for what does not run, with its place."""
        place = f"{block.page}:{block.line}"
        if block.file:
            _write(block, self.pool)
        elif block.language == "python":
            exec(compile(block.text, place, "exec"), {"__name__": "__main__"})  # noqa: S102
        elif block.language == "sh":
            for command in block.commands:
                words = shlex.split(command, comments=True)
                assert words[0] == "embedsmith", f"{place}: {command!r} is no command of ours: give a reason not to run"
                out, err, code = self.typed(*words[1:], *self._shortened(words[1:]))
                assert code in (0, None), f"{place}: {command}\n{out}\n{err}"
        else:
            raise AssertionError(f"{place}: a block of {block.language} without a title")

    def _shortened(self, words: list[str]) -> list[str]:
        """What is typed behind a command that trains."""
        short = (f"train.steps={self.steps}", "train.epochs=null")
        if words[0] == "train":
            return list(short)
        if words[0] != "run":
            return []
        stages = read_tree(recipe_file(words[1], "run"))["stages"]
        places = [place for place, stage in enumerate(stages) if stage["verb"] == "train"]
        return [f"stages.{place}.recipe.{change}" for place in places for change in short]


@dataclass(frozen=True)
class Patient:
    """`folder`: the reader's."""

    pool: Pool
    folder: Path
    environment: dict[str, str]

    def do(self, block: Block) -> None:
        """Errors: `AssertionError` for what does not run, with its place and what it printed."""
        if block.file:
            _write(block, self.pool)
            return
        program = [sys.executable, "-"] if block.language == "python" else ["bash", "-euo", "pipefail"]
        done = subprocess.run(
            program,
            input=block.text,
            text=True,
            capture_output=True,
            cwd=self.folder,
            env=self.environment,
            timeout=1800,
        )
        assert done.returncode == 0, f"{block.page}:{block.line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def _write(block: Block, pool: Pool) -> None:
    path = Path(block.file)
    if path.suffix == ".jsonl":
        write_rows(path, block.text, pool)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
