"""`split`: a file of pairs as a part to train on and a part to be scored on that share no text.

Rows hang together where they share a query or a positive: such a component goes to one part whole. Components are
taken for the test part in an order drawn from the seed and their texts alone, until it has its share of the rows, so
that neither the order of the rows nor another run changes what is held out. Negatives hold nothing together: one that
is a text of the other part is left out of its row.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedsmith.core.errors import DataError
from embedsmith.core.inputs import read_json
from embedsmith.core.outputs import Kind, atomic_folder, claimed
from embedsmith.data.mixture import part_of
from embedsmith.data.plan.separate import RowFacts, row_facts
from embedsmith.data.read import read_source
from embedsmith.data.record import Record, Scores, ids_among, text_id
from embedsmith.data.source import RecordSet, Source
from embedsmith.data.writers import write_records

HELD_OUT = "held-out"
"""The folder in a run's where the parts of its sources are (`evaluate.held_out`)."""

NO_PART = "hang together"
"""What an error says of rows of which no part can be held out."""

_FACTS = "split.json"
_KIND = Kind("split", (_FACTS, "*-train.jsonl", "*-test.jsonl", "*-test/**"), (_FACTS, '"test_rows"'))


@dataclass(frozen=True)
class Split:
    """What was written. `train`, `test`: paths of the two parts; `train_rows`, `test_rows`: their rows (in retrieval a
    row of the test part is a query with its positives); `largest`: rows of the largest component; `negatives_left_out`:
    because they are texts of the other part."""

    source: str
    task: str
    seed: int
    train: str
    test: str
    train_rows: int
    test_rows: int
    largest: int
    negatives_left_out: int

    def lines(self) -> str:
        left = f"\nnegatives left out, as texts of the other part: {self.negatives_left_out:,}"
        return (
            f"train: {self.train} ({self.train_rows:,} rows)\ntest: {self.test} ({self.test_rows:,} rows, no text of "
            f"which is in the training part){left if self.negatives_left_out else ''}\n"
            f"score a model on it: embedsmith evaluate MODEL -t {self.test}\n"
            f"while training: evaluate.tasks=[{self.test}]"
        )

    @classmethod
    def read(cls, folder: Path) -> "Split":
        """What the folder holds, wherever it has been moved to. Errors: `DataError` where it holds no split."""
        told = read_json(folder / _FACTS)
        if not told.keys() >= {field.name for field in fields(cls)}:
            raise DataError("no split", where=folder / _FACTS, fix="split the source again: embedsmith split FILE")
        parts = {part: str(folder / Path(told[part]).name) for part in ("train", "test")}
        return cls(**{field.name: told[field.name] for field in fields(cls)} | parts)


