"""Kinds of task. A task is a value: its data, and how an encoder is scored on it.

A new kind is one more frozen dataclass here (or in a file of its own) with `name`, `kind` and `evaluate`, and one more
`Format` in `load.py` that says what its files look like. Nothing else knows the kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import torch

from embedsmith.core.errors import EvaluationError
from embedsmith.core.reps import Dense
from embedsmith.evaluate.encoding import Reader
from embedsmith.evaluate.metrics import CUTS, Floats, correlations, cosines, ranking_scores
from embedsmith.evaluate.result import TaskResult
from embedsmith.search import TopK

Qrels = Mapping[str, Mapping[str, int]]


class Task(Protocol):
    """Anything `evaluate` can run."""

    kind: ClassVar[str]

    @property
    def name(self) -> str: ...

    def evaluate(self, reader: Reader) -> TaskResult:
        """Errors: `EvaluationError` when the model's output cannot be scored."""
        ...


@dataclass(frozen=True)
class STSTask:
    """Pairs of texts with a human score: does the model's similarity rank them alike?

    Main score: Spearman's correlation of cosine and `score` over all pairs. Other heads than `dense` are compared by
    their own similarity, under `spearman`.
    """

    name: str
    text1: Sequence[str] = field(repr=False)
    text2: Sequence[str] = field(repr=False)
    score: Sequence[float] = field(repr=False)
    kind: ClassVar[str] = "sts"

    def __post_init__(self) -> None:
        if not len(self.text1) == len(self.text2) == len(self.score):
            sizes = f"{len(self.text1)}, {len(self.text2)} and {len(self.score)}"
            raise EvaluationError(f"text1, text2 and score have {sizes} entries", where=self.name)
        if not self.text1:
            raise EvaluationError("no pairs to score", where=self.name)
        if not all(np.isfinite(self.score)):
            raise EvaluationError("a score is not a finite number", where=self.name)

    def evaluate(self, reader: Reader) -> TaskResult:
        similarity_N, cosine_N = self._similarities(reader)
        label_N = np.asarray(self.score, dtype=np.float64)
        scores = dict(zip(("spearman", "pearson"), correlations(similarity_N, label_N), strict=True))
        metric, items = "spearman", {"similarity": similarity_N, "score": label_N}
        if cosine_N is not None:
            metric, items["cosine"] = "cosine_spearman", cosine_N
            cosine = correlations(cosine_N, label_N)
            scores |= dict(zip(("cosine_spearman", "cosine_pearson"), cosine, strict=True))
        undefined = "the model (or the file) gives every pair the same score, so there is no correlation"
        notes = (undefined,) if np.isnan(scores[metric]) else ()
        ids = [str(number) for number in range(len(label_N))]
        return TaskResult(self.name, self.kind, metric, scores, {"pairs": len(label_N)}, ids, items, notes)

    def _similarities(self, reader: Reader) -> tuple[Floats, Floats | None]:
        """The similarity of the head for every pair, and the cosine where the head has vectors. Each distinct text
        is encoded once, on the query side: the comparison is symmetric."""
        texts = list(dict.fromkeys([*self.text1, *self.text2]))
        place = {text: number for number, text in enumerate(texts)}
        reps = reader.all(texts, role="query", task="sts", label=self.name)
        left, right = (reps.rows(torch.tensor([place[text] for text in side])) for side in (self.text1, self.text2))
        similarity_N = left.paired(right)[0].double().numpy()
        if not isinstance(left, Dense) or not isinstance(right, Dense):
            return similarity_N, None
        return similarity_N, cosines(left.vector_ND.double().numpy(), right.vector_ND.double().numpy())


@dataclass(frozen=True)
class RetrievalTask:
    """Queries, a corpus, and graded judgements `qrels[query][document]`: are the relevant documents found first?

    Main score: nDCG@10. Queries without a document graded 1 or more are left out of every mean, and counted. Equal
    scores are ordered by document id, descending, as trec_eval does. `ignore_identical_ids` removes the document with
    the query's own id from its ranking, for collections where the queries are taken from the corpus.
    """

    name: str
    queries: Mapping[str, str] = field(repr=False)
    corpus: Mapping[str, str] = field(repr=False)
    qrels: Qrels = field(repr=False)
    ignore_identical_ids: bool = False
    cuts: tuple[int, ...] = CUTS
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

    def judged(self) -> list[str]:
        """The queries that are scored: those with a positive judgement."""
        return [query for query in self.queries if any(grade > 0 for grade in self.qrels.get(query, {}).values())]

    def evaluate(self, reader: Reader) -> TaskResult:
        query_ids = self.judged()
        run = self._run(reader, query_ids)
        items = ranking_scores({query: dict(self.qrels[query]) for query in query_ids}, run, self.cuts)
        scores = {name: float(values.mean()) for name, values in items.items()}
        metric = "ndcg_at_10" if "ndcg_at_10" in scores else f"ndcg_at_{max(self.cuts)}"
        counts = self._counts(query_ids)
        notes = tuple(f"{counts[name]} {text}" for name, text in _NOTES.items() if counts[name])
        return TaskResult(self.name, self.kind, metric, scores, counts, query_ids, items, notes)

    def _run(self, reader: Reader, query_ids: list[str]) -> dict[str, dict[str, float]]:
        """Scores of the best documents of every query.

        The corpus is read in descending order of id, so that the search's rule for ties (the earlier document) is
        trec_eval's (the larger id) and a tie across the cut is decided as in the complete ranking.
        """
        document_ids = sorted(self.corpus, reverse=True)
        queries = [self.queries[query] for query in query_ids]
        best = TopK(
            reader.all(queries, role="query", task="retrieval", label=f"{self.name} queries"),
            max(self.cuts) + int(self.ignore_identical_ids),
        )
        texts = [self.corpus[document] for document in document_ids]
        for piece in reader.pieces(texts, role="document", task="retrieval", label=f"{self.name} corpus"):
            best.add_in_blocks(piece)
        run: dict[str, dict[str, float]] = {}
        for query, score_k, index_k in zip(query_ids, *(part.tolist() for part in best.result()), strict=True):
            hits = ((document_ids[index], score) for index, score in zip(index_k, score_k, strict=True))
            kept = [hit for hit in hits if not (self.ignore_identical_ids and hit[0] == query)]
            run[query] = dict(kept[: max(self.cuts)])
        return run

    def _counts(self, query_ids: list[str]) -> dict[str, int]:
        judged = {document for query in query_ids for document in self.qrels[query]}
        return {
            "queries": len(query_ids),
            "documents": len(self.corpus),
            "queries_without_positives": len(self.queries) - len(query_ids),
            "judged_queries_missing": len(self.qrels.keys() - self.queries.keys()),
            "judged_documents_missing": len(judged - self.corpus.keys()),
        }


_NOTES = {
    "queries_without_positives": "queries without a relevant document are left out",
    "judged_queries_missing": "judged queries are not among the queries",
    "judged_documents_missing": "judged documents are not in the corpus; they count as not found",
}
