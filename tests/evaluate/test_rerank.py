"""A reranker in an evaluation: it orders the first documents of a ranking, and the candidates of reranking tasks."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import embedsmith as es
from embedsmith.cli import app
from embedsmith.core.errors import EvaluationError
from embedsmith.evaluate import RerankingTask, RetrievalTask, evaluate
from embedsmith.evaluate.rerank import Rerank
from tests.evaluate.fakes import HashEncoder, vector
from tests.models.test_reranker import head
from tests.ranks import on_ranks
from tests.tinybert import tiny_bert

QUERIES = {f"q{n}": f"question {n}" for n in range(7)}
CORPUS = {f"d{n}": f"document {n}" for n in range(20)}
QRELS = {f"q{n}": {f"d{2 * n}": 1, f"d{n + 3}": 2} for n in range(7)}
TASK = RetrievalTask("found", QUERIES, CORPUS, QRELS)


@dataclass
class LengthReranker:
    """A score by the numbers in both texts, coarse, so that some are equal; what was read is counted."""

    factor: int = 3
    read: list[int] = field(default_factory=list)

    def score(self, queries, documents):
        self.read.append(len(queries))
        numbers = [(int(q.split()[-1]), int(d.split()[-1])) for q, d in zip(queries, documents, strict=True)]
        return torch.tensor([float((self.factor * q + d) % 5) for q, d in numbers])

    def fingerprint(self):
        return f"length {self.factor}"


def ordered(query, documents, factor=3):
    """Best first; of equal scores the larger id first, as trec_eval has it."""
    number = int(QUERIES[query].split()[-1])
    score = lambda d: (factor * number + int(CORPUS[d].split()[-1])) % 5
    return sorted(sorted(documents, reverse=True), key=lambda d: -score(d))


def ndcg(query, ranking, k=10):
    gain = lambda grades: math.fsum(g / math.log2(place + 2) for place, g in enumerate(grades[:k]))
    return gain([QRELS[query].get(d, 0) for d in ranking]) / gain(sorted(QRELS[query].values(), reverse=True))


def first(query, depth):
    similarity = {d: float(vector(QUERIES[query]) @ vector(text)) for d, text in CORPUS.items()}
    return sorted(similarity, key=lambda d: -similarity[d])[:depth]


@pytest.mark.parametrize("depth", [1, 4, 20])
def test_the_first_documents_are_ordered_anew_and_no_others_are_read(depth):
    reranker = LengthReranker()
    result = evaluate(HashEncoder(), [TASK], rerank=Rerank(reranker, depth)).tasks[0]
    for query, value in zip(result.item_ids, result.items["ndcg_at_10"], strict=True):
        assert value == pytest.approx(ndcg(query, ordered(query, first(query, depth))), abs=1e-9)
    assert reranker.read == [7 * depth]
    beyond = {name for name in result.scores if int(name.rpartition("_")[2]) > 10}
    assert ("recall_at_100" in beyond) if depth == 20 else not beyond  # 20 documents are the whole corpus


def test_candidates_are_ordered_by_the_reranker_alone():
    candidates = {query: [f"d{(3 * n + i) % 20}" for i in range(9)] for n, query in enumerate(QUERIES)}
    qrels = {query: {candidates[query][4]: 1} for query in QUERIES}
    task = RerankingTask("given", QUERIES, CORPUS, qrels, candidates)
    result = evaluate(None, [task], rerank=Rerank(LengthReranker(), 2)).tasks[0]
    for query, value in zip(result.item_ids, result.items["map_at_1000"], strict=True):
        place = ordered(query, candidates[query]).index(candidates[query][4])
        assert value == pytest.approx(1 / (place + 1), abs=1e-9)


def test_rankings_that_are_kept_are_not_computed_again():
    encoder, found = HashEncoder(), Rerank(LengthReranker(), 5)
    once = evaluate(encoder, [TASK], rerank=found).main_scores()
    calls = len(encoder.calls)
    assert evaluate(encoder, [TASK], rerank=found).main_scores() == once
    assert len(encoder.calls) == calls


def test_a_cached_result_belongs_to_its_reranker_and_depth(tmp_path):
    @dataclass
    class Known(HashEncoder):
        def fingerprint(self):
            return "known"

    scores = {}
    for factor, depth in ((3, 5), (2, 5), (3, 6), (3, 5)):
        found = Rerank(LengthReranker(factor), depth)
        scores.setdefault((factor, depth), []).append(
            evaluate(Known(), [TASK], rerank=found, cache=tmp_path).main_scores()["found"]
        )
    alone = evaluate(Known(), [TASK], cache=tmp_path).main_scores()["found"]
    assert scores[3, 5][0] == scores[3, 5][1]
    assert len({alone, *(value for values in scores.values() for value in values)}) == 4


def on_rank():
    return evaluate(HashEncoder(), [TASK], rerank=Rerank(LengthReranker(), 6), group=None).main_scores()


@pytest.mark.dist
def test_ranks_share_the_queries(tmp_path):
    expected = evaluate(HashEncoder(), [TASK], rerank=Rerank(LengthReranker(), 6)).main_scores()
    assert on_ranks(2, on_rank, tmp_path) == [expected, expected]


def test_what_a_reranker_cannot_do_is_said(tmp_path):
    class Broken(LengthReranker):
        def score(self, queries, documents):
            return super().score(queries, documents) * float("nan")

    with pytest.raises(EvaluationError, match="a reranker alone finds nothing"):
        evaluate(None, [TASK], rerank=Rerank(LengthReranker()))
    with pytest.raises(EvaluationError, match="neither"):
        evaluate(None, [TASK])
    with pytest.raises(EvaluationError, match="the reranker's score of 'question 0' is not finite"):
        evaluate(HashEncoder(), [TASK], rerank=Rerank(Broken()))
    with pytest.raises(EvaluationError, match="reads 0 documents"):
        Rerank(LengthReranker(), 0)
    pairs = tmp_path / "scored.jsonl"
    pairs.write_text('{"text1": "a", "text2": "b", "score": 1}\n{"text1": "a", "text2": "c", "score": 0}\n')
    with pytest.raises(EvaluationError, match="scored is no task that a reranker"):
        es.evaluate(HashEncoder(), pairs, rerank=LengthReranker())


def typed(*words):
    return CliRunner().invoke(app, list(words), catch_exceptions=True)


def test_as_it_is_typed(tmp_path):
    """An embedder with a reranker, a reranker alone, and in an index; the same figures as from Python."""
    es.load(str(tiny_bert(tmp_path / "bert")), pooling="mean").save(tmp_path / "embedder")
    embedder, reranker = str(tmp_path / "embedder"), str(head(tmp_path / "reranker"))
    rows = [{"query": f"{a} cat", "positive": [f"the {a} cat"], "negative": ["a dog", "red"]} for a in ("old", "big")]
    task = tmp_path / "rows.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "scores.json"
    options = ["--rerank", reranker, "--depth", "2", "--json", str(out)]
    said = typed("evaluate", embedder, "--tasks", f"retrieval:{task}", *options)
    assert said.exit_code == 0, said.output
    python = es.evaluate(embedder, f"retrieval:{task}", rerank=Path(reranker), depth=2)
    assert es.evaluate(embedder, f"retrieval:{task}", rerank=es.load_reranker(reranker), depth=2) is not None
    saved = json.loads(out.read_text())
    assert saved["rerank"] == reranker
    assert saved["tasks"][0]["scores"] == pytest.approx(python.tasks[0].scores)
    alone = typed("evaluate", reranker, "--tasks", f"reranking:{task}")
    assert alone.exit_code == 0, alone.output
    wrong = typed("evaluate", reranker, "--tasks", f"reranking:{task}", "--rerank", reranker)
    assert "is a reranker itself" in str(wrong.exception) + wrong.output
    es.index(embedder, [f"the {a} cat" for a in ("old", "big", "red", "blue")], to=tmp_path / "index")
    (found,) = es.search("old cat", tmp_path / "index", k=2, rerank=reranker)
    texts = [hit.text for hit in found.hits]
    every = [f"the {a} cat" for a in ("old", "big", "red", "blue")]
    ranked = es.load_reranker(reranker).rank("old cat", every, k=2)
    assert texts == [every[place] for place, _ in ranked]
    assert [hit.score for hit in found.hits] == pytest.approx([score for _, score in ranked], abs=1e-5)
    assert {"first", "dense"} <= set(found.hits[0].scores)
    line = typed("search", "old cat", "--index", str(tmp_path / "index"), "-k", "2", "--rerank", reranker, "--json")
    assert [hit["text"] for hit in json.loads(line.output)["hits"]] == texts
