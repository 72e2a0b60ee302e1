"""`embedsmith sweep`: many trials of one recipe with other values in the place of its ranges, drawn by Optuna from what
the trials before brought (`sweep_study.py`); the recipes that no other beats are left as files."""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from embedsmith.cli.sweep_recipe import SweepRecipe
from embedsmith.cli.sweep_study import SharedStudy, best_file
from embedsmith.cli.sweep_trial import trials_of
from embedsmith.compat.config import recipe_tree
from embedsmith.core.errors import MissingExtraError
from embedsmith.core.progress import lines_shown
from embedsmith.core.recipe import apply_override
from embedsmith.core.settings import to_plain
from embedsmith.core.shipped import recipe_file
from embedsmith.core.terminal import Printed
from embedsmith.evaluate.result import percent
from embedsmith.report.pareto import SweepRecord, SweepTrial


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
        return [best_file(self.output, trial) for trial in self.best]

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
    file = recipe_file(given, "sweep") if isinstance(given, str | Path) else None
    tree = to_plain(given, exact=True) if file is None else recipe_tree(file)
    for override in overrides:
        apply_override(tree, override)
    return SweepRecipe.read(tree, "sweep" if file is None else str(file))


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
    with closing(study):
        while study.step():
            pass
    with study.in_turn():
        study.publish()
        return Swept(study.output, trials_of(recipe))
