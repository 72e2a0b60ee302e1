"""An encoder and tasks in, results out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from embedsmith.core.encoder import Encoder
from embedsmith.core.errors import EvaluationError
from embedsmith.core.progress import log
from embedsmith.evaluate.encoding import Reader
from embedsmith.evaluate.result import Results, TaskResult
from embedsmith.evaluate.tasks import Task


def evaluate(
    encoder: Encoder,
    tasks: Sequence[Task],
    *,
    head: str = "dense",
    progress: bool | None = None,
    about: Mapping[str, Any] | None = None,
) -> Results:
    """Score `encoder` on every task, with the outputs of one head.

    `progress`: show a bar (`None`: where a terminal watches). `about`: what to store beside the scores, such as the
    model's name.
    Errors: `EvaluationError` for no tasks, two tasks of one name, and a model whose output cannot be scored.
    """
    if not tasks:
        raise EvaluationError("no tasks were given", fix="name some with --tasks, or give paths")
    twice = [name for name, count in Counter(task.name for task in tasks).items() if count > 1]
    if twice:
        raise EvaluationError(f"two tasks are called {twice[0]!r}", fix="give each task once")
    reader = Reader(encoder, head, progress)
    return Results(tuple(_timed(task, reader) for task in tasks), dict(about or {}))


def _timed(task: Task, reader: Reader) -> TaskResult:
    started = time.perf_counter()
    result = replace(task.evaluate(reader), seconds=time.perf_counter() - started)
    for note in result.notes:
        log.warning("%s: %s", task.name, note)
    return result
