"""The recipe of a pipeline, what its stages can do, and how they run in order.

A stage is a function from the plain tree of a verb's recipe to what it made; it may be called again after a stop, and
on all ranks at once. What is finished is in a journal; the same command goes on behind it.
"""

import copy
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from embedsmith.core.collectives import join_ranks, on_first_rank
from embedsmith.core.errors import CheckpointError, EvaluationError, RecipeError
from embedsmith.core.files import atomic_file
from embedsmith.core.inputs import read_json, typed
from embedsmith.core.outputs import claimed, recover, refuse_foreign_file
from embedsmith.core.progress import log
from embedsmith.core.recipe import apply_override, parse, read_tree
from embedsmith.core.settings import Range, Share, Word, did_you_mean, section
from embedsmith.core.shipped import recipe_file

Verb = Literal["curate", "mine", "train", "merge", "evaluate", "export"]
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@section
@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a pipeline: the recipe of one verb.

    `name`: what later stages call it by. `verb`: curate, mine, train, merge, evaluate or export. `recipe`: the
    fields of the verb's own recipe, or the path of a file that holds them, or the name of a shipped one. `set`: changes
    to it, key.path=value. `seeds`: of a training that is run once with each of them, as stages `NAME-0`, `NAME-1`, ...;
    an entry of a list that names `${NAME}` then stands for one of each, so that a merge has all of them as parents.

    In any text `${name}` stands for what the earlier stage of that name made (curate and mine: the file of records;
    train, merge and export: the folder of the model; evaluate: the file of results), and `${output}` for the
    pipeline's folder. `output` may be left out: it is then in that folder, under the stage's name.
    """

    name: str
    verb: Verb
    recipe: dict[str, Any] | str
    set: tuple[str, ...] = ()
    seeds: tuple[Annotated[int, Range(ge=0)], ...] = ()

    def __post_init__(self) -> None:
        if self.seeds and self.verb != "train":
            raise RecipeError(f"seeds of a stage {self.verb}", where=f"stage {self.name}", expected="a stage train")
        if len(set(self.seeds)) < len(self.seeds):
            raise RecipeError(f"seeds: one of {list(self.seeds)} comes twice", where=f"stage {self.name}")
        if not _NAME.fullmatch(self.name) or self.name == "output":
            raise RecipeError(f"{self.name!r} cannot be a stage's name", expected="letters, digits, _ and -")

    def with_each_seed(self) -> "list[Stage]":
        """The stage itself, or one for each of its seeds, in the pipeline's folder."""
        if not self.seeds:
            return [self]
        own = {f"{self.name}-{seed}": f"train.seed={seed}" for seed in self.seeds}
        changes = {name: (*self.set, change, f"output=${{output}}/{name}") for name, change in own.items()}
        return [replace(self, name=name, set=change, seeds=()) for name, change in changes.items()]


@section
@dataclass(frozen=True, kw_only=True)
class PipelineRecipe:
    """Stages that run in their order.

    `output`: the folder of all that has no place of its own. `stages`: the stages, at least one.
    """

    output: Word
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        each = tuple(one for stage in self.stages for one in stage.with_each_seed())
        names += [one.name for one in each if one not in self.stages]
        object.__setattr__(self, "stages", each)
        if not names:
            raise RecipeError("stages: at least one is needed")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RecipeError(f"two stages are called {twice[0]!r}", where="stages", fix="give each its own name")


@dataclass(frozen=True)
class StageKind:
    """A verb as a stage: what runs it, how its output is named where the recipe does not say, and what checks its
    recipe before any stage runs."""

    run: Callable[[dict[str, Any], str], Path]
    suffix: str
    check: Callable[[dict[str, Any], str], None] = lambda tree, where: None


VERBS: dict[str, StageKind] = {}
_MADE = "(what stage "
"""How the words begin that stand for what a stage makes."""


def stage_of(verb: str, suffix: str = "") -> Callable[[Callable[[dict[str, Any], str], Path]], None]:
    """Decorator for what a stage of a verb does: `(tree, where)` to the path of what it made."""

    def add(run: Callable[[dict[str, Any], str], Path]) -> None:
        VERBS[verb] = StageKind(run, suffix, lambda tree, where: _check(verb, tree, where))

    return add


