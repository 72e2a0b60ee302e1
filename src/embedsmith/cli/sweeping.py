"""A sweep: many trials of one recipe with other values in the place of its ranges, drawn by Optuna from what the trials
before brought; the recipes that no other beats are left as files.

    study/          Optuna's storage, an SQLite file
    sweep.yaml      the recipe with its ranges
    sweep.json      every trial that is over, with its values (`report/pareto.py`)
    trials/0007/    the run or the pipeline of a trial
    best/*.yaml     recipes of the Pareto front, to be run by `embedsmith train` or `run`
    report.html

Any number of processes may work on one sweep, each at a trial of its own: what all of them write is written in turns,
and a trial whose process is gone is continued by the next one that asks. Every draw has a seed of its own, so that a
sweep that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from embedsmith.cli.stages import PipelineRecipe
from embedsmith.cli.stages import run as run_pipeline
from embedsmith.cli.sweep_recipe import SweepRecipe
from embedsmith.compat.config import recipe_tree
from embedsmith.core.errors import (
    CheckpointError,
    EmbedsmithError,
    EvaluationError,
    MissingExtraError,
    ModelError,
    RecipeError,
    TrainingError,
)
from embedsmith.core.files import atomic_file
from embedsmith.core.outputs import Kind, atomic_folder, claimed, discard, recover
from embedsmith.core.outputs import sweep as clear_temporary
from embedsmith.core.progress import lines_shown, log
from embedsmith.core.recipe import apply_override, parse, read_tree
from embedsmith.core.seeds import derive_seed
from embedsmith.core.settings import to_plain
from embedsmith.core.shipped import recipe_file
from embedsmith.core.terminal import Printed
from embedsmith.evaluate import Results
from embedsmith.evaluate.result import percent
from embedsmith.report import write_report
from embedsmith.report.pareto import SWEEP_FILE, ScoredStep, SweepRecord, SweepTrial, shown_changes
from embedsmith.train import Recipe, train
from embedsmith.train.checkpoint import flat
from embedsmith.train.scoring import watched
from embedsmith.train.trained import Trained

_RECIPE, _STORAGE, _NAME = "sweep.yaml", "study/optuna.db", "sweep"
SWEEP = Kind(
    "sweep",
    (_RECIPE, "study/*", SWEEP_FILE, "report.html", "best/*.yaml", "trials/**"),
    (_RECIPE, "\nsweep:"),
)
_FREE = ("output", "sweep.trials", "sweep.prune", "sweep.keep")
"""Keys that may change while a sweep goes on."""


@dataclass(frozen=True, repr=False)
class Swept(Printed):
    """What a sweep found. `output`: its folder; `record`: every trial that is over."""

    output: Path
    record: SweepRecord

    @property
    def trials(self) -> tuple[SweepTrial, ...]:
        """All that are over."""
        return self.record.trials

    @property
    def best(self) -> list[SweepTrial]:
        """The Pareto front: trials that no other beats in every objective, the best in the first objective first."""
        return self.record.front()

    @property
    def recipes(self) -> list[Path]:
        """The files of their recipes, each to be run as it is."""
        return [_best_file(self.output, trial) for trial in self.best]

    def table(self) -> RenderableType:
        """A row for each trial of the front, and how all of them ended."""
        table = Table()
        for name in ("trial", *self.record.objectives, *self.record.ranges):
            table.add_column(name, justify="right", overflow="fold")
        for trial in self.best:
            values = [percent(trial.values[name]) for name in self.record.objectives]
            changes = [json.dumps(trial.changes[name], ensure_ascii=False) for name in self.record.ranges]
            table.add_row(str(trial.number), *values, *map(Text, changes))
        lines = [self.record.counts(), f"recipes: {self.output / 'best'}", f"report: {self.output / 'report.html'}"]
        return Group(*([table] if self.best else []), *map(Text, lines))


def sweep(
    recipe: str | Path | Mapping[str, Any],
    ranges: Mapping[str, Any] | None = None,
    /,
    *,
    overwrite: bool = False,
    **settings: Any,
) -> Swept:
    """Search the values of a recipe's keys that are best, or best together, or go on where the same call was stopped.

    >>> import embedsmith as es
    >>> recipe = {
    ...     "model": {"path": "my-model"},
    ...     "data": [{"path": "pairs.jsonl", "batch_size": 8}],
    ...     "train": {"steps": 2},
    ...     "evaluate": {"held_out": 8},
    ...     "output": "runs/sweep",
    ... }
    >>> found = es.sweep(recipe, {"train.learning_rate": {"log": [1e-5, 1e-2]}}, trials=2)
    >>> len(found.trials), found.recipes[0].parent.as_posix()
    (2, 'runs/sweep/best')

    `recipe`: the path of a recipe of `train` or `run`, the name of a shipped one, or a dict; ranges may stand in it.
    `ranges`: by their keys ranges and other changes: `{"log": [1e-6, 1e-4]}`, `{"range": [0, 1]}`, `{"from": [32, 64]}`
    or a value. `overwrite`: replaces a sweep that is there. `settings`: the keys of `sweep`, such as `trials`,
    `objectives`, `sampler`.
    Errors: those of `embedsmith sweep`.
    """
    changes = [f"{key}={json.dumps(to_plain(value), ensure_ascii=False)}" for key, value in (ranges or {}).items()]
    changes += [f"sweep.{key}={json.dumps(to_plain(value), ensure_ascii=False)}" for key, value in settings.items()]
    with lines_shown():
        return run_sweep(read_sweep(recipe, changes), overwrite=overwrite)


def read_sweep(given: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> SweepRecipe:
    """A sweep from a recipe's file, the name of a shipped one or a tree. Errors: those of `SweepRecipe.read`."""
    named = isinstance(given, str | Path)
    tree = recipe_tree(recipe_file(given, "sweep")) if named else to_plain(given, exact=True)
    for override in overrides:
        apply_override(tree, override)
    return SweepRecipe.read(tree, str(given) if named else "sweep")


