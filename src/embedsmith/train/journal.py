"""What a run writes about itself: `metrics.jsonl`, and the trackers accelerate knows (TensorBoard and others)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from accelerate import Accelerator

from embedsmith.core.collectives import rank
from embedsmith.core.files import atomic_file
from embedsmith.core.registry import to_plain


class Journal:
    """One line of numbers at a time, to the file and to every tracker. On the first rank only."""

    def __init__(
        self, output: Path, accelerator: Accelerator, recipe: Any, log_with: tuple[str, ...], start: int
    ) -> None:
        self._accelerator = accelerator
        self._file: IO[str] | None = None
        if rank() != 0:
            return
        path = output / "metrics.jsonl"
        cut_back(path, start)
        self._file = path.open("a", encoding="utf-8")
        if log_with:
            purge = {"tensorboard": {"purge_step": start}} if "tensorboard" in log_with else {}
            accelerator.init_trackers("embedsmith", config=_scalars(to_plain(recipe)), init_kwargs=purge)

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        self._accelerator.log(values, step=step)

    def close(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            for tracker in self._accelerator.trackers:  # `end_training` would also end the process group
                tracker.finish()


def cut_back(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a half-written last one: the run goes on from there and writes them again."""
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["step"] <= step:
            kept.append(line)
    with atomic_file(path) as file:
        file.writelines(line + "\n" for line in kept)


def _scalars(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A flat view of the recipe that every tracker accepts."""
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _scalars(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): tree if isinstance(tree, bool | int | float | str) else json.dumps(tree)}
