"""What a search maximises: retrieval and similarity tasks, cut down so that hundreds of merges can be scored on them,
as one number."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from embedsmith.core.encoder import Encoder
from embedsmith.core.errors import RecipeError
from embedsmith.core.seeds import derive_seed
from embedsmith.core.settings import Finite, Range, section
from embedsmith.evaluate import Results, RetrievalTask, STSTask, Task, evaluate, load_task
from embedsmith.evaluate.compare import SAMPLES, resampled, statistic_of

Floats = npt.NDArray[np.float64]
T = TypeVar("T")


@section
@dataclass(frozen=True, kw_only=True)
class Objective:
    """Which tasks, how much of them, and how they become one number.

    `tasks`: names or paths, looked up in `data`, on which merges are compared. `hold_out`: tasks that the best merge
    and the parents are scored on once, at the end. `data`: the folder of named tasks. `split`: of a BEIR folder.
    `items`: queries or pairs of a task at most. `documents`: of a corpus at most: those judged for the chosen queries,
    the rest drawn. `weights`: by task name, 1 each. `aggregate`: the weighted `mean`, or the worst task (`min`).
    `normalise`: scores as (s - worst parent) / (best parent - worst parent), so that tasks of small range count too.
    `seed`: of what is drawn.
    """

    tasks: Annotated[tuple[str, ...], Range(min_length=1)]
    hold_out: tuple[str, ...] = ()
    data: str | None = None
    split: str = "test"
    items: Annotated[int, Range(ge=2)] = 500
    documents: Annotated[int, Range(ge=2)] = 2000
    weights: dict[str, Finite] = field(default_factory=dict)
    aggregate: Literal["mean", "min"] = "mean"
    normalise: bool = False
    seed: int = 0

    def scorer(self) -> Scorer:
        """With the tasks read and cut down. Errors: `RecipeError` for a weight of a task that is not there, or weights
        that sum to nothing."""
        scorer = Scorer(self, self._read(self.tasks), self._read(self.hold_out))
        known = [task.name for task in scorer.tasks]
        if unknown := sorted(self.weights.keys() - set(known)):
            raise RecipeError(f"goal.weights names {unknown[0]!r}", expected=f"one of {', '.join(known)}")
        if not sum(self.weights.get(name, 1.0) for name in known) > 0:
            raise RecipeError(f"the weights of the goal's tasks, {self.weights}", expected="a sum above 0")
        return scorer

    def _read(self, names: Sequence[str]) -> tuple[Task, ...]:
        tasks = (load_task(name, data_dir=self.data, split=self.split) for name in names)
        return tuple(reduced_task(task, self.items, self.documents, self.seed) for task in tasks)


def reduced_task(task: Task, items: int, documents: int, seed: int) -> Task:
    """At most so many queries or pairs, and a corpus of the documents judged for them filled up at random. The same
    for the same seed; smaller parts lie within larger ones. Other kinds of task stay whole."""
    if isinstance(task, STSTask) and len(task.score) > items:
        rows = sorted(_first(range(len(task.score)), items, seed, task.name))
        left, right = ([column[row] for row in rows] for column in (task.text1, task.text2))
        return STSTask(task.name, left, right, [task.score[row] for row in rows])
    if not isinstance(task, RetrievalTask):
        return task
    queries = _first(task.judged(), items, seed, task.name)
    qrels = {query: task.qrels[query] for query in queries}
    chosen = dict.fromkeys(document for grades in qrels.values() for document in grades if document in task.corpus)
    for document in _first(list(task.corpus), len(task.corpus), seed, f"{task.name} corpus"):
        if len(chosen) >= documents:
            break
        chosen[document] = None
    corpus = {document: task.corpus[document] for document in chosen}
    return replace(task, queries={query: task.queries[query] for query in queries}, corpus=corpus, qrels=qrels)


def _first(values: Sequence[T], count: int, seed: int, name: str) -> list[T]:
    """The first `count` of a fixed random order."""
    order = random.Random(derive_seed("goal", seed, name)).sample(range(len(values)), len(values))
    return [values[place] for place in order[:count]]


@dataclass(frozen=True)
class Scorer:
    """Scores of models on an objective's tasks. `bounds`: worst and best parent's score by task, once they are
    known."""

    settings: Objective
    tasks: tuple[Task, ...]
    hold_out: tuple[Task, ...] = ()
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def bounded(self, parents: Sequence[Results]) -> Scorer:
        """With the parents' scores as the ends of every task's scale."""
        columns = {task.name: [results[task.name].main_score for results in parents] for task in self.tasks}
        return replace(self, bounds={name: (min(scores), max(scores)) for name, scores in columns.items()})

    def results(self, encoder: Encoder) -> Results:
        return evaluate(encoder, self.tasks, progress=False)

    def value(self, results: Results) -> float:
        """The one number, higher is better."""
        return float(self._together({each.task: np.array([each.main_score]) for each in results})[0])

    def gain(self, new: Results, old: Results) -> tuple[float, float, float]:
        """What `new` is better by, and the bounds of 95 % of a paired bootstrap: both are resampled alike."""
        gap_B = self._resampled(new) - self._resampled(old)
        low, high = np.nanquantile(gap_B, (0.025, 0.975))
        return self.value(new) - self.value(old), float(low), float(high)

    def _resampled(self, results: Results) -> Floats:
        """The number on resamples of every task's items."""
        score_B = {}
        for each in results:
            size = len(each.items[statistic_of(each)[0][0]])
            draw = np.random.default_rng(derive_seed(self.settings.seed, each.task))
            score_B[each.task] = resampled(each, draw.integers(0, size, (SAMPLES, size)))
        return self._together(score_B)

    def _together(self, score_B: Mapping[str, Floats]) -> Floats:
        """Normalised, then the weighted mean or the worst."""
        rows, weights = [], []
        for name, values in score_B.items():
            low, high = self.bounds.get(name, (0.0, 1.0)) if self.settings.normalise else (0.0, 1.0)
            rows.append((values - low) / max(high - low, 1e-9))
            weights.append(self.settings.weights.get(name, 1.0))
        stacked = np.stack(rows)
        worst = self.settings.aggregate == "min"
        together: Floats = stacked.min(0) if worst else np.average(stacked, axis=0, weights=weights)
        return together
