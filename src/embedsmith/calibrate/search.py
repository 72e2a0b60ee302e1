"""Search for the weights and the length of a merge. Candidates are rebuilt in place in a live model, never written."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from embedsmith.calibrate.live_model import LiveMerge, open_live
from embedsmith.calibrate.objective import Objective, Scorer
from embedsmith.calibrate.probe import Probe
from embedsmith.calibrate.self_positioning import Descent, Positioning
from embedsmith.core.errors import MissingExtraError, RecipeError
from embedsmith.core.files import atomic_file
from embedsmith.core.outputs import refuse_foreign_file
from embedsmith.core.progress import log, progress_bar
from embedsmith.core.settings import Count, Finite, NotNegative, Positive
from embedsmith.core.shelf import merge_methods
from embedsmith.evaluate import Results, evaluate
from embedsmith.merge.method import Base, Combine, Job, Method, combine_coefficients
from embedsmith.merge.methods.formulas import greedy_soup, karcher, normalised, sequential_slerp


@merge_methods.register(
    "search", formula="argmax over a, lambda of the goal at theta_0 + lambda U(a)", source="embedsmith"
)
@dataclass(frozen=True, kw_only=True)
class Search(Method):
    """The weights and the length that score best on retrieval and similarity tasks. The job's weights are not used.

    `goal`: what is good. `searcher`: `grid` over weights k / `steps` and `lengths`; `cma`, CMA-ES; `self_positioning`,
    one descent on `probe`, scored once. `family`: what weights mean: SLERP with the sum of earlier weights, the
    `paper`'s with their mean, Karcher mean, average. `steps`: of the grid between 0 and 1. `lengths`: the grid's, and
    by their extremes the bounds of the others. `sigma`: the first step of CMA-ES.
    `evaluations`: at most so many merges are scored. `least_gain`: the search stops when the upper bound (95 %, paired
    bootstrap) of what the last rounds have gained is below it. `patience`: how many rounds those are.
    `probe`: texts to descend on; with `cma` the search starts at the end of a descent. `position`: how to descend.
    `report`: a JSON file for every trial, and a CSV file beside it. `seed`: of CMA-ES.
    """

    goal: Objective
    searcher: Literal["grid", "cma", "self_positioning"] = "grid"
    family: Literal["slerp", "paper", "karcher", "average"] = "slerp"
    steps: Count = 4
    lengths: Annotated[tuple[NotNegative, ...], Field(min_length=1)] = (0.6, 0.8, 1.0, 1.2)
    sigma: Positive = 0.3
    evaluations: Count = 100
    least_gain: Finite = 0.001
    patience: Count = 2
    probe: Probe | None = None
    position: Descent = Descent()
    report: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.searcher == "self_positioning" and self.probe is None:
            raise RecipeError("searcher self_positioning needs texts to descend on", fix="set method.probe")

    def prepare(self, job: Job) -> Combine:
        live = open_live(job.parents, job.base, granularity=job.granularity)
        found = self.run(live)
        job.report["search"] = {key: value for key, value in found.as_dict().items() if key != "trials"}
        log.info("search: %s after %d merges (%s)", found.as_dict()["best"], len(found.trials), found.stopped)
        return combine_coefficients(live.coefficients_by_name(found.best.coefficient_GM, job))

    def run(self, live: LiveMerge) -> Found:
        """The best merge of `live`'s parents for the goal; `live` is left at it.

        Errors: `EvaluationError` and `DataError` for tasks that cannot be read, `MissingExtraError` without the package
        `cma` where it is needed.
        """
        if self.report is not None:
            refuse_foreign_file(Path(self.report), '"stopped": "')
            refuse_foreign_file(Path(self.report).with_suffix(".csv"), "value,length,")
        scorer = self.goal.scorer()
        parents = {}
        for place, name in enumerate(live.names):
            live.place_parent(place)
            parents[name] = scorer.results(live)
        study = Study(live, scorer.bounded(list(parents.values())), self)
        with progress_bar("search", self.evaluations) as bar:
            stopped = self._try_all(study, bar.advance)
        best = study.best
        held_out = {}
        if scorer.hold_out:
            for place, name in enumerate(live.names):
                live.place_parent(place)
                held_out[name] = evaluate(live, scorer.hold_out, progress=False).main_scores()
            live.place(best.coefficient_GM)
            held_out = {"merge": evaluate(live, scorer.hold_out, progress=False).main_scores(), **held_out}
        live.place(best.coefficient_GM)
        found = Found(best, tuple(study.trials), parents, held_out, stopped, live.names, live.cost.texts)
        if self.report is not None:
            found.save(self.report)
        return found

    def _try_all(self, study: Study, advance: Callable[[], None]) -> str:
        """Score what the searcher asks for; returns why it ended."""
        low, high = min(self.lengths), max(self.lengths)
        count = study.live.parents
        start = Point((1 / count,) * count, min(max(1.0, low), high))
        if self.probe is not None and self.searcher != "grid":
            batches = self.position.batches(study.live, self.probe.sources, self.probe.read())
            end = Positioning(study.live, batches, self.position).descend()
            start = Point(end.weights, end.length)
            study.try_out(start, end.coefficient_GM)
            if self.searcher == "self_positioning":
                return "descended"
        if self.searcher == "grid":
            return study.run(grid(count, self.steps, self.lengths), advance)
        return study.run(evolution(count, start, (low, high), self.sigma, self.seed), advance)


# Where to look next: each searcher is a generator of rounds of points that is sent the values it asked for.


@dataclass(frozen=True)
class Point:
    """A place in the space of merges: the parents' weights (they sum to 1) and the length lambda."""

    weights: tuple[float, ...]
    length: float


Searcher = Generator[Sequence[Point], Sequence[float], None]