def run_sweep(recipe: SweepRecipe, *, overwrite: bool = False) -> Swept:
    """Try recipes until the sweep has as many trials as it should.

    Errors: `MissingExtraError` without optuna; `CheckpointError` for a folder that holds another sweep or something
    else; those of the trials, but for what a trial's own values bring about.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna", "sweep") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = SharedStudy(recipe)
    with study.in_turn():
        study.open(overwrite)
    while (begun := study.begin()) is not None:
        with begun as trial:
            study.end(study.tried(trial))
    with study.in_turn():
        study.publish()
        return Swept(study.output, study.record)


@dataclass(frozen=True)
class _Begun:
    """A trial that this process has claimed, as a context that lets go of it."""

    number: int
    changes: Mapping[str, Any]
    claim: ExitStack

    def __enter__(self) -> _Begun:
        return self

    def __exit__(self, *error: object) -> None:
        self.claim.close()


class _Behind(Exception):
    """A trial is not worth finishing."""


@dataclass(frozen=True)
class SharedStudy:
    """One sweep in its folder, as one of several processes sees it. What is read or written for all happens
    `in_turn`."""

    recipe: SweepRecipe

    @property
    def output(self) -> Path:
        return self.recipe.output

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """No other process is at the files of all trials. Errors: `CheckpointError` where another verb is."""
        with claimed(self.output, "sweep", patient=True):
            yield

    def folder(self, number: int) -> Path:
        """Where a trial runs."""
        return self.output / "trials" / f"{number:04}"

    @property
    def record(self) -> SweepRecord:
        """What is over so far."""
        if (self.output / SWEEP_FILE).is_file():
            return SweepRecord.read(self.output)
        goals = {name: "low" if one.forgetting else "high" for name, one in self.recipe.objectives.items()}
        ranges = {one.name: str(one) for one in self.recipe.ranges}
        return SweepRecord(self.recipe.verb, self.recipe.settings.sampler, goals, ranges)  # type: ignore[arg-type]

    def open(self, overwrite: bool) -> None:
        """Begin the sweep, or see that what is there is the same one. Errors: `CheckpointError` where it is not."""
        SWEEP.refuse_other(self.output)
        if overwrite:
            for folder in sorted((self.output / "trials").glob("*")):
                with claimed(folder, "sweep"):  # nobody is at it
                    pass
            SWEEP.refuse_foreign(self.output)
            discard(self.output)
        for name in (_RECIPE, SWEEP_FILE, "study", "report.html"):
            recover(self.output / name)
        clear_temporary(self.output / "best")
        now = {**self.recipe.tree, "sweep": to_plain(self.recipe.settings)}
        path = self.output / _RECIPE
        if path.exists():
            before = read_tree(path)
            old, new = ({k: v for k, v in flat(tree).items() if k not in _FREE} for tree in (before, now))
            changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            if changed:
                listing = "; ".join(f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed[:5])
                fix = "use the same recipe to continue it, output=FOLDER to start another, or --overwrite"
                raise CheckpointError(f"the folder holds a sweep of another recipe ({listing})", where=path, fix=fix)
        with atomic_file(path) as file:
            yaml.safe_dump(now, file, sort_keys=False, allow_unicode=True)
        if not (self.output / _STORAGE).exists():
            if self.record.trials:
                fix = "put it back, or begin anew: --overwrite"
                raise CheckpointError("the study of these trials is gone", where=self.output / _STORAGE, fix=fix)
            self._create()

    def _create(self) -> None:
        import optuna
        from optuna.study import StudyDirection

        ways = {"high": StudyDirection.MAXIMIZE, "low": StudyDirection.MINIMIZE}
        directions = [ways[goal] for goal in self.record.objectives.values()]
        path = self.output / _STORAGE
        with atomic_folder(path.parent) as folder, closing(_Storage(folder / path.name)) as opened:
            optuna.create_study(storage=opened.storage, study_name=_NAME, directions=directions)

    def begin(self) -> _Begun | None:
        """The next trial: one that was stopped, or a new one; `None` where none is left for this process."""
        with self.in_turn(), self._storage() as opened, ExitStack() as claim:
            study, over = opened.study(), {trial.number: trial for trial in self.record.trials}
            for trial in study.get_trials(deepcopy=False):
                if trial.state.is_finished():
                    continue
                if trial.number in over:  # a kill between the two
                    opened.tell(over[trial.number])
                    continue
                try:
                    claim.enter_context(claimed(self.folder(trial.number), "sweep"))
                except CheckpointError:  # another process is at it
                    continue
                if trial.params.keys() < {one.name for one in self.recipe.ranges}:
                    self._add(opened, SweepTrial(trial.number, "failed", {}, why="stopped while it was drawn"))
                    continue
                log.info("trial %d goes on", trial.number)
                return _Begun(trial.number, self._values(trial.params), claim.pop_all())
            number = len(study.get_trials(deepcopy=False))
            if number >= self.recipe.settings.trials:
                return None
            study.sampler = self._sampler(number)
            asked = study.ask({one.name: one.distribution() for one in self.recipe.ranges})
            claim.enter_context(claimed(self.folder(number), "sweep"))
            return _Begun(asked.number, self._values(asked.params), claim.pop_all())

    def _values(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        return {one.name: one.value(drawn[one.name]) for one in self.recipe.ranges}

    def _sampler(self, number: int) -> Any:
        """A fresh one a trial: what it knows of those before it reads from the study."""
        from optuna import samplers

        settings = self.recipe.settings
        seed = derive_seed(settings.seed, number) % 2**32
        if settings.sampler == "nsga2":
            return samplers.NSGAIISampler(population_size=settings.startup, seed=seed)
        return samplers.TPESampler(n_startup_trials=settings.startup, seed=seed)

    def tried(self, begun: _Begun) -> SweepTrial:
        """Run a trial to its end. Errors: what is no fault of the trial's own values."""
        folder, started = self.folder(begun.number), time.monotonic()
        trial = SweepTrial(begun.number, "finished", dict(begun.changes))
        count = f"{begun.number + 1} of {self.recipe.settings.trials}"
        log.info("trial %d (%s): %s", begun.number, count, shown_changes(trial))
        tree = self.recipe.tried(begun.changes, folder)
        try:
            self.recipe.check(tree)
        except RecipeError as error:  # values that are right one by one and wrong together
            return replace(trial, state="failed", why=error.what)
        try:
            with watched(lambda output: self._judge(begun.number, output)):
                rounds = _made(self.recipe.verb, tree, self.recipe.where)
        except _Behind:
            trial = replace(trial, state="pruned")
        except (TrainingError, ModelError, EvaluationError, RecipeError) as error:
            stepped = isinstance(error, TrainingError) or any(folder.rglob("metrics.jsonl"))
            if not stepped and not self.record.finished():
                raise  # no fault of this trial's values
            log.warning("trial %d failed: %s", begun.number, error)
            trial = replace(trial, state="failed", why=error.what)
        else:
            trial = self._measured(trial, rounds)
        curve = [point for path in sorted(folder.rglob("metrics.jsonl")) for point in self._curve(begun.number, path)]
        return replace(trial, curve=tuple(curve), seconds=round(time.monotonic() - started, 1))

    def _measured(self, trial: SweepTrial, rounds: Sequence[Results]) -> SweepTrial:
        """The trial with its values, from what was scored, in its order."""
        first: dict[str, float] = {}  # of what is scored again later
        last: dict[str, float] = {}
        for scores in map(_scores, rounds):
            first = {name: last[name] for name in scores if name in last} | first
            last |= scores
        values: dict[str, float] = {}
        start: dict[str, float] = {}
        for name, objective in self.recipe.objectives.items():
            value, before = objective.value(first, last), objective.value(first, first)
            if value is None:
                missing = [each for each in objective.names if each not in last]
                what = (
                    f"{', '.join(missing)} was not scored"
                    if missing
                    else "a task was scored once, and not at the start"
                )
                raise RecipeError(what, where=f"sweep.objectives.{name}", expected=f"one of {', '.join(last)}")
            values[name] = value
            start |= {} if before is None else {name: before}
        if wrong := [name for name, value in values.items() if not math.isfinite(value)]:
            return replace(trial, state="failed", why=f"{wrong[0]} is undefined")
        return replace(trial, values=values, start={n: v for n, v in start.items() if math.isfinite(v)})

    def _judge(self, number: int, output: Path) -> None:
        """After an evaluation of the run in `output`: end the trial where it is behind. Errors: `_Behind`."""
        if not self.recipe.settings.prune or number < self.recipe.settings.startup:
            return
        curve = self._curve(number, output / "metrics.jsonl")
        if curve and self.record.behind(curve[-1].run, curve[-1].step, curve):
            log.info("trial %d is behind at step %d and ends here", number, curve[-1].step)
            raise _Behind

    def _curve(self, number: int, metrics: Path) -> list[ScoredStep]:
        """The objectives at every evaluation of a run, as far as its own scores tell them."""
        run = metrics.parent.relative_to(self.folder(number)).as_posix()
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

    def end(self, trial: SweepTrial) -> None:
        """Enter a trial that is over."""
        with self.in_turn(), self._storage() as opened:
            self._add(opened, trial)
            self.publish()
        told = ", ".join(f"{name} {percent(value)}" for name, value in trial.values.items())
        log.info("trial %d: %s", trial.number, told or trial.state)

    def _add(self, opened: _Storage, trial: SweepTrial) -> None:
        record = self.record
        record = replace(record, trials=tuple(sorted((*record.trials, trial), key=lambda each: each.number)))
        with atomic_file(self.output / SWEEP_FILE) as file:
            json.dump(asdict(record), file, indent=1, ensure_ascii=False)
        opened.tell(trial)

    def publish(self) -> None:
        """Write the best recipes and the report, and remove the folders of trials that are beaten. What is as it should
        be is left alone."""
        record = self.record
        front = record.front()
        wanted = {_best_file(self.output, trial): self._runnable(trial) for trial in front}
        for path in (self.output / "best").glob("*.yaml"):
            if path not in wanted:
                path.unlink()
        for path, text in wanted.items():
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                with atomic_file(path) as file:
                    file.write(text)
        kept = {trial.number for trial in front}
        for trial in record.trials if self.recipe.settings.keep == "best" else ():
            if trial.number not in kept:
                discard(self.folder(trial.number))
        page, known = self.output / "report.html", self.output / SWEEP_FILE
        if known.exists() and not (page.exists() and page.stat().st_mtime_ns >= known.stat().st_mtime_ns):
            try:
                write_report(self.output)
            except EmbedsmithError as error:  # no plotly: the sweep goes on without a page
                log.warning("no report: %s", error)

    def _runnable(self, trial: SweepTrial) -> str:
        """The text of a recipe that does what the trial did, beside the sweep."""
        path, output = _best_file(self.output, trial), self.output.with_name(f"{self.output.name}-{trial.name}")
        values = ", ".join(f"{name} {percent(value)}" for name, value in trial.values.items())
        head = f"# Trial {trial.number} of the sweep in {self.output}: {values}\n"
        head += f"# Run: embedsmith {self.recipe.verb} {path}\n"
        return head + yaml.safe_dump(self.recipe.tried(trial.changes, output), sort_keys=False, allow_unicode=True)

    @contextmanager
    def _storage(self) -> Iterator[_Storage]:
        """Errors: `CheckpointError` for a database that is damaged, gone or on a full disk."""
        from optuna.exceptions import StorageInternalError
        from sqlalchemy.exc import SQLAlchemyError

        try:
            with closing(_Storage(self.output / _STORAGE)) as opened:
                yield opened
        except (StorageInternalError, SQLAlchemyError) as error:
            said = str(error.__cause__ or error).splitlines()[0]
            fix = "free some space if the disk is full; a damaged file can only be begun anew, --overwrite"
            raise CheckpointError(
                f"the study cannot be used ({said})", where=self.output / _STORAGE, fix=fix
            ) from error


