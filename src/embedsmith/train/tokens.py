"""`embedsmith tokenize`: sources to a token cache; and whether a model may train on one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from embedsmith.core.encoder import Role
from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.progress import log, progress_bar
from embedsmith.core.recipe import apply_override, parse, read_tree, section
from embedsmith.data import RecordSet, Source, read_source
from embedsmith.data.record import refuse_tokens
from embedsmith.data.tokencache import TokenJob, write_tokens
from embedsmith.data.tokenmanifest import (
    MANIFEST,
    DatasetFacts,
    Layout,
    Manifest,
    TokenizerFacts,
    open_manifest,
    refuse_other_tokenizer,
)
from embedsmith.data.tokenread import TokenRecords
from embedsmith.models import Embedder, ModelConfig
from embedsmith.models.load import without_weights
from embedsmith.models.special import added_tokens
from embedsmith.models.tokenize import prompt_for

PROBE = "Which ids does 1 text have?"
_OF_MODEL = ("max_length", "pooling")
"""Options of the command line that belong to the model."""


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


def tokenizer_facts(model: Embedder, name: str) -> TokenizerFacts:
    """Hash of everything in the tokenizer that ids depend on; truncation and padding are set anew for every use."""
    tree = json.loads(model.tokenizer.backend_tokenizer.to_str())
    kept = {key: value for key, value in tree.items() if key not in ("truncation", "padding")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    ends = added_tokens(model.tokenizer)[1]
    return TokenizerFacts(name, digest, model.max_length, ends[-1] if ends else None)


def probes(model: Embedder, task: str, document_role: Role) -> dict[str, list[int]]:
    """The ids of one text in every way a cache tokenizes: they differ if prompts, templates or end tokens do."""
    return {
        "query": model.tokenize([PROBE], "query", task).id_S.tolist(),
        "instructed": model.tokenize([PROBE], "query", task, ["Compare: "]).id_S.tolist(),
        "document": model.tokenize([PROBE], document_role, task).id_S.tolist(),
    }


def check_tokens(records: RecordSet, model: Embedder, *, in_pairs: bool, needs_text: Sequence[str] = ()) -> None:
    """Whether a model may train on a token cache. Nothing to check for records of texts.

    Errors: `DataError` for another tokenizer (both hashes named), other prompts, longer texts than the model takes, or
    documents tokenized in another role than the loss reads them in; `RecipeError` for options that need texts.
    """
    if not isinstance(records.records, TokenRecords):
        return
    tokens, facts = records.records.tokenizer, records.records.facts_of_set
    refuse_other_tokenizer(tokens, tokenizer_facts(model, "this one"), records.name)
    if tokens.max_length > model.max_length:
        raise DataError(
            f"its texts have up to {tokens.max_length} tokens, the model takes {model.max_length}",
            where=records.name,
            fix=f"tokenize again with --max-length {model.max_length}",
        )
    role: Role = "query" if in_pairs else "document"
    if facts.probes and facts.document_role != role:
        raise DataError(
            f"its documents were tokenized as {facts.document_role}, the loss reads them as {role}",
            where=records.name,
            fix="use a loss of the task it was tokenized for, or train on the texts",
        )
    if facts.probes and facts.probes != (now := probes(model, records.task, facts.document_role)):
        changed = ", ".join(name for name in facts.probes if facts.probes[name] != now.get(name))
        raise DataError(
            f"it was tokenized with other prompts than the model's ({changed}); its own: {facts.prompts}",
            where=records.name,
            fix="tokenize again, or set model.prompts to its own",
        )
    if needs_text:
        raise RecipeError(f"{needs_text[0]} needs texts, and this source has only tokens", where=records.name)


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
