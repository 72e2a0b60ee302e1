"""An encoder and tasks in, results out; and a folder of results that were computed before.

Nothing in such a folder goes stale: a name holds a hash of everything the content depends on, so another model, another
task or another text is another file. Old files only take space. (Vectors of texts: `search/cached.py`.)
"""

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

import torch

from embedsmith.core.collectives import ALONE, Group, rank
from embedsmith.core.encoder import Encoder, fingerprint, main_head
from embedsmith.core.errors import DeviceMemoryError, EvaluationError
from embedsmith.core.files import atomic_file
from embedsmith.core.inputs import read_json
from embedsmith.core.progress import log
from embedsmith.evaluate.encoding import Reader
from embedsmith.evaluate.metrics import added_metrics
from embedsmith.evaluate.rerank import Rerank
from embedsmith.evaluate.result import Results, TaskResult
from embedsmith.evaluate.tasks.kinds import Task
from embedsmith.evaluate.tasks.ranking import LongDocumentTask, RankingTask


def evaluate(
    encoder: Encoder | None,
    tasks: Sequence[Task],
    *,
    rerank: Rerank | None = None,
    head: str | None = None,
    progress: bool | None = None,
    about: Mapping[str, Any] | None = None,
    cache: str | Path | None = None,
    group: Group = ALONE,
) -> Results:
    """Score `encoder` on every task, with the outputs of one head (`None`: the one that it is made for); or a reranker,
    on reranking tasks and on the first documents that `encoder` finds in retrieval tasks (`None`: reranking tasks
    alone).

    `progress`: show a bar (`None`: where a terminal watches). `about`: what to store beside the scores, such as the
    model's name. `cache`: a folder for the results of single tasks; a task that was scored there before by the same
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
    if encoder is None and rerank is None:
        raise EvaluationError("neither an embedding model nor a reranker was given")
    wrong = [task.name for task in tasks if not isinstance(task, RankingTask | LongDocumentTask)]
    if rerank is not None and wrong:
        raise EvaluationError(
            f"{wrong[0]} is no task that a reranker could be scored on", expected="retrieval and reranking tasks"
        )
    if head is None:
        head = "dense" if encoder is None else main_head(encoder)
    reader = Reader(encoder, head, progress, group, rerank)
    known = None if cache is None else ResultCache.of(encoder, cache, rerank, head)
    with reader.as_one():
        return Results(tuple(_scored(task, reader, known) for task in tasks), dict(about or {}))


def _scored(task: Task, reader: Reader, cache: ResultCache | None) -> TaskResult:
    result, first = None, rank(reader.group) == 0
    if cache is not None:
        result = reader.together(lambda: cache.find(task) if first else None)[0]
    if result is None:
        started = time.perf_counter()
        try:
            result = replace(task.evaluate(reader), seconds=round(time.perf_counter() - started, 3))
        except (torch.OutOfMemoryError, DeviceMemoryError) as error:
            raise EvaluationError(
                f"out of memory ({str(error).splitlines()[0]})",
                where=f"task {task.name}",
                fix="lower model.max_length, or leave the task out of evaluate.tasks and score the checkpoints "
                "by themselves (embedsmith evaluate)",
            ) from error
        if cache is not None and first:
            cache.write(task, result)
    for note in result.notes:
        log.warning("%s: %s", task.name, note)
    return result


def digest(*values: object) -> str:
    """16 hexadecimal digits of the values' JSON."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class ResultCache:
    """A folder of `TASK-HASH.json`, one a task and model."""

    folder: Path
    model: str

    @staticmethod
    def of(encoder: Encoder | None, folder: str | Path, rerank: Rerank | None, head: str) -> ResultCache:
        """That of one head of a model, or of a reranker behind it."""
        models = [fingerprint(encoder)] if encoder is not None else []
        models += [rerank.fingerprint()] if rerank is not None else []
        return ResultCache(Path(folder), digest(*models, head))

    def find(self, task: Task) -> TaskResult | None:
        """The result of the same task by the same model; a file that cannot be read is as good as none."""
        path = self.path(task)
        if not path.is_file():
            return None
        try:
            return TaskResult.from_dict(read_json(path, EvaluationError), path)
        except EvaluationError as error:
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
        raise EvaluationError(f"the task {task.name!r} is no dataclass", fix="evaluate without a cache")
    return [type(task).__name__, dataclasses.asdict(task)]
