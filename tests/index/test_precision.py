"""An index that looks for dense vectors by codes: both engines are told so, its scores stay exact, and it says what it
is."""

import json
from functools import partial

import pytest
import qdrant_edge
import torch

import embedsmith as es
from embedsmith.core.errors import SearchError
from embedsmith.index import Document, EdgeStore, ServerStore, open_index
from embedsmith.index.commands import Place
from embedsmith.index.edge import SETTINGS
from embedsmith.index.filling import run_index
from embedsmith.index.vector_store import FieldSpec, Request
from tests.index.test_index import texts
from tests.index.words import Words

MODEL = Words(dimension=64)
DOCUMENTS = [Document(str(n), text) for n, text in enumerate(texts(400))]
QUERIES = ["the cat of the house", "river stone cloud", "moon moon star", "a fish road"]


@pytest.fixture
def codes_for_few(monkeypatch):
    """The engine makes int8 codes from 10 MB of vectors on; here from 1 kB."""
    few = qdrant_edge.EdgeOptimizersConfig(indexing_threshold=1)
    monkeypatch.setattr(qdrant_edge, "EdgeConfig", partial(qdrant_edge.EdgeConfig, optimizers=few))


def exact(k):
    query, document = (
        MODEL.represent(rows, role="query")["dense"] for rows in (QUERIES, [each.text for each in DOCUMENTS])
    )
    return query.scores(document)[0].topk(k).values


@pytest.mark.parametrize("engine", ["edge", "server"])
@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_scores_are_those_of_the_full_vectors(precision, engine, tmp_path, codes_for_few):
    store = EdgeStore(tmp_path / "index") if engine == "edge" else ServerStore(":memory:", "docs", waits=())
    open_index(MODEL, store, precision=precision, create=True).add(DOCUMENTS, batch=200)
    if engine == "edge":  # and it is the same after it was closed
        store.close()
        store = EdgeStore(tmp_path / "index", read_only=True)
    index = open_index(MODEL, store)
    assert index.precision == precision
    found = index.search(QUERIES, k=5, candidates=20, rescore=20)
    scores = torch.tensor([[hit.score for hit in hits] for hits in found])
    torch.testing.assert_close(scores, exact(5), atol=1e-5, rtol=0)
    store.close()


def test_the_codes_are_used_and_rescoring_mends_them(tmp_path, codes_for_few):
    """Of binary codes alone the best documents are not all found; with more of them scored in full, more are."""
    store = EdgeStore(tmp_path / "index")
    index = open_index(MODEL, store, precision="binary", create=True)
    index.add(DOCUMENTS)
    sums = [
        sum(hit.score for hits in index.search(QUERIES, k=5, candidates=5, rescore=rescore) for hit in hits)
        for rescore in (0, 2, 80)
    ]
    assert sums[0] < sums[1] - 1e-3
    assert sums[1] <= sums[2] + 1e-5
    assert sums[2] == pytest.approx(float(exact(5).sum()), abs=1e-4)
    store.close()


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_both_engines_are_told_the_same(precision, tmp_path):
    server, edge = ServerStore(":memory:", "docs", waits=()), EdgeStore(tmp_path / "index")
    spec = FieldSpec("dense", 8, precision)
    theirs, ours = server._params(spec), edge._params(spec)
    assert theirs.on_disk
    assert ours.on_disk
    assert type(ours.quantization_config).__name__ == {"int8": "Scalar", "binary": "Binary"}[precision] + (
        "QuantizationConfig"
    )
    inner = getattr(theirs.quantization_config, {"int8": "scalar", "binary": "binary"}[precision])
    assert inner.always_ram
    assert ours.quantization_config.always_ram
    for rescore, (wanted, times) in {0: (False, 1.0), 4: (True, 4.0)}.items():
        request = Request("dense", [0.0] * 8, 5, rescore=rescore)
        for made in (server._request(request), edge._request(request)):
            assert (made.params.quantization.rescore, made.params.quantization.oversampling) == (wanted, times)
    plain = Request("dense", [0.0] * 8, 5)
    assert [made.params.quantization for made in (server._request(plain), edge._request(plain))] == [None, None]
    server.close()


def test_the_settings_say_so_and_another_precision_is_refused(tmp_path):
    place = tmp_path / "index"
    store = EdgeStore(place)
    open_index(MODEL, store, precision="int8", create=True)
    assert json.loads((place / SETTINGS).read_text())["precision"] == "int8"
    assert open_index(MODEL, store).precision == "int8"
    with pytest.raises(SearchError, match="made with precision int8"):
        open_index(MODEL, store, precision="binary")
    store.close()
    kept = json.loads((place / SETTINGS).read_text())
    (place / SETTINGS).write_text(json.dumps({key: value for key, value in kept.items() if key != "precision"}))
    store = EdgeStore(place)  # as an earlier version wrote it
    assert open_index(MODEL, store).precision == "float32"
    store.close()
    (place / SETTINGS).write_text(json.dumps({**kept, "precision": "int4"}))
    with pytest.raises(SearchError, match="not what embedsmith writes"):
        EdgeStore(place)


def test_wrong_precisions_are_told(tmp_path):
    with pytest.raises(SearchError, match="the precision is 'int4'"):
        es.index(MODEL, ["a cat"], to=tmp_path / "index", precision="int4")
    with pytest.raises(SearchError, match="codes are of dense vectors"):
        run_index(MODEL, DOCUMENTS, Place(tmp_path / "index"), ["sparse"], 8, precision="int8")
    index = open_index(MODEL, ServerStore(":memory:", "docs", waits=()), create=True)
    with pytest.raises(SearchError, match="rescore is -1"):
        index.search(["a"], rescore=-1)
