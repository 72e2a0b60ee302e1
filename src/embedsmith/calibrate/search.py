"""Search for the weights and the length of a merge. Candidates are rebuilt in place in a live model, never written."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from embedsmith.calibrate.goal import Goal, GoalConfig, Point, Searcher, check_lengths, evolution, grid, halving
from embedsmith.calibrate.live import LiveMerge, Probe, open_live
from embedsmith.calibrate.methods import by_name
from embedsmith.calibrate.positioning import PositioningConfig, ProbeBatches, self_position
from embedsmith.core.errors import RecipeError
from embedsmith.core.files import atomic_file
from embedsmith.core.progress import Bar, log, progress_bar
from embedsmith.core.settings import section
from embedsmith.core.shelf import merge_methods
from embedsmith.evaluate import Results, evaluate
from embedsmith.evaluate.compare import difference
from embedsmith.merge.method import Base, Combine, Job, combine_coefficients
from embedsmith.merge.methods.formulas import average, greedy_soup, karcher, sequential_slerp

Family = Literal["slerp", "paper", "karcher", "average"]


@section
@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How to search.

    `goal`: what is good. `searcher`: `grid` over weights k / `steps` and `lengths`; `halving` of `points` random
    merges; `cma`, CMA-ES; `self_positioning`, one descent on `probe`, scored once. `family`: what weights mean: SLERP
    with the sum of earlier weights, the `paper`'s with their mean, Karcher mean, average. `lengths`: the grid's, and
    by their extremes the bounds of the others. `keep`: the share that survives a halving. `sigma`: the first step of
    CMA-ES. `probe` with `cma` starts at the end of a descent.
    `evaluations`: at most so many merges are scored. `least_gain`, `patience`: stop when the upper bound (95 %, paired
    bootstrap) of what the last `patience` rounds have gained is below `least_gain`. `report`: a file for the history.
    """

    goal: GoalConfig
    searcher: Literal["grid", "halving", "cma", "self_positioning"] = "grid"
    family: Family = "slerp"
    steps: int = 4
    lengths: tuple[float, ...] = (0.6, 0.8, 1.0, 1.2)
    points: int = 27
    keep: float = 1 / 3
    sigma: float = 0.3
    evaluations: int = 100
    least_gain: float = 0.001
    patience: int = 2
    probe: Probe | None = None
    position: PositioningConfig = PositioningConfig()
    report: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_lengths(self.lengths)
        if min(self.steps, self.points, self.evaluations, self.patience) < 1 or not 0 < self.keep < 1:
            raise RecipeError("search: steps, points, evaluations and patience from 1 on, keep between 0 and 1")
        if self.searcher == "self_positioning" and self.probe is None:
            raise RecipeError("searcher self_positioning needs texts to descend on", fix="set probe")


@dataclass(frozen=True)
class Trial:
    """One scored merge. `texts`: encoded so far by the whole search, with this merge."""

    point: Point
    coefficient_GM: Tensor
    share: float
    value: float
    results: Results
    texts: int

    def row(self, names: Sequence[str]) -> dict[str, Any]:
        """Plain values for JSON and CSV."""
        weights = {f"weight/{name}": weight for name, weight in zip(names, self.point.weights, strict=True)}
        scores = {f"score/{task}": score for task, score in self.results.main_scores().items()}
        return {
            "value": self.value,
            "share": self.share,
            "length": self.point.length,
            **weights,
            **scores,
            "texts": self.texts,
        }


