"""An encoder and tasks in, results out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from embedsmith.core.collectives import ALONE, Group, rank
from embedsmith.core.encoder import Encoder
from embedsmith.core.errors import EvaluationError
from embedsmith.core.progress import log
from embedsmith.evaluate.encoding import Reader
from embedsmith.evaluate.keep import KeptResults, fingerprint
from embedsmith.evaluate.result import Results, TaskResult
from embedsmith.evaluate.tasks import Task


def evaluate(
    encoder: Encoder,
    tasks: Sequence[Task],
    *,
    head: str = "dense",
    progress: bool | None = None,
    about: Mapping[str, Any] | None = None,
    keep: str | Path | None = None,
    group: Group = ALONE,
) -> Results:
    """Score `encoder` on every task, with the outputs of one head.

    `progress`: show a bar (`None`: where a terminal watches). `about`: what to store beside the scores, such as the
    model's name. `keep`: a folder for the results of single tasks; a task that was scored there before by the same
    model is not scored again, so an interrupted evaluation continues. `group`: the ranks that share the work
    (`None`: all); every one of them must call this, and gets the same results.
    Errors: `EvaluationError` for no tasks, two tasks of one name, and a model whose output cannot be scored. What goes
    wrong on one rank, of any kind, is an error on all.
    """
    if not tasks:
        raise EvaluationError("no tasks were given", fix="name some with --tasks, or give paths")
    twice = [name for name, count in Counter(task.name for task in tasks).items() if count > 1]
    if twice:
        raise EvaluationError(f"two tasks are called {twice[0]!r}", fix="give each task once")
    reader = Reader(encoder, head, progress, group)
    kept = None if keep is None else KeptResults(Path(keep), fingerprint(encoder, head))
    with reader.as_one():
        return Results(tuple(_scored(task, reader, kept) for task in tasks), dict(about or {}))


def _scored(task: Task, reader: Reader, kept: KeptResults | None) -> TaskResult:
    result = None if kept is None else reader.together(lambda: kept.find(task) if rank(reader.group) == 0 else None)[0]
    if result is None:
        started = time.perf_counter()
        result = replace(task.evaluate(reader), seconds=time.perf_counter() - started)
        if kept is not None and rank(reader.group) == 0:
            kept.write(task, result)
    for note in result.notes:
        log.warning("%s: %s", task.name, note)
    return result
