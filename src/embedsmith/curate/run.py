"""A whole curation: input, steps in their order, output and report. Stopped anywhere, it goes on where it was."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.files import atomic_file
from embedsmith.core.progress import progress_bar
from embedsmith.core.settings import section, to_plain
from embedsmith.core.shelf import curation_steps
from embedsmith.curate.ask import key_of
from embedsmith.curate.read import Corpus, Input
from embedsmith.curate.step import Ledger, Report, Step, StepReport, Tools, booked
from embedsmith.data.formats.files import open_rows
from embedsmith.data.record import Record, RowError, validate
from embedsmith.data.writers import write_records


@section
@dataclass(frozen=True)
class CurateRecipe:
    """Everything a curation depends on.

    `steps` run in their order. `work` holds what each step left, until all are done, and the caches of scores and
    answers, for good (`None`: a folder beside the output, named `OUTPUT.work`). `examples`: how many of what left the
    report shows for each reason. `keep_stages` leaves what each step gave on the disk.
    """

    input: Input
    output: str
    steps: tuple[Annotated[Any, curation_steps], ...]
    work: str | None = None
    examples: int = 5
    keep_stages: bool = False

    def __post_init__(self) -> None:
        if not self.output.removesuffix(".gz").endswith(".jsonl"):
            raise RecipeError(f"output is {self.output!r}", expected="a name in .jsonl or .jsonl.gz")
        if self.examples < 0:
            raise RecipeError(f"examples is {self.examples}", expected="0 or more")

    @property
    def folder(self) -> Path:
        return Path(self.work or f"{self.output}.work")

    @property
    def report_path(self) -> Path:
        return Path(f"{self.output.removesuffix('.gz').removesuffix('.jsonl')}.report.json")


def curate(recipe: CurateRecipe, tools: Tools | None = None, *, overwrite: bool = False) -> Report:
    """Run a recipe. The same call after a stop continues with the step that was under way (its scores and answers are
    kept); after the end it only gives the report again, unless the input's files, the steps or the output changed.
    `overwrite` does everything again, but asks nobody twice for a score or an answer.

    Errors: `DataError` naming file and line; what the steps raise; `CheckpointError` for a full disk.
    """
    makes_queries = any(type(step).registered_name in MAKE_QUERIES for step in recipe.steps)
    corpus = Corpus(recipe.input, makes_queries, Ledger(recipe.examples))
    if Path(recipe.output).resolve() in {Path(path).resolve() for path in corpus.paths}:
        raise RecipeError(f"the output {recipe.output} is also the input", fix="write to another file")
    keys = _keys(recipe, corpus)
    if overwrite:
        shutil.rmtree(recipe.folder / "stages", ignore_errors=True)
    elif (done := _finished(recipe, keys[-1])) is not None:
        return done
    report = _Run(recipe, corpus, replace(tools or Tools(), folder=recipe.folder), keys).all()
    with atomic_file(recipe.report_path) as file:
        json.dump(report.as_dict(), file, indent=2, ensure_ascii=False)
    if not recipe.keep_stages:
        shutil.rmtree(recipe.folder / "stages", ignore_errors=True)
    return report


MAKE_QUERIES = ("synthetic_queries", "long_documents")
"""Steps whose input may be documents without queries."""


def _keys(recipe: CurateRecipe, corpus: Corpus) -> list[str]:
    """What the result depends on: entry n covers everything up to step n."""
    keys = [key_of(version("embedsmith"), corpus.identity, recipe.examples).hex()]
    for step in recipe.steps:
        keys.append(key_of(keys[-1], to_plain(step)).hex())
    return keys


def _finished(recipe: CurateRecipe, key: str) -> Report | None:
    """The report of an earlier run of the same recipe over the same input, if its output is still as it was left."""
    try:
        known = json.loads(recipe.report_path.read_text(encoding="utf-8"))
        same = known["key"] == key and known["output_bytes"] == Path(recipe.output).stat().st_size
        return Report.of(known) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class _Run:
    recipe: CurateRecipe
    corpus: Corpus
    tools: Tools
    keys: list[str]

    def all(self) -> Report:
        """Stages that are there are skipped, the others made; the output is the last one's records, checked."""
        started = time.monotonic()
        tools = replace(self.tools, labels=self.tools.labels or self.corpus.labels)
        steps: list[StepReport] = []
        records: Iterable[Record] = self.corpus
        for place, step in enumerate(self.recipe.steps):
            stage = Stage(self._stage_path(place + 1, type(step).registered_name))
            total = steps[-1].given if steps else self.recipe.input.limit
            steps.append(stage.report() or self._make(stage, step, records, tools, total))
            records = stage
        final = Ledger(self.recipe.examples)
        written = write_records(self.recipe.output, _sound(records, final))
        first = self._input_report(bool(steps))
        last = StepReport.of({"type": "checked for training"}, final, 0.0)
        if not written and not first.given:
            raise DataError("no records in it", where=self.corpus.paths[0], fix="check that it is the right file")
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
            [first, *steps, *([last] if final.left else [])],
            written,
            self.recipe.output,
            Path(self.recipe.output).stat().st_size,
            round(time.monotonic() - started, 1),
        )

    def _make(self, stage: Stage, step: Step, records: Iterable[Record], tools: Tools, total: int | None) -> StepReport:
        ledger = Ledger(self.recipe.examples)
        started = time.monotonic()
        plain = to_plain(step)
        with progress_bar(plain["type"], total) as bar:
            write_records(stage.path, booked(step, _Watched(records, bar.advance), ledger, tools))
        report = StepReport.of(plain, ledger, time.monotonic() - started)
        if records is self.corpus:
            self._keep_input_report()
        stage.finish(report)
        return report

    def _stage_path(self, place: int, name: str) -> Path:
        return self.recipe.folder / "stages" / f"{place:02d}-{name}-{self.keys[place][:12]}.jsonl"

    def _keep_input_report(self) -> None:
        report = StepReport.of({"type": "read", "kind": self.corpus.kind}, self.corpus.ledger, 0.0)
        with atomic_file(self._stage_path(0, "read").with_suffix(".json")) as file:
            json.dump(report.as_dict(), file, ensure_ascii=False)

    def _input_report(self, kept: bool) -> StepReport:
        """How the input was read: by this run, or by the one that made the first stage."""
        if not kept:
            return StepReport.of({"type": "read", "kind": self.corpus.kind}, self.corpus.ledger, 0.0)
        return StepReport(**json.loads(self._stage_path(0, "read").with_suffix(".json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Stage:
    """What a step gave, on the disk; it is finished when its report is there."""

    path: Path

    def report(self) -> StepReport | None:
        try:
            return StepReport(**json.loads(self.path.with_suffix(".json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def finish(self, report: StepReport) -> None:
        with atomic_file(self.path.with_suffix(".json")) as file:
            json.dump(report.as_dict(), file, ensure_ascii=False)

    def __iter__(self) -> Iterator[Record]:
        for line, row in open_rows(self.path).rows:
            if isinstance(row, RowError):
                raise DataError("a damaged stage file", where=f"{self.path}:{line}", fix="delete it and run again")
            fields: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in row.items()}
            yield Record(**fields)


@dataclass(frozen=True)
class _Watched:
    """Records that move a bar; they can be read as often as those behind them."""

    records: Iterable[Record]
    advance: Callable[[], None]

    def __iter__(self) -> Iterator[Record]:
        for record in self.records:
            self.advance()
            yield record


def _sound(records: Iterable[Record], ledger: Ledger) -> Iterator[Record]:
    """Only records that can be trained on."""
    for record in records:
        ledger.taken += 1
        try:
            validate(record)
        except RowError as error:
            ledger.record_left(error.kind, record)
            continue
        ledger.given += 1
        yield record
