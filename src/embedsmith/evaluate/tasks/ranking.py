"""Ranking tasks: retrieval, cross-lingual retrieval, long documents, reranking."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from embedsmith.core.errors import DataError, EvaluationError
from embedsmith.core.inputs import kind_of
from embedsmith.core.progress import log
from embedsmith.core.reps import Dense, Representation
from embedsmith.core.shelf import task_kinds
from embedsmith.data.formats.file_kinds import sound_rows
from embedsmith.data.formats.texts import read_texts, text_in
from embedsmith.evaluate.encoding import Reader, piece_rows
from embedsmith.evaluate.metrics import CUTS, Floats, Graded, Qrels, Ranking
from embedsmith.evaluate.result import Example, TaskResult, ends
from embedsmith.evaluate.tasks.kinds import (
    ENDINGS,
    Format,
    Task,
    TaskKind,
    find,
    has_columns,
    is_beir,
    is_number,
    refuse_empty,
    task_name_of,
)
from embedsmith.evaluate.tasks.rows import judged_texts, read_rows, task_in
from embedsmith.search import Quantised, TopK
from embedsmith.search.exact import on_device, search_device, top_of_block
from embedsmith.search.quantised import RESCORE, SearchPrecision
from embedsmith.search.top_k import merged_top_k

_CANDIDATE_COLUMNS = (("positive", "negative"), ("pos", "neg"), ("positives", "negatives"))
_READ = 32  # queries whose documents a reranker reads together, on any number of ranks
_QRELS = {"query-id", "corpus-id", "score"}
_NOTES = {
    "queries_without_positives": "queries without a relevant document are left out",
    "judged_queries_missing": "judged queries are not among the queries",
    "judged_documents_missing": "judged documents are not in the corpus; they count as not found",
}


@dataclass(frozen=True)
class RankingTask(TaskKind):
    """What tasks share in which the documents of a query are put into order.

    name: what results call it.
    queries, corpus: texts by their ids.
    qrels: the grade of every judged document, by query.
    """

    name: str
    queries: Mapping[str, str] = field(repr=False)
    corpus: Mapping[str, str] = field(repr=False)
    qrels: Qrels = field(repr=False)
    kind: ClassVar[str]

    def judged(self) -> list[str]:
        """The queries that are scored: those with a positive judgement."""
        return [query for query in self.queries if any(grade > 0 for grade in self.qrels.get(query, {}).values())]

    def _result(
        self,
        query_ids: list[str],
        document_ids: list[str],
        ranking_by_cuts: Mapping[tuple[int, ...], Ranking],
        metric: str,
    ) -> TaskResult:
        """Scores of rankings, each at its cuts, with the best relevant and the best other document of every query in
        the last one beside them."""
        place = {document: number for number, document in enumerate(document_ids)}
        items: dict[str, Floats] = {}
        for cuts, ranking in ranking_by_cuts.items():
            graded = Graded.of(ranking, self.qrels, query_ids, place)
            items |= graded.scores(cuts)
        scores = {name: float(values.mean()) for name, values in items.items()}
        judged = {document for query in query_ids for document in self.qrels[query]}
        counts = {
            "queries": len(query_ids),
            "documents": len(self.corpus),
            "queries_without_positives": len(self.queries) - len(query_ids),
            "judged_queries_missing": len(self.qrels.keys() - self.queries.keys()),
            "judged_documents_missing": len(judged - self.corpus.keys()),
        }
        notes = tuple(f"{counts[name]} {text}" for name, text in _NOTES.items() if counts[name])
        if ranking.flat and len(self.corpus) > 1:
            notes = (*notes, "the model gives every document the same score; the order is that of the ids")
        others_Qk = (graded.grade_Qk <= 0) & (ranking.index_Qk >= 0)
        relevant, other = ranking.best(graded.grade_Qk > 0), ranking.best(others_Qk)
        items |= {"similarity_relevant": relevant[0], "similarity_other": other[0]}
        value_N = items["ndcg_at_10"] if "ndcg_at_10" in items else items[metric]
        found = [
            [(document_ids[i] if i >= 0 else "", s) for s, i in zip(*each, strict=True)] for each in (relevant, other)
        ]
        rows = ends(value_N)
        shown = tuple(self._example(query_ids[n], float(value_N[n]), found[0][n], found[1][n]) for n in rows)
        return TaskResult(self.name, self.kind, metric, scores, counts, query_ids, items, notes, examples=shown)

    def _example(self, query: str, value: float, best: tuple[str, float], other: tuple[str, float]) -> Example:
        """`best` and `other`: the highest-scored relevant document and the highest-scored other one among those found,
        with their scores; an empty id where there is none."""
        grades = self.qrels[query]
        relevant = best[0] or max(grades, key=lambda document: grades[document])
        texts = {"query": self.queries[query], "relevant": self.corpus.get(relevant, "(not in the corpus)")}
        numbers = {"similarity of the relevant one": best[1]} if best[0] else {}
        if other[0] and not best[1] > other[1]:
            texts["found before it"] = self.corpus[other[0]]
            numbers["similarity of the other"] = other[1]
        return Example(query, value, texts, numbers)


@task_kinds.register("retrieval")
@dataclass(frozen=True)
class RetrievalTask(RankingTask):
    """Queries, a corpus, and graded judgements `qrels[query][document]`: are the relevant documents found first?

    Main score: nDCG@10. Queries without a document graded 1 or more are left out of every mean, and counted. Equal
    scores are ordered by document id, descending, as trec_eval does. `ignore_identical_ids` is for
    collections where the queries are taken from the corpus.

    ignore_identical_ids: remove the document with the query's own id from its ranking.
    cuts: the numbers of documents at which figures are given.
    precision: int8 or binary: search by codes of the vectors, as for every cut a search for so many documents would.
    rescore: with these, how many times as many documents are scored by their full vectors.
    """

    ignore_identical_ids: bool = False
    cuts: tuple[int, ...] = CUTS
    precision: SearchPrecision = "float32"
    rescore: int = RESCORE
    kind: ClassVar[str] = "retrieval"

    def __post_init__(self) -> None:
        if not self.corpus:
            raise EvaluationError("the corpus is empty", where=self.name)
        if not self.judged():
            raise EvaluationError(
                "no query has a relevant document",
                where=self.name,
                expected="judgements of 1 or more for some of the queries",
                fix="check that the ids of the queries and the judgements are the same",
            )

    @staticmethod
    def read(path: Path, name: str, split: str) -> RetrievalTask:
        """`corpus.jsonl` (`_id, title, text`), `queries.jsonl` (`_id, text`) and `qrels/SPLIT.tsv`.

        A document is its title and its text joined by one space. Ids that are numbers are read as strings.
        """
        qrels_path = find(path / "qrels", split, (".tsv", ".tsv.gz"))
        if qrels_path is None:
            have = sorted(file.name.split(".")[0] for file in path.glob("qrels/*.tsv*"))
            raise DataError(
                f"there are no judgements for the split {split!r}",
                where=path,
                expected=f"qrels/{split}.tsv",
                fix=f"choose another split: {', '.join(have)}" if have else "add the file",
            )
        qrels = _read_qrels(qrels_path)
        judged = {document for grades in qrels.values() for document in grades}
        corpus = _texts_by_id(path, "corpus", judged)
        queries = _texts_by_id(path, "queries", qrels)
        if not any(query in queries for query in qrels):
            raise DataError("no judged query is in queries.jsonl", where=qrels_path, fix="check the ids of both files")
        return RetrievalTask(name, queries, corpus, qrels)

    @staticmethod
    def read_rows(path: Path, name: str, split: str) -> RetrievalTask:
        """Rows of a query and its positives, in any layout that training reads: the positives of each query are to be
        found among all texts of the file but the queries."""
        return RetrievalTask(name, *judged_texts(read_rows(path)))

    formats: ClassVar[tuple[Format, ...]] = (
        Format(is_beir, read, 2),
        Format(lambda path: task_in(path) == "retrieval", read_rows, 20, listed=False),
    )

    def evaluate(self, reader: Reader) -> TaskResult:
        query_ids = self.judged()
        document_ids = sorted(self.corpus, reverse=True)
        cuts = self.cuts
        if reader.rerank is not None and reader.rerank.depth < len(self.corpus):
            # beyond what a reranker reads, a ranking says nothing
            cuts = tuple(cut for cut in cuts if cut <= max(reader.rerank.depth, 10)) or (min(cuts),)
        metric = "ndcg_at_10" if 10 in cuts else f"ndcg_at_{max(cuts)}"
        if reader.rerank is not None:
            found = reader.rerank.found
            if self.name not in found:
                query_reps, wanted = self._asked(reader, query_ids), max(*self.cuts, reader.rerank.depth)
                found[self.name] = self._ranking(reader, query_reps, query_ids, document_ids, wanted)
            ranking = _reranked(reader, self, found[self.name], query_ids, document_ids)
            return self._result(query_ids, document_ids, {cuts: ranking}, metric)
        if self.precision == "float32":
            query_reps = self._asked(reader, query_ids)
            size = 4 * query_reps.vector_ND.shape[1] if isinstance(query_reps, Dense) else None
            rankings = {self.cuts: self._ranking(reader, query_reps, query_ids, document_ids, max(self.cuts))}
        else:
            rankings, size = self._by_codes(reader, query_ids, document_ids)
        result = self._result(query_ids, document_ids, rankings, metric)
        if size is None:
            return result
        return replace(result, counts={**result.counts, "bytes_per_vector": size, "bytes": size * len(document_ids)})

    def _asked(self, reader: Reader, query_ids: list[str]) -> Representation:
        asked = [self.queries[query] for query in query_ids]
        return reader.all(asked, role="query", task="retrieval", label=f"{self.name} queries")

    def _ranking(
        self, reader: Reader, query_reps: Representation, query_ids: list[str], document_ids: list[str], wanted: int
    ) -> Ranking:
        """The `wanted` best documents of every query.

        The corpus is read in descending order of id, so that the search's rule for ties (the earlier document) is
        trec_eval's (the larger id) and a tie across the cut is decided as in the complete ranking. Every rank searches
        its own share of the corpus.
        """
        depth = wanted + int(self.ignore_identical_ids)
        share = reader.share(len(document_ids), piece_rows(len(document_ids)))
        texts = [self.corpus[document] for document in document_ids]
        about: dict[str, Any] = {"role": "document", "task": "retrieval", "label": f"{self.name} corpus"}

        def search() -> tuple[Any, Any]:
            best = TopK(query_reps, depth)
            for piece in reader.pieces(texts, **about, share=share):
                best.add_in_blocks(piece)
            score_Qk, index_Qk = best.result()
            return score_Qk, index_Qk + share.start

        ranking = Ranking(*merged_top_k(reader.together(search), depth))
        return self._without_own(ranking, query_ids, document_ids).first(wanted)

    def _by_codes(
        self, reader: Reader, query_ids: list[str], document_ids: list[str]
    ) -> tuple[dict[tuple[int, ...], Ranking], int]:
        """The ranking at each cut, that of a search for so many documents, and the bytes of a document's code. Every
        rank searches the whole corpus, since the ranges of int8 are those of all documents."""
        query_reps, texts = self._asked(reader, query_ids), [self.corpus[each] for each in document_ids]
        document = reader.all(texts, role="document", task="retrieval", label=f"{self.name} corpus")
        codes = Quantised.of(document, self.precision)
        rankings: dict[tuple[int, ...], Ranking] = {}
        for cut in sorted(self.cuts):
            ranking = Ranking(*codes.top_k(query_reps, cut + int(self.ignore_identical_ids), self.rescore))
            rankings[(cut,)] = self._without_own(ranking, query_ids, document_ids).first(cut)
        return rankings, codes.bytes_per_vector

    def _without_own(self, ranking: Ranking, query_ids: list[str], document_ids: list[str]) -> Ranking:
        """The document with the query's own id is left out where the collection asks for it."""
        if not self.ignore_identical_ids:
            return ranking
        place = {document: number for number, document in enumerate(document_ids)}
        return ranking.without(np.array([place.get(query, -1) for query in query_ids]))


