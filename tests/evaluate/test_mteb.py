"""Our figures are mteb's: the same vectors and the same judgements, scored by both. mteb rounds most to 5 decimals."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mteb", reason="needs mteb: pip install 'embedsmith[eval]'")

from embedsmith.core.errors import DataError, EvaluationError
from embedsmith.evaluate import HybridEncoder, RetrievalTask, STSTask, evaluate
from embedsmith.evaluate.mteb.run import (
    document_text,
    find_mteb_tasks,
    mteb_evaluate,
    mteb_name,
    mteb_task_name,
    query_text,
)
from embedsmith.evaluate.mteb.tasks import SampleLimits, as_mteb_task, hub_task
from tests.evaluate.examples import NamedEncoder, small_tasks
from tests.evaluate.test_retrieval import ManyHeads
from tests.evaluate.test_tasks import collection

pytestmark = pytest.mark.slow
_CUTS = (1, 3, 5, 10, 20, 100)


def both(task: Any, folder: Path, encoder: Any = None, **options: Any) -> tuple[dict[str, float], dict[str, float]]:
    encoder = encoder or NamedEncoder()
    mine = evaluate(encoder, [task], head=options.get("head", "dense"))[0].scores
    theirs = mteb_evaluate(encoder, [as_mteb_task(task)], folder, name="./runs/a/model", **options)[0].scores
    return dict(mine), dict(theirs)


@pytest.mark.parametrize("name", small_tasks())
def test_every_shared_task_has_the_figures_of_mteb(tmp_path: Path, name: str) -> None:
    mine, theirs = both(small_tasks()[name], tmp_path)
    shared = 0
    for score, value in mine.items():
        wanted = score
        if score.startswith("accuracy_at"):
            wanted = score.replace("accuracy", "hit_rate")
        elif name == "pairs" and not score.startswith("cosine"):
            wanted = f"similarity_{score}"
        if wanted in theirs:
            assert value == pytest.approx(theirs[wanted], abs=1e-5), score
            shared += 1
    assert shared == len(mine)


@pytest.mark.parametrize("identical", [False, True])
def test_ties_and_identical_ids_are_those_of_mteb(tmp_path: Path, identical: bool) -> None:
    plain = collection(documents=150, queries=40)
    corpus = dict(plain.corpus)
    if identical:  # some queries are documents too, with the same id and text
        corpus |= {query: plain.queries[query] for query in list(plain.queries)[:15]}
    duplicates = {f"e{number}": corpus[f"d{number}"] for number in range(60)}  # ties everywhere
    task = RetrievalTask("t", plain.queries, corpus | duplicates, plain.qrels, ignore_identical_ids=identical)
    mine, theirs = both(task, tmp_path)
    for k in _CUTS:
        for name in ("ndcg", "map", "recall", "precision", "mrr"):
            assert mine[f"{name}_at_{k}"] == pytest.approx(theirs[f"{name}_at_{k}"], abs=5.1e-6), (name, k)


@pytest.mark.parametrize("equal", [False, True])
def test_sts_figures_are_those_of_mteb(tmp_path: Path, equal: bool) -> None:
    """Pairs of equal texts are tied at a cosine of 1. Their fp32 inner products are not, in both: rounding."""
    random = np.random.default_rng(0)
    text1 = [f"left {number}" for number in range(80)]
    text2 = [text1[number] if equal and number % 4 == 0 else f"right {number}" for number in range(80)]
    task = STSTask("t", text1, text2, [float(score) for score in random.integers(0, 6, 80)])
    mine, theirs = both(task, tmp_path)
    for name in ("cosine_spearman", "cosine_pearson", *(() if equal else ("spearman", "pearson"))):
        assert mine[name] == pytest.approx(theirs[name], abs=1e-6), name


class NamedHeads(ManyHeads):
    def fingerprint(self) -> str:
        return "heads"


@pytest.mark.parametrize("head", ["dense", "sparse", "multivector", "hybrid"])
@pytest.mark.parametrize("task", ["search", "rerank"])
def test_every_head_goes_through_the_search_protocol(tmp_path: Path, head: str, task: str) -> None:
    encoder = HybridEncoder(NamedHeads())
    mine, theirs = both(small_tasks()[task], tmp_path, encoder, head=head)
    for name in ("ndcg_at_10", "map_at_100", "recall_at_5"):
        assert mine[name] == pytest.approx(theirs[name], abs=1e-5), name
    if head != "dense":
        assert list(tmp_path.glob(f"results/*/*/experiments/head_{head}/*.json"))
        with pytest.raises(EvaluationError, match="retrieval and reranking only"):
            mteb_evaluate(encoder, [as_mteb_task(small_tasks()["sts"])], tmp_path, name="./m", head=head)


def test_two_models_of_one_name_do_not_share_results_and_a_model_is_not_run_twice(tmp_path: Path) -> None:
    task = as_mteb_task(small_tasks()["search"])
    run = lambda encoder: mteb_evaluate(encoder, [task], tmp_path, name="./runs/a/model")[0].main_score
    first, other = run(NamedEncoder(4)), run(NamedEncoder(32))
    assert first != other
    again = NamedEncoder(4)
    assert run(again) == first
    assert not again.calls


def test_prompts_reach_their_roles(tmp_path: Path) -> None:
    encoder = NamedEncoder()
    tasks = small_tasks()
    chosen = [as_mteb_task(tasks[name]) for name in ("sts", "pairs", "clusters", "search")]
    mteb_evaluate(encoder, chosen, tmp_path, name="./m")
    asked = [(role, task) for _, role, task in encoder.calls]
    query = [("query", "sts")] * 2 + [("query", "pair_classification")] * 2 + [("query", "clustering")]
    assert asked == [*query, ("query", "retrieval"), ("document", "retrieval")]


def test_limits_sample_the_queries_keep_the_corpus_and_say_so(tmp_path: Path) -> None:
    task = small_tasks()["search"]
    run = lambda limits: mteb_evaluate(NamedEncoder(), [as_mteb_task(task)], tmp_path, name="./m", limits=limits)
    result = run(SampleLimits(5, seed=3))[0]
    whole = evaluate(NamedEncoder(), [task])[0]
    (file,) = tmp_path.glob("results/*/*/experiments/limit_queries_5__limit_seed_3/search.json")
    told = json.loads(file.read_text())["scores"]["test"][0]
    assert (told["limit_queries"], told["documents_searched"], told["comparable"]) == (5, len(task.corpus), True)
    ndcg = whole.items["ndcg_at_10"].tolist()
    combinations = [abs(np.mean(part) - result.main_score) for part in _means_of_five(ndcg, whole.item_ids)]
    assert min(combinations) < 1e-5, "the score is the mean over five of the queries, as scored on the whole corpus"
    cut = run(SampleLimits(5, documents=3, seed=3))[0]
    assert cut.counts["documents_searched"] < len(task.corpus)
    assert "not comparable" in cut.notes[0]
    assert len(list(tmp_path.glob("results/*/*/experiments/*/search.json"))) == 2


def _means_of_five(values: list[float], ids: Any) -> list[list[float]]:
    import random

    chosen = random.Random(3).sample(sorted(ids), 5)
    return [[values[list(ids).index(key)] for key in chosen]]


def test_limits_are_for_retrieval_and_positive() -> None:

    with pytest.raises(EvaluationError, match="limits are for retrieval"):
        SampleLimits(3).apply_to(as_mteb_task(small_tasks()["sts"]))
    with pytest.raises(EvaluationError, match="1 or more"):
        SampleLimits(0)


def test_names_of_models_and_tasks() -> None:
    assert mteb_name("org/model") == "org/model"
    assert mteb_name("/home/me/runs/a/checkpoints/step-5/model") == "local/runs-a-step-5"
    assert mteb_name("./model") == "local/model"
    assert mteb_task_name("PairClassification") == "pair_classification"
    assert mteb_task_name("STS") == "sts"


def test_texts_are_joined_as_mteb_joins_them() -> None:
    assert document_text({"title": "T", "text": "body "}) == "T body"
    assert document_text({"title": None, "text": " body"}) == "body"
    assert query_text({"text": "q", "instruction": "i"}) == "q i"
    with pytest.raises(EvaluationError, match="conversations"):
        query_text({"text": [{"role": "user"}]})


def test_tasks_are_found_by_path_and_by_name_and_a_missing_hub_is_told(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [{"text1": f"a {n}", "text2": f"b {n}", "score": n} for n in range(4)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    (ours,) = find_mteb_tasks([str(file)])
    assert ours.metadata.name == "mine"
    with pytest.raises(EvaluationError, match="did you mean 'STSBenchmark"):
        hub_task("STSBenchmarkk")
    with pytest.raises(DataError, match="cannot be fetched"):
        mteb_evaluate(NamedEncoder(), [hub_task("T2Retrieval")], tmp_path, name="./m")


REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command of `scripts/` in this process, with a stand-in for the model."""
    import runpy

    asked: list[Any] = []

    def load(path: str, **options: Any) -> Any:
        asked.append((path, options))
        return NamedEncoder()

    monkeypatch.setattr("embedsmith.models.load", load)

    def run(name: str, *arguments: str) -> list[Any]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPOSITORY / "scripts" / name), run_name="__main__")
        assert ended.value.code in (0, None)
        return asked

    return run


def test_the_commands_of_the_reference(tmp_path: Path, scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    local = as_mteb_task(small_tasks()["search"])
    monkeypatch.setattr("embedsmith.compat.scripts.find_mteb_tasks", lambda names, **_: [local])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # set by --device cpu
    monkeypatch.setattr("embedsmith.core.device._cpu_alone", False)
    asked = scripts(
        "evaluate_mteb_t2retrieval_models.py",
        *("--model", "qwen3embedding", "--model_id", "org/some", "--batch_size", "8", "--limits", "4"),
        *("--device", "cpu", "--query_instruction", r"Instruct: find\nQuery: ", "--output_folder", str(tmp_path / "a")),
    )
    path, options = asked[0]
    assert path == "org/some"
    assert options["prompts"]["query"] == "Instruct: find\nQuery: ", "an escaped line break is one"
    assert list((tmp_path / "a").glob("results/*/*/experiments/limit_queries_4*/search.json"))
    scripts(
        "evaluate_extractor_mteb.py",
        *("--ckpt_dir", "runs/a/model", "--tasks", "search", "--output_folder", str(tmp_path / "b")),
    )
    assert list((tmp_path / "b").glob("results/*/*/search.json"))