def run_mine(
    tree: dict[str, Any],
    where: str = "mine",
    overwrite: bool = False,
    shard: str | None = None,
    join: bool = False,
) -> Any:
    """Mine; returns the report."""
    from embedsmith.mining import MineRecipe, mine
    from embedsmith.models import load, load_reranker

    recipe = parse(MineRecipe, tree, where)
    return mine(recipe, load, load_reranker, overwrite=overwrite, shard=shard, join=join)


@stage_of("mine", ".jsonl")
def _mine(tree: dict[str, Any], where: str) -> Path:
    return Path(run_mine(tree, where).output)


@stage_of("curate", ".jsonl")
def _curate(tree: dict[str, Any], where: str) -> Path:
    from embedsmith.api.curating import curation_tools
    from embedsmith.curate import CurateRecipe, curate

    recipe = parse(CurateRecipe, tree, where)
    join_ranks()
    on_first_rank(lambda: curate(recipe, curation_tools()).output)
    return Path(recipe.output)


@stage_of("train")
def _train(tree: dict[str, Any], where: str) -> Path:
    from embedsmith.train import Recipe, train

    return train(parse(Recipe, tree, where))


@stage_of("merge")
def _merge(tree: dict[str, Any], where: str) -> Path:
    from embedsmith.compat.mergekit import merge_tree
    from embedsmith.merge import MergeRecipe
    from embedsmith.merge.run import merge

    recipe = parse(MergeRecipe, merge_tree(tree, where), where)
    join_ranks()
    on_first_rank(lambda: str(merge(recipe)))
    return Path(recipe.output)


@section
@dataclass(frozen=True, kw_only=True)
class EvaluateStage:
    """The arguments that `embedsmith evaluate` has on the command line.

    `model`: a folder or hub id. `tasks`: names or paths of tasks, at least one. `probes`: those of them that tell what
    is forgotten, whose queries or pairs no training of the pipeline may read. `output`: the file of results.
    `data`: the folder where names of tasks are looked up. `split`: which judgements of a BEIR folder. `rerank`: a
    reranker that orders the model's rankings anew. `depth`: documents of a ranking that it reads.
    """

    model: str
    tasks: tuple[str, ...]
    output: Word
    probes: tuple[str, ...] = ()
    data: str | None = None
    split: str = "test"
    rerank: str | None = None
    depth: Annotated[int, Range(gt=0)] = 100

    def __post_init__(self) -> None:
        if not self.tasks:
            raise RecipeError("tasks: at least one is needed")
        if strange := next((name for name in self.probes if name not in self.tasks), None):
            raise RecipeError(
                f"probes: {strange!r} is not one of the stage's tasks{did_you_mean(strange, self.tasks)}",
                expected=", ".join(self.tasks),
            )


@stage_of("evaluate", ".json")
def _evaluate(tree: dict[str, Any], where: str) -> Path:
    from embedsmith.api.evaluating import rerank_of
    from embedsmith.evaluate import evaluate, load_tasks
    from embedsmith.models import load

    stage = parse(EvaluateStage, tree, where)
    join_ranks()
    on_first_rank(lambda: refuse_foreign_file(Path(stage.output), '"tasks": ['))
    tasks = load_tasks(stage.tasks, data_dir=stage.data, split=stage.split)
    about = {"model": stage.model} | ({} if stage.rerank is None else {"rerank": stage.rerank})
    ranker = rerank_of(stage.rerank, stage.depth)
    found = evaluate(load(stage.model), tasks, rerank=ranker, about=about, group=None)
    on_first_rank(lambda: found.save(Path(stage.output), items=False))
    return Path(stage.output)


@section
@dataclass(frozen=True, kw_only=True)
class ExportStage:
    """The arguments that `embedsmith export --to` has on the command line.

    `model`: a folder or hub id. `output`: the folder of the graph, or a file `.gguf`. `to`, `dtype`: for what runtime,
    in which numbers. `texts`: a file of texts that 8 bits are calibrated on. `floor`: the least mean cosine to the
    model's vectors. `tasks`: what the graph is scored on beside the model. `data`, `split`: as of evaluate.
    """

    model: str
    output: Word
    to: Literal["onnx", "openvino", "gguf"] = "onnx"
    dtype: Literal["fp32", "fp16", "int8"] = "fp32"
    texts: str | None = None
    floor: Share | None = None
    tasks: tuple[str, ...] = ()
    data: str | None = None
    split: str = "test"


