"""A sweep's study in its folder, as one of several processes sees it.

    study/          Optuna's storage, an SQLite file
    sweep.yaml      the recipe with its ranges
    sweep.json      every trial that is over, with its values (`report/pareto.py`)
    trials/0007/    the run or the pipeline of a trial
    best/*.yaml     recipes of the Pareto front, to be run by `embedsmith train` or `run`
    report.html

What all processes write is written in turns. Each works on a trial of its own, whose folder it has claimed; a trial
whose process is gone is continued by the next one that asks. Every draw has a seed of its own, so that a sweep that was
stopped goes on as if it had not been.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from embedsmith.cli.sweep_recipe import SweepRecipe
from embedsmith.cli.sweep_trial import DrawnTrial, trials_of
from embedsmith.core.errors import CheckpointError, EmbedsmithError
from embedsmith.core.files import atomic_file
from embedsmith.core.outputs import Kind, atomic_folder, claimed, clear_left, discard, recover
from embedsmith.core.progress import log
from embedsmith.core.recipe import read_tree
from embedsmith.core.seeds import derive_seed
from embedsmith.core.settings import to_plain
from embedsmith.evaluate.result import percent
from embedsmith.report import write_report
from embedsmith.report.pareto import SWEEP_FILE, SweepTrial
from embedsmith.train.checkpoint import flat

_RECIPE, _STORAGE, _NAME = "sweep.yaml", "study/optuna.db", "sweep"
SWEEP = Kind(
    "sweep",
    (_RECIPE, "study/*", SWEEP_FILE, "report.html", "best/*.yaml", "trials/**"),
    (_RECIPE, "\nsweep:"),
)
_FREE = ("output", "sweep.trials", "sweep.prune", "sweep.keep")
"""Keys that may change while a sweep goes on."""


@dataclass(frozen=True)
class SharedStudy:
    """The study of a recipe. What is read or written for all processes happens `in_turn`."""

    recipe: SweepRecipe

    @property
    def output(self) -> Path:
        return self.recipe.output

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """No other process is at the files of all trials. Errors: `CheckpointError` where another verb is, and for a
        database that is damaged or on a full disk."""
        from optuna.exceptions import StorageInternalError
        from sqlalchemy.exc import SQLAlchemyError

        try:
            with claimed(self.output, "sweep", patient=True):
                yield
        except (StorageInternalError, SQLAlchemyError) as error:
            said = str(error.__cause__ or error).splitlines()[0]
            fix = "free some space if the disk is full; a damaged file can only be begun anew, --overwrite"
            what = f"the study cannot be used ({said})"
            raise CheckpointError(what, where=self.output / _STORAGE, fix=fix) from error

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
        clear_left(self.output / "best")
        now = to_plain({**self.recipe.tree, "sweep": self.recipe.settings})
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
            if trials_of(self.recipe).trials:
                fix = "put it back, or begin anew: --overwrite"
                raise CheckpointError("the study of these trials is gone", where=self.output / _STORAGE, fix=fix)
            self._create()

    def _create(self) -> None:
        import optuna
        from optuna.study import StudyDirection

        ways = {"high": StudyDirection.MAXIMIZE, "low": StudyDirection.MINIMIZE}
        directions = [ways[goal] for goal in trials_of(self.recipe).objectives.values()]
        path = self.output / _STORAGE
        with atomic_folder(path.parent) as folder:
            storage = _storage(folder / path.name)
            optuna.create_study(storage=storage, study_name=_NAME, directions=directions)
            _close(storage)

    def step(self) -> bool:
        """Do a trial, one that was stopped or a new one; whether there was one left for this process."""
        with ExitStack() as claim:
            with self.in_turn():
                drawn = self._next(claim)
            if drawn is None:
                return False
            trial = drawn.run()
            with self.in_turn():
                self._add(trial)
                self.publish()
        values = ", ".join(f"{name} {percent(value)}" for name, value in trial.values.items())
        log.info("trial %d: %s", trial.number, values or trial.state)
        return True

    def _next(self, claim: ExitStack) -> DrawnTrial | None:
        over = {trial.number: trial for trial in trials_of(self.recipe).trials}
        trials = self._study.get_trials(deepcopy=False)
        for known in (trial for trial in trials if not trial.state.is_finished()):
            if known.number in over:  # a kill between the two
                self._tell(over[known.number])
            elif known.params.keys() < {one.name for one in self.recipe.ranges}:
                self._add(SweepTrial(known.number, "failed", {}, why="stopped while it was drawn"))
            else:
                drawn = self._drawn(known)
                try:
                    claim.enter_context(claimed(drawn.folder, "sweep"))
                except CheckpointError as error:
                    log.info("trial %d is left alone: %s", drawn.number, error.what)
                    continue
                log.info("trial %d goes on", drawn.number)
                return drawn
        if len(trials) >= self.recipe.settings.trials:
            return None
        self._study.sampler = self._sampler(len(trials))
        drawn = self._drawn(self._study.ask({one.name: one.distribution() for one in self.recipe.ranges}))
        claim.enter_context(claimed(drawn.folder, "sweep"))
        return drawn

    def _drawn(self, trial: Any) -> DrawnTrial:
        changes = {one.name: one.value(trial.params[one.name]) for one in self.recipe.ranges}
        return DrawnTrial(self.recipe, trial.number, changes)

    def _sampler(self, number: int) -> Any:
        """A fresh one a trial: what it knows of those before it reads from the study."""
        from optuna import samplers

        settings = self.recipe.settings
        seed = derive_seed(settings.seed, number) % 2**32
        if settings.sampler == "nsga2":
            return samplers.NSGAIISampler(population_size=settings.startup, seed=seed)
        return samplers.TPESampler(n_startup_trials=settings.startup, seed=seed)

    def _add(self, trial: SweepTrial) -> None:
        record = trials_of(self.recipe)
        record = replace(record, trials=tuple(sorted((*record.trials, trial), key=lambda each: each.number)))
        with atomic_file(self.output / SWEEP_FILE) as file:
            json.dump(asdict(record), file, indent=1, ensure_ascii=False)
        self._tell(trial)

    def _tell(self, trial: SweepTrial) -> None:
        """Let the sampler learn how a trial ended."""
        from optuna.trial import TrialState

        if trial.state == "finished":
            self._study.tell(trial.number, list(trial.values.values()))
        else:
            self._study.tell(trial.number, state=TrialState.PRUNED if trial.state == "pruned" else TrialState.FAIL)

    def publish(self) -> None:
        """Write the best recipes and the report, and remove the folders of trials that are beaten. What is as it should
        be is left alone."""
        record = trials_of(self.recipe)
        front = record.front()
        wanted = {best_file(self.output, trial): self._runnable(trial) for trial in front}
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
                discard(DrawnTrial(self.recipe, trial.number, {}).folder)
        page, known = self.output / "report.html", self.output / SWEEP_FILE
        if known.exists() and not (page.exists() and page.stat().st_mtime_ns >= known.stat().st_mtime_ns):
            try:
                write_report(self.output)
            except EmbedsmithError as error:  # no plotly: the sweep goes on without a page
                log.warning("no report: %s", error)

    def _runnable(self, trial: SweepTrial) -> str:
        """The text of a recipe that does what the trial did, beside the sweep."""
        path, output = best_file(self.output, trial), self.output.with_name(f"{self.output.name}-{trial.name}")
        values = ", ".join(f"{name} {percent(value)}" for name, value in trial.values.items())
        head = f"# Trial {trial.number} of the sweep in {self.output}: {values}\n"
        head += f"# Run: embedsmith {self.recipe.verb} {path}\n"
        tree = to_plain(self.recipe.tried(trial.changes, output))
        return head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)

    @cached_property
    def _stored(self) -> Any:
        return _storage(self.output / _STORAGE)

    @cached_property
    def _study(self) -> Any:
        import optuna

        return optuna.load_study(study_name=_NAME, storage=self._stored)

    def close(self) -> None:
        """Let go of the database."""
        if "_stored" in vars(self):
            _close(self._stored)


def _storage(path: Path) -> Any:
    from optuna.storages import RDBStorage
    from sqlalchemy.engine import URL

    return RDBStorage(URL.create("sqlite", database=str(path)).render_as_string())


def _close(storage: Any) -> None:
    storage.remove_session()
    storage.engine.dispose()


def best_file(output: Path, trial: SweepTrial) -> Path:
    """Where the recipe of a trial of the front lies."""
    return output / "best" / f"{trial.name}.yaml"
