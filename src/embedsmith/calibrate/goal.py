"""What a search wants: retrieval and similarity tasks small enough to score hundreds of merges on, as one number."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedsmith.core.encoder import Encoder
from embedsmith.core.errors import MissingExtraError, RecipeError
from embedsmith.core.seeds import derive_seed
from embedsmith.core.settings import section
from embedsmith.evaluate import Results, RetrievalTask, STSTask, Task, TaskResult, evaluate, load_task
from embedsmith.evaluate.compare import SAMPLES, resampled, statistic_of

Floats = npt.NDArray[np.float64]
T = TypeVar("T")


@section
@dataclass(frozen=True, kw_only=True)
class GoalConfig:
    """Which tasks, how much of them, and how they become one number.

    `tasks`, `hold_out`: names or paths, looked up in `data`; what is held out is scored once, at the end. `split`: of
    a BEIR folder. `items`: queries or pairs of a task at most. `documents`: of a corpus at most: those judged for the
    chosen queries, the rest drawn. `weights`: by task name, 1 each. `aggregate`: the weighted mean, or the worst task.
    `normalise`: scores as (s - worst parent) / (best parent - worst parent), so that tasks of small range count too.
    """

    tasks: tuple[str, ...]
    hold_out: tuple[str, ...] = ()
    data: str | None = None
    split: str = "test"
    items: int = 500
    documents: int = 2000
    weights: dict[str, float] = field(default_factory=dict)
    aggregate: Literal["mean", "min"] = "mean"
    normalise: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks:
            raise RecipeError("goal.tasks: at least one task is needed")
        if self.items < 2 or self.documents < 2:
            raise RecipeError(f"items {self.items}, documents {self.documents}", expected="at least 2")

    def open(self) -> Goal:
        """The tasks, cut down. Errors: `RecipeError` for a weight of a task that is not there."""
        chosen, held = ([self._task(name) for name in names] for names in (self.tasks, self.hold_out))
        known = [task.name for task in chosen]
        if unknown := sorted(self.weights.keys() - set(known)):
            raise RecipeError(f"goal.weights names {unknown[0]!r}", expected=f"one of {', '.join(known)}")
        weight = {name: self.weights.get(name, 1.0) for name in known}
        return Goal(tuple(chosen), tuple(held), weight, self.aggregate, self.normalise, self.seed)

    def _task(self, name: str) -> Task:
        return part_of(load_task(name, data_dir=self.data, split=self.split), self.items, self.documents, self.seed)


def part_of(task: Task, items: int, documents: int, seed: int) -> Task:
    """At most so many queries or pairs, and a corpus of the documents judged for them filled up at random. The same
    for the same seed; smaller parts lie within larger ones. Other kinds of task stay whole."""
    if isinstance(task, STSTask) and len(task.score) > items:
        rows = sorted(_first(range(len(task.score)), items, seed, task.name))
        left, right = ([column[row] for row in rows] for column in (task.text1, task.text2))
        return STSTask(task.name, left, right, [task.score[row] for row in rows])
    if isinstance(task, RetrievalTask):
        return _part_of_retrieval(task, items, documents, seed)
    return task


def _part_of_retrieval(task: RetrievalTask, items: int, documents: int, seed: int) -> RetrievalTask:
    queries = _first(task.judged(), items, seed, task.name)
    qrels = {query: task.qrels[query] for query in queries}
    kept = dict.fromkeys(document for grades in qrels.values() for document in grades if document in task.corpus)
    for document in _first(list(task.corpus), len(task.corpus), seed, f"{task.name} corpus"):
        if len(kept) >= documents:
            break
        kept[document] = None
    corpus = {document: task.corpus[document] for document in kept}
    return replace(task, queries={query: task.queries[query] for query in queries}, corpus=corpus, qrels=qrels)


def _first(values: Sequence[T], count: int, seed: int, name: str) -> list[T]:
    """The first `count` of a fixed random order."""
    order = random.Random(derive_seed("goal", seed, name)).sample(range(len(values)), len(values))
    return [values[place] for place in order[:count]]


@dataclass(frozen=True)
class Goal:
    """Tasks and their worth. `bounds`: worst and best parent's score by task, once they are known."""

    tasks: tuple[Task, ...]
    hold_out: tuple[Task, ...]
    weights: Mapping[str, float]
    aggregate: Literal["mean", "min"] = "mean"
    normalise: bool = False
    seed: int = 0
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def bounded(self, parents: Sequence[Results]) -> Goal:
        """With the parents' scores as the ends of every task's scale."""
        columns = {task.name: [results[task.name].main_score for results in parents] for task in self.tasks}
        return replace(self, bounds={name: (min(scores), max(scores)) for name, scores in columns.items()})

    def score(self, encoder: Encoder, share: float = 1.0) -> Results:
        """Main scores on `share` of the items and documents of every task: low fidelity costs less."""
        tasks = self.tasks if share >= 1 else [self._reduced(task, share) for task in self.tasks]
        return evaluate(encoder, tasks, progress=False)

    def _reduced(self, task: Task, share: float) -> Task:
        size = len(task.score) if isinstance(task, STSTask) else 0
        documents = 2
        if isinstance(task, RetrievalTask):
            size, documents = len(task.queries), max(round(share * len(task.corpus)), 2)
        return part_of(task, max(round(share * size), 10), documents, self.seed)

    def value(self, results: Results) -> float:
        """The one number, higher is better."""
        return float(self._together({each.task: np.array([each.main_score]) for each in results})[0])

    def samples(self, results: Results, count: int = SAMPLES) -> Floats:
        """The number on resamples of every task's items; results of two merges are resampled alike."""
        return self._together({each.task: resampled(each, self._choice(each, count)) for each in results})

    def gain(self, new: Results, old: Results) -> tuple[float, float, float]:
        """What `new` is better by, and the bounds of 95 % of a paired bootstrap."""
        gap_B = self.samples(new) - self.samples(old)
        low, high = np.nanquantile(gap_B, (0.025, 0.975))
        return self.value(new) - self.value(old), float(low), float(high)

    def _choice(self, result: TaskResult, count: int) -> npt.NDArray[np.int64]:
        size = len(result.items[statistic_of(result)[0][0]])
        return np.random.default_rng(derive_seed(self.seed, result.task)).integers(0, size, (count, size))

    def _together(self, score_B: Mapping[str, Floats]) -> Floats:
        """Normalised, then the weighted mean or the worst."""
        rows, weights = [], []
        for name, values in score_B.items():
            low, high = self.bounds.get(name, (0.0, 1.0)) if self.normalise else (0.0, 1.0)
            rows.append((values - low) / max(high - low, 1e-9))
            weights.append(self.weights[name])
        stacked = np.stack(rows)
        together: Floats = stacked.min(0) if self.aggregate == "min" else np.average(stacked, axis=0, weights=weights)
        return together


