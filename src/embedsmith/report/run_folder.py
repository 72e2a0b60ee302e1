"""The report of a folder: a training run, finished or not, or a merge (a sweep: `pareto.py`). What is not there is left
out.

Read are `recipe.yaml`, `metrics.jsonl`, `manifest.json`, `finished.json`, `environment.json`, `cut.json`, `merge.json`,
and in `evaluation/` `before.json`, `after.json` (`Results.save(items=True)`), `geometry-before.json` and
`geometry-after.json`.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml
from typing_extensions import TypedDict

from embedsmith.core.errors import DataError, EmbedsmithError, EvaluationError
from embedsmith.core.files import atomic_file
from embedsmith.core.inputs import read_json, typed
from embedsmith.core.outputs import refuse_foreign_file
from embedsmith.core.progress import log
from embedsmith.data.split import held_out_tasks
from embedsmith.evaluate.compare import Comparison
from embedsmith.evaluate.result import Results
from embedsmith.report.changes import change_section, items_texts
from embedsmith.report.comparison import (
    example_section,
    geometry_section,
    score_section,
    similarity_section,
    words_about,
)
from embedsmith.report.merge_steps import merge_steps
from embedsmith.report.model_card import TrainingFacts
from embedsmith.report.next_steps import Evidence, NextStep, next_steps
from embedsmith.report.page import PAGE_MARK, Section, chart, charts, environment_section, finite, page, table
from embedsmith.report.pareto import SWEEP_FILE, sweep_page
from embedsmith.report.together import (
    COSINE,
    FORGETTING,
    conflict_table,
    conflict_words,
    forgetting_words,
    losses_by_task,
)

Line = Mapping[str, float]
_SHOWN = ("models", "coefficients", "notes")
_PRE = "<pre><code>{}</code></pre>"
_HARDNESS = "negatives_"
_TOGETHER = (COSINE, "conflict_share/", FORGETTING, "weight/")
_OWN = ("score/", "validation_loss/", "geometry/", "loss/", _HARDNESS, *_TOGETHER)


def report_run(output: Path, model: Path) -> None:
    """The end of a run: write what it was made of into the model's card, and its report.

    What cannot be written (a full disk, no plotly) is a line in the log: the run is over and its model is saved.
    """
    try:
        TrainingFacts.of_run(output).write_into(model)
        log.info("report: %s", write_report(output))
    except EmbedsmithError as error:
        log.warning("no report: %s", error)


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write `report.html` into the folder (or to `output`); returns its path.

    Errors: `EvaluationError` for a folder with nothing to report; `CheckpointError` for a file that is no page of ours;
    `MissingExtraError` without plotly.
    """
    path = Path(folder) / "report.html" if output is None else Path(output)
    refuse_foreign_file(path, PAGE_MARK)
    text = folder_page(folder)
    with atomic_file(path) as file:
        file.write(text)
    return path


def folder_page(folder: str | Path) -> str:
    """HTML of the folder's report. Errors: see `write_report`."""
    if (Path(folder) / SWEEP_FILE).is_file():
        return sweep_page(Path(folder))
    found = Folder.read(Path(folder))
    made = found.comparison()
    sections = [
        *found.training_sections(),
        found.together_section(),
        found.negatives_section(),
        found.throughput_section(),
    ]
    if found.geometries:
        sections.append(geometry_section(list(found.geometries.values()), list(found.geometries)))
    if made is not None:
        last, name = made.results[-1], f"the model {made.models[-1]} training"
        first = [change_section(made, items_texts(found.tasks())), score_section(made)]
        sections = [*first, *sections, similarity_section(last, name), example_section(last)]
    sections.insert(0, found.next_section(made))
    text, tree = found.recipe, _tree(found.recipe)
    if isinstance(tree, dict):
        text = yaml.safe_dump(_set(tree), sort_keys=False, allow_unicode=True)
    recipe = Section("recipe", "Recipe", _PRE.format(html.escape(text)) if text else "")
    sections += [found.data_section(), found.merge_section(), recipe, environment_section(found.environment)]
    kind = "Merge" if found.merge is not None else "Training run"
    return page(f"{kind}: {found.path.resolve().name}", found.lead(), found.summary(made), sections)