@task_kinds.register("reranking")
@dataclass(frozen=True)
class RerankingTask(RankingTask):
    """Given candidates of every query, put into order: are the relevant ones first?

    Main score: MAP over all candidates (`map_at_1000`), as in mteb.

    candidates: the ids of the documents that are put into order, by query.
    cuts: the numbers of documents at which figures are given.
    """

    candidates: Mapping[str, Sequence[str]] = field(repr=False)
    cuts: tuple[int, ...] = (*CUTS, 1000)
    kind: ClassVar[str] = "reranking"

    def __post_init__(self) -> None:
        for query in self.judged():
            ids = self.candidates.get(query, ())
            if not ids:
                raise EvaluationError(f"the query {query!r} has no candidates", where=self.name)
            if unknown := [document for document in ids if document not in self.corpus]:
                raise EvaluationError(
                    f"the candidate {unknown[0]!r} of {query!r} is not in the corpus", where=self.name
                )
        if not self.judged():
            raise EvaluationError("no query has a relevant document", where=self.name)

    @staticmethod
    def read(path: Path, name: str, split: str) -> RerankingTask:
        """A BEIR folder with `top_ranked.jsonl` beside the corpus: rows of `query-id` and `corpus-ids`."""
        base = RetrievalTask.read(path, name, split)
        file = find(path, "top_ranked", (".jsonl", ".jsonl.gz"))
        if file is None:
            raise DataError("top_ranked.jsonl is missing", where=path, expected="rows of `query-id` and `corpus-ids`")
        candidates: dict[str, list[str]] = {}
        for where, row in sound_rows(file):
            ids = row.get("corpus-ids")
            if "query-id" not in row or not isinstance(ids, list):
                raise DataError(
                    f"found: {', '.join(row)}", where=where, expected="`query-id`, and `corpus-ids`, a list"
                )
            candidates[str(row["query-id"])] = [str(each) for each in ids]
        return RerankingTask(name, base.queries, base.corpus, base.qrels, candidates)

    @staticmethod
    def read_rows(path: Path, name: str, split: str) -> RerankingTask:
        """Rows of `query`, `positive` and `negative` (or `pos`, `neg`), lists of texts. Rows without a positive or
        without a negative are left out, and ids are given as mteb does, so that ties are decided alike."""
        queries: dict[str, str] = {}
        corpus: dict[str, str] = {}
        qrels: dict[str, dict[str, int]] = {}
        number = 0
        for where, row in sound_rows(path):
            columns = next((pair for pair in _CANDIDATE_COLUMNS if set(pair) <= row.keys()), None)
            if columns is None:
                raise DataError(f"found: {', '.join(row)}", where=where, expected="`query`, `positive` and `negative`")
            positive, negative = (_candidates_in(row, column, where) for column in columns)
            if positive and negative:
                query = f"{split}_query{number}"
                number += 1
                queries[query] = text_in(row, "query", where)
                for prefix, texts, grade in (("apositive", positive, 1), ("negative", negative, 0)):
                    for place, text in enumerate(texts):
                        document = f"{prefix}_{query}_{place:05d}"
                        corpus[document] = text_in({"text": text}, "text", where, empty=True)
                        qrels.setdefault(query, {})[document] = grade
        refuse_empty(list(queries), path, "query, positive, negative")
        return RerankingTask(name, queries, corpus, qrels, {query: list(grades) for query, grades in qrels.items()})

    formats: ClassVar[tuple[Format, ...]] = (
        Format(lambda path: is_beir(path) and find(path, "top_ranked", ENDINGS) is not None, read, 1),
        Format(has_columns({"query", "positive", "negative"}), read_rows, 5),
    )

    def evaluate(self, reader: Reader) -> TaskResult:
        query_ids = self.judged()
        wanted = sorted({document for query in query_ids for document in self.candidates[query]}, reverse=True)
        place = {document: number for number, document in enumerate(wanted)}
        if reader.rerank is not None:
            candidates = [
                np.array(sorted({place[document] for document in self.candidates[query]})) for query in query_ids
            ]
            given = Ranking.of([(np.zeros(len(index), np.float32), index) for index in candidates])
            everything = replace(reader, rerank=replace(reader.rerank, depth=given.index_Qk.shape[1]))
            ranking = _reranked(everything, self, given, query_ids, wanted).first(max(self.cuts))
            return self._result(query_ids, wanted, {self.cuts: ranking}, f"map_at_{max(self.cuts)}")
        asked, texts = [self.queries[query] for query in query_ids], [self.corpus[document] for document in wanted]
        query_reps = reader.all(asked, role="query", task=self.kind, label=f"{self.name} queries")
        reps = reader.all(texts, role="document", task=self.kind, label=f"{self.name} candidates")
        device = search_device(query_reps)
        query_reps, score_QK = on_device(query_reps, device), []
        index_QK = [torch.tensor(sorted({place[each] for each in self.candidates[query]})) for query in query_ids]
        for number, index_K in enumerate(index_QK):
            mine = on_device(reps.rows(index_K), device)
            score_QK.append(query_reps.rows(slice(number, number + 1)).scores(mine)[0, 0].float())
        rows = []
        scored = torch.cat(score_QK).cpu().split([len(index_K) for index_K in index_QK])  # the one wait for a GPU
        for index_K, score_K in zip(index_QK, scored, strict=True):
            best = top_of_block(score_K[None], max(self.cuts))
            rows.append((best[0][0].numpy(), index_K[best[1][0]].numpy()))
        return self._result(query_ids, wanted, {self.cuts: Ranking.of(rows)}, f"map_at_{max(self.cuts)}")


