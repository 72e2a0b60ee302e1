"""A whole curation: input, steps in their order, output. Stopped anywhere, it goes on where it was."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from embedsmith.core.errors import CheckpointError, DataError, RecipeError
from embedsmith.core.files import atomic_file
from embedsmith.core.inputs import read_typed
from embedsmith.core.outputs import claimed, clear_left, delivered, discard, files_of, refuse_foreign_records
from embedsmith.core.progress import progress_bar
from embedsmith.core.settings import Word, section, to_plain
from embedsmith.core.shelf import curation_steps, engines
from embedsmith.curate.comparing import ComparingStep
from embedsmith.curate.engines import Running
from embedsmith.curate.engines.local import LocalEngine
from embedsmith.curate.input_records import Input, InputRecords
from embedsmith.curate.keeper import key_of
from embedsmith.curate.ledger import Chain, Ledger, PerRecord, Step, Tools
from embedsmith.curate.outcome import Report, StepReport
from embedsmith.curate.parts import PART, Advance, RecordCheck, StageParts, StepRun, Survey
from embedsmith.data.record import Record
from embedsmith.data.writers import batched, write_records

_STAGE = re.compile(r"\d\d-.+-[0-9a-f]{12}(\.jsonl?|/part-\d{5,}\.jsonl(\.gz)?)")
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
    - `keep_stages`: leave what each step gave on the disk;
    - `engine`: what it runs on: `local` (the cores of this machine) or `ray`; the same records come out of both.
    """

    input: Input
    output: Word
    steps: tuple[Annotated[Any, curation_steps], ...]
    work: str | None = None
    examples: Annotated[int, Field(ge=0)] = 5
    keep_stages: bool = False
    engine: Annotated[Any, engines] = LocalEngine()

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
            tools = replace(tools or Tools(), folder=recipe.folder)
            with recipe.engine.start(recipe.folder) as running:
                report = _Curation(recipe, records, tools, keys, running).all()
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
    clear_left(stages)


def _finished(recipe: CurateRecipe, key: str) -> Report | None:
    """The report of an earlier run of the same recipe over the same input, if its output is still as it was left."""
    try:
        known = read_typed(recipe.report_path, Report)
        return known if (known.key, known.output_bytes) == (key, Path(recipe.output).stat().st_size) else None
    except (DataError, OSError):
        return None


@dataclass
class _Pile:
    """The records after a pass, in parts. Those of an input are written as they are first asked for."""

    stage: StageParts
    count: int = 0
    reading: Iterator[int] = iter(())

    def parts(self) -> Iterator[int]:
        yield from range(self.count)
        for number in self.reading:
            self.count = number + 1
            yield number

    def records(self, advance: Advance) -> _Records:
        return _Records(self, advance)


@dataclass(frozen=True)
class _Records:
    """All records of a pile, in their order; they can be read as often as one likes."""

    pile: _Pile
    advance: Advance

    def __iter__(self) -> Iterator[Record]:
        for number in self.pile.parts():
            yield from self.pile.stage.records(number, self.advance)