@stage_of("export")
def _export(tree: dict[str, Any], where: str) -> Path:
    from embedsmith.api.exporting import export

    stage = parse(ExportStage, tree, where)
    named = {name: getattr(stage, name) for name in ("dtype", "floor", "tasks", "data", "split")}
    join_ranks()
    on_first_rank(lambda: str(export(stage.model, stage.output, stage.to, texts=stage.texts or (), **named)))
    return Path(stage.output)


def recipe_class(verb: str) -> type:
    """The class of a verb's recipe. Errors: `RecipeError` for a verb without one."""
    from embedsmith.api.tokenizing import TokenizeJob
    from embedsmith.curate import CurateRecipe
    from embedsmith.merge import MergeRecipe
    from embedsmith.mining import MineRecipe
    from embedsmith.train import Recipe

    recipes = {
        "train": Recipe,
        "mine": MineRecipe,
        "merge": MergeRecipe,
        "curate": CurateRecipe,
        "tokenize": TokenizeJob,
        "run": PipelineRecipe,
    }
    if verb not in recipes:
        raise RecipeError(f"{verb!r} has no recipe{did_you_mean(verb, recipes)}", expected=", ".join(recipes))
    return recipes[verb]


def _check(verb: str, tree: dict[str, Any], where: str) -> None:
    """The recipe of a stage is one, and what it scores is there; what earlier stages make is not. Errors: those of
    reading a recipe; `EvaluationError` for a task that is nowhere."""
    from embedsmith.compat.mergekit import merge_tree
    from embedsmith.evaluate.tasks.kinds import check_tasks

    own = {"evaluate": EvaluateStage, "export": ExportStage}
    read: Any = parse(own.get(verb) or recipe_class(verb), merge_tree(tree, where) if verb == "merge" else tree, where)
    scored = read.evaluate if verb == "train" else read
    if verb in ("train", *own):
        known = [task for task in scored.tasks if _MADE not in task]
        check_tasks(known, data_dir=scored.data, split=getattr(scored, "split", "test"))


JOURNAL = "pipeline.json"
_REFERENCE = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True)
class Finished:
    """A stage that is over. `key`: a hash of its recipe and of all stages before it."""

    key: str
    result: str
    seconds: float


def run(recipe: PipelineRecipe) -> dict[str, Path]:
    """Run every stage that the journal does not name as finished with the same recipe; what each made, by name.

    A stage whose recipe, or that of an earlier stage, changed since is run again; its verb then says what it does
    with an output that is already there. On several ranks (torchrun) every stage runs on all of them, or on the first
    where it knows no other. Errors: `RecipeError` for a reference to no earlier stage; those of the verbs.
    """
    check_stages(recipe)
    join_ranks()
    with ExitStack() as claim:
        on_first_rank(lambda: claim.enter_context(claimed(recipe.output, "run")))
        on_first_rank(lambda: recover(Path(recipe.output) / JOURNAL))
        results: dict[str, str] = {"output": recipe.output}
        key = ""
        for stage in recipe.stages:
            tree = resolved(stage, results)
            content = json.dumps([key, stage.verb, tree], sort_keys=True, ensure_ascii=False, default=str)
            key = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
            done = _journal(recipe).get(stage.name)
            if done is not None and done.key == key and Path(done.result).exists():
                log.info("stage %s: finished before, %s", stage.name, done.result)
            else:
                log.info("stage %s: %s", stage.name, stage.verb)
                if stage.verb == "train":
                    on_first_rank(partial(refuse_probes_in, tree, stage.name, recipe))
                started = time.monotonic()
                made = VERBS[stage.verb].run(tree, f"stage {stage.name}")
                done = Finished(key, str(made), round(time.monotonic() - started, 1))
                _enter(recipe, stage.name, done)
            results[stage.name] = done.result
    return {stage.name: Path(results[stage.name]) for stage in recipe.stages}


def check_stages(recipe: PipelineRecipe) -> None:
    """Read the recipe of every stage before any runs, so that a mistake in the last one costs nothing. Errors:
    `RecipeError`; `EvaluationError` for a task that is nowhere."""
    place, before = -1, None
    for stage, results in placeholders(recipe):
        place += stage.recipe is not before  # stages that differ by the seed alone stand in one place, with one recipe
        where, before = f"stage {stage.name}", stage.recipe
        try:
            VERBS[stage.verb].check(resolved(stage, results), where)
        except EvaluationError as error:
            fix = "name files or folders that are there"
            if stage.verb == "train":
                fix += f": stages.{place}.recipe.evaluate.tasks=[FILE]"
            else:
                fix += f": stages.{place}.recipe.tasks=[FILE]"
            raise EvaluationError(error.what, where=where, expected=error.expected, fix=fix) from error


