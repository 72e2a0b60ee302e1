"""Our models under mteb 2: dense ones as its encoders, all heads through its search protocol. Results are mteb's JSON,
in the layout of the public leaderboard.

mteb is imported where it is used. Its classes are structural protocols, so nothing here inherits from it.
"""

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from embedsmith.core.encoder import Encoder, Role, fingerprint, main_head
from embedsmith.core.errors import DataError, EvaluationError
from embedsmith.core.reps import Dense, Representation
from embedsmith.data.record import titled
from embedsmith.evaluate.encoding import Reader, looks_like_a_path
from embedsmith.evaluate.mteb.tasks import SampleLimits, as_mteb_task, hub_task, need_mteb
from embedsmith.evaluate.result import Results, TaskResult
from embedsmith.evaluate.run import digest
from embedsmith.evaluate.tasks.kinds import data_folder, known_tasks, load_task
from embedsmith.search import TopK
from embedsmith.search.exact import on_device, search_device

_TYPES = {"dense": "dense", "sparse": "sparse", "multivector": "late-interaction", "hybrid": "hybrid"}
_INNER = ("model", "checkpoints")  # folder names that say nothing about which model it is


def mteb_evaluate(
    encoder: Encoder,
    tasks: Sequence[Any],
    output: str | Path,
    *,
    name: str | Path,
    revision: str | None = None,
    head: str | None = None,
    limits: SampleLimits | None = None,
    progress: bool | None = None,
) -> Results:
    """Score `encoder` on tasks of mteb (or ours made into them, see `as_mteb_task`) with mteb itself.

    mteb writes `OUTPUT/results/NAME/REVISION/TASK.json`, below `experiments/` for another head than `dense` and for a
    sample. Tasks that are there already are not run again.
    Errors: `EvaluationError` for a task whose data cannot be fetched, and one that the head cannot do.
    """
    mteb = need_mteb()
    from datasets.exceptions import DatasetNotFoundError
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    head = head or main_head(encoder)
    experiment = None if limits is None else limits.as_dict()
    kind = MtebEncoder if head == "dense" else MtebSearch
    model = kind.of(encoder, mteb_name(name), revision, head, experiment, progress)
    chosen = [task if limits is None else limits.apply_to(task) for task in tasks]
    cache = mteb.ResultCache(cache_path=Path(output))
    found: list[TaskResult] = []
    logging.getLogger("mteb").setLevel(logging.ERROR)
    for task in chosen:
        if head != "dense" and not isinstance(task, AbsTaskRetrieval):
            raise EvaluationError(
                f"mteb scores the head {head!r} on retrieval and reranking only",
                where=task.metadata.name,
                fix="use embedsmith's own evaluation for this head",
            )
        try:
            done = mteb.evaluate(model, [task], cache=cache, co2_tracker=False, show_progress_bar=bool(progress))
        except (OSError, DatasetNotFoundError) as error:
            raise DataError(
                f"the data cannot be fetched ({str(error).splitlines()[0][:200]})",
                where=task.metadata.name,
                fix="connect to the hub, or use local files: paths of STS files and BEIR folders are tasks too",
            ) from error
        found.append(from_mteb(done.task_results[0], task.metadata))
    meta = model.mteb_model_meta
    about = {"model": meta.name, "revision": meta.revision, "engine": f"mteb {mteb.__version__}", "head": head}
    return Results(tuple(found), about | (experiment or {}))


def find_mteb_tasks(
    names: Sequence[str], *, data: str | Path | None = None, split: str = "test", languages: Sequence[str] = ()
) -> list[Any]:
    """Tasks by name: a path or a name in the data folder is a task of ours, anything else one of mteb's.
    `languages` (such as `cmn`) choose among the parts of mteb's multilingual tasks.

    Errors: as `load_task` and `hub_task`.
    """
    folder = data_folder(data)
    known = set() if folder is None else set(known_tasks(folder))
    tasks = []
    for name in names:
        ours = os.path.exists(name) or ":" in name or name in known or f"{name}-{split}" in known
        tasks.append(
            as_mteb_task(load_task(name, data_dir=data, split=split), split) if ours else hub_task(name, languages)
        )
    return tasks


