"""Writing a token cache: tokenized records as Parquet, in the layouts of F2LLM, with a manifest.

    OUT/manifest.json           tokenizer (name and hash), prompts, maximum length, what each dataset is
    OUT/NAME_query.parquet      corpus layout (F2LLM v2): query_input_ids; ids of documents in passage_input_ids and
                                negative_1_input_ids, ...
    OUT/NAME_corpus.parquet     doc_id, input_ids of every distinct document, once
    OUT/NAME.parquet            inline layout (F2LLM v1): the documents' input_ids stand in the row itself
    OUT/.parts/NAME/            finished shards of a dataset that is still being tokenized

Columns of our own beside theirs: lengths (`query_length`, `length`), body offsets (`query_body_start`, `body_start`),
text ids (`query_id`), further positives (`passage_2_input_ids`, ...), scores, labels and, where asked, the texts.

Source: F2LLM (arXiv 2510.02294) and its released scripts, v1 and v2; sections 4.1 and 4.2 of its description here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedsmith.core.encoder import Role
from embedsmith.core.errors import CheckpointError, DataError
from embedsmith.core.files import atomic_file
from embedsmith.core.tokens import IntArray, TokenBatch
from embedsmith.data.record import Record, text_id
from embedsmith.data.source import RecordSet
from embedsmith.data.store import RecordStore

# The manifest of a token cache: which tokenizer made it, and what its datasets are.

VERSION = 1
MANIFEST = "manifest.json"
Layout = Literal["corpus", "inline"]


@dataclass(frozen=True)
class TokenizerFacts:
    """What makes ids what they are: the tokenizer, by name and hash, and what it was told."""

    name: str
    sha256: str
    max_length: int
    end_id: int | None = None


@dataclass(frozen=True)
class DatasetFacts:
    """One dataset of a cache. `roles`: of its documents (in sts both sides are queries); `prompts`: by role, as put
    before texts that have no instruction of their own; `probes`: the ids of one text by role, which tell a model that
    tokenizes in another way; `ids`: whether `doc_id` is our text id or a name."""

    name: str
    task: str
    layout: Layout
    rows: int
    documents: int
    prompts: dict[str, str]
    document_role: Role
    ids: Literal["text", "name"] = "text"
    labels: tuple[str, ...] = ()
    fingerprint: str = ""
    probes: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    tokenizer: TokenizerFacts
    datasets: dict[str, DatasetFacts] = field(default_factory=dict)
    version: int = VERSION

    def save(self, out: Path) -> None:
        with atomic_file(out / MANIFEST) as file:
            json.dump(asdict(self), file, indent=2, ensure_ascii=False)

    @staticmethod
    def load(out: Path) -> Manifest:
        """Errors: `DataError` for a manifest that is damaged or not of a token cache."""
        try:
            tree = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
            sets = {
                name: DatasetFacts(**facts | {"labels": tuple(facts["labels"])})
                for name, facts in tree["datasets"].items()
            }
            return Manifest(TokenizerFacts(**tree["tokenizer"]), sets, tree["version"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"not a readable manifest of a token cache ({error})",
                where=out / MANIFEST,
                fix="tokenize again, or for a cache of another tool: embedsmith tokenize --adopt",
            ) from error


def open_manifest(out: Path, tokenizer: TokenizerFacts) -> Manifest:
    """The manifest of a folder to write into, or a new one.

    Errors: `CheckpointError` for a cache of another tokenizer or maximum length, naming both.
    """
    if not (out / MANIFEST).exists():
        return Manifest(tokenizer)
    before = Manifest.load(out)
    refuse_other_tokenizer(before.tokenizer, tokenizer, out)
    if before.tokenizer.max_length != tokenizer.max_length:
        raise CheckpointError(
            f"the cache was cut at {before.tokenizer.max_length} tokens, not at {tokenizer.max_length}",
            where=out,
            fix="choose another folder, or the same --max-length",
        )
    return before


def refuse_other_tokenizer(made: TokenizerFacts, wanted: TokenizerFacts, where: object) -> None:
    """Errors: `DataError` naming both hashes."""
    if made.sha256 != wanted.sha256:
        raise DataError(
            f"these tokens were made by the tokenizer {made.name} (sha256 {made.sha256})",
            where=where,
            expected=f"that of the model {wanted.name} (sha256 {wanted.sha256})",
            fix="tokenize the texts again for this model: embedsmith tokenize",
        )


SHARD_ROWS = 20_000
GROUP_ROWS = 50_000
_CALL = 1000
SCORES = ("positive_scores", "negative_scores", "teacher_positive_scores", "teacher_negative_scores")


class Tokenize(Protocol):
    """What a cache needs of a model (`Embedder.tokenize`)."""

    def __call__(
        self,
        texts: Sequence[str],
        role: Role = "document",
        task: str | None = None,
        instruction: Sequence[str | None] | None = None,
    ) -> TokenBatch: ...


@dataclass(frozen=True)
class TokenJob:
    """One dataset on its way into a cache. The same job, run again after a stop, goes on at the first missing shard."""

    out: Path
    records: RecordSet
    tokenize: Tokenize
    prompts: dict[str, str]
    probes: dict[str, list[int]]
    layout: Layout = "corpus"
    keep_text: bool = False
    shard_rows: int = field(default_factory=lambda: SHARD_ROWS)

    @property
    def name(self) -> str:
        return self.records.name

    @property
    def document_role(self) -> Role:
        return "query" if self.records.task == "sts" else "document"

    @cached_property
    def slots(self) -> dict[str, tuple[str, int]]:
        """Every document column: which texts of a record it holds, and which of them."""
        records = self.records.records
        if isinstance(records, RecordStore):
            positives, negatives = records.counts.most_positives, records.counts.most_negatives
        else:
            positives = max((len(record.positives) for record in records), default=0)
            negatives = max((len(record.negatives) for record in records), default=0)
        names = {"passage" if slot == 0 else f"passage_{slot + 1}": ("positives", slot) for slot in range(positives)}
        return names | {f"negative_{slot + 1}": ("negatives", slot) for slot in range(negatives)}

    @property
    def shards(self) -> int:
        return -(-len(self.records.records) // self.shard_rows)

    @property
    def parts(self) -> Path:
        return self.out / ".parts" / self.name

    @property
    def identity(self) -> dict[str, Any]:
        """What shards of a stopped job must have in common with this one."""
        names = ("layout", "keep_text", "shard_rows", "prompts", "probes")
        return {name: getattr(self, name) for name in names} | {"fingerprint": self.records.fingerprint}


def write_tokens(job: TokenJob, advance: Callable[[int], None] = lambda rows: None) -> DatasetFacts:
    """Tokenize a dataset; `advance` is told rows as they are done. Writing overlaps with tokenizing.

    Errors: `CheckpointError` when the disk is full (finished shards stay, the same call continues); `DataError` for
    shards of another job.
    """
    _claim_parts(job)
    seen = _seen(job)
    with ThreadPoolExecutor(max_workers=1) as writer:
        pending: Future[None] | None = None
        for shard in range(job.shards):
            rows = range(shard * job.shard_rows, min((shard + 1) * job.shard_rows, len(job.records.records)))
            if not _part(job, "query", shard).exists():
                tables, seen = _tokenize_shard(job, rows, seen)
                if pending is not None:
                    pending.result()
                pending = writer.submit(_write_shard, job, shard, tables)
            advance(len(rows))
        if pending is not None:
            pending.result()
    documents = _assemble(job)
    shutil.rmtree(job.parts)
    if not any(job.parts.parent.iterdir()):
        job.parts.parent.rmdir()
    return DatasetFacts(
        name=job.name,
        task=job.records.task,
        layout=job.layout,
        rows=len(job.records.records),
        documents=documents,
        prompts=job.prompts,
        document_role=job.document_role,
        labels=job.records.labels,
        fingerprint=job.records.fingerprint,
        probes=job.probes,
    )


def _claim_parts(job: TokenJob) -> None:
    """Shards of an earlier call are used if they are of the same texts, cut in the same way."""
    path = job.parts / "job.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != job.identity:
        raise DataError(
            "shards of other texts or options are here, from a run that was stopped",
            where=job.parts,
            fix="run that command again to finish it, or delete this folder",
        )
    with atomic_file(path) as file:
        json.dump(job.identity, file)


def _part(job: TokenJob, kind: str, shard: int) -> Path:
    return job.parts / f"{kind}-{shard:06}.arrow"


def _tokens(job: TokenJob, texts: Sequence[str], role: Role, own: Sequence[str | None] | None = None) -> TokenBatch:
    """Tokenized a thousand at a time: what the tokenizer returns stays in the processor's caches until it is read."""
    task, parts = job.records.task, []
    for start in range(0, max(len(texts), 1), _CALL):
        piece = slice(start, start + _CALL)
        parts.append(job.tokenize(texts[piece], role, task, None if own is None else own[piece]))
    return TokenBatch.concatenate(parts)


