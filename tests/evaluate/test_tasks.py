"""What a task asks of an encoder, and what it makes of the answer."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from embedsmith.core.errors import EvaluationError
from embedsmith.core.reps import Dense
from embedsmith.evaluate import RetrievalTask, STSTask, encoding, evaluate
from tests.evaluate.fakes import ConstantEncoder, HashEncoder, TableEncoder, WordEncoder, vector
from tests.evaluate.oracle import trec_scores

PAIRS = STSTask("pairs", ["a", "b", "c", "a"], ["b", "c", "d", "d"], [1.0, 2.0, 3.0, 0.5])


def collection(documents: int = 60, queries: int = 10) -> RetrievalTask:
    corpus = {f"d{number}": f"document {number}" for number in range(documents)}
    asked = {f"q{number}": f"query {number}" for number in range(queries)}
    qrels = {
        f"q{number}": {f"d{(7 * number + step) % documents}": 1 + step for step in range(3)}
        for number in range(queries)
    }
    return RetrievalTask("small", asked, corpus, qrels)


def test_sts_asks_for_each_text_once_and_pairs_them_up() -> None:
    encoder = HashEncoder()
    result = evaluate(encoder, [PAIRS])[0]
    assert encoder.calls == [(4, "query", "sts")]
    expected = [float(vector(a) @ vector(b)) for a, b in zip(PAIRS.text1, PAIRS.text2, strict=True)]
    assert result.items["cosine"].tolist() == pytest.approx(expected, abs=1e-6)
    assert result.metric == "cosine_spearman"
    assert result.counts == {"pairs": 4}


def test_cosine_ignores_length_and_the_models_own_similarity_does_not() -> None:
    table = {"a": (1.0, 0.0), "b": (2.0, 0.1), "c": (0.5, 3.0), "d": (1.0, 1.0)}
    longer = {text: tuple(9 * (1 + i) * x for x in row) for i, (text, row) in enumerate(table.items())}
    short, long = (evaluate(TableEncoder(t), [PAIRS])[0] for t in (table, longer))
    assert long.items["cosine"] == pytest.approx(short.items["cosine"])
    assert long.items["similarity"] != pytest.approx(short.items["similarity"])


def test_a_constant_model_has_an_undefined_correlation_and_no_crash() -> None:
    result = evaluate(ConstantEncoder(), [PAIRS])[0]
    assert math.isnan(result.main_score)
    assert "no correlation" in result.notes[0]
    assert result.as_dict()["main_score"] is None


def test_retrieval_equals_scoring_the_complete_matrix() -> None:
    task = collection()
    result = evaluate(HashEncoder(), [task])[0]
    run = {
        query: {d: float(vector(text) @ vector(body)) for d, body in task.corpus.items()}
        for query, text in task.queries.items()
    }
    for name, expected in trec_scores(task.qrels, run).items():
        assert result.items[name] == pytest.approx(expected, abs=1e-9), name
        assert result.scores[name] == pytest.approx(expected.mean(), abs=1e-9)


def test_pieces_of_any_size_give_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(HashEncoder(), [collection()])[0].scores
    monkeypatch.setattr(encoding, "PIECE", 7)
    encoder = HashEncoder()
    assert evaluate(encoder, [collection()])[0].scores == pytest.approx(whole)
    assert encoder.calls[:3] == [(7, "query", "retrieval"), (3, "query", "retrieval"), (7, "document", "retrieval")]


def test_the_bar_reaches_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    @contextmanager
    def counted(label: str, total: int, **options: object) -> Iterator[SimpleNamespace]:
        bars.append([total, 0])

        def advance(count: int = 1) -> None:
            bars[-1][1] += count

        yield SimpleNamespace(advance=advance)

    monkeypatch.setattr(encoding, "progress_bar", counted)
    evaluate(HashEncoder(), [collection()])
    assert bars
    assert all(total == done for total, done in bars), bars


def test_a_tie_across_the_cut_is_decided_as_in_the_complete_ranking() -> None:
    """Every document scores the same and there are more of them than are kept: only the id decides."""
    corpus = {f"d{number:03}": f"text {number}" for number in range(300)}
    task = RetrievalTask("tied", {"q": "query"}, corpus, {"q": {"d299": 2, "d250": 1, "d000": 1}})
    complete = trec_scores(task.qrels, {"q": dict.fromkeys(corpus, 1.0)})
    result = evaluate(ConstantEncoder(), [task])[0]
    assert result.scores == pytest.approx({name: float(value[0]) for name, value in complete.items()})
    assert result.scores["mrr_at_1"] == 1.0


def test_queries_without_a_positive_are_left_out_and_counted() -> None:
    task = collection()
    more = RetrievalTask(
        "more",
        {**task.queries, "never": "judged by nobody", "zero": "only bad ones"},
        task.corpus,
        {**task.qrels, "zero": {"d1": 0}, "lost": {"d1": 1}},
    )
    plain, result = (evaluate(HashEncoder(), [each])[0] for each in (task, more))
    assert result.scores == plain.scores
    assert result.counts["queries"] == 10
    assert result.counts["queries_without_positives"] == 2
    assert result.counts["judged_queries_missing"] == 1
    assert any("2 queries without" in note for note in result.notes)


def test_judged_documents_that_are_missing_count_as_not_found() -> None:
    task = RetrievalTask("t", {"q": "a"}, {"d": "a", "e": "b"}, {"q": {"d": 1, "gone": 1}})
    result = evaluate(HashEncoder(), [task])[0]
    assert result.scores["recall_at_10"] == 0.5
    assert result.counts["judged_documents_missing"] == 1


def test_a_query_may_ignore_the_document_with_its_own_id() -> None:
    corpus = {"1": "same", "2": "other"}
    kept = RetrievalTask("t", {"1": "same"}, corpus, {"1": {"2": 1}}, cuts=(1, 2))
    dropped = RetrievalTask("t", {"1": "same"}, corpus, {"1": {"2": 1}}, ignore_identical_ids=True, cuts=(1,))
    assert evaluate(HashEncoder(), [kept])[0].scores["mrr_at_2"] == 0.5
    assert evaluate(HashEncoder(), [dropped])[0].scores["mrr_at_1"] == 1.0


def test_one_document() -> None:
    task = RetrievalTask("t", {"q": "a"}, {"d": "b"}, {"q": {"d": 1}})
    assert evaluate(HashEncoder(), [task])[0].main_score == 1.0


def test_another_head_is_scored_by_its_own_similarity() -> None:
    corpus = {"d1": "cats sleep all day", "d2": "dogs run", "d3": "birds fly south"}
    task = RetrievalTask("t", {"q": "birds south", "r": "dogs"}, corpus, {"q": {"d3": 1}, "r": {"d2": 1}})
    assert evaluate(WordEncoder(), [task], head="sparse")[0].main_score == 1.0
    pairs = STSTask("p", ["a b", "a b", "a b"], ["a b", "a c", "c d"], [5, 3, 0])
    result = evaluate(WordEncoder(), [pairs], head="sparse")[0]
    assert (result.metric, result.main_score) == ("spearman", 1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: STSTask("t", [], [], []),
        lambda: STSTask("t", ["a"], ["b"], []),
        lambda: STSTask("t", ["a"], ["b"], [float("nan")]),
        lambda: RetrievalTask("t", {"q": "a"}, {}, {"q": {"d": 1}}),
        lambda: RetrievalTask("t", {"q": "a"}, {"d": "b"}, {"q": {"d": 0}}),
    ],
)
def test_a_task_with_nothing_to_score_is_an_error(make: object) -> None:
    with pytest.raises(EvaluationError):
        make()  # type: ignore[operator]


class Broken:
    def __init__(self, reps: dict[str, Dense]) -> None:
        self.reps = reps

    def represent(self, texts: object, **options: object) -> dict[str, Dense]:
        return self.reps


@pytest.mark.parametrize(
    ("reps", "message"),
    [
        ({"dense": Dense(torch.tensor([[1.0], [float("nan")], [1.0], [1.0]]))}, "'b' is not finite"),
        ({"dense": Dense(torch.tensor([[1.0], [1.0], [float("inf")], [1.0]]))}, "'c' is not finite"),
        ({"dense": Dense(torch.ones(3, 2))}, "3 rows for 4 texts"),
        ({"sparse": Dense(torch.ones(4, 2))}, "no 'dense' output"),
    ],
)
def test_a_wrong_answer_of_the_model_is_an_error(reps: dict[str, Dense], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        evaluate(Broken(reps), [PAIRS])  # type: ignore[arg-type]
