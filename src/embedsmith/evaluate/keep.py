"""What was computed before: results of tasks, by the model's fingerprint (vectors of texts: `search/cached.py`).

Nothing here goes stale: a name holds a hash of everything the content depends on, so another model, another task or
another text is another file. Old files only take space.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedsmith.core.encoder import Encoder, Fingerprinted
from embedsmith.core.errors import EvaluationError
from embedsmith.core.files import atomic_file
from embedsmith.core.progress import log
from embedsmith.evaluate.result import TaskResult
from embedsmith.evaluate.tasks import Task


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
        return self.folder / f"{task.name.replace('/', '_')}-{digest(self.model, task_content(task))}.json"


def task_content(task: Task) -> Any:
    """Everything a task holds, as plain values. Errors: `EvaluationError` for a task that is no dataclass."""
    if not dataclasses.is_dataclass(task) or isinstance(task, type):
        raise EvaluationError(f"the task {task.name!r} is no dataclass", fix="evaluate without keeping results")
    return [type(task).__name__, dataclasses.asdict(task)]