def _seen(job: TokenJob) -> IntArray:
    """Sorted ids of the documents in finished shards."""
    parts = [_part(job, "corpus", shard) for shard in range(job.shards) if _part(job, "query", shard).exists()]
    ids = [np.asarray(_read_part(path)["id"]) for path in parts if path.exists()]
    return np.sort(np.concatenate(ids)) if ids else np.zeros(0, np.int64)


def _tokenize_shard(job: TokenJob, rows: range, seen: IntArray) -> tuple[dict[str, Any], IntArray]:
    records = job.records.records[rows.start : rows.stop]
    columns = _query_columns(job, records)
    texts: dict[int, str] = {}
    ids = {name: _slot_ids(records, *slot, texts) for name, slot in job.slots.items()}
    if job.layout == "corpus":
        id_N = np.fromiter(texts, np.int64, len(texts))
        new_N = id_N[~_member(id_N, seen)]
        corpus = _corpus_table(job, new_N, [texts[id_] for id_ in new_N.tolist()])
        columns |= {f"{name}_input_ids": pa.array(_names(slot), pa.string()) for name, slot in ids.items()}
        return {"query": pa.table(columns), "corpus": corpus}, np.sort(np.concatenate([seen, new_N]))
    columns |= _inline_columns(job, ids, texts)
    return {"query": pa.table(columns)}, seen


