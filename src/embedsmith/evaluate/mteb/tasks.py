"""Tasks for mteb: ours as its own, offline; its own by name, where a hub is reachable; and samples of them."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embedsmith.core.errors import EvaluationError, MissingExtraError
from embedsmith.core.settings import did_you_mean
from embedsmith.evaluate.run import digest, task_content
from embedsmith.evaluate.tasks.kinds import Task
from embedsmith.evaluate.tasks.labelled import ClassificationTask, ClusteringTask
from embedsmith.evaluate.tasks.pairs import PairClassificationTask, STSTask
from embedsmith.evaluate.tasks.ranking import RerankingTask, RetrievalTask

_BLANK = ("date", "domains", "task_subtypes", "license", "annotations_creators", "dialect", "sample_creation")


def need_mteb() -> Any:
    """The package. Errors: `MissingExtraError` where it is not installed."""
    try:
        import mteb
    except ImportError as error:
        raise MissingExtraError("mteb", "eval") from error
    return mteb


@dataclass(frozen=True)
class SampleLimits:
    """A sample of a retrieval task: `queries` of them, drawn with `seed`, against the whole corpus.

    With `documents` the corpus is cut too: every document judged relevant for a sampled query, and that many others.
    Scores of a cut corpus are higher than those of the whole one and are marked as not comparable.
    """

    queries: int
    documents: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.queries < 1 or (self.documents is not None and self.documents < 0):
            raise EvaluationError(f"limits of {self.queries} queries, {self.documents} documents", expected="1 or more")

    def as_dict(self) -> dict[str, Any]:
        """What goes into the result and into the name of its folder."""
        named = {"limit_queries": self.queries, "limit_seed": self.seed}
        return named if self.documents is None else {**named, "limit_documents": self.documents}

    def draw(self, data: Mapping[str, Any], name: str) -> dict[str, Any]:
        """The split with fewer queries, and with a smaller corpus where that is wanted."""
        judged = data["relevant_docs"]
        query_ids = [str(key) for key in data["queries"]["id"]]
        able = sorted(key for key in query_ids if any(grade > 0 for grade in judged.get(key, {}).values()))
        if not able:
            raise EvaluationError("no query has a relevant document", where=name)
        chance = random.Random(self.seed)
        chosen = set(chance.sample(able, min(self.queries, len(able))))
        queries = data["queries"].select([row for row, key in enumerate(query_ids) if key in chosen])
        corpus, ranked = data["corpus"], data.get("top_ranked")
        if self.documents is not None:
            ids = [str(key) for key in corpus["id"]]
            needed = {key for query in chosen for key, grade in judged[query].items() if grade > 0}
            needed |= {key for query in chosen for key in (ranked or {}).get(query, ())}
            others = [key for key in ids if key not in needed]
            needed |= set(chance.sample(others, min(self.documents, len(others))))
            corpus = corpus.select([row for row, key in enumerate(ids) if key in needed])
        return {**data, "queries": queries, "corpus": corpus, "relevant_docs": {key: judged[key] for key in chosen}}

    def apply_to(self, task: Any) -> Any:
        """The mteb task with its queries sampled when it loads, and the sample noted in its scores. Changes `task`.

        mteb has no such option; a `limits` handed to it is ignored, and the score is of all queries.
        Errors: `EvaluationError` for a task that is no retrieval.
        """
        from mteb.abstasks.retrieval import AbsTaskRetrieval

        if not isinstance(task, AbsTaskRetrieval):
            raise EvaluationError("limits are for retrieval tasks", where=task.metadata.name)
        whole = task.load_data
        sizes: dict[tuple[str, str], dict[str, int]] = {}

        def load_data(**options: Any) -> None:
            if task.data_loaded:
                return
            whole(**options)
            task.convert_v1_dataset_format_to_v2(num_proc=None)
            for subset, splits in task.dataset.items():
                for split, data in splits.items():
                    splits[split] = self.draw(data, task.metadata.name)
                    sizes[subset, split] = {part: len(splits[split][part]) for part in ("queries", "corpus")}

        def sizes_of(scores: Any, qrels: Any, results: Any, hf_split: str, hf_subset: str) -> dict[str, Any]:
            size = sizes[hf_subset, hf_split]
            counts = {"queries_scored": size["queries"], "documents_searched": size["corpus"]}
            return {**self.as_dict(), **counts, "comparable": self.documents is None}

        task.load_data, task.task_specific_scores = load_data, sizes_of
        return task


def hub_task(name: str, languages: Sequence[str] = ()) -> Any:
    """A task of mteb by name; its data is fetched when it runs. Errors: `EvaluationError` for an unknown name."""
    mteb = need_mteb()
    try:
        return mteb.get_task(name, languages=list(languages) or None)
    except KeyError as error:
        known = [task.metadata.name for task in mteb.get_tasks()]
        raise EvaluationError(f"mteb has no task {name!r}{did_you_mean(name, known)}") from error


def as_mteb_task(task: Task, split: str = "test") -> Any:
    """One of our tasks as an mteb task that needs no network. Its revision is a hash of its content.

    Errors: `EvaluationError` for a kind that mteb does not have.
    """
    need_mteb()
    makers: dict[type, Callable[[Any, str], Any]] = {
        STSTask: _sts,
        RetrievalTask: _retrieval,
        RerankingTask: _retrieval,
        PairClassificationTask: _pairs,
        ClassificationTask: _classification,
        ClusteringTask: _clustering,
    }
    if type(task) not in makers:
        raise EvaluationError(f"mteb has no tasks of the kind {task.kind!r}", where=task.name)
    return makers[type(task)](task, split)


def _made(base: type, task: Task, kind: str, metric: str, split: str, dataset: Any, **settings: Any) -> Any:
    """An instance of a new subclass of mteb's `base` that holds its data already."""

    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.languages import ISO_TO_LANGUAGE, ISO_TO_SCRIPT

    undetermined = "und" in ISO_TO_LANGUAGE and "Zyyy" in ISO_TO_SCRIPT  # mteb refuses codes that it does not know
    metadata = TaskMetadata(
        name=task.name,
        description=f"{task.name}, from local files",
        type=kind,
        category="t2t",
        modalities=["text"],
        eval_splits=[split],
        eval_langs=["und-Zyyy"] if undetermined else ["eng-Latn"],
        main_score=metric,
        dataset={"path": f"local/{task.name}", "revision": digest(task_content(task))},
        reference=None,
        bibtex_citation=None,
        **dict.fromkeys(_BLANK),
    )

    def load_data(self: Any, **_: Any) -> None:
        self.dataset, self.data_loaded = dataset(), True

    made = type(f"Local{kind}", (base,), {"metadata": metadata, "load_data": load_data, **settings})
    return made()


