"""One trial of a sweep: the recipe with its values is run, given up where it is behind, and measured."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embedsmith.cli.stages import PipelineRecipe
from embedsmith.cli.stages import run as run_pipeline
from embedsmith.cli.sweep_recipe import SweepRecipe
from embedsmith.core.errors import EvaluationError, ModelError, RecipeError, TrainingError
from embedsmith.core.progress import log
from embedsmith.core.recipe import parse
from embedsmith.evaluate import Results
from embedsmith.report.pareto import SWEEP_FILE, ScoredStep, SweepRecord, SweepTrial, shown_changes
from embedsmith.train import Recipe, train
from embedsmith.train.scoring import watched
from embedsmith.train.trained import Trained


def trials_of(recipe: SweepRecipe) -> SweepRecord:
    """What is over of a sweep so far."""
    if (recipe.output / SWEEP_FILE).is_file():
        return SweepRecord.read(recipe.output)
    goals = {name: "low" if one.forgetting else "high" for name, one in recipe.objectives.items()}
    ranges = {one.name: str(one) for one in recipe.ranges}
    return SweepRecord(recipe.verb, recipe.settings.sampler, goals, ranges)  # type: ignore[arg-type]


class _Behind(Exception):
    """A trial is not worth finishing."""


@dataclass(frozen=True)
class DrawnTrial:
    """A recipe to be tried. `changes`: the value of each key that has a range."""

    recipe: SweepRecipe
    number: int
    changes: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where it runs."""
        return self.recipe.output / "trials" / f"{self.number:04}"

    def run(self) -> SweepTrial:
        """Run it to its end. Errors: what is no fault of its own values."""
        settings, started = self.recipe.settings, time.monotonic()
        trial = SweepTrial(self.number, "finished", dict(self.changes))
        log.info("trial %d (%d of %d): %s", self.number, self.number + 1, settings.trials, shown_changes(trial))
        tree = self.recipe.tried(self.changes, self.folder)
        try:
            self.recipe.check(tree)
        except RecipeError as error:  # values that are right one by one and wrong together
            return replace(trial, state="failed", why=error.what)
        try:
            with ExitStack() as watch:
                if settings.prune and self.number >= settings.startup:
                    watch.enter_context(watched(self._judge))
                rounds = _made(self.recipe.verb, tree, self.recipe.where)
        except _Behind:
            trial = replace(trial, state="pruned")
        except (TrainingError, ModelError, EvaluationError, RecipeError) as error:
            stepped = isinstance(error, TrainingError) or any(self.folder.rglob("metrics.jsonl"))
            if not stepped and not trials_of(self.recipe).finished():
                raise  # the recipe's fault
            log.warning("trial %d failed: %s", self.number, error)
            trial = replace(trial, state="failed", why=error.what)
        else:
            trial = self._measured(trial, rounds)
        curve = [point for path in sorted(self.folder.rglob("metrics.jsonl")) for point in self._curve(path)]
        return replace(trial, curve=tuple(curve), seconds=round(time.monotonic() - started, 1))

    def _measured(self, trial: SweepTrial, rounds: Sequence[Mapping[str, float]]) -> SweepTrial:
        """The trial with its values, from what was scored, in its order."""
        first: dict[str, float] = {}  # of what is scored again later
        last: dict[str, float] = {}
        for scores in rounds:
            first = {name: last[name] for name in scores if name in last} | first
            last |= scores
        values: dict[str, float] = {}
        start: dict[str, float] = {}
        for name, objective in self.recipe.objectives.items():
            value, before = objective.value(first, last), objective.value(first, first)
            if value is None:
                missing = [each for each in objective.names if each not in last]
                what = f"{', '.join(missing)} was not scored" if missing else "its tasks were not scored at the start"
                raise RecipeError(what, where=f"sweep.objectives.{name}", expected=f"one of {', '.join(last)}")
            values[name] = value
            start |= {} if before is None else {name: before}
        if wrong := [name for name, value in values.items() if not math.isfinite(value)]:
            return replace(trial, state="failed", why=f"{wrong[0]} is undefined")
        return replace(trial, values=values, start={n: v for n, v in start.items() if math.isfinite(v)})

    def _judge(self, output: Path) -> None:
        """After an evaluation of the run in `output`: end the trial where it is behind. Errors: `_Behind`."""
        curve = self._curve(output / "metrics.jsonl")
        if curve and trials_of(self.recipe).behind(curve[-1].run, curve[-1].step, curve):
            log.info("trial %d is behind at step %d and ends here", self.number, curve[-1].step)
            raise _Behind

    def _curve(self, metrics: Path) -> list[ScoredStep]:
        """The objectives at every evaluation of a run, as far as its own scores tell them."""
        run = metrics.parent.relative_to(self.folder).as_posix()
        first: dict[str, float] | None = None
        points = []
        for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            entry = json.loads(line)
            scores = {key.removeprefix("score/"): value for key, value in entry.items() if key.startswith("score/")}
            first = first or scores
            found = {name: one.value(first, scores) for name, one in self.recipe.objectives.items()}
            values = {name: value for name, value in found.items() if value is not None}
            if scores and values and entry["step"]:
                points.append(ScoredStep(run, entry["step"], values))
        return points


def _made(verb: str, tree: dict[str, Any], where: str) -> list[dict[str, float]]:
    """Run a trial's recipe; everything that was scored, in its order."""
    if verb == "train":
        return _of_run(train(parse(Recipe, tree, where)).parent)
    pipeline, found = parse(PipelineRecipe, tree, where), []
    made = run_pipeline(pipeline)
    for stage in pipeline.stages:
        if stage.verb == "train":
            found += _of_run(made[stage.name].parent)
        elif stage.verb == "evaluate":
            found.append(_scores(Results.load(made[stage.name])))
    return found


def _of_run(output: Path) -> list[dict[str, float]]:
    """What a run scored before and after. Scores at other widths and of other heads are in its metrics alone, in the
    line that has the same main scores: the last one, or with `final: best` that of the best checkpoint."""
    run = Trained.of(output)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = []
    for results in (run.results_before, run.results):
        if results is not None:
            main = {f"score/{task}": score for task, score in results.main_scores().items()}
            own: dict[str, float] = next((line for line in reversed(lines) if main.items() <= line.items()), {})
            columns = {key.removeprefix("score/"): score for key, score in own.items() if key.startswith("score/")}
            found.append(columns | _scores(results))
    return found


def _scores(results: Results) -> dict[str, float]:
    """Main scores by the names of tasks, and every score as `TASK/METRIC`."""
    every = {f"{result.task}/{name}": score for result in results for name, score in result.scores.items()}
    return results.main_scores() | every
