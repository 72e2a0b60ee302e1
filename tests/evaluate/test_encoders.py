"""sentence-transformers models as encoders: which prompt, which length, which error."""

import builtins
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from embedsmith.core.errors import EvaluationError, MissingExtraError, ModelError
from embedsmith.evaluate.encoding import SentenceTransformersEncoder, looks_like_a_path


class FakeModel:
    def __init__(self, prompts: dict[str, str], default: str | None = None, similarity: str = "cosine") -> None:
        self.prompts, self.default_prompt_name, self.similarity_fn_name = prompts, default, similarity
        self.asked: list[dict[str, Any]] = []

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        self.asked.append({"texts": texts, **options})
        return np.ones((len(texts), 2), np.float16)


@pytest.mark.parametrize(
    ("prompts", "default", "role", "task", "expected"),
    [
        ({}, None, "query", "sts", None),
        ({"query": "Q:", "document": "D:"}, None, "query", None, "Q:"),
        ({"query": "Q:", "passage": "P:"}, None, "document", "retrieval", "P:"),
        ({"query": "Q:", "sts": "S:"}, None, "query", "sts", "S:"),
        ({"query": "Q:", "retrieval-query": "R:"}, None, "query", "retrieval", "R:"),
        ({"general": "G:"}, "general", "document", None, "G:"),
        ({"general": "G:", "query": ""}, "general", "query", None, ""),
    ],
)
def test_the_prompt_of_a_role(
    prompts: dict[str, str], default: str | None, role: Any, task: str | None, expected: str | None
) -> None:
    model = FakeModel(prompts, default)
    reps = SentenceTransformersEncoder(model, batch_size=5).represent(["a", "b"], role=role, task=task)
    assert reps["dense"].tensors()[0].dtype.is_floating_point
    assert model.asked[0]["prompt"] == expected
    assert model.asked[0]["batch_size"] == 5
    assert model.asked[0]["texts"] == ["a", "b"]


@pytest.mark.parametrize(("similarity", "normalized"), [("cosine", True), ("dot", False)])
def test_vectors_are_normalised_where_the_model_compares_by_cosine(similarity: str, normalized: bool) -> None:
    model = FakeModel({}, similarity=similarity)
    SentenceTransformersEncoder(model).represent(["a"], role="query")
    assert model.asked[0]["normalize_embeddings"] is normalized


def test_what_it_cannot_do_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="sparse"):
        SentenceTransformersEncoder(FakeModel({})).represent(["a"], role="query", outputs=("sparse",))
    with pytest.raises(EvaluationError, match="euclidean"):
        SentenceTransformersEncoder(FakeModel({}, similarity="euclidean")).represent(["a"], role="query")


def test_without_the_package_the_error_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    importer = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("sentence_transformers"):
            raise ImportError(name)
        return importer(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"embedsmith\[eval\]"):
        SentenceTransformersEncoder.load("anything")


def test_loading_sets_the_length_and_adds_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = FakeModel({"query": "Q:"})
    library = SimpleNamespace(SentenceTransformer=lambda path, device: made)
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    encoder = SentenceTransformersEncoder.load(tmp_path, max_length=7, prompts={"document": "D:"})
    assert encoder.model.max_seq_length == 7
    assert encoder.model.prompts == {"query": "Q:", "document": "D:"}
    with pytest.raises(ModelError, match="no such folder"):
        SentenceTransformersEncoder.load("./nowhere")


@pytest.mark.parametrize(("text", "path"), [("a/b", False), ("b", False), ("./b", True), ("/b", True), ("a/b/c", True)])
def test_hub_ids_and_paths(text: str, path: bool) -> None:
    assert looks_like_a_path(text) is path
