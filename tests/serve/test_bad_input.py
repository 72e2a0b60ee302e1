"""What comes wrong is refused in OpenAI's shape, named, and harms nobody else."""

import json
import logging
import threading
import time

import pytest
from fastapi.testclient import TestClient

from embedsmith.serve import batching
from embedsmith.serve.app import http_app
from embedsmith.serve.limits import ServerLimits
from embedsmith.serve.service import Service, Sources
from tests.models.tiny import embedder
from tests.serve.fuzz import fault, requests

KEY = "a-key-of-more-than-16-signs"


def refusal(client, path, body, status=400):
    sent = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = client.post(path, headers={"content-type": "application/json"}, **sent)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8080", 200),
        ("127.0.0.1", 200),
        ("[::1]:8080", 200),
        ("a.localhost", 200),
        ("evil.example:8080", 403),
    ],
)
def test_a_name_of_the_web_that_points_here_is_turned_away_where_there_are_no_keys(service, host, status):
    here = TestClient(http_app(service), base_url="http://127.0.0.1:8080")
    there = TestClient(http_app(service), base_url="http://10.0.0.7:8080")
    assert here.get("/v1/models", headers={"host": host}).status_code == status
    assert there.get("/v1/models", headers={"host": host}).status_code == 200
    keyed = TestClient(http_app(service, keys=[KEY]), base_url="http://127.0.0.1:8080")
    told = {"host": host, "authorization": f"Bearer {KEY}"}
    assert keyed.get("/v1/models", headers=told).status_code == 200