@dataclass(frozen=True)
class Found:
    """What a search found.

    `front`: the trials that no other beats both in retrieval and in similarity. `against_parents`: how much the best
    is better than each parent on each task, with p-values corrected for their number (Holm). `held_out`: the best and
    the parents on tasks the search never saw. `stopped`: why it ended.
    """

    best: Trial
    trials: tuple[Trial, ...]
    parents: Mapping[str, Results]
    front: tuple[Trial, ...]
    against_parents: tuple[dict[str, Any], ...]
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
            "against_parents": list(self.against_parents),
            "held_out": {name: dict(scores) for name, scores in self.held_out.items()},
            "front": [trial.row(self.names) for trial in self.front],
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
    goal: Goal
    config: SearchConfig
    trials: list[Trial] = field(default_factory=list)

    def coefficients(self, point: Point) -> Tensor:
        """coefficient_GM of a point in the search's family, length included."""
        rows = [_direction(self.config.family, gram_MM, point.weight_M) for gram_MM in self.live.gram()]
        return point.length * torch.stack(rows)

    def try_out(self, point: Point, share: float, coefficient_GM: Tensor | None = None) -> Trial:
        """Place the merge in the live model and score it."""
        own_GM = self.coefficients(point) if coefficient_GM is None else coefficient_GM
        self.live.place(own_GM)
        results = self.goal.score(self.live, share)
        trial = Trial(point, own_GM, share, self.goal.value(results), results, self.live.cost.texts)
        self.trials.append(trial)
        return trial

    def best(self) -> Trial | None:
        """The best of those scored on all items."""
        whole = [trial for trial in self.trials if trial.share >= 1]
        return max(whole, key=lambda trial: trial.value, default=None)

    def run(self, searcher: Searcher, bar: Bar) -> str:
        """Round after round until the searcher ends, the budget is spent or nothing is gained; returns which."""
        values: list[float] | None = None
        bests: list[Trial] = []
        while True:
            try:
                wanted = searcher.send(values)  # type: ignore[arg-type]  # the first send starts the generator
            except StopIteration:
                return "searched all"
            values = []
            for point in wanted.points:
                if len(self.trials) >= self.config.evaluations:
                    return "budget spent"
                values.append(self.try_out(point, wanted.share).value)
                bar.advance()
            best = self.best()
            bests += [] if best is None or wanted.share < 1 else [best]
            if best is not None and self._settled(bests):
                return "no more gain"

    def _settled(self, bests: Sequence[Trial]) -> bool:
        """Whether the last rounds together gained less than is worth it, even at the upper bound."""
        patience = self.config.patience
        if len(bests) <= patience:
            return False
        _, _, high = self.goal.gain(bests[-1].results, bests[-1 - patience].results)
        return high < self.config.least_gain


def _direction(family: Family, gram_MM: Tensor, weight_M: Tensor) -> Tensor:
    if family == "karcher":
        return karcher(gram_MM, weight_M)
    if family == "average":
        return average(weight_M)
    accumulate: Literal["sum", "mean"] = "mean" if family == "paper" else "sum"
    return sequential_slerp(gram_MM, weight_M, accumulate, on_antipodal="linear")


def search(live: LiveMerge, config: SearchConfig) -> Found:
    """The best merge of `live`'s parents for the goal; `live` is left at it.

    Errors: `EvaluationError` and `DataError` for tasks that cannot be read, `MissingExtraError` without the package
    `cma` where it is needed.
    """
    goal = config.goal.open()
    parents = {}
    for place, name in enumerate(live.names):
        live.place_parent(place)
        parents[name] = goal.score(live)
    goal = goal.bounded(list(parents.values()))
    study = Study(live, goal, config)
    with progress_bar("search", config.evaluations) as bar:
        stopped = _run(study, bar)
    best = study.best() or _on_all(study)
    held_out = _held_out(live, goal, best)
    live.place(best.coefficient_GM)
    found = Found(
        best=best,
        trials=tuple(study.trials),
        parents=parents,
        front=front([trial for trial in study.trials if trial.share >= 1]),
        against_parents=tuple(against(best.results, parents)),
        held_out=held_out,
        stopped=stopped,
        names=live.names,
        texts=live.cost.texts,
    )
    if config.report is not None:
        found.save(config.report)
    return found


def _run(study: Study, bar: Bar) -> str:
    config, live = study.config, study.live
    bounds = (min(config.lengths), max(config.lengths))
    start = Point((1 / live.parents,) * live.parents, min(max(1.0, bounds[0]), bounds[1]))
    if config.probe is not None and config.searcher in ("cma", "self_positioning"):
        batches = ProbeBatches.of(live, config.probe.sources, config.probe.read(), config.position)
        end = self_position(live, batches, config.position)
        start = Point(end.weights, end.length)
        study.try_out(start, 1.0, end.coefficient_GM)
        if config.searcher == "self_positioning":
            return "descended"
    if config.searcher == "grid":
        return study.run(grid(live.parents, config.steps, config.lengths), bar)
    if config.searcher == "halving":
        return study.run(halving(live.parents, config.points, bounds, config.keep, config.seed), bar)
    return study.run(evolution(live.parents, start, bounds, config.sigma, config.seed), bar)


