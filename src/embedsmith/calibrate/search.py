"""Weights of a merge by how well models do: of candidates (search), of parents one after the other (greedy soup), of
each parent alone (LM-Cocktail). Models are rebuilt in place in a live one, never written."""

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
from torch import Tensor

from embedsmith.calibrate.live_model import LiveMerge
from embedsmith.calibrate.objective import Objective, Scorer
from embedsmith.calibrate.probe import Probe, ProbedMethod, TaskBatches
from embedsmith.calibrate.self_positioning import Descent, Positioning
from embedsmith.core.errors import MissingExtraError, RecipeError
from embedsmith.core.files import atomic_file
from embedsmith.core.outputs import refuse_foreign_file
from embedsmith.core.progress import log, progress_bar
from embedsmith.core.settings import Count, Finite, NotNegative, Positive, Range
from embedsmith.core.shelf import merge_methods
from embedsmith.evaluate import Results, evaluate
from embedsmith.merge.method import Base, Combine, Job, Method, combine_coefficients
from embedsmith.merge.methods.formulas import karcher, normalised, sequential_slerp

REPORTED = (1.0, 2.0, 5.0)
"""Temperatures LM-Cocktail's weights are always shown for: the published code has 5, its documentation 3."""


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
    lengths: Annotated[tuple[NotNegative, ...], Range(min_length=1)] = (0.6, 0.8, 1.0, 1.2)
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
        if self.probe is not None and self.probe.max_length is not None:
            fix = "take max_length of method.probe away, or use method: self_positioning"
            raise RecipeError("a search scores whole texts, with the model that reads the probe", fix=fix)

    def prepare(self, job: Job) -> Combine:
        live = LiveMerge.of(job.parents, job.base, granularity=job.granularity)
        found = self.run(live)
        report = found.as_dict()
        del report["trials"]
        job.report["search"] = report
        log.info("search: %s after %d merges (%s)", report["best"], len(found.trials), found.stopped)
        if (better := found.better_parent) is not None:
            log.warning("search: the best merge (%.4f) lies below its own part %s (%.4f)", found.best.value, *better)
        return combine_coefficients(live.coefficients_by_name(found.best.coefficient_GM, job))

    def run(self, live: LiveMerge) -> Study:
        """The search for the best merge of `live`'s parents for the goal; `live` is left at it.

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
        study = Study(live, scorer.bounded(list(parents.values())), self, parents=parents)
        with progress_bar("search", self.evaluations) as bar:
            study.stopped = self._try_all(study, bar.advance)
        places = {"merge": study.best.coefficient_GM, **dict(zip(live.names, torch.eye(live.parents).double()))}
        for name, coefficient_GM in places.items() if scorer.hold_out else ():
            live.place(coefficient_GM)
            study.held_out[name] = evaluate(live, scorer.hold_out, progress=False).main_scores()
        live.place(study.best.coefficient_GM)
        if self.report is not None:
            found = study.as_dict()
            with atomic_file(self.report) as file:
                json.dump(found, file, indent=1)
            with atomic_file(Path(self.report).with_suffix(".csv")) as file:
                writer = csv.DictWriter(file, fieldnames=list(found["trials"][0]))
                writer.writeheader()
                writer.writerows(found["trials"])
        return study

    def _try_all(self, study: Study, advance: Callable[[], None]) -> str:
        """Score what the searcher asks for; returns why it ended."""
        low, high = min(self.lengths), max(self.lengths)
        count = study.live.parents
        start = Point((1 / count,) * count, min(max(1.0, low), high))
        if self.probe is not None and self.searcher != "grid":
            batches = self.position.batches(study.live, self.probe)
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


@dataclass
class Study:
    """A search under way, and what it found. `parents`: their results by name. `held_out`: the best and the parents on
    tasks the search never saw. `stopped`: why it ended."""

    live: LiveMerge
    scorer: Scorer
    settings: Search
    trials: list[Trial] = field(default_factory=list)
    parents: Mapping[str, Results] = field(default_factory=dict)
    held_out: dict[str, dict[str, float]] = field(default_factory=dict)
    stopped: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "best": self.best.row(self.live.names),
            "stopped": self.stopped,
            "texts": self.live.texts,
            "parents": {name: results.main_scores() for name, results in self.parents.items()},
            "better_parent": None if self.better_parent is None else dict([self.better_parent]),
            "held_out": self.held_out,
            "trials": [trial.row(self.live.names) for trial in self.trials],
        }

    @property
    def better_parent(self) -> tuple[str, float] | None:
        """The parent with the best score, and that score, where it is above the best merge's."""
        values = {name: self.scorer.value(results) for name, results in self.parents.items()}
        name = max(values, key=lambda name: values[name], default=None)
        return None if name is None or values[name] <= self.best.value else (name, values[name])

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
        trial = Trial(point, own_GM, self.scorer.value(results), results, self.live.texts)
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
        live = LiveMerge.of(job.parents, job.base)
        scorer = self.goal.scorer()

        def value(coefficient_M: Tensor) -> float:
            live.place(coefficient_M)
            return scorer.value(scorer.results(live))

        alone = [value(row) for row in torch.eye(live.parents, dtype=torch.float64)]
        coefficient_M, history = self.chosen(alone, value)
        job.report["greedy_soup"] = {"parents": live.by_parent(alone), "in_turn": history}
        return combine_coefficients(live.coefficients_by_name(coefficient_M[None], job))

    def chosen(self, score_M: Sequence[float], evaluate: Callable[[Tensor], float]) -> tuple[Tensor, list[float]]:
        """Coefficients, and the score after every trial. `evaluate`: coefficients [M] to a held-out score, higher is
        better."""

        def mean_of(places: Sequence[int]) -> Tensor:
            coef_M = torch.zeros(len(score_M), dtype=torch.float64)
            coef_M[list(places)] = 1 / len(places)
            return coef_M

        first, *others = sorted(range(len(score_M)), key=lambda place: -score_M[place])
        kept, best, history = [first], score_M[first], [score_M[first]]
        for place in others:
            history.append(evaluate(mean_of([*kept, place])))
            if history[-1] >= best + self.least_gain:
                kept, best = [*kept, place], history[-1]
        return mean_of(kept), history