def searched_by_codes(task: Task, precision: SearchPrecision, rescore: int = RESCORE) -> Task:
    """A retrieval task whose documents are searched as int8 or binary codes. Errors: `EvaluationError` for other
    tasks."""
    if isinstance(task, LongDocumentTask):
        return replace(task, task=replace(task.task, precision=precision, rescore=rescore))
    if not isinstance(task, RetrievalTask):
        raise EvaluationError(
            f"precision {precision} is for retrieval, not {task.kind}", where=task.name, fix="leave the task out"
        )
    return replace(task, precision=precision, rescore=rescore)


def _reranked(
    reader: Reader, task: RankingTask, ranking: Ranking, query_ids: list[str], document_ids: list[str]
) -> Ranking:
    """The ranking as a reranker orders it; every rank reads the documents of its share of the queries."""
    rerank, share = reader.rerank, reader.share(len(query_ids), _READ)
    assert rerank is not None
    queries, documents = [task.queries[query] for query in query_ids], [task.corpus[each] for each in document_ids]

    def act() -> list[Ranking]:
        label, made = f"{task.name} reranked", []
        for start in range(share.start, share.stop, _READ):
            rows = slice(start, min(start + _READ, share.stop))
            asked = Ranking(ranking.score_Qk[rows], ranking.index_Qk[rows])
            made.append(rerank.ordered(asked, queries[rows], documents, label))
        return made

    parts = [part for of_rank in reader.together(act) for part in of_rank]
    return Ranking(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("score_Qk", "index_Qk")))


