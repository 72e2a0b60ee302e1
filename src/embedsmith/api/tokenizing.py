"""The verb `tokenize`: sources to token caches, and caches of other tools made known."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedsmith.core.collectives import refuse_launcher
from embedsmith.core.encoder import Role
from embedsmith.core.errors import CheckpointError, DataError, RecipeError
from embedsmith.core.inputs import local_path
from embedsmith.core.outputs import claimed, clear_left, delivered, files_of, refuse_foreign_file
from embedsmith.core.progress import log, progress_bar
from embedsmith.core.recipe import apply_override, parse, read_tree
from embedsmith.core.settings import section
from embedsmith.core.sharing import Shard, Sharing
from embedsmith.core.shipped import names_recipe, recipe_file
from embedsmith.data.f2llm import f2llm_source, is_f2llm_folder, negative_columns, parquet_files, task_of_dataset
from embedsmith.data.formats.file_kinds import parquet_schema, readable_parquet
from embedsmith.data.read import read_source
from embedsmith.data.record import TASKS
from embedsmith.data.source import CacheLayout, DatasetFacts, RecordSet, Source, TokenizerFacts
from embedsmith.data.token_cache import MANIFEST, Manifest, TokenJob, refuse_other_folder
from embedsmith.models import Embedder, ModelConfig
from embedsmith.models.load import without_weights
from embedsmith.train.build import probes, tokenizer_facts

_OF_MODEL = ("max_length", "pooling")
"""Options of the command line that belong to the model."""


@section
@dataclass(frozen=True)
class TokenizeJob:
    """What `embedsmith tokenize` does.

    - `model`: the model that will be trained; only its tokenizer and settings are read, not its weights;
    - `data`: the sources, each of which becomes a dataset of the cache, under its name;
    - `out`: the folder of the cache, where finished datasets stay as they are;
    - `layout`: `corpus` keeps every distinct document once (F2LLM v2), `inline` in each row that has it (F2LLM v1);
    - `keep_text`: whether the texts are kept beside their tokens; training does not need them.
    """

    model: ModelConfig
    data: tuple[Source, ...]
    out: str
    layout: CacheLayout = "corpus"
    keep_text: bool = False

    def of(self, records: RecordSet, model: Embedder) -> TokenJob:
        """What there is to do for one of the sources."""
        roles: dict[str, Role] = {"query": "query", "document": "query" if records.task == "sts" else "document"}
        return TokenJob(
            Path(self.out),
            records,
            model.tokenize,
            prompts={side: model.settings.prompt_for(role, records.task) for side, role in roles.items()},
            probes=probes(model, records.task, roles["document"]),
            layout=self.layout,
            keep_text=self.keep_text,
        )


def tokenize(job: TokenizeJob, *, shard: Shard | None = None, join: bool = False) -> Manifest:
    """Write the token cache of some sources; the same job continues where a stopped one was.

    Datasets that are finished and whose records are unchanged are left alone. The ranks of a launcher share the parts.
    `shard`: which of how many this is, `(0, 4)` or `"0/4"`, for shards that are started each by itself; `join`: end
    their work. Errors: those of `read_source`, `load` and `TokenJob.write`; `RecipeError` for two sources of one name;
    `DataError` for a cache of another tokenizer; `CheckpointError` for a folder with other files, one that another
    process writes to, and parts that are missing at the join.
    """
    with delivered(job.out, "tokenize", shared=shard is not None or join) as place:
        sharing = Sharing.asked("tokenize", place, shard, join)
        with sharing.claim():
            return _tokenize(replace(job, out=place), sharing)


def _tokenize(job: TokenizeJob, sharing: Sharing) -> Manifest:
    model = sharing.every(lambda: without_weights(job.model))
    tokenizer = tokenizer_facts(model, job.model.path)
    known = {"sha256": tokenizer.sha256, "max_length": tokenizer.max_length}
    sources = [[source.name, str(source.path), source.split] for source in job.data]
    sharing.agree({"tokenizer": known, "data": sources, "layout": job.layout, "keep_text": job.keep_text})
    manifest = sharing.first(lambda: _begun(sharing, tokenizer))
    names: set[str] = set()
    left = 0
    for source in job.data:
        records = sharing.every(partial(_records, source))
        if records.name in names:
            raise RecipeError(f"two sources are named {records.name!r}", fix="name one of them: name: ...")
        names.add(records.name)
        one = job.of(records, model)
        if _is_tokenized(one, manifest):
            log.info("%s: is tokenized already", records.name)
            if sharing.ends:
                sharing.first(one.clear)
            continue
        left += 1
        sharing.first(partial(_open_parts, one, manifest))
        todo = sharing.share(range(one.count), sharing.first(one.done))
        sharing.every(partial(_write, one, todo))
        if sharing.ends:
            manifest = sharing.first(partial(_assembled, one, manifest, sharing))
        else:
            sharing.tell(one.count)
    if sharing.ends or not left:
        sharing.first(sharing.end)
    return manifest


def _begun(sharing: Sharing, tokenizer: TokenizerFacts) -> Manifest:
    """The manifest of the folder, made ready."""
    out = sharing.output
    if not (out / MANIFEST).exists():
        if files_of(out):
            fix = "choose another folder, or make it known with --adopt"
            raise CheckpointError("the folder is not empty and holds no token cache", where=out, fix=fix)
        if sharing.mode == "join":
            sharing.refuse_unbegun()
    manifest = Manifest.to_write(out, tokenizer)
    if sharing.mode in ("alone", "ranks"):
        clear_left(out)
    if sharing.mode != "shard" or not (out / MANIFEST).exists():
        manifest.save(out)
    return manifest


def _records(source: Source) -> RecordSet:
    records = read_source(source).texts_only("tokenizing", source.path)
    refuse_other_folder(records.name, source.path)
    return records


def _is_tokenized(one: TokenJob, manifest: Manifest) -> bool:
    """Whether the dataset is there as this job would write it."""
    before, name = manifest.datasets.get(one.records.name), one.records.name
    if before is None:
        return False
    if (before.fingerprint, before.probes, before.layout) == (one.records.fingerprint, one.probes, one.layout):
        return True
    log.warning("%s: its texts or how they are tokenized have changed: tokenizing it again", name)
    return False


def _open_parts(one: TokenJob, manifest: Manifest) -> None:
    if one.records.name not in manifest.datasets and not one.parts.exists():
        for path in one.files:
            refuse_foreign_file(path, False)
    one.claim()


def _write(one: TokenJob, todo: Sequence[int]) -> None:
    total = len(one.records.records)
    mine = sum(min(one.part_rows, total - part * one.part_rows) for part in todo)
    with progress_bar(f"tokenize {one.records.name}", mine) as bar:
        one.write_parts(todo, bar.advance)


def _assembled(one: TokenJob, manifest: Manifest, sharing: Sharing) -> Manifest:
    """The manifest with the dataset, whose parts are put together."""
    sharing.refuse_missing(set(range(one.count)) - one.done(), one.count)
    out, name = sharing.output, one.records.name
    manifest = replace(manifest, datasets={each: facts for each, facts in manifest.datasets.items() if each != name})
    manifest.save(out)  # nobody may read what is half old, half new
    manifest = replace(manifest, datasets=manifest.datasets | {name: one.assemble()})
    manifest.save(out)
    one.clear()
    return manifest


def run_tokenize(
    data: Sequence[str],
    options: dict[str, Any],
    changes: Sequence[str],
    task: str | None,
    shard: Shard | None = None,
    join: bool = False,
) -> list[str]:
    """What the command line asks for, done; lines that report it. `task` adopts a cache of another tool."""
    given = {key: value for key, value in options.items() if value is not None}
    if task is not None:
        refuse_launcher("tokenize --adopt", "start it once, without the launcher")
        if shard is not None or join:
            raise RecipeError("--adopt with --shard or --join", fix="leave these out: it only writes a manifest")
        _require(given, "model")
        out = Path(data[0])
        model = without_weights(ModelConfig(given["model"], **{key: given[key] for key in _OF_MODEL if key in given}))
        with claimed(out, "tokenize"):
            manifest = adopt(out, model, given["model"], task)
    else:
        job = job_of(data, given, changes)
        out, manifest = Path(job.out), tokenize(job, shard=shard, join=join)
    sets = manifest.datasets.values()
    lines = [f"  {one.name}: {one.rows:,} rows, {one.documents:,} documents, {one.task}, {one.layout}" for one in sets]
    return ["\n".join([f"tokens in {out}, of the tokenizer {manifest.tokenizer.sha256[:16]}:", *lines])]


def job_of(data: Sequence[str], given: dict[str, Any], changes: Sequence[str]) -> TokenizeJob:
    """A job from a recipe and changes to it, or from paths and options."""
    recipe = len(data) == 1 and names_recipe(data[0], "tokenize")
    tree: dict[str, Any] = (
        read_tree(recipe_file(data[0], "tokenize")) if recipe else {"data": [one for path in data for one in _at(path)]}
    )
    for target in [tree] if recipe else tree["data"]:
        for change in changes:
            apply_override(target, change)
    for key in ("model", *_OF_MODEL):
        if key in given:
            tree["model"] = tree.get("model", {}) | {"path" if key == "model" else key: given[key]}
    tree |= {key: value for key, value in given.items() if key not in ("model", *_OF_MODEL)}
    if not recipe:
        _require(tree, "model", "out")
    return parse(TokenizeJob, tree, where=data[0] if recipe else "tokenize")


def _at(path: str) -> list[dict[str, Any]]:
    """The source that a path names; of a folder of F2LLM's files one each, with its kind of task."""
    folder = local_path(path)
    if not is_f2llm_folder(folder):
        return [{"path": path}]
    return [f2llm_source(name, file) for name, file in parquet_files(folder).items()]