@dataclass(frozen=True)
class _Curation:
    """One run of a recipe. `keys`: what the result depends on; entry n covers everything up to step n."""

    recipe: CurateRecipe
    input: InputRecords
    tools: Tools
    keys: list[str]
    running: Running

    def all(self) -> Report:
        """Passes that are there are skipped, the others made; the output is the last one's records, checked."""
        started = time.monotonic()
        pile = input_ = self._read()
        steps: list[StepReport] = []
        for place, step in enumerate(self.recipe.steps, 1):
            report, pile = self._step(place, step, pile, steps[-1].given if steps else self.recipe.input.limit)
            steps.append(report)
        last = self._write(pile, steps[-1].given if steps else None)
        deque(input_.parts(), maxlen=0)  # its manifest is written when its last record has been read
        reading = input_.stage.manifest()
        assert reading is not None
        first, written = reading.report, last.given
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
            [first, *steps, *([last] if last.left else [])],
            written,
            self.recipe.output,
            Path(self.recipe.output).stat().st_size,
            round(time.monotonic() - started, 1),
        )

    def _read(self) -> _Pile:
        """The input, read as it is asked for, unless that was done before."""
        stage = self._stage(0, "read")
        if (known := stage.manifest()) is not None:
            return _Pile(stage, len(known.sizes))

        def reading() -> Iterator[int]:
            stage.clear()
            count = 0
            for batch in batched(self.input, PART):
                write_records(stage.part(count), batch)
                yield count
                count += 1
            plain = {"type": "read", "kind": self.input.kind}
            stage.finish(StepReport.of(plain, self.input.ledger, 0.0), count)

        return _Pile(stage, reading=reading())

    def _step(self, place: int, step: Step, pile: _Pile, total: int | None) -> tuple[StepReport, _Pile]:
        """One step of the recipe: its passes."""
        plain = to_plain(step)
        passes = step.passes() if isinstance(step, Chain) else (step,)
        reports: list[StepReport] = []
        for number, one in enumerate(passes, 1):
            last = number == len(passes)
            stage = self._stage(place, plain["type"] if last else f"{plain['type']}-{number}")
            if (known := stage.manifest()) is None:
                stage.clear()
                started = time.monotonic()
                with progress_bar(plain["type"], reports[-1].given if reports else total) as bar:
                    ledger, count = self._pass(one, pile, stage, bar.advance)
                known = stage.finish(StepReport.of(plain, ledger, time.monotonic() - started), count)
            reports.append(known.report)
            pile = _Pile(stage, len(known.sizes))
        return StepReport.together(reports), pile

    def _pass(self, step: Step, pile: _Pile, stage: StageParts, advance: Advance) -> tuple[Ledger, int]:
        """Write the parts of a stage; what it did, and how many parts there are."""
        ledger, running = Ledger(self.recipe.examples), self.running
        tools = replace(self.tools.for_a_step(), labels=self.tools.labels or self.input.labels)
        if isinstance(step, PerRecord):
            step, handed = running.equip(step, tools)
            model = step.holds_model
            look = Survey(step, pile.stage, handed)
            surveys = list(running.each(look, pile.parts(), advance, holds_model=model)) if step.surveyed else []
            known = step.prepare(ledger, tools, surveys)
            work = StepRun(step, pile.stage, stage, handed, known, ledger.examples)
            for one in running.each(work, pile.parts(), advance, holds_model=model):
                ledger.merge(one)
            step.conclude(ledger, handed)
            return ledger, pile.count
        if isinstance(step, ComparingStep):
            for one in running.without_like(step, pile.stage, stage, pile.parts(), advance, ledger.examples):
                ledger.merge(one)
            return ledger, pile.count
        count = 0  # a step of which nothing is known: here, with all records in their order
        for batch in batched(step(pile.records(advance), ledger, tools), PART):
            ledger.given += write_records(stage.part(count), batch)
            count += 1
        return ledger, count

    def _write(self, pile: _Pile, total: int | None) -> StepReport:
        """The output: what can be trained on."""
        output = Path(self.recipe.output)
        ending = ".jsonl.gz" if output.suffix == ".gz" else ".jsonl"
        stage = StageParts(self._stage(len(self.recipe.steps) + 1, "checked").folder, ending)
        if (known := stage.manifest()) is None:
            stage.clear()
            ledger = Ledger(self.recipe.examples)
            with progress_bar("check", total) as bar:
                work = RecordCheck(pile.stage, stage, ledger.examples)
                for one in self.running.each(work, pile.parts(), bar.advance):
                    ledger.merge(one)
            known = stage.finish(StepReport.of({"type": "checked for training"}, ledger, 0.0), pile.count)
        with atomic_file(output, "wb") as whole:
            for number in range(len(known.sizes)):
                with stage.part(number).open("rb") as part:
                    shutil.copyfileobj(part, whole)
        return known.report

    def _stage(self, place: int, name: str) -> StageParts:
        key = self.keys[min(place, len(self.keys) - 1)]
        return StageParts(self.recipe.folder / "stages" / f"{place:02d}-{name}-{key[:12]}")
