"""The models and evaluation sets that the steps of a curation ask for."""

from collections.abc import Iterator, Sequence

from embedsmith.core.encoder import Encoder
from embedsmith.core.errors import RecipeError
from embedsmith.core.reranker import Reranker
from embedsmith.curate import EvaluationText, Tools
from embedsmith.evaluate import load_task, split_names
from embedsmith.evaluate.overlap import texts_of
from embedsmith.models import load, load_reranker


def curation_tools(data: str | None = None) -> Tools:
    """`data`: the folder where the names of evaluation tasks are looked up."""
    return Tools(encoder=load_encoder, reranker=open_reranker, evaluation=lambda names: evaluation_texts(names, data))


def load_encoder(path: str) -> tuple[Encoder, str]:
    """A model, and its fingerprint."""
    model = load(path)
    return model, model.fingerprint()


def open_reranker(path: str) -> tuple[Reranker, str]:
    """A reranker, and its fingerprint."""
    model = load_reranker(path)
    return model, model.fingerprint()


def evaluation_texts(names: Sequence[str], data: str | None) -> Iterator[EvaluationText]:
    """The texts of evaluation tasks, named as for `embedsmith evaluate`: texts of pairs and texts to classify count as
    queries; what a classifier is fitted on does not count. Errors: `EvaluationError` for unknown names."""
    for name in split_names(names):
        task = load_task(name, data_dir=data)
        if (found := texts_of(task)) is None:
            raise RecipeError(f"decontaminate cannot read the texts of {name!r} ({task.kind})")
        for role, texts in found:
            yield from (EvaluationText(text, name, role) for text in texts)
