"""Models are loaded anew while requests come: none is lost, each is answered by the old one or the new."""

import shutil
import threading

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from embedsmith.core.errors import ModelError, SearchError
from embedsmith.index import Document, EdgeStore, open_index
from embedsmith.models import load
from embedsmith.serve.app import http_app
from embedsmith.serve.failures import ClosedError, ReloadingError
from embedsmith.serve.service import Service, Sources
from tests.models.tiny import embedder


def changed(model, folder):
    """The same model with other weights."""
    with torch.no_grad():
        model.backbone.embeddings.word_embeddings.weight.add_(0.5 * torch.randn(120, 16))
    model.save(folder)
    return model


def test_a_swap_drops_no_request_and_mixes_no_models(tmp_path):
    place = tmp_path / "model"
    old = embedder(tmp_path / "plain")
    old.save(place)
    loads = []
    service = Service(Sources({"m": lambda: loads.append(1) or load(str(place), device="cpu")}))
    client = TestClient(http_app(service), raise_server_exceptions=False)
    texts = ["the fox", "a dog"]
    before = load(str(place), device="cpu").encode(texts)
    after = changed(embedder(tmp_path / "other"), place).encode(texts)
    assert np.abs(before - after).max() > 1e-3
    answers, ended = [], threading.Event()

    def ask():
        while not ended.is_set():
            answers.append(client.post("/v1/embeddings", json={"input": texts}))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        assert client.post("/admin/reload", json={"models": ["m"]}).json() == {"reloaded": ["m"]}
    ended.set()
    for thread in threads:
        thread.join()
    assert len(loads) == 4
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:
        found = np.array([row["embedding"] for row in answer.json()["data"]])
        assert min(np.abs(found - before).max(), np.abs(found - after).max()) < 1e-6
    last = client.post("/v1/embeddings", json={"input": texts}).json()["data"]
    assert np.abs(np.array([row["embedding"] for row in last]) - after).max() < 1e-6
    assert "embedsmith_reloads_total 3.0" in client.get("/metrics").text


def test_what_cannot_be_loaded_changes_nothing(tmp_path):
    place, index = tmp_path / "model", tmp_path / "index"
    model = embedder(tmp_path / "plain")
    model.save(place)
    made = open_index(model, EdgeStore(index), create=True)
    made.add([Document("1", "the fox")])
    made.store.close()
    sources = Sources({"m": lambda: load(str(place), device="cpu")}, [lambda: EdgeStore(index, read_only=True)])
    service = Service(sources)
    client = TestClient(http_app(service), raise_server_exceptions=False)
    found = lambda: [hit["id"] for hit in client.post("/search", json={"query": "fox"}).json()["hits"]]
    assert found() == ["1"]
    service.reload()
    assert found() == ["1"]
    changed(embedder(tmp_path / "other"), place)
    with pytest.raises(SearchError, match="made by another model"):
        service.reload()
    assert found() == ["1"]
    shutil.rmtree(place)
    with pytest.raises(ModelError):
        service.reload()
    assert found() == ["1"]
    with service._reloading, pytest.raises(ReloadingError):
        service.reload()
    assert client.post("/admin/reload", json={"models": ["x"]}).status_code == 404
    service.close()


def test_a_closed_service_answers_what_it_took_and_takes_no_more(model):
    service = Service(Sources({"m": lambda: model}))
    future = service.models["m"].submit(["the fox"] * 50, "document")
    service.close()
    assert len(future.result(0).token_N) == 50
    client = TestClient(http_app(service), raise_server_exceptions=False)
    refused = client.post("/v1/embeddings", json={"input": "a"})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert client.get("/health").status_code == 503
    with pytest.raises(ClosedError):
        service._of_the_present(lambda: service.models["m"].submit(["a"], "document"))
