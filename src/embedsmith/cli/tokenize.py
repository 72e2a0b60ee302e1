"""The verb `tokenize`: sources to token caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from embedsmith.core.encoder import Role
from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.progress import log, progress_bar
from embedsmith.core.recipe import apply_override, parse, read_tree
from embedsmith.core.settings import section
from embedsmith.data import RecordSet, Source, read_source
from embedsmith.data.record import refuse_tokens
from embedsmith.data.token_cache import (
    MANIFEST,
    DatasetFacts,
    Layout,
    Manifest,
    TokenJob,
    open_manifest,
    write_tokens,
)
from embedsmith.models import Embedder, ModelConfig
from embedsmith.models.load import without_weights
from embedsmith.models.tokenize import prompt_for
from embedsmith.train.tokens import _OF_MODEL, probes, tokenizer_facts


@section
@dataclass(frozen=True)
class TokenizeJob:
    """What `embedsmith tokenize` does. `layout`: `corpus` keeps every distinct document once, `inline` in each row;
    `keep_text`: the texts too."""

    model: ModelConfig
    data: tuple[Source, ...]
    out: str
    layout: Layout = "corpus"
    keep_text: bool = False


def tokenize(job: TokenizeJob) -> Manifest:
    """Write the token cache of some sources; the same job continues where a stopped one was.

    Datasets that are finished and whose records are unchanged are left alone. Errors: those of `read_source`, `load`
    and `write_tokens`; `RecipeError` for two sources of one name; `DataError` for a cache of another tokenizer.
    """
    out, model = Path(job.out), without_weights(job.model)
    manifest = open_manifest(out, tokenizer_facts(model, job.model.path))
    manifest.save(out)
    names: set[str] = set()
    for source in job.data:
        records = read_source(source)
        refuse_tokens(records.records, "tokenizing", source.path)
        if records.name in names:
            raise RecipeError(f"two sources are named {records.name!r}", fix="name one of them: name: ...")
        names.add(records.name)
        one = _job(out, records, model, job)
        if _is_done(manifest, one):
            log.info("%s: is tokenized already", records.name)
            continue
        with progress_bar(f"tokenize {records.name}", total=len(records.records)) as bar:
            facts = write_tokens(one, bar.advance)
        manifest = replace(manifest, datasets=manifest.datasets | {records.name: facts})
        manifest.save(out)
    return manifest


def run_tokenize(data: Sequence[str], options: dict[str, Any], changes: Sequence[str], task: str | None) -> list[str]:
    """What the command line asks for, done; lines that say what came of it. `task` adopts a cache of another tool."""
    given = {key: value for key, value in options.items() if value is not None}
    if task is not None:
        _require(given, "model")
        model = without_weights(ModelConfig(given["model"], **{key: given[key] for key in _OF_MODEL if key in given}))
        return [_said(Path(data[0]), adopt(Path(data[0]), model, given["model"], task))]
    job = job_of(data, given, changes)
    return [_said(Path(job.out), tokenize(job))]


def job_of(data: Sequence[str], given: dict[str, Any], changes: Sequence[str]) -> TokenizeJob:
    """A job from a recipe and changes to it, or from paths and options."""
    recipe = len(data) == 1 and data[0].endswith((".yaml", ".yml"))
    tree: dict[str, Any] = read_tree(data[0]) if recipe else {"data": [{"path": path} for path in data]}
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


def _require(given: dict[str, Any], *names: str) -> None:
    for name in names:
        if name not in given:
            raise RecipeError(f"--{name} is missing", fix=f"say --{name} ...")


def _said(out: Path, manifest: Manifest) -> str:
    sets = manifest.datasets.values()
    lines = [f"  {one.name}: {one.rows:,} rows, {one.documents:,} documents, {one.task}, {one.layout}" for one in sets]
    return "\n".join([f"tokens in {out}, of the tokenizer {manifest.tokenizer.sha256[:16]}:", *lines])


def _job(out: Path, records: RecordSet, model: Embedder, job: TokenizeJob) -> TokenJob:
    roles: dict[str, Role] = {"query": "query", "document": "query" if records.task == "sts" else "document"}
    return TokenJob(
        out,
        records,
        model.tokenize,
        prompts={side: prompt_for(model.settings, role, records.task) for side, role in roles.items()},
        probes=probes(model, records.task, roles["document"]),
        layout=job.layout,
        keep_text=job.keep_text,
    )


def _is_done(manifest: Manifest, job: TokenJob) -> bool:
    before = manifest.datasets.get(job.name)
    if before is None:
        return False
    same = (before.fingerprint, before.probes, before.layout) == (job.records.fingerprint, job.probes, job.layout)
    if not same:
        log.warning("%s: its texts or how they are tokenized have changed: tokenizing it again", job.name)
    return same


def adopt(folder: Path, model: Embedder, name: str, task: str, max_length: int | None = None) -> Manifest:
    """Write the manifest of a cache that another tool made, in either F2LLM layout, vouching for its tokenizer.

    Errors: `DataError` for a folder without such files, one that has a manifest, or ids the tokenizer does not have.
    """
    if (folder / MANIFEST).exists():
        raise DataError("it has a manifest already", where=folder, fix="train on it as it is")
    facts = tokenizer_facts(model, name)
    datasets = {}
    for path in sorted(folder.glob("*.parquet")):
        columns = pq.read_schema(path)
        if "query_input_ids" not in columns.names:
            continue
        inline = not path.stem.endswith("_query")
        dataset = path.stem if inline else path.stem.removesuffix("_query")
        rows = pq.read_metadata(path).num_rows
        datasets[dataset] = DatasetFacts(
            dataset,
            task,
            "inline" if inline else "corpus",
            rows,
            0,
            {},
            "query" if task == "sts" else "document",
            "name",
        )
        _check_ids(path, len(model.tokenizer), name)
    if not datasets:
        raise DataError(
            "no file with a column query_input_ids", where=folder, expected="NAME.parquet or NAME_query.parquet"
        )
    manifest = Manifest(replace(facts, max_length=max_length or facts.max_length), datasets)
    manifest.save(folder)
    return manifest


def _check_ids(path: Path, words: int, name: str) -> None:
    """A first look: ids beyond the vocabulary cannot come from this tokenizer."""
    ids: Any = next(pq.ParquetFile(path).iter_batches(batch_size=1000, columns=["query_input_ids"])).column(0)
    highest = max(ids.flatten().to_pylist(), default=0)
    if highest >= words:
        raise DataError(f"an id is {highest}, but {name} has {words} tokens", where=path, fix="name its own tokenizer")
