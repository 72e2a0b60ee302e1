"""Reranking, languages, long documents, several heads, several ranks."""

import json

import numpy as np
import pytest
import torch

from embedsmith.core.errors import DataError, EmbedsmithError, EvaluationError
from embedsmith.core.reps import Dense, MultiVector, Sparse
from embedsmith.evaluate import (
    HybridEncoder,
    LongDocumentTask,
    RerankingTask,
    RetrievalTask,
    across_languages,
    encoding,
    evaluate,
)
from embedsmith.search.hybrid import Hybrid, join
from tests.evaluate.examples import NamedEncoder, small_tasks
from tests.evaluate.fakes import HashEncoder, TableEncoder, vector
from tests.ranks import on_ranks


def test_reranking_looks_at_the_candidates_only():
    table = {"q": (1.0, 0.0), "best": (1.0, 0.0), "good": (0.8, 0.6), "bad": (0.0, 1.0)}
    corpus = {"1": "best", "2": "good", "3": "bad"}
    task = RerankingTask("t", {"q": "q"}, corpus, {"q": {"2": 1}}, {"q": ["3", "2"]})
    result = evaluate(TableEncoder(table), [task])[0]
    assert (result.metric, result.main_score) == ("map_at_1000", 1.0)


@pytest.mark.parametrize(("ids", "message"), [([], "no candidates"), (["9"], "'9' of 'q' is not in the corpus")])
def test_candidates_must_exist(ids, message):
    with pytest.raises(EvaluationError, match=message):
        RerankingTask("t", {"q": "q"}, {"1": "a"}, {"q": {"1": 1}}, {"q": ids})