@dataclass(frozen=True)
class Folder:
    """What a folder holds, as far as it can be read; `problems` are the files that could not."""

    path: Path
    recipe: str = ""
    lines: tuple[Line, ...] = ()
    finished: Mapping[str, Any] | None = None
    environment: Mapping[str, Any] | None = None
    merge: Mapping[str, Any] | None = None
    manifest: Mapping[str, Any] | None = None
    cut: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    results: Mapping[str, Results] = field(default_factory=dict)
    geometries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @staticmethod
    def read(path: Path) -> Folder:
        """Everything there is; a file that cannot be read is a problem, not an end.

        Errors: `EvaluationError` for no folder, or one with nothing that belongs to a run.
        """
        if not path.is_dir():
            raise EvaluationError("there is no such folder", where=path, expected="the output of a run or a merge")
        problems: list[str] = []
        recipe = path / "recipe.yaml"
        text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else ""
        lines = _lines(path / "metrics.jsonl", problems)
        environment, merge = (_json(path / f"{name}.json", problems) for name in ("environment", "merge"))
        finished = _json(path / "finished.json", problems, _Finished)
        manifest = _json(path / "manifest.json", problems, _Manifest)
        cut = _json(path / "cut.json", problems, dict[str, _Cut]) or {}
        results: dict[str, Results] = {}
        geometries: dict[str, Mapping[str, Any]] = {}
        for name in ("before", "after"):
            file = path / "evaluation" / f"{name}.json"
            if file.is_file():
                try:
                    results[name] = Results.load(file)
                except EvaluationError as error:
                    log.warning("%s", error)
                    problems.append(f"evaluation/{file.name} could not be read")
        for name in ("before", "after"):
            geometry = _json(path / "evaluation" / f"geometry-{name}.json", problems, _GeometryFile)
            if geometry is not None:
                geometries[name] = geometry
        found = Folder(
            path, text, tuple(lines), finished, environment, merge, manifest, cut, results, geometries, tuple(problems)
        )
        if not any((found.recipe, found.lines, found.finished, found.merge, found.results)):
            raise EvaluationError("nothing to report on", where=path, expected="the output of a run or a merge")
        return found

    def comparison(self) -> Comparison | None:
        """The results before and after, on the tasks they share; one alone where the other is missing."""
        if not self.results:
            return None
        shared = set.intersection(*({result.task for result in each} for each in self.results.values()))
        if not shared:
            return Comparison.of([next(iter(self.results.items()))])
        ordered = {
            name: sorted((result for result in each if result.task in shared), key=lambda result: result.task)
            for name, each in self.results.items()
        }
        return Comparison.of([(name, Results(tuple(each), self.results[name].about)) for name, each in ordered.items()])

    @property
    def last_step(self) -> int:
        return max((int(line["step"]) for line in self.lines), default=0)

    def lead(self) -> str:
        """The line below the title."""
        if self.merge is not None:
            return str(self.merge.get("method", "several checkpoints made into one"))
        if self.finished is not None:
            return f"finished after {self.finished.get('steps', self.last_step)} steps"
        return f"not finished: the last report is of step {self.last_step}"

    def summary(self, made: Comparison | None) -> list[str]:
        """What happened, in sentences of HTML."""
        words = words_about(made, named=False) if made and len(made.models) > 1 else []
        parents = [model for model in _models(self.merge) if model.get("distance", "-") != "-"]
        if parents:
            names = ", ".join(f"<b>{_text(m['id'])}</b> ({_text(m['distance'])} from the base)" for m in parents)
            words.append(f"Made of {names}.")
        notes = (self.merge or {}).get("notes")
        words += [_text(note) for note in (notes if isinstance(notes, list) else ())]
        if self.merge is None and self.finished is None:
            words.insert(0, f"<b>This run did not finish.</b> What it wrote up to step {self.last_step} is shown.")
        for key in sorted({key for line in self.lines for key in line if key.startswith("loss/")}):
            values = [line[key] for line in self.lines if key in line]
            name = html.escape(key.split("/", 1)[1])
            words.append(f"The loss on <b>{name}</b> went from {values[0]:.4g} to {values[-1]:.4g}.")
        if self.finished and self.finished.get("best_step"):
            score = self.finished.get("best_score")
            mean = "" if score is None else f" with a mean score of {100 * score:.2f}"
            words.append(f"The best checkpoint is that of step {_text(self.finished['best_step'])}{mean}.")
        words += forgetting_words(self.lines)
        if made is None and self.merge is None:
            advice = "set <code>evaluate.tasks</code> in the recipe to see what training changed"
            words.append(f"No task was scored: {advice}.")
        return words + [html.escape(problem) for problem in self.problems]

    def tasks(self) -> list[str]:
        """What the run scores: the recipe's tasks, as they stand there, and what is held out of its sources."""
        recipe = _tree(self.recipe)
        found = (recipe.get("evaluate") or {}).get("tasks") if isinstance(recipe, dict) else None
        return [str(each) for each in found or () if isinstance(found, list)] + held_out_tasks(self.path)

    def next_steps(self, made: Comparison | None) -> list[NextStep]:
        """What the figures ask for."""
        recipe = _tree(self.recipe)
        if not isinstance(recipe, dict):
            return []
        changes = made.differences(len(made.models) - 1) if made is not None and len(made.models) > 1 else ()
        if self.merge is not None:
            return merge_steps(str(self.path), recipe, _models(self.merge), changes if made is not None else None)
        finished, after = self.finished is not None, self.results.get("after")
        return next_steps(Evidence(str(self.path), recipe, self.lines, finished, changes, after, self.cut))

    def next_section(self, made: Comparison | None) -> Section:
        """Steps that the figures ask for, each with its command."""
        steps = "".join(
            f"<li><b>{html.escape(step.what)}.</b> {html.escape(step.why)}"
            f'<pre class="command"><code>{html.escape(step.command)}</code></pre></li>'
            for step in self.next_steps(made)
        )
        return Section("next", "What to try next", f'<ol class="steps">{steps}</ol>' if steps else "")

    def data_section(self) -> Section:
        """A row a source: what it is, and how much of it was seen."""
        rows = []
        for name, facts in ((self.manifest or {}).get("sources") or {}).items():
            seen = facts.get("seen", {})
            counts = [f"{value:,}" if isinstance(value, int) else "" for value in (facts.get("rows"), seen.get("rows"))]
            steps = "" if "steps" not in seen else f"{seen['steps']:,}"
            rows.append([html.escape(name), html.escape(str(facts.get("task", ""))), *counts, steps])
        return Section("data", "Data", table(("source", "task", "rows", "rows seen", "steps"), rows, numbers_from=2))

    def training_sections(self) -> list[Section]:
        """Training losses by source, then their parts (heads among them) source by source, scores and geometry."""
        keys = [key for key in dict.fromkeys(key for line in self.lines for key in line) if key != "step"]
        below = {start: [key for key in keys if key.startswith(start)] for start in _OWN}
        curves = [
            self._curves(below["loss/"], "Training loss by source", "loss"),
            self._curves(below["validation_loss/"], "Validation loss by source", "loss"),
        ]
        parts = [key for key in keys if "/" in key and not key.startswith(_OWN)]
        for source in dict.fromkeys(key.rsplit("/", 1)[1] for key in parts):
            mine = [key for key in parts if key.rsplit("/", 1)[1] == source]
            curves.append(self._curves(mine, f"Parts of the loss on {source}", "value", strip=f"/{source}"))
        curves.append(self._curves(below["score/"], "Scores while training", "score"))
        curves.append(self._curves(["learning_rate"], "Learning rate", ""))
        curves.append(self._curves(["gradient_norm"], "Gradient norm before clipping", ""))
        space = []
        for key in below["geometry/"]:  # geometry/token/svd_entropy becomes `tokens: svd entropy`
            kind, _, name = key.split("/", 1)[1].rpartition("/")
            of = {"sentence": "texts: ", "token": "tokens: "}.get(kind, f"{kind}: " if kind else "")
            space.append(self._curves([key], of + name.replace("_", " "), ""))
        training = Section("training", "Training", charts(curves))
        return [training, Section("space", "Geometry while training", charts(space))]

    def together_section(self) -> Section:
        """How the tasks got on: losses by task, cosines and conflict of their gradients, the weights that a rule gave
        them, and what the probes forgot."""
        sources = ((self.manifest or {}).get("sources") or {}).items()
        of_tasks = losses_by_task(self.lines, {name: str(facts.get("task", "")) for name, facts in sources})
        keys = dict.fromkeys(key for line in self.lines for key in line)
        below = {start: [key for key in keys if key.startswith(start)] for start in _TOGETHER}
        whole = [key for key in below[COSINE] if key.count("/") == 1]
        tasks = sorted({key for line in of_tasks for key in line} - {"step"})
        curves = [
            self._curves(tasks, "Training loss by task", "loss", of_tasks),
            self._curves(whole, "Cosine between the gradients of", "cosine"),
            self._curves(below["conflict_share/"], "Share of the weights on which they disagree", ""),
            self._curves(below["weight/"], "Weights by the rule of train.balance", ""),
            self._curves(below[FORGETTING], "Forgetting: how far the score lies below the start", ""),
        ]
        told = conflict_table(self.lines)
        told += conflict_words(self.lines) if told else ""
        return Section("together", "Tasks together", charts(curves) + told)

    def negatives_section(self) -> Section:
        """How hard the negatives were, how many were replaced and how many may be false, by source, and what mining
        anew took, where the run reported it."""
        keys = [key for key in dict.fromkeys(key for line in self.lines for key in line) if key.startswith(_HARDNESS)]
        curves = []
        for measure in dict.fromkeys(key.split("/", 1)[0] for key in keys):
            mine = [key for key in keys if key.startswith(f"{measure}/")]
            curves.append(self._curves(mine, measure.removeprefix(_HARDNESS).replace("_", " "), ""))
        curves.append(self._curves(["remine_seconds"], "Seconds spent on mining anew, so far", "s", least=0.0))
        return Section("negatives", "Negatives", charts(curves))

    def throughput_section(self) -> Section:
        """Tokens a second, the share of padding, and of the time that data were waited for."""
        speed = self._curves(["tokens_per_second"], "Tokens a second, all ranks", "")
        padding = self._curves(["padding_share"], "Share of padding", "", least=0.0)
        wait = self._curves(["wait"], "Share of the time spent waiting for data", "", least=0.0)
        return Section("throughput", "Padding and speed", charts([speed, padding, wait]))

    def _curves(
        self,
        keys: Sequence[str],
        title: str,
        y: str,
        lines: Sequence[Line] | None = None,
        *,
        strip: str = "",
        least: float | None = None,
    ) -> str:
        """One line a key over steps; empty without any value. `lines`: other numbers than those of the run."""
        traces = []
        last = [PurePath(key.split("/", 1)[-1]).name for key in keys]
        for key, short in zip(keys, last, strict=True):
            points = [(line["step"], line[key]) for line in (self.lines if lines is None else lines) if key in line]
            if points:
                steps, values = zip(*points)
                whole = key.split("/", 1)[-1]  # a column of a task, such as stsb-en/64: two tasks may have it
                name = key.removesuffix(strip) if strip else short if last.count(short) == 1 else whole
                mode = "lines+markers" if len(points) < 40 else "lines"
                trace = {"type": "scatter", "mode": mode, "name": name, "x": list(steps), "y": finite(values)}
                traces.append({**trace, "showlegend": len(keys) > 1 or bool(strip)})
        axis: dict[str, Any] = {} if least is None else {"yaxis": {"rangemode": "tozero"}}
        return chart(traces, title=title, x="step", y=y, height=300, **axis) if traces else ""

    def merge_section(self) -> Section:
        """Tables of the models and of their coefficients, single values, and the rest as it stands in the file."""
        merge = self.merge
        if not merge:
            return Section("merge", "Merge", "")
        models, coefficients = _models(merge), merge.get("coefficients")
        of_models = [[_text(model.get(key, "")) for key in ("id", "weight", "distance", "path")] for model in models]
        body = table(("model", "weight", "moved", "folder"), of_models, 1, 3)
        rows, names = _coefficients(coefficients, models)
        body += f"<h3>Coefficients</h3>{table(('part', *names), rows)}" if rows else ""
        shown = _SHOWN if rows else [key for key in _SHOWN if key != "coefficients"]
        left = {key: value for key, value in merge.items() if value and key not in shown}
        plain = [[_text(key), _text(value)] for key, value in left.items() if not isinstance(value, dict | list)]
        deep = {key: value for key, value in left.items() if isinstance(value, dict | list)}
        body += "<h3>Settings</h3>" + table(("what", "value"), plain, numbers_from=9)
        body += _PRE.format(html.escape(json.dumps(deep, indent=2, ensure_ascii=False))) if deep else ""
        return Section("merge", "Merge", body)