def grid(parents: int, steps: int, lengths: Sequence[float]) -> Searcher:
    """Every combination of weights k / steps that sum to 1, at every length; one round a length, the unmerged corners
    last, since they are the parents themselves."""
    ways = [way for way in itertools.product(range(steps + 1), repeat=parents) if sum(way) == steps]
    ways.sort(key=lambda way: max(way))
    for length in lengths:
        yield [Point(tuple(part / steps for part in way), length) for way in ways]


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
        asked = strategy.ask()
        shares = [torch.softmax(torch.tensor(list(place[:-1]), dtype=torch.float64), 0).tolist() for place in asked]
        values = yield [Point(tuple(own), float(place[-1])) for own, place in zip(shares, asked, strict=True)]
        strategy.tell(asked, [-value for value in values])


@dataclass(frozen=True)
class Trial:
    """One scored merge. `texts`: encoded so far by the whole search, with this merge."""

    point: Point
    coefficient_GM: Tensor
    value: float
    results: Results
    texts: int

    def row(self, names: Sequence[str]) -> dict[str, Any]:
        """Plain values for JSON and CSV."""
        weights = {f"weight/{name}": weight for name, weight in zip(names, self.point.weights, strict=True)}
        scores = {f"score/{task}": score for task, score in self.results.main_scores().items()}
        return {"value": self.value, "length": self.point.length, **weights, **scores, "texts": self.texts}


@dataclass(frozen=True)
class Found:
    """What a search found. `parents`: their results by name. `held_out`: the best and the parents on tasks the search
    never saw. `stopped`: why it ended."""

    best: Trial
    trials: tuple[Trial, ...]
    parents: Mapping[str, Results]
    held_out: Mapping[str, Mapping[str, float]]
    stopped: str
    names: tuple[str, ...]
    texts: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "best": self.best.row(self.names),
            "stopped": self.stopped,
            "texts": self.texts,
            "parents": {name: results.main_scores() for name, results in self.parents.items()},
            "held_out": {name: dict(scores) for name, scores in self.held_out.items()},
            "trials": [trial.row(self.names) for trial in self.trials],
        }

    def save(self, path: str | Path) -> None:
        """JSON at `path`, and the trials as CSV beside it."""
        path = Path(path)
        with atomic_file(path) as file:
            json.dump(self.as_dict(), file, indent=1)
        rows = [trial.row(self.names) for trial in self.trials]
        with atomic_file(path.with_suffix(".csv")) as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


@dataclass
class Study:
    """A search under way."""

    live: LiveMerge
    scorer: Scorer
    settings: Search
    trials: list[Trial] = field(default_factory=list)

    @cached_property
    def gram_GMM(self) -> Tensor:
        return self.live.gram()

    def coefficients(self, point: Point) -> Tensor:
        """coefficient_GM of a point in the search's family, length included."""
        weight_M = torch.tensor(point.weights, dtype=torch.float64)
        accumulate: Literal["sum", "mean"] = "mean" if self.settings.family == "paper" else "sum"
        rows = []
        for gram_MM in self.gram_GMM:
            if self.settings.family == "karcher":
                rows.append(karcher(gram_MM, weight_M))
            elif self.settings.family == "average":
                rows.append(normalised(weight_M))
            else:
                rows.append(sequential_slerp(gram_MM, weight_M, accumulate, on_antipodal="linear"))
        return point.length * torch.stack(rows)

    def try_out(self, point: Point, coefficient_GM: Tensor | None = None) -> Trial:
        """Place the merge in the live model and score it."""
        own_GM = self.coefficients(point) if coefficient_GM is None else coefficient_GM
        self.live.place(own_GM)
        results = self.scorer.results(self.live)
        trial = Trial(point, own_GM, self.scorer.value(results), results, self.live.cost.texts)
        self.trials.append(trial)
        return trial

    @property
    def best(self) -> Trial:
        return max(self.trials, key=lambda trial: trial.value)

    def run(self, searcher: Searcher, advance: Callable[[], None]) -> str:
        """Round after round until the searcher ends, the budget is spent or nothing is gained; returns which."""
        values: list[float] | None = None
        bests: list[Trial] = []
        while True:
            try:
                points = searcher.send(values)  # type: ignore[arg-type]  # the first send starts the generator
            except StopIteration:
                return "searched all"
            values = []
            for point in points:
                if len(self.trials) >= self.settings.evaluations:
                    return "budget spent"
                values.append(self.try_out(point).value)
                advance()
            bests.append(self.best)
            patience = self.settings.patience
            if len(bests) > patience:
                _, _, high = self.scorer.gain(bests[-1].results, bests[-1 - patience].results)
                if high < self.settings.least_gain:
                    return "no more gain"


@merge_methods.register("greedy_soup", formula="best first, kept if the goal does not fall", source="2203.05482")
@dataclass(frozen=True, kw_only=True)
class GreedySoup(Method):
    """Parents from best to worst, each kept in the running mean if the goal rises by `least_gain` or more.

    `goal`: what is good. `least_gain`: the least rise that keeps a parent.
    """

    base: ClassVar[Base] = "optional"

    goal: Objective
    least_gain: Finite = 0.0

    def prepare(self, job: Job) -> Combine:
        live = open_live(job.parents, job.base)
        scorer = self.goal.scorer()

        def value(coefficient_M: Tensor) -> float:
            live.place(coefficient_M)
            return scorer.value(scorer.results(live))

        alone = [value(row) for row in torch.eye(live.parents, dtype=torch.float64)]
        coefficient_M, history = greedy_soup(alone, value, self.least_gain)
        job.report["greedy_soup"] = {"parents": live.by_parent(alone), "in_turn": history}
        return combine_coefficients(live.coefficients_by_name(coefficient_M[None], job))
