"""Run a model under mteb 2: results in mteb's JSON, in the layout of the public leaderboard."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedsmith.core.encoder import Encoder
from embedsmith.core.errors import DataError, EvaluationError
from embedsmith.evaluate.mteb.models import mteb_model, mteb_task_name, need_mteb
from embedsmith.evaluate.mteb.tasks import SampleLimits, as_mteb_task, hub_task, limited
from embedsmith.evaluate.result import Results, TaskResult
from embedsmith.evaluate.tasks.by_name import data_folder, known_tasks, load_task


def mteb_evaluate(
    encoder: Encoder,
    tasks: Sequence[Any],
    output: str | Path,
    *,
    name: str | Path,
    revision: str | None = None,
    head: str = "dense",
    limits: SampleLimits | None = None,
    progress: bool | None = None,
) -> Results:
    """Score `encoder` on tasks of mteb (or ours made into them, see `as_mteb_task`) with mteb itself.

    mteb writes `OUTPUT/results/NAME/REVISION/TASK.json`, below `experiments/` for another head than `dense` and for a
    sample. Tasks that are there already are not run again.
    Errors: `EvaluationError` for a task whose data cannot be fetched, and one that the head cannot do.
    """
    mteb = need_mteb()
    from datasets.exceptions import DatasetNotFoundError
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    experiment = None if limits is None else limits.as_dict()
    model = mteb_model(encoder, name, revision=revision, head=head, experiment=experiment, progress=progress)
    chosen = [task if limits is None else limited(task, limits) for task in tasks]
    cache = mteb.ResultCache(cache_path=Path(output))
    found: list[TaskResult] = []
    logging.getLogger("mteb").setLevel(logging.ERROR)
    for task in chosen:
        if head != "dense" and not isinstance(task, AbsTaskRetrieval):
            raise EvaluationError(
                f"mteb scores the head {head!r} on retrieval and reranking only",
                where=task.metadata.name,
                fix="use embedsmith's own evaluation for this head",
            )
        try:
            done = mteb.evaluate(model, [task], cache=cache, co2_tracker=False, show_progress_bar=bool(progress))
        except (OSError, DatasetNotFoundError) as error:
            raise DataError(
                f"the data cannot be fetched ({str(error).splitlines()[0][:200]})",
                where=task.metadata.name,
                fix="connect to the hub, or use local files: paths of STS files and BEIR folders are tasks too",
            ) from error
        found.append(from_mteb(done.task_results[0], task.metadata))
    meta = model.mteb_model_meta
    about = {"model": meta.name, "revision": meta.revision, "engine": f"mteb {mteb.__version__}", "head": head}
    return Results(tuple(found), about | (experiment or {}))


def find_mteb_tasks(
    names: Sequence[str], *, data: str | Path | None = None, split: str = "test", languages: Sequence[str] = ()
) -> list[Any]:
    """Tasks by name: a path or a name in the data folder is a task of ours, anything else one of mteb's.
    `languages` (such as `cmn`) choose among the parts of mteb's multilingual tasks.

    Errors: as `load_task` and `hub_task`.
    """
    folder = data_folder(data)
    known = set() if folder is None else set(known_tasks(folder))
    tasks = []
    for name in names:
        ours = Path(name).exists() or ":" in name or name in known or f"{name}-{split}" in known
        tasks.append(
            as_mteb_task(load_task(name, data_dir=data, split=split), split) if ours else hub_task(name, languages)
        )
    return tasks


def from_mteb(result: Any, metadata: Any) -> TaskResult:
    """mteb's result as ours: the mean over splits and languages, as mteb's leaderboard takes it."""
    rows = [row for rows in result.scores.values() for row in rows]
    numbers: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                numbers.setdefault(key, []).append(float(value))
    scores = {key: sum(values) / len(values) for key, values in numbers.items()}
    for key in [key for key in scores if key.startswith("limit_")]:
        del scores[key]
    metric = str(metadata.main_score) if metadata.main_score in scores else "main_score"
    sizes: tuple[str, ...] = ("queries_scored", "documents_searched")
    cut = any(row.get("comparable") is False for row in rows)
    counts = {key: int(scores.pop(key)) for key in sizes if key in scores}
    notes: list[str] = ["the corpus was cut: the score is not comparable with others"] if cut else []
    notes += ["the score does not exist: the model gives all texts the same"] if math.isnan(scores[metric]) else []
    kind, seconds = mteb_task_name(metadata.type), float(result.evaluation_time or 0.0)
    return TaskResult(result.task_name, kind, metric, scores, counts, notes=tuple(notes), seconds=seconds)