def _tree(recipe: str) -> Any:
    """The recipe's tree; None for a text that is no YAML."""
    try:
        return yaml.safe_load(recipe)
    except (yaml.YAMLError, RecursionError):
        return None


def _set(value: Any) -> Any:
    """A tree without what is not set: keys that hold nothing."""
    if isinstance(value, dict):
        kept = {key: _set(each) for key, each in value.items()}
        return {key: each for key, each in kept.items() if each is not None and each != {} and each != []}
    return [_set(each) for each in value] if isinstance(value, list) else value


def _lines(path: Path, problems: list[str]) -> list[Line]:
    """Lines of numbers. The last one may be half: the run was killed while it wrote."""
    if not path.is_file():
        return []
    lines: list[Line] = []
    broken = 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            lines.append({key: float(value) for key, value in line.items() if isinstance(value, int | float)})
            if not math.isfinite(lines[-1]["step"]):
                raise ValueError
        except (ValueError, AttributeError, KeyError, OverflowError, RecursionError):
            broken += 1
            lines = [line for line in lines if math.isfinite(line.get("step", math.nan))]
    if broken:
        problems.append(f"{broken} line(s) of {path.name} could not be read")
    return lines


def _json(path: Path, problems: list[str], shape: Any = dict[str, Any]) -> dict[str, Any] | None:
    """The object in a file, where there is one of this shape."""
    if not path.is_file():
        return None
    try:
        found = read_json(path)
        typed(shape, found, path)
    except DataError:
        problems.append(f"{path.name} could not be read")
        return None
    return found