@merge_methods.register("lm_cocktail", formula="w = softmax(-L_i / T)", source="LM-Cocktail (2311.13534)")
@dataclass(frozen=True, kw_only=True)
class LMCocktail(ProbedMethod):
    """The parents' mean, weighed by their losses on a few examples of the task at hand.

    Losses are those of the sources (InfoNCE, CoSENT, or as they say), at the model's own pooling, prompts and length;
    with several sources the mean over them.
    `temperature`: T of the softmax over losses. `batch_size`: examples of a task in one contrastive batch.
    """

    temperature: Positive = 5.0
    batch_size: Annotated[int, Range(ge=2)] = 16

    def prepare(self, job: Job) -> Combine:
        live = self.live(job)
        tasks = TaskBatches.whole(live, self.probe.sources, self.probe.read(), self.batch_size, self.probe.seed)
        losses = tasks.parent_losses()
        job.report["lm_cocktail"] = {
            "losses": live.by_parent(losses),
            "weights_at_temperature": {f"{t:g}": self.weights(losses, t).tolist() for t in REPORTED},
            "texts": live.texts,
        }
        return combine_coefficients(live.coefficients_by_name(self.weights(losses, self.temperature)[None], job))

    @staticmethod
    def weights(losses: Sequence[float], temperature: float) -> Tensor:
        """softmax(-L / T) [M] in float64, so that weights sum to 1 to the last digits."""
        return torch.softmax(-torch.tensor(losses, dtype=torch.float64) / temperature, dim=0)
