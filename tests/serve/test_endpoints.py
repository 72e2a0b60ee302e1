"""Every endpoint against the model itself: the same vectors, weights, scores and hits."""

import base64

import numpy as np
import pytest
from fastapi.testclient import TestClient

from embedsmith.core.errors import SearchError
from embedsmith.index import EdgeStore, WeightedSum, open_index
from embedsmith.index.vector_store import lexical_weights
from embedsmith.serve.app import http_app
from embedsmith.serve.service import Service, Sources
from tests.models.tiny import TEXTS, embedder
from tests.serve.conftest import HEADS, WORDS, Overlap

SOME = [text for text in TEXTS if text]


def vectors(answer):
    return np.array([row["embedding"] for row in answer.json()["data"]])


def post(client, path, **body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize("role", ["query", "document"])
@pytest.mark.parametrize("width", [None, 8])
def test_embeddings_are_those_of_encode(client, model, role, width):
    expected = model.encode(SOME, role, dim=width)
    more = {} if width is None else {"dimensions": width}
    answer = post(client, "/v1/embeddings", input=SOME, input_type=role, model="tiny", **more)
    assert np.abs(vectors(answer) - expected).max() < 1e-6
    coded = post(client, "/v1/embeddings", input=SOME, input_type=role, encoding_format="base64", **more).json()
    decoded = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in coded["data"]]
    assert np.abs(np.stack(decoded) - expected).max() < 1e-6
    assert [row["index"] for row in coded["data"]] == list(range(len(SOME)))
    tokens = int(model.tokenize(SOME, role).length_N.sum())
    assert coded["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert (coded["object"], coded["model"], coded["data"][0]["object"]) == ("list", "tiny", "embedding")


def test_one_text_and_token_ids_with_and_without_special_tokens(client, model):
    expected = model.encode(SOME, "query")
    plain = [
        model.tokenizer(text, add_special_tokens=False, truncation=True, max_length=30)["input_ids"] for text in SOME
    ]
    marked = [[2, *ids, 3] for ids in plain]
    assert (
        np.abs(vectors(post(client, "/v1/embeddings", input=SOME[0], input_type="query")) - expected[:1]).max() < 1e-6
    )
    for rows in (plain, marked):
        fitting = [n for n, ids in enumerate(rows) if len(ids) < 30]
        answer = post(client, "/v1/embeddings", input=[rows[n] for n in fitting], input_type="query")
        assert np.abs(vectors(answer) - expected[fitting]).max() < 1e-6
    mixed = post(client, "/v1/embeddings", input=[SOME[0], plain[1], SOME[2]], input_type="query")
    assert np.abs(vectors(mixed) - expected[:3]).max() < 1e-6
    assert (
        np.abs(vectors(post(client, "/v1/embeddings", input=plain[1], input_type="query")) - expected[1:2]).max() < 1e-6
    )


def test_a_folder_that_cuts_its_vectors_cuts_them_here(tmp_path):
    import dataclasses

    model = embedder(tmp_path)
    model.settings = dataclasses.replace(model.settings, truncate_dim=8)
    client = TestClient(http_app(Service(Sources({"cut": lambda: model}))))
    assert np.abs(vectors(post(client, "/v1/embeddings", input=SOME)) - model.encode(SOME)).max() < 1e-6
    assert vectors(post(client, "/v1/embeddings", input=SOME, dimensions=16)).shape[1] == 16


def test_sparse_weights_and_token_vectors(client, model):
    reps = model.represent(SOME, role="document", outputs=HEADS)
    rows = post(client, "/v1/sparse", input=SOME).json()["data"]
    for row, expected in zip(rows, lexical_weights(reps["sparse"]), strict=True):
        got = row["embedding"]
        assert dict(zip(got["indices"], got["values"], strict=True)) == pytest.approx(expected, abs=1e-6)
        assert got["tokens"] == model.tokenizer.convert_ids_to_tokens(got["indices"])
        assert got["values"] == sorted(got["values"], reverse=True)
    rows = post(client, "/v1/multivector", input=SOME).json()["data"]
    tokens = reps["multivector"]
    for row, vector_TD, mask_T in zip(rows, tokens.vector_NTD, tokens.mask_NT, strict=True):
        assert np.abs(np.array(row["embedding"]) - vector_TD[mask_T].numpy()).max() < 1e-6


def test_search_finds_what_the_index_finds(client, model, index_folder):
    index = open_index(model, EdgeStore(index_folder, read_only=True))
    weights = {"dense": 1.0, "sparse": 0.5}
    (expected,) = index.search(["quick fox"], 3, fusion=WeightedSum(weights))
    answer = post(client, "/search", query="quick fox", k=3, weights=weights).json()
    assert answer["model"] == "tiny"
    for hit, known in zip(answer["hits"], expected, strict=True):
        assert (hit["id"], hit["text"], hit["fields"]) == (known.id, known.text, dict(known.metadata))
        assert hit["score"] == pytest.approx(known.score, abs=1e-5)
        assert hit["heads"] == pytest.approx(dict(known.scores), abs=1e-5)
        assert hit["tokens"] == []
    filtered = post(client, "/search", query="quick fox", filter={"lang": "en", "n": {"gte": 3}}).json()["hits"]
    assert {hit["id"] for hit in filtered} == {"3", "5"}
    index.store.close()


def test_explained_tokens_sum_to_the_scores_of_their_heads(client):
    hits = post(client, "/search", query="quick fox", explain=True).json()["hits"]
    assert len(hits) == len(WORDS)
    for hit in hits:
        for head in ("sparse", "multivector"):
            total = sum(token["weight"] for token in hit["tokens"] if token["head"] == head)
            assert total == pytest.approx(hit["heads"].get(head, 0.0), abs=1e-5)
    best = max(hits[0]["tokens"], key=lambda token: token["weight"])
    assert {"token", "query_token", "head", "weight"} == set(best)


def test_reranking_in_both_shapes(client):
    documents = ["zzz", "fox", "quick fox jumps"]
    logit_N = Overlap().score(["quick fox"] * 3, documents)
    share_N = logit_N.sigmoid().tolist()
    cohere = post(client, "/v2/rerank", query="quick fox", documents=documents, top_n=2, return_documents=True).json()
    assert [(row["index"], row["document"]["text"]) for row in cohere["results"]] == [(2, documents[2]), (1, "fox")]
    assert [row["relevance_score"] for row in cohere["results"]] == pytest.approx([share_N[2], share_N[1]])
    objects = [{"text": text} for text in documents]
    assert post(client, "/rerank", query="quick fox", documents=objects).json()["results"][0] == {
        "index": 2,
        "relevance_score": pytest.approx(share_N[2]),
    }
    tei = post(client, "/rerank", query="quick fox", texts=documents, return_text=True, raw_scores=True).json()
    assert [row["index"] for row in tei] == [2, 1, 0]
    assert [row["score"] for row in tei] == pytest.approx(logit_N.sort(descending=True).values.tolist())
    assert tei[0]["text"] == documents[2]


def test_search_with_the_reranker_is_in_its_order(client):
    plain = post(client, "/search", query="passage", k=7).json()["hits"]
    hits = post(client, "/search", query="passage", k=3, rerank=True).json()["hits"]
    relevance = Overlap().score(["passage"] * len(plain), [hit["text"] for hit in plain]).sigmoid().tolist()
    best = sorted(zip(relevance, plain, strict=True), key=lambda pair: -pair[0])[:3]
    assert [hit["id"] for hit in hits] == [hit["id"] for _, hit in best]
    assert [hit["score"] for hit in hits] == pytest.approx([score for score, _ in best])
    assert [hit["heads"]["first"] for hit in hits] == pytest.approx([hit["score"] for _, hit in best])


def test_models_health_metrics_and_the_manual(client):
    (told,) = client.get("/v1/models").json()["data"]
    assert told == client.get("/v1/models/tiny").json()
    assert (told["id"], told["heads"], told["dimension"], told["indexed"]) == ("tiny", list(HEADS), 16, True)
    assert client.get("/health").json() == {"status": "ok"}
    assert client.head("/health").status_code == 200
    post(client, "/v1/embeddings", input=SOME)
    shown = client.get("/metrics").text
    assert 'embedsmith_requests_total{endpoint="/v1/embeddings",status="200"}' in shown
    assert 'embedsmith_texts_total{model="tiny"}' in shown
    assert 'embedsmith_waiting_texts{model="tiny"} 0.0' in shown
    page, description = client.get("/docs").text, client.get("/openapi.json").text
    assert "422" not in description
    assert "ValidationError" not in description
    for path in client.get("/openapi.json").json()["paths"]:
        assert path in page
    assert "//" not in page.replace("<!doctype", "")
    assert "<script" not in page


def test_an_encoder_that_knows_no_tokens_is_served_too():
    from tests.index.words import Words

    words = Words()
    client = TestClient(http_app(Service(Sources({"words": lambda: words}))), raise_server_exceptions=False)
    expected = words.represent(["cat", "a dog"], role="document")["dense"].vector_ND.numpy()
    assert np.abs(vectors(post(client, "/v1/embeddings", input=["cat", "a dog"])) - expected).max() < 1e-6
    assert vectors(post(client, "/v1/embeddings", input="cat", dimensions=4)).shape == (1, 4)
    for body, words in (({"input": [1, 2]}, "no token ids"), ({"input": "a", "dimensions": 99}, "from 1 to 16")):
        answer = client.post("/v1/embeddings", json=body)
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]


def test_an_index_of_another_model_is_refused(index_folder, tmp_path):
    other = embedder(tmp_path, pooling="cls", heads=HEADS)
    with pytest.raises(SearchError, match="made by another model"):
        Service(Sources({"other": lambda: other}, [lambda: EdgeStore(index_folder, read_only=True)]))
    with pytest.raises(SearchError, match="no index here"):
        Service(Sources({"other": lambda: other}, [lambda: EdgeStore(tmp_path / "none", read_only=True)]))