def across_languages(queries: RetrievalTask, documents: RetrievalTask) -> RetrievalTask:
    """Cross-lingual retrieval: the queries (and judgements) of one collection against the corpus of another that gives
    the same ids to its documents.

    Errors: `EvaluationError` where no judged document is in the other corpus.
    """
    judged = {document for grades in queries.qrels.values() for document in grades}
    if not judged & documents.corpus.keys():
        raise EvaluationError(
            f"no document judged in {queries.name!r} is in the corpus of {documents.name!r}",
            expected="two collections that share the ids of their documents",
        )
    return replace(queries, name=f"{queries.name}-to-{documents.name}", corpus=documents.corpus)


@task_kinds.register("cross")
class CrossLingual(TaskKind):
    """The queries of one collection against the corpus of another: `cross:QUERIES:DOCUMENTS` of BEIR folders."""

    @classmethod
    def load(cls, name: str, find: Callable[[str], Path], split: str) -> Task:
        first, colon, second = name.partition(":")
        if not colon:
            raise EvaluationError(f"'cross:{name}' names one collection", expected="cross:QUERIES:DOCUMENTS")
        queries, documents = (
            RetrievalTask.read(path, task_name_of(path), split) for path in (find(each) for each in (first, second))
        )
        return across_languages(queries, documents)


