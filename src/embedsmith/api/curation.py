"""The models and evaluation sets that the steps of a curation ask for."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from embedsmith.core.encoder import Encoder, Role
from embedsmith.core.errors import RecipeError
from embedsmith.curate import EvaluationText, Tools
from embedsmith.evaluate import load_task, split_names
from embedsmith.evaluate.tasks import labelled, pairs, ranking
from embedsmith.models import load


def curation_tools(data: str | None = None) -> Tools:
    """`data`: the folder where the names of evaluation tasks are looked up."""
    return Tools(encoder=load_encoder, evaluation=lambda names: evaluation_texts(names, data))


def load_encoder(path: str) -> tuple[Encoder, str]:
    """A model, and its fingerprint."""
    model = load(path)
    return model, model.fingerprint()


def evaluation_texts(names: Sequence[str], data: str | None) -> Iterator[EvaluationText]:
    """The texts of evaluation tasks, named as for `embedsmith evaluate`: texts of pairs and texts to classify count as
    queries; what a classifier is fitted on does not count. Errors: `EvaluationError` for unknown names."""
    for name in split_names(names):
        for role, texts in _texts_of(load_task(name, data_dir=data), name):
            yield from (EvaluationText(text, name, role) for text in texts)


def _texts_of(task: Any, name: str) -> list[tuple[Role, Iterable[str]]]:
    match task:
        case ranking.LongDocumentTask():
            return _texts_of(task.task, name)
        case ranking.RetrievalTask() | ranking.RerankingTask():
            return [("query", task.queries.values()), ("document", task.corpus.values())]
        case pairs.STSTask() | pairs.PairClassificationTask():
            return [("query", task.text1), ("query", task.text2)]
        case labelled.ClassificationTask() | labelled.ClusteringTask():
            return [("query", task.text)]
        case _:
            raise RecipeError(f"decontaminate cannot read the texts of {name!r} ({task.kind})")
