"""An encoder and tasks in, results out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embedsmith.core.collectives import ALONE, Group, rank
from embedsmith.core.encoder import Encoder, Fingerprinted
from embedsmith.core.errors import EvaluationError
from embedsmith.core.files import atomic_file
from embedsmith.core.progress import log
from embedsmith.evaluate.encoding import Reader
from embedsmith.evaluate.metrics import added_metrics
from embedsmith.evaluate.result import Results, TaskResult
from embedsmith.evaluate.tasks.similarity import Task

# What was computed before: results of tasks, by the model's fingerprint (vectors of texts: `search/cached.py`).
# Nothing here goes stale: a name holds a hash of everything the content depends on, so another model, another task or
# another text is another file. Old files only take space.


def fingerprint(encoder: Encoder, *also: object) -> str:
    """The encoder's hash, and that of what else matters. Errors: `EvaluationError` for an encoder that has none."""
    if not isinstance(encoder, Fingerprinted):
        raise EvaluationError(
            f"{type(encoder).__name__} cannot say which model it is",
            expected="a method fingerprint() that returns a hash of its weights and settings",
            fix="add it, or evaluate without keeping results",
        )
    return digest(encoder.fingerprint(), *also)


def digest(*values: object) -> str:
    """16 hexadecimal digits of the values' JSON."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class KeptResults:
    """A folder of `TASK-HASH.json`, one a task and model."""

    folder: Path
    model: str

    def find(self, task: Task) -> TaskResult | None:
        """The result of the same task by the same model; a file that cannot be read is as good as none."""
        path = self.path(task)
        if not path.is_file():
            return None
        try:
            return TaskResult.from_dict(json.loads(path.read_text(encoding="utf-8")), path)
        except (OSError, ValueError, EvaluationError) as error:
            log.warning("%s: cannot be read (%s); the task is scored again", path, error)
            return None

    def write(self, task: Task, result: TaskResult) -> None:
        with atomic_file(self.path(task)) as file:
            json.dump(result.as_dict(items=True), file, ensure_ascii=False, allow_nan=False)

    def path(self, task: Task) -> Path:
        """Metrics of other packages count: a result without them is not that of an evaluation with them."""
        content = digest(self.model, task_content(task), *added_metrics())
        return self.folder / f"{task.name.replace('/', '_')}-{content}.json"


def task_content(task: Task) -> Any:
    """Everything a task holds, as plain values. Errors: `EvaluationError` for a task that is no dataclass."""
    if not dataclasses.is_dataclass(task) or isinstance(task, type):
        raise EvaluationError(f"the task {task.name!r} is no dataclass", fix="evaluate without keeping results")
    return [type(task).__name__, dataclasses.asdict(task)]


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