@task_kinds.register("long")
@dataclass(frozen=True)
class LongDocumentTask(TaskKind):
    """A retrieval task whose score is also given by the length of the relevant documents.

    The scores are those of `task`; `ndcg_at_10_length_1` to `_4` are means over the queries whose longest relevant
    document lies in that quarter of lengths (characters) from short to long. A model that reads only the beginning of
    a text shows it in the last ones.

    task: the retrieval task that is scored, as `long:NAME` names it.
    """

    task: RetrievalTask
    kind: ClassVar[str] = "long_retrieval"

    @classmethod
    def load(cls, name: str, find: Callable[[str], Path], split: str) -> LongDocumentTask:
        path = find(name)
        return LongDocumentTask(RetrievalTask.read(path, task_name_of(path), split))

    @property
    def name(self) -> str:
        return f"{self.task.name}-by-length"

    def evaluate(self, reader: Reader) -> TaskResult:
        result = self.task.evaluate(reader)
        corpus, qrels = self.task.corpus, self.task.qrels
        relevant = [[document for document, grade in qrels[query].items() if grade > 0] for query in result.item_ids]
        length_N = np.array([max(len(corpus.get(each, "")) for each in row) for row in relevant], dtype=np.float64)
        quarter_N = np.searchsorted(np.quantile(length_N, (0.25, 0.5, 0.75)), length_N, side="left")
        value_N: Floats = result.items[result.metric]
        by_length = {
            f"{result.metric}_length_{quarter + 1}": float(value_N[quarter_N == quarter].mean())
            for quarter in range(4)
            if bool((quarter_N == quarter).any())
        }
        edges = {f"characters_up_to_{q + 1}": int(np.quantile(length_N, (q + 1) / 4)) for q in range(4)}
        return replace(
            result,
            task=self.name,
            kind=self.kind,
            scores={**result.scores, **by_length},
            counts={**result.counts, **edges},
            items={**result.items, "characters": length_N},
        )


