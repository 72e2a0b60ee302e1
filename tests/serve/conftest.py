"""A tiny model of three heads, an index that it made, and the application that serves both."""

import pytest
import torch
from fastapi.testclient import TestClient

from embedsmith.index import Document, EdgeStore, open_index
from embedsmith.serve.app import http_app
from embedsmith.serve.service import Service, Sources
from tests.models.tiny import embedder

HEADS = ("dense", "sparse", "multivector")
WORDS = ["the fox jumps", "a dog", "late interaction", "text vectors", "quick fox", "query: the dog", "passage"]


class Overlap:
    """A reranker that counts the letters that both texts have, as logits around 0."""

    def __init__(self):
        self.calls = []

    def score(self, queries, documents):
        self.calls.append(len(queries))
        pairs = zip(queries, documents, strict=True)
        return torch.tensor([len(set(left) & set(right)) - 4.0 for left, right in pairs])


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    torch.manual_seed(0)
    prompts = {"query": "query: ", "document": ""}
    return embedder(tmp_path_factory.mktemp("tiny"), heads=HEADS, prompts=prompts)


@pytest.fixture(scope="session")
def folder(model, tmp_path_factory):
    """The model's folder."""
    place = tmp_path_factory.mktemp("saved") / "tiny"
    model.save(place)
    return place


@pytest.fixture(scope="session")
def index_folder(model, tmp_path_factory):
    place = tmp_path_factory.mktemp("index") / "docs"
    made = open_index(model, EdgeStore(place), heads=HEADS, create=True)
    made.add([Document(str(n), text, {"lang": "en" if n % 2 else "zh", "n": n}) for n, text in enumerate(WORDS)])
    made.store.close()
    return place


@pytest.fixture(scope="session")
def service(model, index_folder):
    stores = [lambda: EdgeStore(index_folder, read_only=True)]
    made = Service(Sources({"tiny": lambda: model}, stores, Overlap, "overlap"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def client(service):
    return TestClient(http_app(service), raise_server_exceptions=False)
