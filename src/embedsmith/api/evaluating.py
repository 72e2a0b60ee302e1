"""How models are scored and compared, for Python (`evaluate`, `compare`) and for the verbs. Costs torch, so that the
verbs import it inside their functions."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from embedsmith.core.collectives import ALONE, Group, lost_ranks, refuse_launcher
from embedsmith.core.encoder import Encoder, Reranker, main_head
from embedsmith.core.errors import EmbedsmithError, EvaluationError
from embedsmith.core.outputs import delivered
from embedsmith.core.progress import lines_shown, log
from embedsmith.core.recipe import parse, read_tree
from embedsmith.core.sharing import Shard, Sharing
from embedsmith.data import RecordSet, Source, part_of, read_source
from embedsmith.data.record import Text
from embedsmith.data.split import HELD_OUT
from embedsmith.evaluate.compare import Comparison
from embedsmith.evaluate.mteb.run import find_mteb_tasks, mteb_evaluate
from embedsmith.evaluate.mteb.tasks import SampleLimits
from embedsmith.evaluate.overlap import warn_of_overlap
from embedsmith.evaluate.rerank import DEPTH, Rerank
from embedsmith.evaluate.result import Results
from embedsmith.evaluate.run import ResultCache, digest, task_content
from embedsmith.evaluate.run import evaluate as score
from embedsmith.evaluate.tasks.kinds import Task, load_tasks
from embedsmith.evaluate.variants import FULL, HEADS, HeadScores, score_heads, score_widths
from embedsmith.models import CrossEncoder, Embedder, is_reranker, load, load_reranker
from embedsmith.search.cached import CachedEncoder
from embedsmith.search.hybrid import M3_WEIGHTS, HybridEncoder
from embedsmith.search.quantised import RESCORE, SearchPrecision
from embedsmith.train.held_out import training_parts

Load = Callable[..., Encoder]
Tasks = str | Path | Task | Sequence[str | Path | Task]


def evaluate(
    model: str | Path | Encoder,
    tasks: Tasks,
    *,
    data: str | Path | None = None,
    split: str = "test",
    head: str | None = None,
    dims: Sequence[int] = (),
    precision: SearchPrecision | Sequence[SearchPrecision] = (),
    rescore: int = RESCORE,
    weights: Mapping[str, float] | None = None,
    cache: str | Path | None = None,
    rerank: str | Path | Reranker | None = None,
    depth: int = DEPTH,
    shard: Shard | None = None,
    join: bool = False,
    **options: Any,
) -> Results | HeadScores:
    """Score a model on tasks. The ranks of a launcher share the work: all of them must call this.

    >>> import embedsmith as es
    >>> scores = es.evaluate("my-model", "scored.jsonl")
    >>> list(scores.main_scores())
    ['scored']

    `model`: a folder, a hub id, or a model that is loaded; of a reranker, reranking tasks are scored. `tasks`: names or
    paths of tasks, or tasks, one or several. `data`: the folder where names are looked up. `split`: which judgements of
    a BEIR folder. `head`: `dense`, `sparse`, `multivector` or `hybrid`, the latter with `weights`; `all` for these side
    by side; by default what the model is made for. `dims`: widths of the vectors that are scored too. `precision`:
    `int8`, `binary` or both: retrieval tasks are searched by such codes too, and `rescore` times as many documents then
    by their full vectors. `cache`: a folder for vectors and results, so that a stopped call continues. `rerank`: a
    reranker, or its folder or hub id, that orders the first `depth` documents of the model's rankings anew. `shard`:
    which of how many shards this call is, `(0, 4)`, each of which scores some of the tasks into `cache`; `join`: put
    their results together (docs/ranks.md). `options`: of `embedsmith.load`, such as `pooling`, `prompts`, `max_length`.
    Errors: `EvaluationError` for unknown tasks and scores that cannot be had; those of `load`.
    """
    sharing = evaluation_sharing(_path(cache), shard, join)
    named, encoder = _loaded(model, options)
    ranker = rerank_of(rerank, depth)
    if isinstance(encoder, CrossEncoder):
        if ranker is not None:
            raise EvaluationError("rerank of a reranker", fix="name the embedding model first, and its reranker there")
        ranker = Rerank(encoder, depth)
        encoder = None
    precisions = (precision,) if isinstance(precision, str) else tuple(precision)
    if ranker is not None and (dims or precisions or head == "all"):
        raise EvaluationError("a reranker with dims, precision or head='all'", fix="leave one of them out")
    scored = head or ("dense" if encoder is None else main_head(encoder))
    about = {"model": named, "split": split, "head": scored, **options}
    if rerank is not None:
        about["rerank"] = str(rerank) if isinstance(rerank, str | Path) else type(rerank).__name__
        about["depth"] = depth
    if (dims or precisions) and head not in (None, "dense"):
        given = "dims" if dims else "precision"
        raise EvaluationError(f"{given} with head={head!r}", fix="leave one of them out: it is of dense vectors")
    with lines_shown(), ExitStack() as claims:
        kept: Path | None = None
        if cache is not None:
            kept = Path(claims.enter_context(delivered(cache, "evaluate", shared=shard is not None or join)))
            sharing = replace(sharing, output=kept)
            claims.enter_context(sharing.claim())
        place = None if data is None else Path(data)
        scoring = Scoring(_listed(tasks), place, split, head, kept, weights, ranker, sharing)
        if head == "all":
            return scoring.side_by_side(encoder, [name for name in HEADS if name in encoder.outputs], (), about)
        if dims or precisions:
            return scoring.at_widths(encoder, dims, about, checked_precisions(precisions), rescore)
        return scoring.score(encoder, about)


def evaluation_sharing(cache: Path | None, shard: Shard | None, join: bool) -> Sharing:
    """Who scores what. Errors: `EvaluationError` for shards without a folder for their results; those of
    `Sharing.asked`."""
    if cache is None and (shard is not None or join):
        raise EvaluationError(
            "shards keep their results in a folder, and none is named",
            fix="add --keep FOLDER (in Python: cache=FOLDER), the same one for all shards and the join",
        )
    return Sharing.asked("evaluate", cache or "scores", shard, join)


def checked_precisions(given: Sequence[str]) -> tuple[SearchPrecision, ...]:
    """Those that are searched beside the full vectors. Errors: `EvaluationError` for another one."""
    if wrong := [one for one in given if one not in ("float32", "int8", "binary")]:
        raise EvaluationError(f"the precision is {wrong[0]!r}", expected="int8, binary or both")
    return tuple(one for one in ("int8", "binary") if one in given)


def compare(
    models: Sequence[str | Path] | Mapping[str, str | Path | Encoder | Results],
    tasks: Tasks = (),
    *,
    data: str | Path | None = None,
    split: str = "test",
    head: str | None = None,
    dims: Sequence[int] = (),
    cache: str | Path | None = None,
    **options: Any,
) -> Comparison:
    """Score models side by side, with the confidence of their differences to the first.

    >>> import embedsmith as es
    >>> compared = es.compare(["my-model", "other-model"], ["scored.jsonl"])
    >>> [str(name) for name in compared.models]
    ['my-model', 'other-model']

    `models`: folders, hub ids or files of results, or a dict of names to these, to loaded models or to results of
    `evaluate`; the baseline first. The other arguments are those of `evaluate`.
    Errors: `EvaluationError` for fewer than two to compare, and for results of other tasks.
    """
    scoring = Scoring(_listed(tasks), None if data is None else Path(data), split, head, _path(cache))
    named = models if isinstance(models, Mapping) else {str(model): model for model in models}
    with lines_shown():
        return compare_models(named, scoring, partial(load, **options), dims)


def _loaded(model: str | Path | Encoder, options: Mapping[str, Any]) -> tuple[str, Any]:
    if isinstance(model, str | Path):
        return str(model), load_either(str(model), options)
    if options:
        raise EvaluationError(
            f"{next(iter(options))} of a model that is loaded", fix="give it to load: embedsmith.load(FOLDER, ...)"
        )
    return type(model).__name__, model


def load_either(path: str, options: Mapping[str, Any]) -> Embedder | CrossEncoder:
    """The embedding model or the reranker of a folder or hub id."""
    return load_reranker(path, **options) if is_reranker(path) else load(path, **options)


def rerank_of(model: str | Path | Reranker | None, depth: int) -> Rerank | None:
    """A reranker, or its folder or hub id, as an evaluation takes it."""
    if model is None:
        return None
    return Rerank(load_reranker(str(model)) if isinstance(model, str | Path) else model, depth)


def _listed(tasks: Tasks) -> tuple[Any, ...]:
    listed = tuple(tasks) if isinstance(tasks, list | tuple) else (tasks,)
    if wrong := [
        one for one in listed if not (isinstance(one, str | Path) or callable(getattr(one, "evaluate", None)))
    ]:
        raise EvaluationError(
            f"a {type(wrong[0]).__name__} is no task",
            expected="names, paths or tasks",
            fix="hold a part of your rows out, and score that: embedsmith.split(rows).test",
        )
    return listed


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


@dataclass(frozen=True)
class Scoring:
    """How the verbs score a model. `head`: `None` for the one that it is made for. `cache`: a folder for results and
    vectors, so that a stopped command continues. `rerank`: what orders the model's rankings anew. `sharing`: who scores
    what; `None`: this process everything."""

    tasks: tuple[str | Path | Task, ...]
    data: Path | None = None
    split: str = "test"
    head: str | None = None
    cache: Path | None = None
    weights: Mapping[str, float] | None = None
    rerank: Rerank | None = None
    sharing: Sharing | None = None

    @property
    def group(self) -> Group:
        """The ranks that share the work."""
        return self.sharing.group if self.sharing is not None and self.sharing.mode == "ranks" else ALONE

    def score(self, encoder: Encoder | None, about: Mapping[str, Any]) -> Results:
        """The model on all tasks, with our own evaluator."""
        loaded = self._load(self.tasks)
        warn_of_overlap(loaded, trained_on(str(about.get("model", ""))))
        if self.head == "hybrid" and encoder is not None:
            encoder = HybridEncoder(encoder, self.weights or M3_WEIGHTS)
        results, share = None, loaded
        if self.cache is not None:
            encoder = None if encoder is None else CachedEncoder.of(encoder, self.cache / "vectors")
            results = self.cache / "results"
            share = self._share(loaded, encoder, results)
            if not share:  # more shards than tasks
                return Results((), dict(about))
        options = {"rerank": self.rerank, "head": self.head, "cache": results, "group": self.group}
        with lost_ranks():
            found = score(encoder, share, about=about, **options)
        if self.sharing is not None and results is not None:
            if self.sharing.ends or not self._missing(loaded, encoder, results):
                self.sharing.first(self.sharing.end)
            if not self.sharing.ends:
                self.sharing.tell(len(loaded))
        return found

    def _share(self, tasks: list[Task], encoder: Encoder | None, results: Path) -> list[Task]:
        """Those of the tasks that are to be scored here; for a join all, which must be there."""
        sharing = self.sharing
        if sharing is None or sharing.mode not in ("shard", "join"):
            return tasks
        model = self._known(encoder, results).model
        sharing.agree({"model": model, "tasks": {task.name: digest(task_content(task)) for task in tasks}})
        if sharing.mode == "join":
            sharing.refuse_missing(self._missing(tasks, encoder, results), len(tasks))
            return tasks
        return [tasks[number] for number in sharing.share(range(len(tasks)), ())]

    def _missing(self, tasks: list[Task], encoder: Encoder | None, results: Path) -> list[int]:
        """The numbers of the tasks that are not scored yet."""
        known = self._known(encoder, results)
        return [number for number, task in enumerate(tasks) if known.find(task) is None]

    def _known(self, encoder: Encoder | None, results: Path) -> ResultCache:
        head = self.head or ("dense" if encoder is None else main_head(encoder))
        return ResultCache.of(encoder, results, self.rerank, head)

    def _refuse_shards(self, what: str) -> None:
        if self.sharing is not None and self.sharing.mode in ("shard", "join"):
            raise EvaluationError(f"shards of {what}", fix="start it in one process, or with torchrun")

    def side_by_side(
        self, encoder: Encoder, heads: Sequence[str], tune_on: Sequence[str], about: Mapping[str, Any]
    ) -> HeadScores:
        """Every head alone and heads together, on all tasks; weights tuned on the dev split of `tune_on`."""
        self._refuse_shards("all heads side by side")
        if tune_on and self.group is not ALONE:
            raise EvaluationError("weights are tuned by one process", fix="start --tune without the launcher")
        loaded, dev = self._load(self.tasks), self._load(tune_on, "dev")
        if same := [one.name for one in dev if one in loaded]:
            raise EvaluationError(f"weights tuned on {same[0]} and reported on it", fix="tune on another task")
        return score_heads(
            encoder, loaded, heads, weights=self.weights, tune_on=dev, about=about, cache=self.cache, group=self.group
        )

    def at_widths(
        self,
        encoder: Encoder,
        widths: Sequence[int],
        about: Mapping[str, Any],
        precisions: Sequence[SearchPrecision] = (),
        rescore: int = RESCORE,
    ) -> HeadScores:
        """The whole vectors and their first numbers, in full and as codes, on all tasks."""
        self._refuse_shards("several widths or codes")
        loaded, options = self._load(self.tasks), {"about": about, "cache": self.cache, "group": self.group}
        return score_widths(encoder, loaded, widths, precisions=precisions, rescore=rescore, **options)

    def chosen(self, results: Results, where: str) -> Results:
        """The asked tasks of a file with results; all of them where none was asked for."""
        wanted = [
            Path(task).name.removesuffix(".jsonl") if isinstance(task, str | Path) else task.name for task in self.tasks
        ]
        found = {result.task: result for result in results}
        if missing := [task for task in wanted if task not in found]:
            raise EvaluationError(f"no result for {missing[0]!r}", where=where, expected=", ".join(found))
        return Results(tuple(found[task] for task in wanted) or results.tasks, results.about)

    def _load(self, tasks: Sequence[str | Path | Task], split: str | None = None) -> list[Task]:
        names = [task for task in tasks if isinstance(task, str | Path)]
        loaded = iter(load_tasks(names, data_dir=self.data, split=split or self.split))
        return [next(loaded) if isinstance(task, str | Path) else task for task in tasks]

    def with_mteb(self, encoder: Encoder, model: str, output: Path, limits: SampleLimits | None) -> Results:
        """The model on all tasks, with mteb."""
        self._refuse_shards("an evaluation by mteb")
        refuse_launcher("evaluate --mteb", "start it once, without the launcher")
        chosen = find_mteb_tasks([str(task) for task in self.tasks], data=self.data, split=self.split)
        if self.head == "hybrid":
            encoder = HybridEncoder(encoder, self.weights or M3_WEIGHTS)
        return mteb_evaluate(encoder, chosen, output, name=model, head=self.head, limits=limits)


def trained_on(model: str) -> list[RecordSet[Text]]:
    """What a model was trained on, where its run's folder is still around it and its sources can be read; empty for any
    other model. Streams, and what was never on this disk, are left out."""
    places = Path(model).absolute().parents[:3] if (Path(model) / "config.json").is_file() else ()
    recipe = next((place / "recipe.yaml" for place in places if (place / "manifest.json").is_file()), None)
    found: list[RecordSet[Text]] = []
    try:
        tree = {} if recipe is None else read_tree(recipe)
        given = [parse(Source, one) for one in tree.get("data") or []] if "train" in tree else []
        evaluated = tree.get("evaluate") or {}
        if recipe is not None and evaluated.get("held_out") and not evaluated.get("tasks"):
            given = training_parts(given, recipe.parent / HELD_OUT)
    except (EmbedsmithError, TypeError, AttributeError):
        return []
    for source in given:
        if source.rows is None and not source.streaming and Path(source.path).exists():
            try:
                found.append(part_of(read_source(source), source.part))
            except EmbedsmithError as error:
                log.info("not compared with the evaluated texts: %s", error)
    return found


def compare_models(models: Mapping[str, Any], scoring: Scoring, load: Load, widths: Sequence[int] = ()) -> Comparison:
    """Names to models by folder or hub id, loaded models, results or their files (`evaluate --items --json`), the one
    to measure against first. With `widths` every model is scored at those widths too.

    Errors: `EvaluationError` for fewer than two to compare, and results of other tasks.
    """
    if len(models) < 2 and not widths:
        raise EvaluationError(f"{len(models)} model given", expected="two or more")
    scored: list[tuple[str, Results]] = []
    for name, model in models.items():
        if isinstance(model, Results) or str(model).endswith(".json"):
            results = model if isinstance(model, Results) else Results.load(model)
            scored.append((name, scoring.chosen(results, name)))
            continue
        encoder = load(str(model)) if isinstance(model, str | Path) else model
        if widths:
            columns = scoring.at_widths(encoder, widths, {"model": name}).columns
            scored += [(name if width == FULL else f"{name} at {width}", each) for width, each in columns.items()]
        else:
            scored.append((name, scoring.score(encoder, {"model": name})))
    return Comparison.of(scored)