def _slot_ids(records: Sequence[Record], role: str, slot: int, texts: dict[int, str]) -> list[int | None]:
    """The text id of one slot of every record; its text is noted in `texts`."""
    ids: list[int | None] = []
    for record in records:
        held: tuple[str, ...] = getattr(record, role)
        if slot < len(held):
            ids.append(id_ := text_id(held[slot]))
            texts.setdefault(id_, held[slot])
        else:
            ids.append(None)
    return ids


def _names(ids: Sequence[int | None]) -> list[str | None]:
    return [None if id_ is None else str(id_) for id_ in ids]


def _member(id_N: IntArray, sorted_M: IntArray) -> Any:
    if len(sorted_M) == 0:
        return np.zeros(len(id_N), bool)
    return sorted_M[np.searchsorted(sorted_M, id_N).clip(max=len(sorted_M) - 1)] == id_N


def _query_columns(job: TokenJob, records: Sequence[Record]) -> dict[str, Any]:
    own = [record.instruction for record in records]
    instructions = own if any(one is not None for one in own) else None
    texts = [record.query for record in records]
    tokens = _tokens(job, texts, "query", instructions)
    columns: dict[str, Any] = {
        "query_input_ids": lists_of(tokens),
        "query_length": pa.array(tokens.length_N.astype(np.int32)),
        "query_body_start": pa.array(tokens.body_N.astype(np.int32)),
        "query_id": pa.array([text_id(text) for text in texts], pa.int64()),
    }
    for name in SCORES:
        if any(getattr(record, name) is not None for record in records):
            columns[name] = pa.array([getattr(record, name) for record in records], pa.list_(pa.float64()))
    if any(record.label is not None for record in records):
        columns["label"] = pa.array([record.label for record in records], pa.int64())
    if job.keep_text:
        columns["query"] = pa.array(texts, pa.string())
    return columns


