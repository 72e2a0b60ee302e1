"""Our figures are mteb's: the same vectors and the same judgements, scored by both. mteb rounds most to 5 decimals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedsmith.evaluate import RetrievalTask, STSTask, evaluate
from tests.evaluate.fakes import HashEncoder, vector
from tests.evaluate.test_tasks import collection

pytestmark = pytest.mark.slow
_CUTS = (1, 3, 5, 10, 20, 100)


@pytest.fixture(scope="module")
def mteb() -> Any:
    return pytest.importorskip("mteb", reason="needs mteb: pip install 'embedsmith[eval]'")


def metadata(name: str, kind: str, main_score: str) -> Any:
    from mteb.abstasks.task_metadata import TaskMetadata

    blank = ("date", "domains", "task_subtypes", "license", "annotations_creators", "dialect", "sample_creation")
    return TaskMetadata(
        name=name,
        description=name,
        type=kind,
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=main_score,
        dataset={"path": "local/none", "revision": "1"},
        reference=None,
        bibtex_citation=None,
        **dict.fromkeys(blank),
    )


def retrieval_task(ours: RetrievalTask) -> Any:
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    class Local(AbsTaskRetrieval):
        metadata = metadata("LocalRetrieval", "Retrieval", "ndcg_at_10")
        ignore_identical_ids = ours.ignore_identical_ids

        def load_data(self, **_: Any) -> None:
            corpus = [{"id": key, "title": "", "text": text} for key, text in ours.corpus.items()]
            queries = [{"id": key, "text": text} for key, text in ours.queries.items()]
            split = {
                "corpus": Dataset.from_list(corpus),
                "queries": Dataset.from_list(queries),
                "relevant_docs": {query: dict(judged) for query, judged in ours.qrels.items()},
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Local()


def sts_task(ours: STSTask) -> Any:
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.sts import AbsTaskSTS

    class Local(AbsTaskSTS):
        metadata = metadata("LocalSTS", "STS", "cosine_spearman")
        min_score, max_score = 0, 5

        def load_data(self, **_: Any) -> None:
            columns = {"sentence1": list(ours.text1), "sentence2": list(ours.text2), "score": list(ours.score)}
            self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
            self.data_loaded = True

    return Local()


def scores_of_mteb(mteb: Any, task: Any, folder: Path) -> dict[str, float]:
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta

    class Hashed(AbsEncoder):
        def __init__(self) -> None:
            self.mteb_model_meta = ModelMeta.create_empty({"name": "local/hash", "revision": folder.name})

        def encode(self, inputs: Any, **_: Any) -> Any:
            return np.stack([vector(text).numpy() for batch in inputs for text in batch["text"]])

    cache = mteb.ResultCache(cache_path=folder)
    done = mteb.evaluate(Hashed(), [task], cache=cache, overwrite_strategy="always", co2_tracker=False)
    found: dict[str, float] = done.task_results[0].scores["test"][0]
    return found


@pytest.mark.parametrize("identical", [False, True])
def test_retrieval_figures_are_those_of_mteb(mteb: Any, tmp_path: Path, identical: bool) -> None:
    plain = collection(documents=150, queries=40)
    corpus = dict(plain.corpus)
    if identical:  # some queries are documents too, with the same id and text
        corpus |= {query: plain.queries[query] for query in list(plain.queries)[:15]}
    duplicates = {f"e{number}": corpus[f"d{number}"] for number in range(60)}  # ties everywhere
    ours = RetrievalTask("t", plain.queries, corpus | duplicates, plain.qrels, ignore_identical_ids=identical)
    theirs = scores_of_mteb(mteb, retrieval_task(ours), tmp_path)
    mine = evaluate(HashEncoder(), [ours])[0].scores
    for k in _CUTS:
        for name in ("ndcg", "map", "recall", "precision"):
            assert mine[f"{name}_at_{k}"] == pytest.approx(theirs[f"{name}_at_{k}"], abs=5.1e-6), (name, k)
        assert mine[f"accuracy_at_{k}"] == pytest.approx(theirs[f"hit_rate_at_{k}"], abs=5.1e-6)
        assert mine[f"mrr_at_{k}"] == pytest.approx(theirs[f"mrr_at_{k}"], abs=1e-6)


@pytest.mark.parametrize("equal", [False, True])
def test_sts_figures_are_those_of_mteb(mteb: Any, tmp_path: Path, equal: bool) -> None:
    """Pairs of equal texts are tied at a cosine of 1. Their fp32 inner products are not, in both: rounding."""
    random = np.random.default_rng(0)
    text1 = [f"left {number}" for number in range(80)]
    text2 = [text1[number] if equal and number % 4 == 0 else f"right {number}" for number in range(80)]
    ours = STSTask("t", text1, text2, [float(score) for score in random.integers(0, 6, 80)])
    theirs = scores_of_mteb(mteb, sts_task(ours), tmp_path)
    mine = evaluate(HashEncoder(), [ours])[0].scores
    for name in ("cosine_spearman", "cosine_pearson", *(() if equal else ("spearman", "pearson"))):
        assert mine[name] == pytest.approx(theirs[name], abs=1e-6), name