def _retrieval(task: RetrievalTask | RerankingTask, split: str) -> Any:
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    def dataset() -> Any:
        from datasets import Dataset

        corpus = [{"id": key, "title": "", "text": text} for key, text in task.corpus.items()]
        queries = [{"id": key, "text": task.queries[key]} for key in task.judged()]
        judged = {query: dict(task.qrels[query]) for query in task.judged()}
        ranked = None
        if isinstance(task, RerankingTask):
            ranked = {query: list(task.candidates[query]) for query in task.judged()}
        tables = {"corpus": Dataset.from_list(corpus), "queries": Dataset.from_list(queries)}
        return {"default": {split: {**tables, "relevant_docs": judged, "top_ranked": ranked}}}

    if isinstance(task, RerankingTask):
        return _made(AbsTaskRetrieval, task, "Reranking", "map_at_1000", split, dataset)
    identical = {"ignore_identical_ids": task.ignore_identical_ids}
    return _made(AbsTaskRetrieval, task, "Retrieval", "ndcg_at_10", split, dataset, **identical)


def _sts(task: STSTask, split: str) -> Any:
    from mteb.abstasks.sts import AbsTaskSTS

    low, high = min(task.score), max(task.score)
    dataset = _columns(split, sentence1=list(task.text1), sentence2=list(task.text2), score=list(task.score))
    return _made(AbsTaskSTS, task, "STS", "cosine_spearman", split, dataset, min_score=low, max_score=high)


def _pairs(task: PairClassificationTask, split: str) -> Any:
    from mteb.abstasks.pair_classification import AbsTaskPairClassification

    dataset = _columns(split, sentence1=list(task.text1), sentence2=list(task.text2), labels=list(task.label))
    return _made(AbsTaskPairClassification, task, "PairClassification", "cosine_ap", split, dataset)


def _classification(task: ClassificationTask, split: str) -> Any:
    from mteb.abstasks.classification import AbsTaskClassification

    number = {label: code for code, label in enumerate(sorted(set(task.train_label)))}

    def dataset() -> Any:
        from datasets import Dataset, DatasetDict

        rows = {"train": (task.train_text, task.train_label), split: (task.text, task.label)}
        tables = {key: {"text": list(t), "label": [number[each] for each in ls]} for key, (t, ls) in rows.items()}
        return DatasetDict({key: Dataset.from_dict(table) for key, table in tables.items()})

    settings = {"samples_per_label": task.samples_per_label, "n_experiments": task.experiments}
    return _made(AbsTaskClassification, task, "Classification", "accuracy", split, dataset, **settings)


def _clustering(task: ClusteringTask, split: str) -> Any:
    from mteb.abstasks.clustering import AbsTaskClustering

    dataset = _columns(split, sentences=list(task.text), labels=list(task.label))
    settings = {
        "max_fraction_of_documents_to_embed": None,
        "max_document_to_embed": task.max_documents,
        "max_documents_per_cluster": task.sample,
        "n_clusters": task.experiments,
    }
    return _made(AbsTaskClustering, task, "Clustering", "v_measure", split, dataset, **settings)


def _columns(split: str, **columns: list[Any]) -> Any:
    def dataset() -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({split: Dataset.from_dict(columns)})

    return dataset
