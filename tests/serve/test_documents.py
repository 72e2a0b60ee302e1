"""Documents through the server: on the disk when they are acknowledged, found at once, kept through everything."""

import json
import signal
import threading

import httpx
import pytest
from fastapi.testclient import TestClient

from embedsmith.core.errors import SearchError
from embedsmith.index import EdgeStore
from embedsmith.serve.app import http_app
from embedsmith.serve.service import Service, Sources
from tests.serve.conftest import HEADS
from tests.serve.test_server import process


def served(model, folder):
    service = Service(Sources({"tiny": lambda: model}, [lambda: EdgeStore(folder)], writable=True))
    return service, TestClient(http_app(service), raise_server_exceptions=False)


def row(number, text="the fox"):
    return {"id": str(number), "text": f"{text} {number}", "fields": {"n": number}}


def test_documents_are_written_found_replaced_and_deleted(model, tmp_path):
    service, client = served(model, tmp_path / "index")
    ask = lambda path, **body: client.post(path, json=body).json()
    written = ask("/documents", documents=[row(n) for n in range(5)])
    assert written == {"model": "tiny", "new": 5, "changed": 0, "unchanged": 0, "size": 5}
    written = ask("/documents", documents=[row(0), row(1, "a dog"), row(9)])
    assert written == {"model": "tiny", "new": 1, "changed": 1, "unchanged": 1, "size": 6}
    hits = ask("/search", query="a dog 1", filter={"n": {"gte": 1, "lte": 2}})["hits"]
    assert {(hit["text"], hit["fields"]["n"]) for hit in hits} == {("a dog 1", 1), ("the fox 2", 2)}
    assert {"dense", "multivector"} <= set(hits[0]["heads"]) <= set(HEADS)
    with pytest.raises(SearchError, match="another process has this index open"):
        EdgeStore(tmp_path / "index")
    service.reload()
    assert ask("/documents/delete", ids=["1", "no such"]) == {"model": "tiny", "size": 5}
    assert "1" not in {hit["id"] for hit in ask("/search", query="a dog 1")["hits"]}
    service.close()
    kept = EdgeStore(tmp_path / "index", read_only=True)
    assert kept.count() == 5
    kept.close()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"documents": []}, "at least 1"),
        ({"documents": [{"id": "", "text": "a"}]}, "at least 1 character"),
        ({"documents": [{"id": "a", "text": ""}]}, "empty"),
        ({"documents": [{"id": "a"}]}, "'documents.0.text' is missing"),
        ({"documents": [{"id": 1, "text": "a"}]}, "valid string"),
        ({"documents": [{"id": "a", "text": "b"}] * 2}, "comes twice"),
        ({"documents": [{"id": "a", "text": "b", "lang": "en"}]}, "unknown key"),
    ],
)
def test_wrong_documents_are_refused_and_none_is_written(model, tmp_path, body, words):
    service, client = served(model, tmp_path / "index")
    answer = client.post("/documents", json=body)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]
    assert len(service.index) == 0
    service.close()


def test_a_server_that_only_reads_takes_none(client):
    for path, body in (("/documents", {"documents": [row(1)]}), ("/documents/delete", {"ids": ["1"]})):
        answer = client.post(path, json=body)
        assert answer.status_code == 400
        assert "--writable" in answer.json()["error"]["message"]


def test_searches_and_writes_at_the_same_time(model, tmp_path):
    service, client = served(model, tmp_path / "index")
    client.post("/documents", json={"documents": [row(n) for n in range(20)]})
    ended, answers = threading.Event(), []

    def search():
        while not ended.is_set():
            answers.append(client.post("/search", json={"query": "the fox", "k": 5, "explain": True}))

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for start in range(20, 60, 10):
        answer = client.post("/documents", json={"documents": [row(n) for n in range(start, start + 10)]})
        assert answer.json()["size"] == start + 10
    ended.set()
    for thread in threads:
        thread.join()
    assert answers
    assert {(answer.status_code, len(answer.json()["hits"])) for answer in answers} == {(200, 5)}
    service.close()


@pytest.mark.slow
def test_kill_minus_nine_loses_no_acknowledged_document(folder, tmp_path):
    arguments = (folder, "--index", tmp_path / "index", "--writable")
    acknowledged = []
    with process(*arguments) as (server, address):

        def write(caller):
            with httpx.Client() as client:
                for number in range(1000):
                    rows = [row(100_000 * caller + 3 * number + n) for n in range(3)]
                    try:
                        answer = client.post(f"{address}/documents", json={"documents": rows})
                    except httpx.TransportError:
                        return
                    if answer.status_code == 200:
                        acknowledged.extend(rows)

        threads = [threading.Thread(target=write, args=(caller,)) for caller in range(4)]
        for thread in threads:
            thread.start()
        while len(acknowledged) < 60:
            pass
        server.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join()
    with process(*arguments) as (_, address):
        answer = httpx.post(f"{address}/documents", json={"documents": acknowledged}, timeout=60).json()
        assert (answer["new"], answer["changed"], answer["unchanged"]) == (0, 0, len(acknowledged)), json.dumps(answer)
        assert answer["size"] >= len(acknowledged)
