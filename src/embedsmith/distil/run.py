"""`distil`: a teacher and texts in, a small student out, with its scores and speed beside the teacher's.

OUT             the student, a model's folder
OUT.distil/     what it was made of: start/ and run/ (a training run) of a smaller student, distil.json, report.html
"""

import dataclasses
import html
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rich.table import Table

from embedsmith.core.encoder import Encoder
from embedsmith.core.errors import CheckpointError, DataError, RecipeError
from embedsmith.core.files import atomic_file
from embedsmith.core.inputs import read_json
from embedsmith.core.outputs import claimed, delivered
from embedsmith.core.progress import log
from embedsmith.core.settings import Count, NotNegative, Positive, Width, Word, section, to_plain
from embedsmith.data import RecordSet, Source, read_source
from embedsmith.distil.smaller import write_smaller
from embedsmith.distil.static_student import STATIC, StaticStudent, distil_static
from embedsmith.evaluate import evaluate, load_tasks
from embedsmith.evaluate.tasks.kinds import Task
from embedsmith.losses import TeacherVectors
from embedsmith.models import Embedder, ModelConfig, load
from embedsmith.models.write import saved_model
from embedsmith.report.page import Section, page, table
from embedsmith.train import EvaluateConfig, Recipe, TrainConfig, train

TIMED = 256
"""Texts that are encoded to measure a speed."""


@section
@dataclass(frozen=True)
class DistilRecipe:
    """What to make of a teacher.

    - `teacher`: a model's folder or hub id.
    - `output`: the student's folder; what it was made of lies beside it, in `output`.distil.
    - `data`: files whose texts the student learns from: pairs, scored pairs, labelled texts, or texts alone. Needed but
      for a static student, which is better with them.
    - `layers`: how many layers it keeps, at even distances.
    - `hidden`: its hidden width, below the teacher's.
    - `static`: a table of token vectors in the place of a transformer.
    - `dims`: numbers of a text's vector, of a static student.
    - `tasks`: what both are scored on afterwards.
    - `tasks_folder`: where tasks are looked up, as of `embedsmith evaluate`.
    - `epochs`, `steps`: how long a smaller student trains; one pass over the data where neither is given.
    - `batch_size`: rows a step.
    - `learning_rate`: the highest rate.
    - `warmup`: a share of the run, or steps.
    - `seed`: of everything that is drawn.
    """

    teacher: Word
    output: Word
    data: tuple[Source, ...] = ()
    layers: Count | None = None
    hidden: Width | None = None
    static: bool = False
    dims: Width = 256
    tasks: tuple[str, ...] = ()
    tasks_folder: str | None = None
    epochs: Positive | None = None
    steps: Count | None = None
    batch_size: Count = 64
    learning_rate: Positive = 1e-4
    warmup: NotNegative = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.static == (self.layers is not None or self.hidden is not None):
            raise RecipeError(
                "static beside layers or hidden" if self.static else "nothing is said of the student",
                expected="static; or layers, hidden, or both",
                fix="say one: --static, or for example --layers 3",
            )
        if not self.static and not self.data:
            raise RecipeError(
                "a smaller student without texts to learn from",
                fix="name a file of texts or pairs: --data texts.jsonl",
            )


@dataclass(frozen=True)
class Measured:
    """A model in numbers. `scores`: the main score by task; `parameters`: all of its weights; `texts_per_second`: on
    this machine, of the same texts for both; `None` where there were none."""

    scores: Mapping[str, float]
    dimension: int
    parameters: int
    texts_per_second: float | None = None


@dataclass(frozen=True)
class Distilled:
    """The student in `folder`, beside its teacher."""

    folder: Path
    teacher: Measured
    student: Measured

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """(what, teacher, student, the student's share of the teacher's) of every number."""
        for task, score in self.teacher.scores.items():
            other = self.student.scores[task]
            yield task, f"{100 * score:.2f}", f"{100 * other:.2f}", f"{other / score:.1%}" if score > 0 else ""
        one, other_one = self.teacher, self.student
        if one.texts_per_second and other_one.texts_per_second:
            speed = (one.texts_per_second, other_one.texts_per_second)
            yield "texts a second", f"{speed[0]:,.0f}", f"{speed[1]:,.0f}", f"{speed[1] / speed[0]:.1f} times"
        for name, of in (("parameters", "parameters"), ("numbers a text", "dimension")):
            before, after = getattr(one, of), getattr(other_one, of)
            yield name, f"{before:,}", f"{after:,}", f"{after / before:.1%}"

    def table(self) -> Table:
        made = Table("", title=f"student: {self.folder}")
        for name in ("teacher", "student", "of it"):
            made.add_column(name, justify="right")
        for row in self.rows():
            made.add_row(*row)
        return made