def split_source(
    source: Source,
    output: str | Path,
    *,
    test: float = 0.1,
    most: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Split:
    """Write both parts of a source to the folder `output`: `NAME-train.jsonl`; and `NAME-test`, a BEIR folder for
    retrieval, `NAME-test.jsonl` for scored pairs and labelled texts.

    `test`: the share of the rows that is held out, or from 1 on their number; `most`: rows that are held out at most.
    Errors: `DataError` where all rows hang together, or a share that holds nothing; those of `read_source`;
    `CheckpointError` for an output that is there.
    """
    output = Path(output)
    with claimed(output, "split"):
        _KIND.refuse_other(output)
        found = part_of(read_source(source), source.part).texts_only("a split", source.path)
        facts = row_facts(found.records)
        wanted = max(min(round(test * len(facts)) if test < 1 else int(test), most or len(facts)), 1)
        label_N = np.zeros(len(facts), np.int64)
        if found.task == "classification":
            label_N = np.fromiter((record.label or 0 for record in found.records), np.int64, len(facts))
        held_N, largest = _held_out(facts, label_N, wanted, seed, source.path)
        parts = _Parts(found, facts, held_N)
        with atomic_folder(output, _KIND, overwrite=overwrite) as folder:
            train, held = f"{found.name}-train.jsonl", f"{found.name}-test"
            write: dict[str, Callable[[Path, Iterable[Record]], None]] = {"retrieval": write_beir}
            held += "" if found.task in write else ".jsonl"
            _writer(found)(folder / train, parts.train())
            write.get(found.task, _writer(found))(folder / held, parts.test())
            made = Split(
                source.path,
                found.task,
                seed,
                str(output / train),
                str(output / held),
                int((~held_N).sum()),
                int(held_N.sum()),
                largest,
                parts.left_out,
            )
            (folder / _FACTS).write_text(json.dumps(asdict(made), indent=1, ensure_ascii=False), encoding="utf-8")
    return made


def held_out_tasks(run: Path) -> list[str]:
    """The parts that a run scores of its own sources; empty where it holds nothing out."""
    return [str(path) for path in sorted(run.glob(f"{HELD_OUT}/*/*-test*"))]


def _held_out(
    facts: RowFacts, label_N: npt.NDArray[np.int64], wanted: int, seed: int, where: str
) -> tuple[npt.NDArray[np.bool_], int]:
    """(whether each row is held out, rows of the largest component). Of every label a row is left to train on."""
    component_N, least_C = _components(facts)
    rows_C = np.bincount(component_N)
    keys = (blake2b(b"%d %d" % (seed, least), digest_size=8).digest() for least in least_C.tolist())
    order_C = np.argsort(np.fromiter((int.from_bytes(key, "big") >> 1 for key in keys), np.int64, len(least_C)))
    chosen_C, room = np.zeros(len(rows_C), bool), min(wanted, len(facts) - 1)
    _, class_N, left_L = np.unique(label_N, return_inverse=True, return_counts=True)
    row_N, end_C, lacking = np.argsort(component_N, kind="stable"), np.cumsum(rows_C), False
    for component in order_C.tolist():
        if rows_C[component] <= room:
            rows = row_N[end_C[component] - rows_C[component] : end_C[component]]
            label_K, count_K = np.unique(class_N[rows], return_counts=True)
            if (left_L[label_K] == count_K).any():
                lacking = True
                continue
            chosen_C[component] = True
            left_L[label_K] -= count_K
            room -= int(rows_C[component])
        if room == 0:
            break
    if not chosen_C.any() and lacking:
        what = f"no row can be held out of {len(facts):,}: each of {len(left_L):,} labels would lose its last one"
        raise DataError(what, where=where, fix="add rows, or take another file for the test")
    if not chosen_C.any():
        largest, least = int(rows_C.max()), int(rows_C.min())
        more = "" if len(rows_C) == 1 else f"hold out more: --test {least}; or "
        raise DataError(
            f"rows {NO_PART} by texts that they share, {least:,} to {largest:,} of {len(facts):,}: no {wanted:,} "
            "can be held out",
            where=where,
            fix=f"{more}remove texts that many rows share, or take another file for the test",
        )
    return chosen_C[component_N], int(rows_C.max())


def _components(facts: RowFacts) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(the component of each row, the lowest text id of each component)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows = len(facts)
    text_E = np.concatenate([facts.query_id_N, facts.positive_id_P])
    row_E = np.concatenate([np.arange(rows), np.repeat(np.arange(rows), np.diff(facts.offset_N1))])
    ids_T, place_E = np.unique(text_E, return_inverse=True)
    size = rows + len(ids_T)
    edges = coo_array((np.ones(len(row_E), np.int8), (row_E, rows + place_E)), shape=(size, size))
    _, label_S = connected_components(edges, directed=False)
    _, component_S = np.unique(label_S, return_inverse=True)
    least_C = np.full(int(component_S.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(least_C, component_S[rows:], ids_T)
    return component_S[:rows].astype(np.int64), least_C


class _Parts:
    """The records of either part, without negatives that are texts of the other one, which are counted."""

    def __init__(self, found: RecordSet, facts: RowFacts, held_N: npt.NDArray[np.bool_]) -> None:
        self.found, self.held_N, self.left_out = found, held_N, 0
        owner_P = np.repeat(held_N, np.diff(facts.offset_N1))
        self.ids = {
            part: np.concatenate([facts.query_id_N[held_N == part], facts.positive_id_P[owner_P == part]])
            for part in (False, True)
        }

    def train(self) -> Iterator[Record]:
        """To be read first: its negatives are texts of this part from then on."""
        negatives: set[int] = set()
        for record in self._apart(False):
            negatives.update(map(text_id, record.negatives))
            yield record
        self.ids[False] = np.concatenate([self.ids[False], np.fromiter(negatives, np.int64, len(negatives))])

    def test(self) -> Iterator[Record]:
        return self._apart(True)

    def _apart(self, part: bool) -> Iterator[Record]:
        others = np.unique(self.ids[not part])
        for place in np.flatnonzero(self.held_N == part).tolist():
            record = self.found.records[place]
            ids = np.asarray([text_id(text) for text in record.negatives], np.int64)
            kept = np.flatnonzero(~ids_among(ids, others)).tolist()
            if len(kept) < len(ids):
                self.left_out += len(ids) - len(kept)
                record = _with_negatives(record, kept)
            yield record


def _with_negatives(record: Record, places: list[int]) -> Record:
    """The record with some of its negatives, and their scores."""

    def chosen(values: Scores | None) -> Scores | None:
        return None if values is None else tuple(values[place] for place in places) or None

    return replace(
        record,
        negatives=tuple(record.negatives[place] for place in places),
        negative_scores=chosen(record.negative_scores),
        teacher_negative_scores=chosen(record.teacher_negative_scores),
    )


def _writer(found: RecordSet) -> Callable[[Path, Iterable[Record]], None]:
    """Scored pairs and labelled texts as rows that `evaluate` reads, everything else as records."""

    def pairs(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
        for record in records:
            for text, score in zip(record.positives, record.positive_scores or ()):
                yield {"text1": record.query, "text2": text, "score": score}

    def labels(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
        for record in records:
            number = record.label or 0
            yield {"text": record.query, "label": found.labels[number] if found.labels else number}

    def written(path: Path, records: Iterable[Record]) -> None:
        if found.task == "sts" or (found.task == "classification" and not any(found.records[0].positives)):
            rows = pairs(records) if found.task == "sts" else labels(records)
            with path.open("w", encoding="utf-8") as file:
                file.writelines(map(_line, rows))
        else:
            write_records(path, records)

    return written


def write_beir(folder: Path, records: Iterable[Record]) -> None:
    """A BEIR folder in which every query once is to find its positives among all texts of the records but the queries,
    each once. Of a text and a judgement only the ids stay in memory."""
    (folder / "qrels").mkdir(parents=True)
    queries: set[int] = set()
    documents: set[int] = set()
    judged: set[tuple[int, int]] = set()
    with (
        (folder / "corpus.jsonl").open("w", encoding="utf-8") as corpus,
        (folder / "queries.jsonl").open("w", encoding="utf-8") as asked,
        (folder / "qrels" / "test.tsv").open("w", encoding="utf-8") as qrels,
    ):
        qrels.write("query-id\tcorpus-id\tscore\n")
        for record in records:
            if (query := text_id(record.query)) not in queries:
                queries.add(query)
                asked.write(_line({"_id": f"q{query}", "text": record.query}))
            for text in (*record.positives, *record.negatives):
                if (id_ := text_id(text)) not in documents:
                    documents.add(id_)
                    corpus.write(_line({"_id": f"d{id_}", "title": "", "text": text}))
            for id_ in map(text_id, record.positives):
                if (query, id_) not in judged:
                    judged.add((query, id_))
                    qrels.write(f"q{query}\td{id_}\t1\n")


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