# Where to look next: each searcher is a generator of rounds of points that is sent the values it asked for.


@dataclass(frozen=True)
class Point:
    """A place in the space of merges: the parents' weights (they sum to 1) and the length lambda."""

    weights: tuple[float, ...]
    length: float

    @property
    def weight_M(self) -> Tensor:
        return torch.tensor(self.weights, dtype=torch.float64)


@dataclass(frozen=True)
class Round:
    """Points to score, on which share of the items."""

    points: tuple[Point, ...]
    share: float = 1.0


Searcher = Generator[Round, Sequence[float], None]


def grid(parents: int, steps: int, lengths: Sequence[float]) -> Searcher:
    """Every combination of weights k / steps that sum to 1, at every length; one round a length, the unmerged corners
    last, since they are the parents themselves."""
    ways = [way for way in itertools.product(range(steps + 1), repeat=parents) if sum(way) == steps]
    ways.sort(key=lambda way: max(way))
    for length in lengths:
        yield Round(tuple(Point(tuple(part / steps for part in way), length) for way in ways))


def halving(parents: int, points: int, lengths: tuple[float, float], keep: float, seed: int) -> Searcher:
    """Random points on a small share of the items; the best `keep` of them on more, until all items are used.

    Weights are uniform on the simplex, lengths uniform between the bounds. Equal weights at the middle length are
    always among them.
    """
    chance = np.random.default_rng(seed)
    left = [Point((1 / parents,) * parents, sum(lengths) / 2)]
    for _ in range(points - 1):
        weights = tuple(float(w) for w in chance.dirichlet(np.ones(parents)))
        left.append(Point(weights, float(chance.uniform(*lengths))))
    rounds = max(math.ceil(math.log(len(left)) / math.log(1 / keep)), 1)
    for place in range(rounds + 1):
        values = yield Round(tuple(left), share=min(keep ** (rounds - place), 1.0))
        order = sorted(range(len(left)), key=lambda n: -values[n])
        left = [left[n] for n in order[: max(math.ceil(keep * len(left)), 1)]]


def evolution(parents: int, start: Point, lengths: tuple[float, float], sigma: float, seed: int) -> Searcher:
    """CMA-ES on (log weights, length) from `start`. Source: Hansen 2016 (1604.00772), package cma."""
    try:
        import cma
    except ImportError as error:
        raise MissingExtraError("cma", "merge") from error
    logs = [math.log(max(w, 1e-3)) for w in start.weights]
    low, high = [-6.0] * parents + [lengths[0]], [6.0] * parents + [lengths[1]]
    options: dict[str, Any] = {"seed": seed + 1, "verbose": -9, "bounds": [low, high]}
    strategy = cma.CMAEvolutionStrategy([*logs, start.length], sigma, options)
    while not strategy.stop():
        found = strategy.ask()
        values = yield Round(tuple(_point(place) for place in found))
        strategy.tell(found, [-value for value in values])


def _point(place: Sequence[float]) -> Point:
    weights = torch.softmax(torch.tensor(list(place[:-1]), dtype=torch.float64), 0)
    return Point(tuple(weights.tolist()), float(place[-1]))


def check_lengths(lengths: Sequence[float]) -> None:
    """Errors: `RecipeError` for lengths that cannot be searched."""
    if not lengths or min(lengths) < 0:
        raise RecipeError(f"lengths {list(lengths)}", expected="numbers from 0 on")