def refuse_probes_in(tree: dict[str, Any], stage: str, recipe: PipelineRecipe) -> None:
    """Errors: `RecipeError` where a stage `train` reads queries or pairs of a probe of a stage `evaluate`."""
    from embedsmith.data import read_source
    from embedsmith.evaluate import load_task
    from embedsmith.evaluate.overlap import warn_of_overlap
    from embedsmith.train import Recipe

    scored = [resolved(one, results) for one, results in placeholders(recipe) if one.verb == "evaluate"]
    stages = [parse(EvaluateStage, each, recipe.output) for each in scored]
    named = {(name, one.data, one.split) for one in stages for name in one.probes if _MADE not in name}
    if named:
        trained_on = [read_source(source) for source in parse(Recipe, tree, f"stage {stage}").data]
        probes = [load_task(name, data_dir=data, split=split) for name, data, split in sorted(named, key=str)]
        warn_of_overlap(probes, trained_on, probes)


def placeholders(recipe: PipelineRecipe) -> Iterator[tuple[Stage, dict[str, str]]]:
    """Every stage, with words in the place of what the stages before it make."""
    results: dict[str, str] = {"output": recipe.output}
    for stage in recipe.stages:
        yield stage, dict(results)
        results[stage.name] = f"{_MADE}{stage.name} makes)"


def resolved(stage: Stage, results: dict[str, str]) -> dict[str, Any]:
    """The tree of the stage's verb, with changes made and references filled in."""
    given = stage.recipe
    tree = read_tree(recipe_file(given, stage.verb)) if isinstance(given, str) else copy.deepcopy(given)
    for change in stage.set:
        apply_override(tree, change)
    tree.setdefault("output", f"${{output}}/{stage.name}{VERBS[stage.verb].suffix}")
    filled: dict[str, Any] = _filled(tree, results, stage.name)
    return filled


def _filled(value: Any, results: dict[str, str], where: str) -> Any:
    """The value with what earlier stages made in the place of `${name}`."""

    def made(reference: re.Match[str]) -> str:
        name = reference[1]
        if name in results:
            return results[name]
        if group := _group(name, results):
            raise RecipeError(
                f"${{{name}}} stands for {len(group)} models, and here is place for one",
                where=f"stage {where}",
                fix=f"name one of them, ${{{group[0]}}}, or put it into a list",
            )
        raise RecipeError(
            f"{reference[0]} is no earlier stage{did_you_mean(name, results)}",
            where=f"stage {where}",
            expected=f"one of {', '.join(results)}",
        )

    if isinstance(value, dict):
        return {key: _filled(item, results, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, each, where) for item in value for each in _with_one_of_each_group(item, results)]
    return _REFERENCE.sub(made, value) if isinstance(value, str) else value


def _group(name: str, results: dict[str, str]) -> list[str]:
    """The stages `name-0`, `name-1`, ... that a stage with seeds became."""
    return [each for each in results if re.fullmatch(rf"{re.escape(name)}-\d+", each)]


def _with_one_of_each_group(item: Any, results: dict[str, str]) -> Iterator[dict[str, str]]:
    """The results for each entry that an entry of a list stands for: with one model of each group that it names."""
    texts = [text for text in item.values() if isinstance(text, str)] if isinstance(item, dict) else [item]
    names = [name for text in texts if isinstance(text, str) for name in _REFERENCE.findall(text)]
    name = next((name for name in names if name not in results and _group(name, results)), None)
    if name is None:
        yield results
        return
    for one in _group(name, results):
        yield from _with_one_of_each_group(item, results | {name: results[one]})


def _journal(recipe: PipelineRecipe) -> dict[str, Finished]:
    path = Path(recipe.output) / JOURNAL
    if not path.exists():
        return {}
    fix = "delete this journal of stages; verbs find what they finished by themselves"
    entries = read_json(path, CheckpointError, fix=fix)
    return typed(dict[str, Finished], entries, path, CheckpointError, fix=fix)


def _enter(recipe: PipelineRecipe, name: str, done: Finished) -> None:
    """Enter a finished stage. On several ranks after all of them are through."""

    def write() -> None:
        entries = {known: asdict(entry) for known, entry in _journal(recipe).items()} | {name: asdict(done)}
        with atomic_file(Path(recipe.output) / JOURNAL) as file:
            json.dump(entries, file, indent=1)

    on_first_rank(write)
