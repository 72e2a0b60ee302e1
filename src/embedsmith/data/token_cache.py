"""Writing a token cache: tokenized records as Parquet, in the layouts of F2LLM, with a manifest.

    OUT/manifest.json           tokenizer (name and hash), prompts, maximum length, what each dataset is
    OUT/NAME_query.parquet      corpus layout (F2LLM v2): query_input_ids; ids of documents in passage_input_ids and
                                negative_1_input_ids, ...
    OUT/NAME_corpus.parquet     doc_id, input_ids of every distinct document, once
    OUT/NAME.parquet            inline layout (F2LLM v1): the documents' input_ids stand in the row itself
    OUT/.parts/NAME/            finished parts of a dataset that is still being tokenized

Columns of our own beside theirs: lengths (`query_length`, `length`), body offsets (`query_body_start`, `body_start`),
text ids (`query_id`), further positives (`passage_2_input_ids`, ...), scores, labels and, where asked, the texts.

Source: F2LLM (arXiv 2510.02294) and its released scripts, v1 and v2; sections 4.1 and 4.2 of its description here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedsmith.core.encoder import Role
from embedsmith.core.errors import CheckpointError, DataError
from embedsmith.core.files import atomic_file
from embedsmith.core.inputs import read_json, read_typed
from embedsmith.core.outputs import discard
from embedsmith.core.tokens import IntArray, TokenBatch
from embedsmith.data.record import Record, ids_among, text_id
from embedsmith.data.source import CacheLayout, DatasetFacts, RecordSet, TokenizerFacts
from embedsmith.data.store import RecordStore

MANIFEST = "manifest.json"
PART_ROWS = 20_000
"""Records that are tokenized and kept together, so that a stopped job loses no more."""
GROUP_ROWS = 50_000
"""Rows of a row group of the finished files."""
_CALL = 1000
SCORES = ("positive_scores", "negative_scores", "teacher_positive_scores", "teacher_negative_scores")


@dataclass(frozen=True)
class Manifest:
    """What stands in the `manifest.json` of a token cache; all of its datasets are of one tokenizer."""

    tokenizer: TokenizerFacts
    datasets: dict[str, DatasetFacts] = field(default_factory=dict)
    version: int = 1

    def save(self, out: Path) -> None:
        with atomic_file(out / MANIFEST) as file:
            json.dump(asdict(self), file, indent=2, ensure_ascii=False)

    @staticmethod
    def load(out: Path) -> Manifest:
        """Errors: `DataError` for a manifest that is damaged or not of a token cache."""
        try:
            found = read_typed(out / MANIFEST, Manifest)
        except DataError as error:
            raise DataError(
                f"not a readable manifest of a token cache ({error.what})",
                where=out / MANIFEST,
                fix="tokenize again, or for a cache of another tool: embedsmith tokenize --adopt",
            ) from error
        for name, facts in found.datasets.items():
            if facts.name != name:
                raise DataError(f"the dataset {name!r} calls itself {facts.name!r}", where=out / MANIFEST)
            refuse_other_folder(name, out / MANIFEST)
        return found

    @staticmethod
    def to_write(out: Path, tokenizer: TokenizerFacts) -> Manifest:
        """The manifest of a folder to write into, or a new one.

        Errors: `DataError` for a cache of another tokenizer, `CheckpointError` for one of another maximum length,
        naming both.
        """
        if not (out / MANIFEST).exists():
            return Manifest(tokenizer)
        before = Manifest.load(out)
        before.tokenizer.refuse_other(tokenizer, out)
        if before.tokenizer.max_length != tokenizer.max_length:
            raise CheckpointError(
                f"the cache was cut at {before.tokenizer.max_length} tokens, not at {tokenizer.max_length}",
                where=out,
                fix="choose another folder, or the same --max-length",
            )
        return before


def refuse_other_folder(name: str, where: object) -> None:
    """Errors: `DataError` for a dataset whose name would place its files elsewhere than in the cache."""
    if not name or name.startswith(".") or "/" in name or "\0" in name or len(name.encode()) > 200:
        raise DataError(
            f"the dataset's name {name[:60]!r} cannot be that of a file in the cache",
            where=where,
            expected="a name without / and without a dot in front, of at most 200 bytes",
            fix="name the source: name: ...",
        )


class Tokenize(Protocol):
    """What a cache needs of a model (`Embedder.tokenize`)."""

    def __call__(
        self,
        texts: Sequence[str],
        role: Role | Sequence[Role] = "document",
        task: str | None = None,
        instruction: Sequence[str | None] | None = None,
    ) -> TokenBatch: ...


@dataclass(frozen=True)
class TokenJob:
    """One dataset on its way into a cache. The same job, run again after a stop, makes the parts that are missing."""

    out: Path
    records: RecordSet
    tokenize: Tokenize
    prompts: dict[str, str]
    probes: dict[str, list[int]]
    layout: CacheLayout = "corpus"
    keep_text: bool = False
    part_rows: int = field(default_factory=lambda: PART_ROWS)

    def write(self, advance: Callable[[int], None] = lambda rows: None) -> DatasetFacts:
        """Tokenize the dataset, all of it. Errors: those of `claim` and `write_parts`."""
        self.claim()
        self.write_parts([part for part in range(self.count) if part not in self.done()], advance)
        return self.assemble()

    def write_parts(self, parts: Sequence[int], advance: Callable[[int], None] = lambda rows: None) -> None:
        """Tokenize some parts (rising); `advance` is called with the number of rows whenever some are done. Writing
        overlaps with tokenizing.

        Errors: `CheckpointError` when the disk is full (finished parts stay, the same call continues).
        """
        count, looked = len(self.records.records), 0
        seen = np.zeros(0, np.int64)
        with ThreadPoolExecutor(max_workers=1) as writer:
            pending: Future[None] | None = None
            for part in parts:
                seen, looked = self._known_before(part, seen, looked), part + 1
                rows = slice(part * self.part_rows, min((part + 1) * self.part_rows, count))
                tables, seen = self._tokenize_part(self.records.records[rows], seen)
                if pending is not None:
                    pending.result()
                pending = writer.submit(self._write_part, part, tables)
                advance(rows.stop - rows.start)
            if pending is not None:
                pending.result()

    def assemble(self) -> DatasetFacts:
        """All parts to the final files."""
        *corpus, queries = self.files
        documents = sum(self._to_parquet(path, "corpus") for path in corpus)
        self._to_parquet(queries, "query")
        return DatasetFacts(
            name=self.records.name,
            task=self.records.task,
            layout=self.layout,
            rows=len(self.records.records),
            documents=documents,
            prompts=self.prompts,
            document_role=self.document_role,
            labels=self.records.labels,
            fingerprint=self.records.fingerprint,
            probes=self.probes,
        )

    def clear(self) -> None:
        """Remove the parts, once the manifest names the dataset."""
        discard(self.parts)
        with suppress(OSError):
            self.parts.parent.rmdir()

    @property
    def document_role(self) -> Role:
        return "query" if self.records.task == "sts" else "document"

    @property
    def count(self) -> int:
        """How many parts there are."""
        return -(-len(self.records.records) // self.part_rows)

    @property
    def parts(self) -> Path:
        return self.out / ".parts" / self.records.name

    def _part(self, kind: str, part: int) -> Path:
        return self.parts / f"{kind}-{part:06}.arrow"

    def claim(self) -> None:
        """Parts of an earlier call are used if they are of the same texts, cut in the same way."""
        names = ("layout", "keep_text", "prompts", "probes")
        identity = {name: getattr(self, name) for name in names}
        identity |= {"shard_rows": self.part_rows, "fingerprint": self.records.fingerprint}
        path = self.parts / "job.json"
        fix = f"delete the folder {self.parts}, and run the same command again"
        if path.exists() and read_json(path, fix=fix) != identity:
            raise DataError(
                "parts of other texts or options are here, from a run that was stopped",
                where=self.parts,
                fix="run that command again to finish it, or delete this folder",
            )
        with atomic_file(path, replace=False) as file:
            json.dump(identity, file)

    def done(self) -> set[int]:
        """Parts that are whole on the disk."""
        return {part for part in range(self.count) if self._part("query", part).exists()}

    def _known_before(self, part: int, seen: IntArray, looked: int) -> IntArray:
        """Sorted ids of the documents in finished parts before one, of which those before `looked` are `seen`. Parts
        behind it do not count: a document belongs to the first part that has it, whoever was faster."""
        paths = [path for one in range(looked, part) if (path := self._part("corpus", one)).exists()]
        ids = [np.asarray(_read_part(path)["id"]) for path in paths]
        return np.unique(np.concatenate([seen, *ids])) if ids else seen

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

    def _tokenize_part(self, records: Sequence[Record], seen: IntArray) -> tuple[dict[str, Any], IntArray]:
        """The part's tables, and the ids of all documents tokenized so far (of the corpus layout), sorted."""
        columns = self._query_columns(records)
        texts: dict[int, str] = {}
        ids = {name: _slot_ids(records, *slot, texts) for name, slot in self.slots.items()}
        if self.layout == "inline":
            return {"query": pa.table(columns | self._inline_columns(ids, texts))}, seen
        id_N = np.fromiter(texts, np.int64, len(texts))
        id_N = id_N[~ids_among(id_N, seen)]
        names = {
            f"{name}_input_ids": pa.array([None if id_ is None else str(id_) for id_ in slot], pa.string())
            for name, slot in ids.items()
        }
        tables = {
            "query": pa.table(columns | names),
            "corpus": self._corpus(id_N, [texts[id_] for id_ in id_N.tolist()]),
        }
        return tables, np.sort(np.concatenate([seen, id_N]))

    def _tokens(
        self, texts: Sequence[str], role: Role, instructions: Sequence[str | None] | None = None
    ) -> tuple[Any, Any, Any]:
        """(ids, lengths, body offsets) as Arrow columns. Tokenized a thousand at a time: what the tokenizer returns
        stays in the processor's caches until it is read."""
        parts = []
        for start in range(0, max(len(texts), 1), _CALL):
            piece = slice(start, start + _CALL)
            own = None if instructions is None else instructions[piece]
            parts.append(self.tokenize(texts[piece], role, self.records.task, own))
        tokens = TokenBatch.concatenate(parts)
        ids = pa.ListArray.from_arrays(
            pa.array(tokens.offset_P.astype(np.int32)), pa.array(tokens.id_S.astype(np.int32))
        )
        return ids, pa.array(tokens.length_N.astype(np.int32)), pa.array(tokens.body_N.astype(np.int32))

    def _query_columns(self, records: Sequence[Record]) -> dict[str, Any]:
        own = [record.instruction for record in records]
        texts = [record.query for record in records]
        ids, length, body = self._tokens(texts, "query", own if any(one is not None for one in own) else None)
        columns = {"query_input_ids": ids, "query_length": length, "query_body_start": body}
        columns["query_id"] = pa.array(map(text_id, texts), pa.int64())
        for name in SCORES:
            if any(getattr(record, name) is not None for record in records):
                columns[name] = pa.array([getattr(record, name) for record in records], pa.list_(pa.float64()))
        if any(record.label is not None for record in records):
            columns["label"] = pa.array([record.label for record in records], pa.int64())
        return columns | ({"query": pa.array(texts, pa.string())} if self.keep_text else {})

    def _corpus(self, id_N: IntArray, texts: list[str]) -> Any:
        ids, length, body = self._tokens(texts, self.document_role)
        names = pa.array(map(str, id_N.tolist()), pa.string())
        columns = {"doc_id": names, "input_ids": ids, "length": length, "body_start": body, "id": pa.array(id_N)}
        return pa.table(columns | ({"text": pa.array(texts, pa.string())} if self.keep_text else {}))

    def _inline_columns(self, ids: dict[str, list[int | None]], texts: dict[int, str]) -> dict[str, Any]:
        """The tokens of every slot in its row; each distinct text of a part is tokenized once."""
        place = {id_: number for number, id_ in enumerate(texts)}
        every, _, body = self._tokens(list(texts.values()), self.document_role)
        columns: dict[str, Any] = {}
        for name, slot in ids.items():
            wanted = pa.array([None if id_ is None else place[id_] for id_ in slot], pa.int64())
            columns[f"{name}_input_ids"] = every.take(wanted)
            columns[f"{name}_body_start"] = body.take(wanted)
            columns[f"{name}_id"] = pa.array(slot, pa.int64())
            if self.keep_text:
                columns[name] = pa.array([None if id_ is None else texts[id_] for id_ in slot], pa.string())
        return columns

    def _write_part(self, part: int, tables: dict[str, Any]) -> None:
        """A part's corpus first: it counts as finished when its queries are there."""
        for kind in sorted(tables):
            path, schema = self._part(kind, part), tables[kind].schema
            with atomic_file(path, "wb") as file, pa.ipc.new_file(file, schema) as sink:
                sink.write_table(tables[kind])

    @property
    def files(self) -> list[Path]:
        """The finished files: of the inline layout one, else documents and queries."""
        kinds = ("",) if self.layout == "inline" else ("_corpus", "_query")
        return [self.out / f"{self.records.name}{kind}.parquet" for kind in kinds]

    def _to_parquet(self, path: Path, kind: str) -> int:
        """All parts in one file; of a document that several have, its first. Its rows."""
        paths = [self._part(kind, part) for part in range(self.count)]
        schema = pa.unify_schemas([pa.ipc.open_file(pa.memory_map(str(one))).schema for one in paths])
        written = pa.schema([one for one in schema if kind == "query" or one.name != "id"])
        plain = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "write_statistics": False}
        rows, waiting = 0, [written.empty_table()]  # gives a column that a part lacks: it is null there
        seen = np.zeros(0, np.int64)
        with atomic_file(path, "wb") as file, pq.ParquetWriter(file, written, **plain) as sink:
            for part in paths:
                table = _read_part(part)
                if kind == "corpus":  # the documents that no part before has
                    id_N = np.asarray(table["id"])
                    new_N = ~ids_among(id_N, seen)
                    table = table if new_N.all() else table.filter(pa.array(new_N))
                    seen = np.sort(np.concatenate([seen, id_N[new_N]]))
                waiting.append(table)
                if sum(map(len, waiting)) >= GROUP_ROWS or part == paths[-1]:
                    group = pa.concat_tables(waiting, promote_options="default").select(written.names)
                    sink.write_table(group, row_group_size=GROUP_ROWS)
                    rows, waiting = rows + len(group), waiting[:1]
        return rows


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


def _read_part(path: Path) -> Any:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