def from_mteb(result: Any, metadata: Any) -> TaskResult:
    """mteb's result as ours: the mean over splits and languages, as mteb's leaderboard takes it."""
    rows = [row for rows in result.scores.values() for row in rows]
    numbers: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                numbers.setdefault(key, []).append(float(value))
    scores = {key: sum(values) / len(values) for key, values in numbers.items()}
    for key in [key for key in scores if key.startswith("limit_")]:
        del scores[key]
    metric = str(metadata.main_score) if metadata.main_score in scores else "main_score"
    sizes: tuple[str, ...] = ("queries_scored", "documents_searched")
    cut = any(row.get("comparable") is False for row in rows)
    counts = {key: int(scores.pop(key)) for key in sizes if key in scores}
    notes: list[str] = ["the corpus was cut: the score is not comparable with others"] if cut else []
    notes += ["the score does not exist: the model gives all texts the same"] if math.isnan(scores[metric]) else []
    kind, seconds = mteb_task_name(metadata.type), float(result.evaluation_time or 0.0)
    return TaskResult(result.task_name, kind, metric, scores, counts, notes=tuple(notes), seconds=seconds)


def mteb_name(model: str | Path) -> str:
    """The name under which mteb files a model's results: hub ids stay, folders become `local/PARTS`.

    Only the last parts of a path remain; the revision tells models of one name apart.
    """
    if not looks_like_a_path(model) and not os.path.exists(model) and str(model).count("/") == 1:
        return str(model)
    parts = [part for part in Path(model).parts if part not in _INNER and part not in ("/", ".", "..")]
    return f"local/{re.sub(r'[^A-Za-z0-9.-]+', '-', '-'.join(parts[-3:])).strip('-') or 'model'}"