class _Storage:
    """Optuna's storage in a file, for as long as this process has its turn."""

    def __init__(self, path: Path) -> None:
        from optuna.storages import RDBStorage
        from sqlalchemy.engine import URL

        self.storage = RDBStorage(URL.create("sqlite", database=str(path)).render_as_string())

    @cached_property
    def _study(self) -> Any:
        import optuna

        return optuna.load_study(study_name=_NAME, storage=self.storage)

    def study(self) -> Any:
        return self._study

    def tell(self, trial: SweepTrial) -> None:
        """Let the sampler learn how a trial ended."""
        from optuna.trial import TrialState

        ends = {"pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        if trial.state == "finished":
            self._study.tell(trial.number, list(trial.values.values()))
        else:
            self._study.tell(trial.number, state=ends[trial.state])

    def close(self) -> None:
        self.storage.remove_session()
        self.storage.engine.dispose()


def _made(verb: str, tree: dict[str, Any], where: str) -> list[Results]:
    """Run a trial's recipe; everything that was scored, in its order."""
    if verb == "train":
        return _of_run(train(parse(Recipe, tree, where)).parent)
    pipeline, found = parse(PipelineRecipe, tree, where), []
    made = run_pipeline(pipeline)
    for stage in pipeline.stages:
        if stage.verb == "train":
            found += _of_run(made[stage.name].parent)
        elif stage.verb == "evaluate":
            found.append(Results.load(made[stage.name]))
    return found


def _of_run(output: Path) -> list[Results]:
    run = Trained.of(output)
    return [results for results in (run.results_before, run.results) if results is not None]


def _scores(results: Results) -> dict[str, float]:
    """Main scores by the names of tasks, and every score as `TASK/METRIC`."""
    every = {f"{result.task}/{name}": score for result in results for name, score in result.scores.items()}
    return results.main_scores() | every


def _best_file(output: Path, trial: SweepTrial) -> Path:
    return output / "best" / f"{trial.name}.yaml"