def distil(recipe: DistilRecipe, *, overwrite: bool) -> Distilled:
    """Make the student and measure it beside its teacher. What is finished is left as it is; a stopped run goes on.

    Errors: `CheckpointError` for an output with something else in it; those of `load`, `train` and `evaluate`.
    """
    tasks = load_tasks(recipe.tasks, data_dir=recipe.tasks_folder)
    with delivered(recipe.output, "distil") as place, claimed(place, "distil"):
        out = Path(place)
        work = out.with_name(f"{out.name}.distil")
        found = None if overwrite else _finished(recipe, out, work)
        if found is not None:
            log.info("%s: distilled before; --overwrite does it again", out)
            return found
        (STATIC if recipe.static else saved_model()).refuse_other(out)
        teacher = load(recipe.teacher)
        sets = [_records(source) for source in recipe.data]
        records = (one for source, found in sets for one in found.texts_only("distilling", source.path).records)
        every = ((record.query, *record.positives, *record.negatives) for record in records)
        texts = list(dict.fromkeys(chain.from_iterable(every)))
        student: Embedder | StaticStudent
        if recipe.static:
            student = distil_static(teacher, texts, recipe.dims, seed=recipe.seed)
        else:
            student = _smaller(recipe, [source for source, _ in sets], work, overwrite)
        from embedsmith.evaluate.model_geometry import Sample

        sample = texts[:TIMED] or [text for task in tasks for text in Sample.of(task, TIMED).texts][:TIMED]
        made = Distilled(out, *(_measured(encoder, tasks, sample) for encoder in (teacher, student)))
        student.save(out)
        _write(made, recipe, work)
    return made


def _finished(recipe: DistilRecipe, out: Path, work: Path) -> Distilled | None:
    """What the same recipe made before. Errors: `CheckpointError` where another one made what is there."""
    if not (work / "distil.json").exists():
        return None
    told = read_json(work / "distil.json")
    if told["recipe"] != to_plain(recipe):
        raise CheckpointError(
            "the folder holds the student of other settings",
            where=out,
            fix="choose another output, or --overwrite",
        )
    if not (out / "modules.json").exists():
        return None
    return Distilled(out, Measured(**told["teacher"]), Measured(**told["student"]))


def _smaller(recipe: DistilRecipe, sources: Sequence[Source], work: Path, overwrite: bool) -> Embedder:
    """A student of fewer or narrower layers, trained on the teacher's vectors."""
    start = work / "start"
    if overwrite or not (start / "modules.json").exists():
        write_smaller(recipe.teacher, start, recipe.layers, recipe.hidden)
    teacher, student = load(recipe.teacher, device="cpu").dimension, load(str(start), device="cpu").dimension
    loss = TeacherVectors(project=student != teacher, teacher_dimension=teacher if student != teacher else None)
    run = Recipe(
        model=ModelConfig(path=str(start)),
        data=tuple(dataclasses.replace(one, teacher=recipe.teacher, loss=loss, negatives=0) for one in sources),
        output=str(work / "run"),
        train=TrainConfig(
            steps=recipe.steps,
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            warmup=recipe.warmup,
            seed=recipe.seed,
        ),
        evaluate=EvaluateConfig(tasks=recipe.tasks, data=recipe.tasks_folder),
    )
    return load(str(train(run, overwrite=overwrite)))


def _records(source: Source) -> tuple[Source, RecordSet[Any]]:
    """A source as it can be read: a file of texts alone, or of texts and labels, as texts. Errors: `DataError`."""
    try:
        records = read_source(source)
        if records.task not in ("classification", "clustering"):
            return source, records
    except DataError:
        if source.format is not None or source.columns is not None:
            raise
        try:
            return (texts := dataclasses.replace(source, format="texts")), read_source(texts)
        except DataError:
            pass
        raise
    texts = dataclasses.replace(source, format="texts", task="retrieval")
    return texts, read_source(texts)


def _measured(encoder: Embedder | StaticStudent, tasks: Sequence[Task], sample: Sequence[str]) -> Measured:
    scores = evaluate(encoder, tasks).main_scores() if tasks else {}
    weights = [encoder.row_VD] if isinstance(encoder, StaticStudent) else list(encoder.parameters())
    return Measured(
        scores, encoder.dimension, sum(weight.numel() for weight in weights), speed(encoder, sample) if sample else None
    )


def speed(encoder: Encoder, texts: Sequence[str]) -> float:
    """Texts a second, by the better of two times after a warm-up."""
    encoder.represent(texts[:32], role="document")
    times = []
    for _ in range(2):
        start = time.perf_counter()
        encoder.represent(texts, role="document")
        times.append(time.perf_counter() - start)
    return round(len(texts) / min(times), 1)


def _write(made: Distilled, recipe: DistilRecipe, work: Path) -> None:
    """distil.json and report.html, the former last: it says that all is there."""
    work.mkdir(parents=True, exist_ok=True)
    rows = [[html.escape(cell) for cell in row] for row in made.rows()]
    run = '<p><a href="run/report.html">How it was trained</a></p>' if (work / "run" / "report.html").exists() else ""
    settings = html.escape(json.dumps(to_plain(recipe), indent=2, ensure_ascii=False))
    sections = [
        Section("scores", "Beside the teacher", table(["", "teacher", "student", "of it"], rows) + run),
        Section("recipe", "Settings", f"<pre><code>{settings}</code></pre>"),
    ]
    with atomic_file(work / "report.html") as file:
        file.write(page(f"Distilled: {made.folder.name}", f"A student of {recipe.teacher}", [], sections))
    told = {"recipe": to_plain(recipe), "teacher": asdict(made.teacher), "student": asdict(made.student)}
    with atomic_file(work / "distil.json") as file:
        json.dump(told, file, indent=2, ensure_ascii=False)