def test_candidates_are_read_from_a_file_beside_the_corpus(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n1\t7\t1\n2\t8\t1\n")
    rows = {
        "corpus": [{"_id": n, "text": f"text {n}"} for n in "789"],
        "queries": [{"_id": n, "text": n} for n in "12"],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    with pytest.raises(DataError, match=rf"^{tmp_path}: top_ranked\.jsonl is missing"):
        RerankingTask.read(tmp_path, "mine", "test")
    file = tmp_path / "top_ranked.jsonl"
    file.write_text('{"query-id": 1, "corpus-ids": [9, 7]}\n{"query-id": "2", "corpus-ids": ["8"]}\n')
    task = RerankingTask.read(tmp_path, "mine", "test")
    assert task.candidates == {"1": ["9", "7"], "2": ["8"]}
    assert "9" not in repr(task)
    file.write_text('{"query-id": 1, "corpus-ids": [9]}\n{"query-id": "2", "corpus": ["8"]}\n')
    with pytest.raises(DataError, match=r"top_ranked\.jsonl:2: found: query-id, corpus"):
        RerankingTask.read(tmp_path, "mine", "test")


def test_one_document_can_be_searched():
    task = RetrievalTask("t", {"q": "a"}, {"1": "b"}, {"q": {"1": 1}})
    assert evaluate(HashEncoder(), [task])[0].main_score == 1.0


def test_queries_of_one_language_are_asked_of_the_corpus_of_another():
    english = RetrievalTask("en", {"q": "a"}, {"1": "one"}, {"q": {"1": 1}})
    german = RetrievalTask("de", {"q": "b"}, {"1": "eins"}, {"q": {"1": 1}})
    crossed = across_languages(german, english)
    assert (crossed.name, crossed.queries, crossed.corpus) == ("de-to-en", {"q": "b"}, {"1": "one"})
    with pytest.raises(EvaluationError, match="share the ids"):
        across_languages(german, RetrievalTask("x", {"q": "a"}, {"2": "z"}, {"q": {"2": 1}}))


def test_scores_by_length_are_means_over_the_queries_of_that_length():
    corpus = {str(n): "word " * 4**n for n in range(4)}
    task = RetrievalTask("t", {f"q{n}": f"ask {n}" for n in range(4)}, corpus, {f"q{n}": {str(n): 1} for n in range(4)})
    result = evaluate(HashEncoder(), [LongDocumentTask(task)])[0]
    parts = [result.scores[f"ndcg_at_10_length_{quarter}"] for quarter in (1, 2, 3, 4)]
    assert parts == pytest.approx(result.items["ndcg_at_10"].tolist())
    assert (result.task, result.counts["characters_up_to_4"]) == ("t-by-length", 5 * 64)


def test_the_worst_and_the_best_queries_are_shown_with_what_was_found_instead():
    result = evaluate(HashEncoder(), [small_tasks()["search"]])[0]
    values = [example.value for example in result.examples]
    assert len(values) == 10
    assert values[0] == min(result.items["ndcg_at_10"])
    assert values[-1] == max(result.items["ndcg_at_10"])
    assert "found before it" in result.examples[0].texts


def test_similarities_of_the_best_relevant_and_other_document():
    task = small_tasks()["search"]
    result = evaluate(HashEncoder(), [task])[0]
    query = result.item_ids[0]
    score = {d: float(vector(task.queries[query]) @ vector(text)) for d, text in task.corpus.items()}
    relevant = max(score[d] for d, grade in task.qrels[query].items() if grade > 0)
    other = max(s for d, s in score.items() if task.qrels[query].get(d, 0) == 0)
    assert result.items["similarity_relevant"][0] == pytest.approx(relevant, abs=1e-6)
    assert result.items["similarity_other"][0] == pytest.approx(other, abs=1e-6)


class ManyHeads:
    """dense, sparse and multivector of a text from its hash; texts have different numbers of tokens."""

    def represent(self, texts, *, role, task=None, outputs=("dense",)):
        length = max(len(text.split()) for text in texts)
        tokens = torch.zeros(len(texts), length, 4)
        mask = torch.zeros(len(texts), length, dtype=torch.bool)
        for row, text in enumerate(texts):
            for place, word in enumerate(text.split()):
                tokens[row, place], mask[row, place] = vector(word, 4), True
        coordinate = (tokens[..., 0] * 1e4).long().abs() % 7
        reps = {
            "dense": Dense(torch.stack([vector(text) for text in texts])),
            "sparse": Sparse(coordinate, mask * 1.0),
            "multivector": MultiVector(tokens, mask),
        }
        return {name: reps[name] for name in outputs}


def test_hybrid_scores_are_the_weighted_sum_of_the_heads(monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 7)
    monkeypatch.setattr("embedsmith.search.hybrid._NUMBERS", 50)
    task, weights = small_tasks()["search"], {"dense": 1.0, "sparse": 0.3, "multivector": 2.0}
    corpus = {key: " ".join(text.split()[: 1 + n % 5]) for n, (key, text) in enumerate(task.corpus.items())}
    task = RetrievalTask("search", task.queries, corpus, task.qrels)
    result = evaluate(HybridEncoder(ManyHeads(), weights), [task], head="hybrid")[0]
    asked, documents = [task.queries[q] for q in result.item_ids], list(corpus.values())
    heads = tuple(weights)
    left, right = (ManyHeads().represent(each, role="query", outputs=heads) for each in (asked, documents))
    total = sum(weight * left[head].scores(right[head])[0].double() for head, weight in weights.items())
    best = total.masked_fill(~relevant_mask(task, result.item_ids), float("-inf")).amax(1)
    assert result.items["similarity_relevant"] == pytest.approx(best.numpy(), abs=1e-5)


def relevant_mask(task, query_ids):
    return torch.tensor([[task.qrels[query].get(d, 0) > 0 for d in task.corpus] for query in query_ids])


def test_hybrid_pieces_join_in_order():
    pieces = [Hybrid((Dense(torch.full((2, 3), float(n))),), (1.0,)) for n in range(3)]
    assert join(pieces).parts[0].vector_ND[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def scores_on_all_ranks():
    from embedsmith.core.collectives import ALONE
    from embedsmith.evaluate.run import digest

    tasks = list(small_tasks().values())
    shared = evaluate(NamedEncoder(), tasks, group=None)
    alone = evaluate(NamedEncoder(), tasks, group=ALONE)
    items = lambda results: {r.task: {k: v.tolist() for k, v in r.items.items()} for r in results}
    return items(shared), items(alone), digest([result.as_dict()["scores"] for result in shared])


class Broken(HashEncoder):
    def represent(self, texts, **options):
        from embedsmith.core.collectives import rank

        reps = super().represent(texts, **options)
        return reps if rank() == 0 else {"dense": Dense(reps["dense"].vector_ND * float("nan"))}


def error_on_all_ranks():
    try:
        evaluate(Broken(), [small_tasks()["search"]], group=None)
    except EmbedsmithError as error:
        return str(error)
    return "no error"


@pytest.mark.dist
def test_two_ranks_equal_one(tmp_path):
    outcomes = on_ranks(2, scores_on_all_ranks, tmp_path)
    for shared, alone, _ in outcomes:
        for task, items in alone.items():
            for name, values in items.items():
                np.testing.assert_allclose(shared[task][name], values, atol=1e-6, err_msg=f"{task} {name}")
    assert outcomes[0][2] == outcomes[1][2]


@pytest.mark.dist
def test_nan_on_one_rank_is_an_error_on_all(tmp_path):
    assert all("not finite" in message for message in on_ranks(2, error_on_all_ranks, tmp_path))


class Unlucky(NamedEncoder):
    """Fails on rank 1, with an error that is none of ours."""

    def represent(self, texts, **options):
        from embedsmith.core.collectives import rank

        if rank() == 1:
            raise ZeroDivisionError("a surprise")
        return super().represent(texts, **options)


def fails_while_encoding(folder):
    return evaluate(Unlucky(), [small_tasks()["search"]], group=None)


def fails_after_the_last_talk(folder):
    """Rank 1 fails while it computes its figures, when nothing is left to exchange."""
    from embedsmith.core.collectives import rank
    from embedsmith.evaluate.metrics import Graded

    if rank() == 1:
        Graded.scores = lambda *_: 1 / 0
    return evaluate(NamedEncoder(), [small_tasks()["search"]], group=None)


def fails_to_keep(folder):
    """Rank 0 cannot write: a file stands where the folder should be."""
    return evaluate(NamedEncoder(), list(small_tasks().values())[:2], group=None, cache=folder / "file")


def what_each_rank_raises(folder):
    (folder / "file").write_text("no folder")
    told = []
    for act in (fails_while_encoding, fails_after_the_last_talk, fails_to_keep):
        try:
            act(folder)
            told.append("no error")
        except (ArithmeticError, OSError, EmbedsmithError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


@pytest.mark.dist
def test_any_error_on_one_rank_is_an_error_on_all(tmp_path):
    first, second = on_ranks(2, what_each_rank_raises, tmp_path, tmp_path)
    assert second[0] == "ZeroDivisionError: a surprise"
    assert first[0].startswith("FailedElsewhereError: rank 1: ZeroDivisionError: a surprise")
    assert second[1].startswith("ZeroDivisionError")
    assert first[1].startswith("FailedElsewhereError: rank 1: ZeroDivisionError")
    assert second[2].startswith("FailedElsewhereError: rank 0")
    assert not first[2].startswith(("FailedElsewhereError", "no error"))
