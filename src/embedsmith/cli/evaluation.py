"""How the evaluation verbs score models: the work behind `evaluate`, `compare` and stages. Costs torch, so that the
verbs import it inside their functions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedsmith.core.encoder import Encoder
from embedsmith.core.errors import EmbedsmithError, EvaluationError
from embedsmith.core.progress import log
from embedsmith.core.recipe import parse, read_tree
from embedsmith.data import RecordSet, Source, part_of, read_source
from embedsmith.data.record import Text
from embedsmith.evaluate.compare import Comparison
from embedsmith.evaluate.mteb.run import find_mteb_tasks, mteb_evaluate
from embedsmith.evaluate.mteb.tasks import SampleLimits
from embedsmith.evaluate.result import Results
from embedsmith.evaluate.run import evaluate
from embedsmith.evaluate.seen import warn_of_seen
from embedsmith.evaluate.tasks.kinds import Task, load_task
from embedsmith.evaluate.variants import FULL, HeadScores, score_heads, score_widths
from embedsmith.search.cached import CachedEncoder
from embedsmith.search.hybrid import M3_WEIGHTS, HybridEncoder

Load = Callable[..., Encoder]


@dataclass(frozen=True)
class Scoring:
    """How the verbs score a model. `cache`: a folder for results and vectors, so that a stopped command continues."""

    tasks: tuple[str, ...]
    data: Path | None = None
    split: str = "test"
    head: str = "dense"
    cache: Path | None = None
    weights: Mapping[str, float] | None = None

    def score(self, encoder: Encoder, about: Mapping[str, Any]) -> Results:
        """The model on all tasks, with our own evaluator."""
        loaded = self._load(self.tasks)
        warn_of_seen(loaded, trained_on(str(about.get("model", ""))))
        if self.head == "hybrid":
            encoder = HybridEncoder(encoder, self.weights or M3_WEIGHTS)
        if self.cache is None:
            return evaluate(encoder, loaded, head=self.head, about=about)
        cached = CachedEncoder.of(encoder, self.cache / "vectors")
        return evaluate(cached, loaded, head=self.head, about=about, cache=self.cache / "results")

    def side_by_side(
        self, encoder: Encoder, heads: Sequence[str], tune_on: Sequence[str], about: Mapping[str, Any]
    ) -> HeadScores:
        """Every head alone and heads together, on all tasks; weights tuned on the dev split of `tune_on`."""
        loaded, dev = self._load(self.tasks), self._load(tune_on, "dev")
        if same := [one.name for one in dev if one in loaded]:
            raise EvaluationError(f"weights tuned on {same[0]} and reported on it", fix="tune on another task")
        return score_heads(encoder, loaded, heads, weights=self.weights, tune_on=dev, about=about, cache=self.cache)

    def at_widths(self, encoder: Encoder, widths: Sequence[int], about: Mapping[str, Any]) -> HeadScores:
        """The whole vectors and their first numbers, on all tasks."""
        return score_widths(encoder, self._load(self.tasks), widths, about=about, cache=self.cache)

    def chosen(self, results: Results, where: str) -> Results:
        """The asked tasks of a file with results; all of them where none was asked for."""
        wanted = [Path(task).name.removesuffix(".jsonl") for task in self.tasks]
        found = {result.task: result for result in results}
        if missing := [task for task in wanted if task not in found]:
            raise EvaluationError(f"no result for {missing[0]!r}", where=where, expected=", ".join(found))
        return Results(tuple(found[task] for task in wanted) or results.tasks, results.about)

    def _load(self, names: Sequence[str], split: str | None = None) -> list[Task]:
        return [load_task(name, data_dir=self.data, split=split or self.split) for name in names]

    def with_mteb(self, encoder: Encoder, model: str, output: Path, limits: SampleLimits | None) -> Results:
        """The model on all tasks, with mteb."""
        chosen = find_mteb_tasks(self.tasks, data=self.data, split=self.split)
        if self.head == "hybrid":
            encoder = HybridEncoder(encoder, self.weights or M3_WEIGHTS)
        return mteb_evaluate(encoder, chosen, output, name=model, head=self.head, limits=limits)


def trained_on(model: str) -> list[RecordSet[Text]]:
    """What a model was trained on, where its run's folder is still around it and its sources can be read; empty for any
    other model. Streams, and what was never on this disk, are left out."""
    places = Path(model).absolute().parents
    recipe = next((place / "recipe.yaml" for place in places[:3] if (place / "recipe.yaml").is_file()), None)
    found: list[RecordSet[Text]] = []
    try:
        tree = {} if recipe is None else read_tree(recipe)
        given = [parse(Source, one) for one in tree.get("data") or []] if "train" in tree else []
    except (EmbedsmithError, TypeError):
        return []
    for source in given:
        if source.rows is None and not source.streaming and Path(source.path).exists():
            try:
                found.append(part_of(read_source(source), source.part))
            except EmbedsmithError as error:
                log.info("not compared with the evaluated texts: %s", error)
    return found


def compare_models(models: Sequence[str], scoring: Scoring, load: Load, widths: Sequence[int] = ()) -> Comparison:
    """Models by folder or hub id, or results by file (`evaluate --items --json`), the one to measure against first.
    With `widths` every model is scored at those widths too.

    Errors: `EvaluationError` for fewer than two to compare, and results of other tasks.
    """
    if len(models) < 2 and not widths:
        raise EvaluationError(f"{len(models)} model given", expected="two or more")
    scored: list[tuple[str, Results]] = []
    for name in models:
        if name.endswith(".json"):
            scored.append((name, scoring.chosen(Results.load(name), name)))
        elif widths:
            columns = scoring.at_widths(load(name), widths, {"model": name}).columns
            scored += [(name if width == FULL else f"{name} at {width}", each) for width, each in columns.items()]
        else:
            scored.append((name, scoring.score(load(name), {"model": name})))
    return Comparison.of(scored)