def _on_all(study: Study) -> Trial:
    """A budget spent before any merge was scored on all items: score the best of what is known."""
    return study.try_out(max(study.trials, key=lambda trial: (trial.share, trial.value)).point, 1.0)


def _held_out(live: LiveMerge, goal: Goal, best: Trial) -> dict[str, dict[str, float]]:
    """Main scores of the best merge and of the parents on the tasks that were not searched on."""
    if not goal.hold_out:
        return {}
    scores = {}
    for place, name in enumerate(live.names):
        live.place_parent(place)
        scores[name] = evaluate(live, goal.hold_out, progress=False).main_scores()
    live.place(best.coefficient_GM)
    return {"merge": evaluate(live, goal.hold_out, progress=False).main_scores(), **scores}


def front(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Trials that no other equals in both retrieval and similarity while beating them in one (Pareto), best retrieval
    first. Tasks that are not retrieval count as similarity."""
    axes = [two_scores(trial.results) for trial in trials]

    def beaten(own: tuple[float, float]) -> bool:
        return any(other[0] >= own[0] and other[1] >= own[1] and other != own for other in axes)

    kept = [(own, trial) for own, trial in zip(axes, trials, strict=True) if not beaten(own)]
    return tuple(trial for _, trial in sorted(kept, key=lambda pair: -pair[0][0]))


def two_scores(results: Results) -> tuple[float, float]:
    """Mean main score of the retrieval tasks, and of the others; 0 where there are none."""
    retrieval = [result.main_score for result in results if result.kind == "retrieval"]
    other = [result.main_score for result in results if result.kind != "retrieval"]
    means = [sum(scores) / len(scores) if scores else 0.0 for scores in (retrieval, other)]
    return means[0], means[1]


def against(best: Results, parents: Mapping[str, Results]) -> list[dict[str, Any]]:
    """Paired differences of the best to every parent on every task, p-values corrected by Holm's method."""
    rows: list[dict[str, Any]] = []
    for name, results in parents.items():
        for new, old in zip(best, results, strict=True):
            gap = difference(new, old)
            bounds = {"difference": gap.interval.value, "low": gap.interval.low, "high": gap.interval.high}
            rows.append({"parent": name, "task": gap.task, **bounds, "p": gap.p_value})
    for row, corrected in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = corrected
    return rows


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the k-th smallest of n times (n - k + 1), never falling, at most 1."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min((len(p_values) - rank) * p_values[place], 1.0))
        corrected[place] = highest
    return corrected


@merge_methods.register(
    "search", formula="argmax over a, lambda of the goal at theta_0 + lambda U(a)", source="embedsmith"
)
@dataclass(frozen=True, kw_only=True)
class Search(SearchConfig):
    """The weights and the length that score best on retrieval and similarity tasks. The job's weights are not used."""

    base: ClassVar[Base] = "needed"
    by_rows: ClassVar[bool] = False

    def prepare(self, job: Job) -> Combine:
        live = open_live(job.parents, job.base, granularity=job.granularity)
        found = search(live, self)
        own = {key: value for key, value in found.as_dict().items() if key != "trials"}
        job.report["search"] = own
        log.info("search: %s after %d merges (%s)", own["best"], len(found.trials), found.stopped)
        return combine_coefficients(by_name(live, found.best.coefficient_GM, job))


@merge_methods.register("greedy_soup", formula="best first, kept if the goal does not fall", source="2203.05482")
@dataclass(frozen=True, kw_only=True)
class GreedySoup:
    """Parents from best to worst, each kept in the running mean if the goal rises by `least_gain` or more."""

    base: ClassVar[Base] = "optional"
    by_rows: ClassVar[bool] = False

    goal: GoalConfig
    least_gain: float = 0.0

    def prepare(self, job: Job) -> Combine:
        live = open_live(job.parents, job.base)
        goal = self.goal.open()

        def value(coefficient_M: Tensor) -> float:
            live.place(coefficient_M)
            return goal.value(goal.score(live))

        alone = [value(row) for row in torch.eye(live.parents, dtype=torch.float64)]
        coefficient_M, history = greedy_soup(alone, value, self.least_gain)
        job.report["greedy_soup"] = {"parents": dict(zip(live.names, alone, strict=True)), "in_turn": history}
        return combine_coefficients(by_name(live, coefficient_M[None], job))