def mteb_task_name(kind: str) -> str:
    """mteb's name of a kind of task as ours: `PairClassification` is `pair_classification`, `STS` is `sts`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind).lower()


@dataclass
class MtebSearch:
    """Any head as an mteb search model: the corpus is kept as texts by `index`, then encoded and scored in pieces by
    `search`, exactly, with ties ordered by id as trec_eval does."""

    encoder: Encoder
    mteb_model_meta: Any
    head: str = "dense"
    progress: bool | None = None
    _corpus: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls,
        encoder: Encoder,
        name: str,
        revision: str | None = None,
        head: str = "dense",
        experiment: Mapping[str, Any] | None = None,
        progress: bool | None = None,
    ) -> Self:
        """`encoder` as mteb takes models, with a name and a revision of its own. `experiment` becomes the name of the
        folder with the results.

        mteb's cache knows a model by these two only, and gives every local model the same ones; so the revision is the
        encoder's fingerprint unless another one is given.
        Errors: `ModelError` for an encoder without a fingerprint and no revision.
        """
        need_mteb()
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        named = {**({} if head == "dense" else {"head": head}), **(experiment or {})}
        facts = {
            "name": name,
            "revision": revision or digest(fingerprint(encoder)),
            "model_type": [_TYPES.get(head, "dense")],
            "framework": ["PyTorch"],
            "similarity_fn_name": ScoringFunction.MAX_SIM if head == "multivector" else ScoringFunction.DOT_PRODUCT,
            "experiment_kwargs": named or None,
        }
        return cls(encoder, ModelMeta.create_empty(overwrites=facts), head, progress)

    def index(self, corpus: Any, **_: Any) -> None:
        """Keep the documents. Keyword arguments are mteb's and not needed."""
        self._corpus = {str(row["id"]): document_text(row) for row in corpus}

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **_: Any,
    ) -> dict[str, dict[str, float]]:
        """Document ids and scores of the best documents of every query; of its candidates only with `top_ranked`."""
        asked = {str(row["id"]): query_text(row) for row in queries}
        task = mteb_task_name(task_metadata.type)
        reps = self._reader.all(list(asked.values()), role="query", task=task, label=f"{task_metadata.name} queries")
        if top_ranked is not None:
            return self._reranked(list(asked), reps, top_ranked, top_k, task)
        ids = sorted(self._corpus, reverse=True)
        best = TopK(reps, top_k)
        texts, label = [self._corpus[key] for key in ids], f"{task_metadata.name} corpus"
        for piece in self._reader.pieces(texts, role="document", task=task, label=label):
            best.add_in_blocks(piece)
        rows = zip(asked, *(part.tolist() for part in best.result()), strict=True)
        return {query: {ids[i]: score for i, score in zip(index_k, score_k)} for query, score_k, index_k in rows}

    def _reranked(
        self, query_ids: list[str], reps: Representation, top_ranked: Mapping[str, Sequence[str]], top_k: int, task: str
    ) -> dict[str, dict[str, float]]:
        wanted = sorted({document for query in query_ids for document in top_ranked.get(query, ())})
        texts = [self._corpus[document] for document in wanted]
        documents = self._reader.all(texts, role="document", task=task, label="candidates")
        place = {document: row for row, document in enumerate(wanted)}
        run: dict[str, dict[str, float]] = {}
        device = search_device(reps)
        reps = on_device(reps, device)
        for number, query in enumerate(query_ids):
            ids = list(top_ranked.get(query, ()))
            mine = documents.rows(torch.tensor([place[document] for document in ids], dtype=torch.int64))
            mine = on_device(mine, device)
            score_K = reps.rows(slice(number, number + 1)).scores(mine)[0, 0].tolist() if ids else []
            best = sorted(zip(score_K, ids, strict=True), reverse=True)[:top_k]
            run[query] = {document: score for score, document in best}
        return run

    @property
    def _reader(self) -> Reader:
        return Reader(self.encoder, self.head, self.progress)


@dataclass
class MtebEncoder(MtebSearch):
    """A dense model as an mteb encoder too, for its tasks that want vectors."""

    _kind: type[Dense] = field(default=Dense, init=False, repr=False)

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **_: Any) -> npt.NDArray[np.float32]:
        """vector_ND of the texts of a data loader. Whatever is not a document gets the prompt for queries."""
        texts = [text for batch in inputs for text in batch["text"]]
        role: Role = "document" if getattr(prompt_type, "value", prompt_type) == "document" else "query"
        task = mteb_task_name(task_metadata.type)
        rep = self._reader.all(texts, role=role, task=task, label=task_metadata.name)
        if not isinstance(rep, Dense):
            raise EvaluationError(f"the head {self.head!r} has no vectors", where=task_metadata.name)
        self._kind = type(rep)
        vector_ND: npt.NDArray[np.float32] = rep.vector_ND.float().numpy()
        return vector_ND

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Every row with every row, as the model compares: inner products, or minus a distance."""
        left, right = (torch.atleast_2d(torch.as_tensor(side)).float() for side in (embeddings1, embeddings2))
        return self._kind(left).scores(self._kind(right))[0]

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """The same row by row."""
        left, right = (torch.as_tensor(side).float() for side in (embeddings1, embeddings2))
        return self._kind(left).paired(self._kind(right))[0]


def document_text(row: Mapping[str, Any]) -> str:
    """Title and text, joined by one space, as mteb joins them."""
    return titled(row.get("title"), str(row["text"])).strip()


def query_text(row: Mapping[str, Any]) -> str:
    """The query, with the instruction of this query behind it where the task gives one, as mteb joins them.

    Errors: `EvaluationError` for a conversation.
    """
    text, instruction = row["text"], row.get("instruction")
    if not isinstance(text, str):
        raise EvaluationError("the queries are conversations, which are not supported")
    return text if instruction is None else f"{text} {instruction}"