def _corpus_table(job: TokenJob, id_N: IntArray, texts: list[str]) -> Any:
    tokens = _tokens(job, texts, job.document_role)
    columns = {
        "doc_id": pa.array(map(str, id_N.tolist()), pa.string()),
        "input_ids": lists_of(tokens),
        "length": pa.array(tokens.length_N.astype(np.int32)),
        "body_start": pa.array(tokens.body_N.astype(np.int32)),
        "id": pa.array(id_N),
    }
    return pa.table(columns | ({"text": pa.array(texts, pa.string())} if job.keep_text else {}))


def _inline_columns(job: TokenJob, ids: dict[str, list[int | None]], texts: dict[int, str]) -> dict[str, Any]:
    """The tokens of every slot in its row; each distinct text of a shard is tokenized once."""
    place = {id_: number for number, id_ in enumerate(texts)}
    all_tokens = _tokens(job, list(texts.values()), job.document_role)
    columns: dict[str, Any] = {}
    for name, slot in ids.items():
        held = np.asarray([id_ is not None for id_ in slot])
        tokens = all_tokens.take(np.asarray([place[id_] for id_ in slot if id_ is not None], np.int64))
        columns[f"{name}_input_ids"] = lists_of(tokens, held)
        columns[f"{name}_body_start"] = _spread(tokens.body_N.astype(np.int32), held)
        columns[f"{name}_id"] = pa.array(slot, pa.int64())
        if job.keep_text:
            columns[name] = pa.array([None if id_ is None else texts[id_] for id_ in slot], pa.string())
    return columns


def _spread(values: Any, held: Any) -> Any:
    wide = np.zeros(len(held), values.dtype)
    wide[held] = values
    return pa.array(wide, mask=~held)


def lists_of(tokens: TokenBatch, held: Any = None) -> Any:
    """Token ids as an Arrow list<int32>; rows that are not `held` are null."""
    ends = tokens.offset_P.astype(np.int32)
    if held is None:
        return pa.ListArray.from_arrays(pa.array(ends), pa.array(tokens.id_S.astype(np.int32)))
    lengths = np.zeros(len(held), np.int64)
    lengths[held] = tokens.length_N
    wide = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(wide), pa.array(tokens.id_S.astype(np.int32)), mask=pa.array(~held))


def _write_shard(job: TokenJob, shard: int, tables: dict[str, Any]) -> None:
    """The shard's corpus first: a shard counts as finished when its queries are there."""
    for kind in ("corpus", "query"):
        if kind in tables:
            with atomic_file(_part(job, kind, shard), "wb") as file, pa.ipc.new_file(file, tables[kind].schema) as sink:
                sink.write_table(tables[kind])


def _read_part(path: Path) -> Any:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _assemble(job: TokenJob) -> int:
    """All shards to the final files; the number of distinct documents."""
    if job.layout == "inline":
        _to_parquet(job.out / f"{job.name}.parquet", job, "query")
        return 0
    documents = _to_parquet(job.out / f"{job.name}_corpus.parquet", job, "corpus")
    _to_parquet(job.out / f"{job.name}_query.parquet", job, "query")
    return documents


def _to_parquet(path: Path, job: TokenJob, kind: str) -> int:
    paths = [_part(job, kind, shard) for shard in range(job.shards)]
    schema = pa.unify_schemas([pa.ipc.open_file(pa.memory_map(str(one))).schema for one in paths])
    names = [name for name in schema.names if kind == "query" or name != "id"]
    plain = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "write_statistics": False}
    written = pa.schema([schema.field(name) for name in names])
    with atomic_file(path, "wb") as file, pq.ParquetWriter(file, written, **plain) as sink:
        return sum(_append(sink, group) for group in _groups(paths, schema, names))


def _groups(paths: Sequence[Path], schema: Any, names: list[str]) -> Iterator[Any]:
    """Tables of about `GROUP_ROWS` rows; a column that a shard lacks is null there."""
    waiting: list[Any] = []
    for path in paths:
        table = _read_part(path)
        absent = {name: pa.nulls(len(table), schema.field(name).type) for name in set(names) - set(table.column_names)}
        waiting.append(pa.table({name: absent[name] if name in absent else table[name] for name in names}))
        if sum(map(len, waiting)) >= GROUP_ROWS:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _append(sink: Any, table: Any) -> int:
    sink.write_table(table, row_group_size=GROUP_ROWS)
    return len(table)