class _Finished(TypedDict, total=False):
    steps: int
    best_step: int | None
    best_score: float | None


class _Cut(TypedDict):
    texts: int
    cut: int
    longest: int
    max_length: int


class _Seen(TypedDict, total=False):
    rows: int
    steps: int


class _Source(TypedDict, total=False):
    task: str
    rows: int
    seen: _Seen


class _Manifest(TypedDict, total=False):
    sources: dict[str, _Source]


class _Histograms(TypedDict):
    edges: list[float]
    random: list[float]
    pairs: list[float]


class _GeometryFile(TypedDict):
    geometry: dict[str, float | None]
    spectrum: list[float]
    variance: list[float]
    histograms: _Histograms


def _models(merge: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    found = (merge or {}).get("models")
    return [each for each in found if isinstance(each, dict) and "id" in each] if isinstance(found, list) else []


def _coefficients(found: Any, models: Sequence[Mapping[str, Any]]) -> tuple[list[list[str]], list[str]]:
    """Rows of a table, one a part of the model, and the parents' names; nothing where the file has another shape."""
    lists = found.values() if isinstance(found, dict) else ()
    widths = {len(row) if isinstance(row, list) else 0 for row in lists}
    if len(widths) != 1 or 0 in widths or not all(isinstance(c, int | float) for row in lists for c in row):
        return [], []
    width = widths.pop()
    names = [str(model["id"]) for model in models][:width]
    names += [f"model {place + 1}" for place in range(len(names), width)]
    return [[_text(part), *(f"{value:.4g}" for value in row)] for part, row in found.items()], names


def _text(value: Any) -> str:
    return html.escape(str(value))