def _require(given: dict[str, Any], *names: str) -> None:
    for name in names:
        if name not in given:
            raise RecipeError(f"--{name} is missing", fix=f"add --{name} ...")


def adopt(folder: Path, model: Embedder, name: str, task: str, max_length: int | None = None) -> Manifest:
    """Write the manifest of a cache that another tool made, in either F2LLM layout, vouching for its tokenizer. The
    task `auto` is that of each dataset by its name or its columns, as F2LLM's scripts know it (`data/f2llm.py`).

    Errors: `DataError` for a folder without such files, one that has a manifest, or ids the tokenizer does not have.
    """
    if (folder / MANIFEST).exists():
        raise DataError("it has a manifest already", where=folder, fix="train on it as it is")
    facts = tokenizer_facts(model, name)
    if task != "auto" and task not in TASKS:
        raise RecipeError(f"--adopt {task}", expected=f"auto, or one of {', '.join(TASKS)}")
    role: Role = "query" if task == "sts" else "document"
    datasets = {}
    for path in sorted(folder.glob("*.parquet")):
        columns = parquet_schema(path).names
        if "query_input_ids" not in columns:
            continue
        dataset = path.stem.removesuffix("_query")
        layout: CacheLayout = "inline" if dataset == path.stem else "corpus"
        with readable_parquet(path):
            rows = pq.read_metadata(path).num_rows
            first = next(pq.ParquetFile(path).iter_batches(batch_size=1000, columns=["query_input_ids"]), None)
        negatives = negative_columns([column.removesuffix("_input_ids") for column in columns])
        kind = task_of_dataset(dataset, list(dict.fromkeys(negatives))) if task == "auto" else task
        datasets[dataset] = DatasetFacts(dataset, kind, layout, rows, 0, {}, role, "name")
        # A first look: ids beyond the vocabulary cannot come from this tokenizer.
        ids: Any = pa.array([], pa.list_(pa.int32())) if first is None else first.column(0)
        if not pa.types.is_list(ids.type) or not pa.types.is_integer(ids.type.value_type):
            raise DataError(f"query_input_ids are {ids.type}", where=path, expected="lists of token ids")
        highest, words = max(filter(None, ids.flatten().to_pylist()), default=0), len(model.tokenizer)
        if highest >= words:
            what = f"an id is {highest}, but {name} has {words} tokens"
            raise DataError(what, where=path, fix="name its own tokenizer")
    if not datasets:
        raise DataError(
            "no file with a column query_input_ids", where=folder, expected="NAME.parquet or NAME_query.parquet"
        )
    manifest = Manifest(replace(facts, max_length=max_length or facts.max_length), datasets)
    manifest.save(folder)
    return manifest
