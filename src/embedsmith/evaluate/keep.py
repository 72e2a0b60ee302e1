"""What was computed before: results of tasks and vectors of texts, by the model's fingerprint.

Nothing here goes stale: a name holds a hash of everything the content depends on, so another model, another task or
another text is another file. Old files only take space.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from embedsmith.core.encoder import Encoder, Role
from embedsmith.core.errors import EvaluationError
from embedsmith.core.files import atomic_file
from embedsmith.core.progress import log
from embedsmith.core.reps import Dense, Reps
from embedsmith.evaluate.result import TaskResult
from embedsmith.evaluate.tasks import Task


@runtime_checkable
class Fingerprinted(Protocol):
    """An encoder that can say which one it is."""

    def fingerprint(self) -> str:
        """A hash of everything its output depends on: weights, settings, prompts."""
        ...


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


@dataclass(frozen=True)
class CachedEncoder:
    """An encoder whose dense vectors are kept on disk, in one file a piece of texts, under its fingerprint.

    An evaluation that was stopped goes on behind the pieces that are there, and tasks that share a corpus encode it
    once. Files are NumPy matrices in fp32, read memory-mapped. Other outputs than `dense` pass through.
    """

    encoder: Encoder
    folder: Path
    key: str

    @staticmethod
    def of(encoder: Encoder, folder: str | Path) -> CachedEncoder:
        """Errors: `EvaluationError` for an encoder without a fingerprint."""
        return CachedEncoder(encoder, Path(folder), fingerprint(encoder))

    def represent(
        self, texts: Sequence[str], *, role: Role, task: str | None = None, outputs: Sequence[str] = ("dense",)
    ) -> Reps:
        if tuple(outputs) != ("dense",):
            return self.encoder.represent(texts, role=role, task=task, outputs=outputs)
        path = self.folder / self.key / f"{digest(role, task, list(texts))}.npy"
        vector_ND = _read_matrix(path, len(texts))
        if vector_ND is None:
            rep = self.encoder.represent(texts, role=role, task=task, outputs=outputs)["dense"]
            if not isinstance(rep, Dense):
                raise EvaluationError("the dense output is not dense")
            if bool(rep.vector_ND.isfinite().all()):
                with atomic_file(path, "wb") as file:
                    np.save(file, rep.vector_ND.float().numpy())
            return {"dense": rep}
        return {"dense": Dense(torch.from_numpy(np.array(vector_ND)))}

    def fingerprint(self) -> str:
        return self.key


def _read_matrix(path: Path, rows: int) -> Any:
    """The matrix, memory-mapped; `None` where there is none, or a file that is not whole."""
    if not path.is_file():
        return None
    try:
        vector_ND = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        log.warning("%s: cannot be read (%s); the texts are encoded again", path, error)
        return None
    return vector_ND if vector_ND.ndim == 2 and len(vector_ND) == rows else None