def _candidates_in(row: Mapping[str, Any], column: str, where: str) -> list[Any]:
    value = row[column]
    if value is not None and not isinstance(value, str | list):
        raise DataError(f"{column!r} is {kind_of(value)}", where=where, expected="a text or a list of texts")
    return [value] if isinstance(value, str) else value or []


def _read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Columns `query-id`, `corpus-id`, `score`. Grades are whole numbers; a pair judged twice must agree."""
    qrels: dict[str, dict[str, int]] = {}
    for where, row in sound_rows(path):
        if not row.keys() >= _QRELS:
            raise DataError(f"found: {', '.join(row)}", where=path, expected=f"columns {', '.join(sorted(_QRELS))}")
        query, document, score = (str(row[column]) for column in ("query-id", "corpus-id", "score"))
        if not is_number(score) or not float(score).is_integer() or abs(float(score)) >= 2**31:
            raise DataError(f"the grade is {score[:60]!r}", where=where, expected="a whole number of 32 bits")
        grade = int(float(score))
        earlier = qrels.setdefault(query, {}).setdefault(document, grade)
        if earlier != grade:
            raise DataError(f"{document!r} has the grades {earlier} and {grade} for query {query!r}", where=where)
    if not qrels:
        raise DataError("the file has no judgements", where=path)
    return qrels


def _texts_by_id(folder: Path, part: str, judged: Collection[str]) -> dict[str, str]:
    """Texts by id of the `corpus` or the `queries`. Where an id appears twice the last one counts, as in BEIR's own
    loader; but a judged id must be one text."""
    path, document = find(folder, part, ENDINGS), part == "corpus"
    if path is None:
        raise DataError(f"{part}.jsonl is missing", where=folder, expected="corpus.jsonl, queries.jsonl and qrels/")
    texts: dict[str, str] = {}
    for one in read_texts(path, titles=document, ids="each"):
        key = str(one.id)
        if key in texts and key in judged:
            raise DataError(f"the judged id {key!r} appears twice", where=one.where, fix="keep one of the two rows")
        if key in texts:
            log.warning("%s: the id %r appears twice; the later text counts", one.where, key)
        if not document and not one.text.strip():
            raise DataError("'text' is empty", where=one.where)
        texts[key] = one.text
    if not texts:
        raise DataError("the file has no rows", where=path)
    return texts