@pytest.mark.parametrize(
    ("body", "words", "param"),
    [
        ({"input": []}, "the list is empty", "input"),
        ({"input": ""}, "the text is empty", "input"),
        ({"input": ["a", ""]}, "text 1 is empty", "input"),
        ({"input": [[]]}, "text 0 is empty", "input"),
        ({"input": None}, "got null", "input"),
        ({"input": {"a": 1}}, "got an object", "input"),
        ({"input": ["a", None]}, "text 1 is null", "input"),
        ({"input": [1, 2.5]}, "a number with a fraction at place 1", "input"),
        ({"input": [1, True]}, "true or false at place 1", "input"),
        ({"input": [[5, 10**9]]}, "token id 1000000000", None),
        ({"input": list(range(5, 50))}, "at most 40", None),
        ({"input": ["a"] * 2049}, "at most 2,048", "input"),
        ({}, "'input' is missing", "input"),
        ({"input": "a", "dimension": 4}, "did you mean 'dimensions'", "dimension"),
        ({"input": "a", "dimensions": 0}, "greater than or equal to 1", "dimensions"),
        ({"input": "a", "dimensions": 17}, "from 1 to 16", None),
        ({"input": "a", "dimensions": "8"}, "valid integer", "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "'float' or 'base64'", "encoding_format"),
        ({"input": "a", "input_type": "passage"}, "'query' or 'document'", "input_type"),
        (b'{"input": "a", "dimensions": NaN}', "valid integer", "dimensions"),
        (b'{"input": "\\ud800"}', "surrogate", "input"),
        (b'{"input": "a"', "not JSON", None),
        (b"", "the body is empty", None),
        (b"[]", "the body", None),
    ],
)
def test_a_malformed_request_is_refused_with_the_key_and_the_reason(client, body, words, param):
    error = refusal(client, "/v1/embeddings", body)
    assert words in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_other_models_heads_and_paths_are_named(client):
    error = refusal(client, "/v1/embeddings", {"input": "a", "model": "tine"}, 404)
    assert error["code"] == "model_not_found"
    assert "did you mean 'tiny'" in error["message"]
    assert "no head 'other'" in refusal(client, "/search", {"query": "a", "weights": {"other": 1}})["message"]
    assert "above 0" in refusal(client, "/search", {"query": "a", "weights": {"dense": 0}})["message"]
    assert "filter on 'n'" in refusal(client, "/search", {"query": "a", "filter": {"n": {"over": 1}}})["message"]
    assert "at most 1000" in refusal(client, "/search", {"query": "a", "k": 1001})["message"]
    assert "documents" in refusal(client, "/rerank", {"query": "a"})["message"]
    assert "no reranker 'x'" in refusal(client, "/rerank", {"query": "a", "texts": ["b"], "model": "x"}, 404)["message"]
    assert "/nothing" in refusal(client, "/nothing", {}, 404)["message"]
    assert client.get("/v1/embeddings").json()["error"]["message"].startswith("Method Not Allowed")


def test_a_server_without_index_reranker_or_heads_says_how_to_start_one(tmp_path):
    model = embedder(tmp_path)
    client = TestClient(http_app(Service(Sources({"plain": lambda: model}))), raise_server_exceptions=False)
    assert "--index" in refusal(client, "/search", {"query": "a"})["message"]
    assert "--reranker" in refusal(client, "/rerank", {"query": "a", "texts": ["b"]})["message"]
    for head in ("sparse", "multivector"):
        assert f"no head '{head}'" in refusal(client, f"/v1/{head}", {"input": "a"})["message"]


def test_bodies_are_bounded_whatever_the_header_says(model):
    client = TestClient(http_app(Service(Sources({"tiny": lambda: model}), ServerLimits(body=1000))))
    assert "1,000 bytes" in refusal(client, "/v1/embeddings", {"input": "a" * 1000}, 413)["message"]
    pieces = (b"x" * 100 for _ in range(100))
    assert client.post("/v1/embeddings", content=pieces).status_code == 413
    assert client.post("/v1/embeddings", json={"input": "a" * 900}).status_code == 200
    small = TestClient(http_app(Service(Sources({"tiny": lambda: model}))))
    assert refusal(small, "/v1/embeddings", {"input": "a" * 10_000_000}, 413)
    assert refusal(small, "/v1/embeddings", {"input": list(range(10**7, 10**7 + 10**6))}, 413)
    assert refusal(small, "/v1/embeddings", {"input": [5] * 1_000_000})["message"].startswith("text 0 has 1,000,002")


def test_keys_open_the_server_and_are_shown_nowhere(model, caplog):
    service = Service(Sources({"tiny": lambda: model}))
    client = TestClient(http_app(service, [KEY, KEY[::-1]]), raise_server_exceptions=False)
    caplog.set_level(logging.DEBUG)
    ask = lambda **headers: client.post("/v1/embeddings", json={"input": "a"}, headers=headers)
    assert ask().status_code == 401
    assert ask().headers["www-authenticate"] == "Bearer"
    wrong = ask(Authorization=f"Bearer {KEY}x")
    assert wrong.status_code == 401
    assert wrong.json()["error"]["code"] == "invalid_api_key"
    for headers in ({"Authorization": f"Bearer {KEY}"}, {"Authorization": f"bearer {KEY[::-1]}"}, {"x-api-key": KEY}):
        assert ask(**headers).status_code == 200
    assert client.get("/health").status_code == 200
    for path in ("/metrics", "/docs", "/openapi.json", "/v1/models", "/nothing"):
        assert client.get(path).status_code == 401
    echoed = client.post("/v1/embeddings", json={KEY: 1}, headers={"x-api-key": KEY})
    assert echoed.status_code == 400
    assert KEY not in echoed.text + wrong.text + caplog.text + repr(vars(service))


def test_a_full_queue_is_told_with_a_time_to_come_again(model):
    service = Service(Sources({"tiny": lambda: model}), ServerLimits(queue=2))
    client, batcher = TestClient(http_app(service)), service.models["tiny"].batcher
    answers = []
    ask = lambda: answers.append(client.post("/v1/embeddings", json={"input": ["a", "b"]}))
    with batching._COMPUTING:
        taken = service.models["tiny"].submit(["first"], "document")
        while batcher.waiting:
            time.sleep(0.001)
        caller = threading.Thread(target=ask)
        caller.start()
        while batcher.waiting < 2:
            time.sleep(0.001)
        busy = client.post("/v1/embeddings", json={"input": "c"})
    caller.join()
    assert taken.result(10)
    assert [answer.status_code for answer in answers] == [200]
    assert (busy.status_code, busy.json()["error"]["code"]) == (503, "busy")
    assert int(busy.headers["retry-after"]) >= 1


def test_what_fails_inside_is_told_to_the_log_alone(tmp_path, caplog):
    class Broken:
        def represent(self, texts, **how):
            raise RuntimeError("the secret of line 17")

    client = TestClient(http_app(Service(Sources({"broken": Broken}))), raise_server_exceptions=False)
    error = refusal(client, "/v1/embeddings", {"input": "a"}, 500)
    assert "secret" not in json.dumps(error)
    assert "the secret of line 17" in caplog.text


def test_hostile_bodies_are_never_our_failure(client, caplog):
    for number, sent in enumerate(requests(seed=1, count=150)):
        answer = client.request(sent.method, sent.path, content=sent.body, headers=sent.headers, follow_redirects=False)
        wrong = fault(answer.status_code, answer.content, sent)
        assert wrong is None, (number, wrong, sent.path, sent.body[:300], answer.text[:300])
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 200
