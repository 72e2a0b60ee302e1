"""A whole curation: input, steps in their order, output. Stopped anywhere, it goes on where it was."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from embedsmith.core.errors import CheckpointError, DataError, RecipeError
from embedsmith.core.files import atomic_file
from embedsmith.core.inputs import read_typed
from embedsmith.core.outputs import claimed, delivered, discard, files_of, refuse_foreign_records, sweep
from embedsmith.core.progress import progress_bar
from embedsmith.core.settings import Word, section, to_plain
from embedsmith.core.shelf import curation_steps
from embedsmith.curate.ask import key_of
from embedsmith.curate.input_records import Input, InputRecords
from embedsmith.curate.ledger import Ledger, Step, Tools
from embedsmith.curate.outcome import Report, StepReport
from embedsmith.data.formats.files import sound_rows
from embedsmith.data.record import Record, RowError, validate
from embedsmith.data.writers import write_records

_STAGE = re.compile(r"\d\d-.+-[0-9a-f]{12}\.(jsonl|json)")
MAKE_QUERIES = ("synthetic_queries", "long_documents")
"""Steps whose input may be documents without queries."""


@section
@dataclass(frozen=True)
class CurateRecipe:
    """Everything a curation depends on.

    - `input`: what to curate;
    - `output`: the file of the records that stay, in .jsonl or .jsonl.gz;
    - `steps`: what is done, in this order;
    - `work`: the folder of what each step gave, until all are done, and of the scores and answers that were paid for,
      for good; `None` is a folder beside the output, named `OUTPUT.work`;
    - `examples`: how many of those that left the report shows for each reason;
    - `keep_stages`: leave what each step gave on the disk.
    """

    input: Input
    output: Word
    steps: tuple[Annotated[Any, curation_steps], ...]
    work: str | None = None
    examples: Annotated[int, Field(ge=0)] = 5
    keep_stages: bool = False

    def __post_init__(self) -> None:
        if not self.output.removesuffix(".gz").endswith(".jsonl"):
            raise RecipeError(f"output is {self.output!r}", expected="a name in .jsonl or .jsonl.gz")

    @property
    def folder(self) -> Path:
        return Path(self.work or f"{self.output}.work")

    @property
    def report_path(self) -> Path:
        return Path(f"{self.output.removesuffix('.gz').removesuffix('.jsonl')}.report.json")


def curate(recipe: CurateRecipe, tools: Tools | None = None, *, overwrite: bool = False) -> Report:
    """Run a recipe. The same call after a stop continues with the step that was under way (its scores and answers are
    kept); after the end it only gives the report again, unless the input's files or the steps changed.
    `overwrite` does everything again, but asks nobody twice for a score or an answer.

    Errors: `DataError` naming file and line; what the steps raise; `CheckpointError` for an output that is not ours or
    that another process writes to, or a full disk.
    """
    with delivered(recipe.output, "curate") as output:
        recipe = replace(recipe, output=output)
        with claimed(output, "curate"), claimed(recipe.folder, "curate"):
            return _curate(recipe, tools, overwrite)


def _curate(recipe: CurateRecipe, tools: Tools | None, overwrite: bool) -> Report:
    makes_queries = any(type(step).registered_name in MAKE_QUERIES for step in recipe.steps)
    records = InputRecords(recipe.input, makes_queries, Ledger(recipe.examples))
    if Path(recipe.output).resolve() in {Path(path).resolve() for path in records.paths}:
        raise RecipeError(f"the output {recipe.output} is also the input", fix="write to another file")
    _check_output(recipe, overwrite)
    keys = [key_of(version("embedsmith"), records.identity, recipe.examples).hex()]
    for step in recipe.steps:
        keys.append(key_of(keys[-1], to_plain(step)).hex())
    if overwrite:
        discard(recipe.folder / "stages")
    elif (done := _finished(recipe, keys[-1])) is not None:
        return done
    report = _Run(recipe, records, replace(tools or Tools(), folder=recipe.folder), keys).all()
    with atomic_file(recipe.report_path) as file:
        json.dump(report.as_dict(), file, indent=2, ensure_ascii=False)
    if not recipe.keep_stages:
        discard(recipe.folder / "stages")
    return report


def _check_output(recipe: CurateRecipe, overwrite: bool) -> None:
    """Errors: `CheckpointError` for an output that is not ours, and other files among the stages."""
    stages = recipe.folder / "stages"
    refuse_foreign_records(
        Path(recipe.output), recipe.report_path, "steps", recipe.folder, stages.exists(), overwrite=overwrite
    )
    if strange := [name for name in files_of(stages) if not _STAGE.fullmatch(name)]:
        raise CheckpointError(f"{strange[0]} is no stage of a curation", where=stages, fix="set work to a new folder")
    sweep(stages)


def _finished(recipe: CurateRecipe, key: str) -> Report | None:
    """The report of an earlier run of the same recipe over the same input, if its output is still as it was left."""
    try:
        known = read_typed(recipe.report_path, Report)
        return known if (known.key, known.output_bytes) == (key, Path(recipe.output).stat().st_size) else None
    except (DataError, OSError):
        return None


@dataclass(frozen=True)
class _Run:
    """One run of a recipe. `keys`: what the result depends on; entry n covers everything up to step n."""

    recipe: CurateRecipe
    input: InputRecords
    tools: Tools
    keys: list[str]

    def all(self) -> Report:
        """Stages that are there are skipped, the others made; the output is the last one's records, checked."""
        started = time.monotonic()
        tools = replace(self.tools, labels=self.tools.labels or self.input.labels)
        steps: list[StepReport] = []
        records: Iterable[Record] = self.input
        for place, step in enumerate(self.recipe.steps):
            stage = self._stage(place + 1, type(step).registered_name)
            total = steps[-1].given if steps else self.recipe.input.limit
            steps.append(stage.report() or self._make(stage, step, records, tools, total))
            records = stage
        checks = Ledger(self.recipe.examples)
        written = write_records(self.recipe.output, _trainable(records, checks))
        first = self._stage(0, "read").report() if steps else self._reading()
        assert first is not None  # written before the first stage was finished
        last = StepReport.of({"type": "checked for training"}, checks, 0.0)
        if not written and not first.given:
            raise DataError("no records in it", where=self.input.paths[0], fix="check that it is the right file")
        if not written:
            lost = [step for step in (first, *steps, last) if step.left]
            raise DataError(
                "nothing is left: " + "; ".join(f"{step.name}: {step.reasons()}" for step in lost),
                where=self.recipe.output,
                fix="loosen the step that takes most",
            )
        return Report(
            self.keys[-1],
            to_plain(self.recipe),
            [first, *steps, *([last] if checks.left else [])],
            written,
            self.recipe.output,
            Path(self.recipe.output).stat().st_size,
            round(time.monotonic() - started, 1),
        )

    def _make(
        self, out: StepOutput, step: Step, records: Iterable[Record], tools: Tools, total: int | None
    ) -> StepReport:
        ledger = Ledger(self.recipe.examples)
        started = time.monotonic()
        plain = to_plain(step)
        with progress_bar(plain["type"], total) as bar:
            ledger.given = write_records(out.path, step(_Watched(records, bar.advance), ledger, tools))
        report = StepReport.of(plain, ledger, time.monotonic() - started)
        if records is self.input:
            self._stage(0, "read").finish(self._reading())
        out.finish(report)
        return report

    def _stage(self, place: int, name: str) -> StepOutput:
        return StepOutput(self.recipe.folder / "stages" / f"{place:02d}-{name}-{self.keys[place][:12]}.jsonl")

    def _reading(self) -> StepReport:
        """How this run read the input."""
        return StepReport.of({"type": "read", "kind": self.input.kind}, self.input.ledger, 0.0)


@dataclass(frozen=True)
class StepOutput:
    """What a step gave, on the disk; it is finished when its report is there."""

    path: Path

    def report(self) -> StepReport | None:
        try:
            return read_typed(self.path.with_suffix(".json"), StepReport)
        except DataError:
            return None

    def finish(self, report: StepReport) -> None:
        with atomic_file(self.path.with_suffix(".json")) as file:
            json.dump(asdict(report), file, ensure_ascii=False)

    def __iter__(self) -> Iterator[Record]:
        try:
            for _, row in sound_rows(self.path):
                fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
                yield Record(**fields)
        except RowError as error:
            raise DataError("a damaged stage file", where=error.where, fix="delete it and run again") from error


@dataclass(frozen=True)
class _Watched:
    """Records that move a bar; they can be read as often as those behind them."""

    records: Iterable[Record]
    advance: Callable[[], None]

    def __iter__(self) -> Iterator[Record]:
        for record in self.records:
            self.advance()
            yield record


def _trainable(records: Iterable[Record], ledger: Ledger) -> Iterator[Record]:
    for record in records:
        ledger.taken += 1
        try:
            validate(record)
        except RowError as error:
            ledger.record_left(error.kind, record)
            continue
        ledger.given += 1
        yield record
