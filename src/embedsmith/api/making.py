"""What makes models and data, from Python: `train`, `mine`, `curate`, `split`, `merge` and `tokenize`.

Each takes the keys of its verb's recipe as keywords, with texts and dicts where the recipe has them; or a recipe that
lies in a file, with keywords that change it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from embedsmith.api.curating import curation_tools
from embedsmith.api.tokenizing import TokenizeJob
from embedsmith.api.tokenizing import tokenize as run_tokenize
from embedsmith.compat.config import recipe_tree
from embedsmith.compat.mergekit import is_mergekit, mergekit_tree
from embedsmith.core.errors import RecipeError
from embedsmith.core.progress import lines_shown
from embedsmith.core.recipe import parse, read_tree
from embedsmith.core.settings import did_you_mean, to_plain
from embedsmith.core.sharing import Shard
from embedsmith.curate import CurateRecipe
from embedsmith.curate import Report as CurationReport
from embedsmith.curate import curate as run_curate
from embedsmith.data import Source
from embedsmith.data.source import source_name
from embedsmith.data.split import Split, split_source
from embedsmith.data.token_cache import Manifest
from embedsmith.distil.run import Distilled, DistilRecipe
from embedsmith.distil.run import distil as run_distil
from embedsmith.merge import Merged, MergeRecipe
from embedsmith.merge import merge as run_merge
from embedsmith.mining import MineRecipe, MineReport
from embedsmith.mining import mine as run_mine
from embedsmith.models import ModelConfig, load, load_reranker
from embedsmith.train import EvaluateConfig, Recipe, TrainConfig
from embedsmith.train import train as run_train
from embedsmith.train.trained import Trained

R = TypeVar("R")


def train(
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    /,
    *,
    model: str | Path | Mapping[str, Any] | ModelConfig | None = None,
    data: Any = None,
    output: str | Path | None = None,
    evaluate: str | Sequence[str] | Mapping[str, Any] | EvaluateConfig | None = None,
    task: str | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Trained:
    """Train a model, or continue where the same call was stopped.

    >>> import embedsmith as es
    >>> run = es.train(model="my-model", data="pairs.jsonl", steps=4, batch_size=8, output="runs/first")
    >>> run.folder.as_posix()
    'runs/first/model'
    >>> run.model.encode("a cat on the mat").shape
    (16,)

    `recipe`: the path of a YAML recipe or a recipe as a dict, which the other arguments change; or a whole `Recipe`.
    `model`: a folder or hub id, or the keys of `model` as a dict: `{"path": "my-model", "pooling": "mean"}`.
    `data`: a path, the keys of a source as a dict (`{"path": "scored.jsonl", "task": "sts"}`), a `Source`, or a list of
    these. `output`: the run's folder; without it a folder below `runs`, named after all the other arguments.
    `evaluate`: tasks to score before and after, or the keys of `evaluate` as a dict. `task`: `"rerank"` trains a
    reranker, which is then `run.reranker`. `overwrite`: replaces a run that
    is there. `settings`: the keys of `train`, such as `steps`, `epochs`, `batch_size`, `learning_rate`.
    Errors: `RecipeError` naming the keyword and the nearest known one; those of `embedsmith train`.
    """
    changes = {"model": model_tree(model), "data": None if data is None else source_trees(data), "output": output}
    changes |= {"train": _of_train(settings) if settings else None, "evaluate": evaluate, "task": task}
    if isinstance(evaluate, str | list | tuple):
        tasks = [evaluate] if isinstance(evaluate, str) else [str(one) for one in evaluate]
        changes["evaluate"] = {"tasks": tasks}
    if isinstance(recipe, Recipe):
        whole = recipe_of(Recipe, recipe, changes, where="train")
    else:
        tree = keyed(recipe_tree(recipe) if isinstance(recipe, str | Path) else recipe, changes)
        whole = parse(
            Recipe, {"output": "runs", **tree}, where=str(recipe) if isinstance(recipe, str | Path) else "train"
        )
        if "output" not in tree:  # a folder that the same arguments always have, and no others
            content = json.dumps(to_plain(whole), sort_keys=True, ensure_ascii=False).encode()
            name = f"{Path(whole.model.path).name}-{hashlib.blake2b(content, digest_size=4).hexdigest()}"
            whole = dataclasses.replace(whole, output=f"runs/{name}")
    with lines_shown():
        folder = run_train(whole, overwrite=overwrite)
    return Trained.of(folder.parent)


def _of_train(settings: Mapping[str, Any]) -> Any:
    """The keys of `train`, given one by one or together as `train={...}`. Errors: `RecipeError` for unknown ones."""
    known = [f.name for f in dataclasses.fields(TrainConfig)]
    together = settings.get("train") or {}
    if isinstance(together, TrainConfig) and len(settings) == 1:
        return together
    for key in settings:
        if key not in (*known, "train"):
            choices = [*known, "model", "data", "output", "evaluate", "task", "overwrite"]
            raise RecipeError(
                f"{key}: unknown key{did_you_mean(key, choices)}",
                where="train",
                expected=f"one of {', '.join(choices)}",
            )
    single = {key: value for key, value in settings.items() if key != "train"}
    return {**to_plain(together), **single} if isinstance(together, TrainConfig) else {**together, **single}


def mine(
    recipe: MineRecipe | str | Path | Mapping[str, Any] | None = None,
    /,
    *,
    data: Any = None,
    searchers: Any = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    shard: Shard | None = None,
    join: bool = False,
    **settings: Any,
) -> MineReport:
    """Find hard negatives for records, and write the records with them.

    >>> import embedsmith as es
    >>> report = es.mine(data="pairs.jsonl", searchers="my-model", output="mined.jsonl", select={"negatives": 2})
    >>> report.records
    40

    `recipe`: the path of a YAML recipe or a recipe as a dict, which the other arguments change; or a `MineRecipe`.
    `data`: a path, the keys of a source as a dict, or a `Source`. `searchers`: who proposes candidates: the folder or
    hub id of a model, `"bm25"`, a dict (`{"type": "embedding", "model": "my-model"}`), or a list of these. `output`:
    the file that is written. `overwrite`: mines again. `shard`: which of how many shards this call is, `(0, 4)`;
    `join`: end the work of shards (docs/ranks.md). `settings`: the other keys of the recipe.
    Errors: those of `embedsmith mine`.
    """
    changes = {"data": None if data is None else source_tree(data), "searchers": _searchers(searchers)}
    whole = recipe_of(MineRecipe, recipe, changes | {"output": output} | settings, where="mine")
    with lines_shown():
        return run_mine(whole, load, load_reranker, overwrite=overwrite, shard=shard, join=join)


def distil(
    teacher: str | Path | DistilRecipe,
    output: str | Path | None = None,
    /,
    *,
    data: Any = None,
    tasks: str | Sequence[str] | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Distilled:
    """A small student of a model: fewer layers, narrower ones, or a static table of token vectors.

    >>> import embedsmith as es
    >>> small = es.distil("my-model", "runs/small", data="pairs.jsonl", layers=1, steps=2)
    >>> small.student.parameters < small.teacher.parameters
    True
    >>> print(es.distil("my-model", "runs/static", static=True, dims=8).student.dimension)
    8

    `teacher`: a folder or hub id; or a whole `DistilRecipe`. `output`: the student's folder. `data`: whose texts it
    learns from: a path, the keys of a source as a dict, or a list of these. `tasks`: what both are scored on.
    `overwrite`: replaces a student that is there. `settings`: the other keys of `DistilRecipe`, such as `layers`,
    `hidden`, `static`, `dims`, `steps`.
    Errors: those of `embedsmith distil`.
    """
    changes = {"output": output, "data": None if data is None else source_trees(data)} | settings
    changes |= {"tasks": [tasks] if isinstance(tasks, str) else tasks}
    if isinstance(teacher, DistilRecipe):
        whole = recipe_of(DistilRecipe, teacher, changes, where="distil")
    else:
        whole = recipe_of(DistilRecipe, None, {"teacher": str(teacher), **changes}, where="distil")
    with lines_shown():
        return run_distil(whole, overwrite=overwrite)


def _searchers(given: Any) -> Any:
    if given is None:
        return None
    listed = given if isinstance(given, list | tuple) else [given]
    models = [isinstance(one, Path) or (isinstance(one, str) and one != "bm25") for one in listed]
    return [{"type": "embedding", "model": str(one)} if is_model else one for one, is_model in zip(listed, models)]


def curate(
    recipe: CurateRecipe | str | Path | Mapping[str, Any] | None = None,
    /,
    *,
    input: Any = None,
    steps: Sequence[Any] | None = None,
    output: str | Path | None = None,
    tasks_folder: str | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> CurationReport:
    """Clean, filter and make training data.

    >>> import embedsmith as es
    >>> report = es.curate(input="pairs.jsonl", steps=["exact_duplicates"], output="kept.jsonl")
    >>> report.records
    40

    `recipe`: the path of a YAML recipe or a recipe as a dict, which the other arguments change; or a `CurateRecipe`.
    `input`: a path or the keys of `input` as a dict. `steps`: in their order, each a name or a dict
    (`{"type": "length", "query_min": 3}`). `output`: the file that is written. `tasks_folder`: where the names of
    evaluation tasks are looked up. `overwrite`: does it again. `settings`: the other keys of the recipe, such as
    `engine="ray"`.
    Errors: those of `embedsmith curate`.
    """
    changes = {"input": {"path": str(input)} if isinstance(input, str | Path) else input, "steps": steps}
    whole = recipe_of(CurateRecipe, recipe, changes | {"output": output} | settings, where="curate")
    with lines_shown():
        return run_curate(whole, curation_tools(tasks_folder), overwrite=overwrite)


def merge(
    recipe: MergeRecipe | str | Path | Mapping[str, Any] | None = None,
    /,
    *,
    parents: Sequence[Any] | None = None,
    method: Any = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Merged:
    """Merge models into one.

    >>> import embedsmith as es
    >>> merged = es.merge(parents=["my-model", "other-model"], method="average", output="merged")
    >>> es.load(str(merged)).encode("a cat on the mat").shape
    (16,)

    `recipe`: the path of a YAML recipe (or of mergekit's YAML), or a recipe as a dict, which the other arguments
    change; or a `MergeRecipe`.
    `parents`: folders or hub ids, or dicts (`{"path": "my-model", "weight": 0.3}`). `method`: a name or a dict
    (`{"type": "ties", "density": 0.2}`; `embedsmith list merge-method`). `output`: the folder that is written.
    `overwrite`: replaces a merge that is there. `settings`: the other keys of the recipe, such as `base`.
    Errors: those of `embedsmith merge`.
    """
    check = settings.pop("check", None)
    changes = {
        "parents": None if parents is None else [str(p) if isinstance(p, Path) else p for p in parents],
        "method": method,
    }
    tree = read_tree(recipe) if isinstance(recipe, str | Path) else recipe
    if isinstance(tree, Mapping) and is_mergekit(tree):
        recipe = mergekit_tree(tree, recipe if isinstance(recipe, str | Path) else "merge")
    whole = recipe_of(MergeRecipe, recipe, changes | {"output": output} | settings, where="merge")
    with lines_shown():
        return run_merge(whole, overwrite=overwrite, check=check)


def split(
    data: Any, /, output: str | Path | None = None, *, test: float = 0.1, seed: int = 0, overwrite: bool = False
) -> Split:
    """Split data into a training part and a part for scoring that shares no text with it.

    >>> import embedsmith as es
    >>> parts = es.split("pairs.jsonl", test=0.2)
    >>> parts.train_rows, parts.test_rows
    (32, 8)
    >>> run = es.train(model="my-model", data=parts.train, evaluate=parts.test, steps=4, batch_size=8)
    >>> list(run.scores)
    ['pairs-test']

    `data`: one source, as in a recipe: a file, folder or pattern, a dict (`{"path": "pairs.jsonl", "task": "sts"}`), a
    `Source`, or rows in memory. `output`: the folder that gets both parts; otherwise the name of the data with
    `-split`. `test`: the share of the rows to hold out, or from 1 on their number. `seed`: another draw of what is held
    out. `overwrite`: replaces a split that is there. Errors: those of `embedsmith split`.
    """
    if not test > 0:
        raise RecipeError(f"test is {test:g}", expected="a share such as 0.1, or a number of rows from 1")
    source = parse(Source, source_tree(data), "data")
    with lines_shown():
        return split_source(source, output or f"{source_name(source)}-split", test=test, seed=seed, overwrite=overwrite)


def tokenize(
    recipe: TokenizeJob | str | Path | Mapping[str, Any] | None = None,
    /,
    *,
    model: str | Path | Mapping[str, Any] | ModelConfig | None = None,
    data: Any = None,
    out: str | Path | None = None,
    shard: Shard | None = None,
    join: bool = False,
    **settings: Any,
) -> Manifest:
    """Tokenize sources once, for training without the tokenizer.

    >>> import embedsmith as es
    >>> es.tokenize(model="my-model", data="pairs.jsonl", out="tokens").datasets["pairs"].rows
    40

    `recipe`: the path of a YAML recipe of this verb or a recipe as a dict, which the other arguments change; or a
    `TokenizeJob`. `model`, `data`: as for `train`. `out`: the folder of the token cache, which is then a source's path.
    `shard`: which of how many shards this call is, `(0, 4)`; `join`: end the work of shards (docs/ranks.md).
    `settings`: the other keys of the recipe. Errors: those of `embedsmith tokenize`.
    """
    changes = {"model": model_tree(model), "data": None if data is None else source_trees(data), "out": out}
    whole = recipe_of(TokenizeJob, recipe, changes | settings, where="tokenize")
    with lines_shown():
        return run_tokenize(whole, shard=shard, join=join)


def recipe_of(schema: type[R], given: Any, changes: Mapping[str, Any], where: str) -> R:
    """The recipe that `given` (one of these, a path, a dict or `None`) becomes with `changes`; those that are `None`
    change nothing.

    Errors: `RecipeError` for unknown keys, with the nearest known one, and for a whole recipe with changes.
    """
    if isinstance(given, schema):
        if changed := [key for key, value in changes.items() if value is not None]:
            raise RecipeError(
                f"a whole {schema.__name__} and {changed[0]} are both given",
                where=where,
                fix=f"put {changed[0]} into the recipe: dataclasses.replace(recipe, {changed[0]}=VALUE)",
            )
        return given
    tree = read_tree(given) if isinstance(given, str | Path) else given
    return parse(schema, keyed(tree, changes), where=str(given) if isinstance(given, str | Path) else where)


def keyed(tree: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's tree with changes; of sections that both have as dicts, the keys of both. Paths become texts."""
    made = dict(tree or {})
    for key, value in changes.items():
        if value is None:
            continue
        both = isinstance(value, Mapping) and isinstance(made.get(key), Mapping)
        made[key] = {**made[key], **value} if both else str(value) if isinstance(value, Path) else value
    return made


def model_tree(given: Any) -> Any:
    """The section `model`: a folder or hub id alone is its path. Errors: `RecipeError` for a loaded model."""
    if hasattr(given, "represent"):
        fix = "give its folder or hub id; a model in memory can be saved first: model.save(FOLDER)"
        raise RecipeError("model is a loaded model", expected="a folder or hub id, or a dict of its settings", fix=fix)
    return {"path": str(given)} if isinstance(given, str | Path) else given


def source_trees(given: Any) -> list[Any]:
    """The section `data`: one source or several."""
    several = isinstance(given, list | tuple) and not is_rows(given)
    return [source_tree(one) for one in given] if several else [source_tree(given)]


def source_tree(given: Any) -> Any:
    """One source: a path alone, or rows in memory, become its only key."""
    if isinstance(given, str | Path):
        return {"path": str(given)}
    if isinstance(given, Source):
        return given
    if isinstance(given, Mapping):
        return {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    return {"rows": given}


def is_rows(given: Any) -> bool:
    """Whether a list holds rows of data, and not sources: dicts that name no path."""
    first = given[0] if len(given) else None
    return isinstance(first, Mapping) and "path" not in first and "rows" not in first
