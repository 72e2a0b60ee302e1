"""Each head in sentence-transformers: it loads there and gives the same scores."""

import importlib
import importlib.util
import json
import sys
import types

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder

from embedsmith.core.errors import ModelError
from embedsmith.models import load
from embedsmith.models.exports.libraries import export_head
from tests.models import lm

QUERIES = ["the red cat", "a big old tree", "far"]
DOCUMENTS = ["the cat sat on the mat", "a dog ran by the tree", "", "new new red mat", "the big old tree"]
PROMPTS = {"query": "a dog: ", "document": ""}


def model_of(path, kind="bert", **options):
    torch.manual_seed(1)
    pooling = "last" if "llama" in kind else "cls"
    options = {"heads": ("sparse", "multivector"), "multivector_dim": 6, "prompts": PROMPTS, **options}
    options = {"heads_include_prompt": True, **options}
    return load(str(lm.folder(path / "lm", kind)), pooling=pooling, device="cpu", new_heads=True, **options)


def scores(model, head):
    queries, documents = (
        model.represent(texts, role=role, outputs=(head,))[head]
        for texts, role in ((QUERIES, "query"), (DOCUMENTS, "document"))
    )
    return queries.scores(documents)[0].numpy()


def peer_scores(peer):
    queries, documents = peer.encode_query(QUERIES), peer.encode_document(DOCUMENTS)
    return np.asarray(peer.similarity(queries, documents))


def test_dense_alone(tmp_path):
    model = model_of(tmp_path)
    export_head(model, tmp_path / "dense", "dense")
    assert not list((tmp_path / "dense").glob("*.pt"))
    np.testing.assert_allclose(
        peer_scores(SentenceTransformer(str(tmp_path / "dense"))), scores(model, "dense"), atol=1e-5
    )
    assert list(model.token_heads) == ["sparse", "multivector"], "the model itself is untouched"


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "modernbert"])
@pytest.mark.parametrize("terms", [5, 10**6])
def test_splade_with_modules_of_their_own(tmp_path, kind, terms):
    model = model_of(tmp_path, kind, sparse="splade", sparse_terms=terms)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    export_head(model, tmp_path / "sparse", "sparse")
    types = [entry["type"] for entry in json.loads((tmp_path / "sparse" / "modules.json").read_text())]
    assert all(kind.startswith("sentence_transformers.") for kind in types)
    peer = SparseEncoder(str(tmp_path / "sparse"), device="cpu")
    np.testing.assert_allclose(peer_scores(peer), scores(model, "sparse"), atol=1e-4, rtol=1e-4)
    assert scores(model, "sparse").max() > 0.1


@pytest.mark.parametrize(("kind", "sparse"), [("bert", "lexical"), ("llama", "splade"), ("llama", "lexical")])
def test_sparse_heads_without_modules_there_come_through_embedsmith(tmp_path, kind, sparse):
    model = model_of(tmp_path, kind, sparse=sparse, heads=("sparse",), multivector_dim=None)
    if sparse == "lexical":
        model.token_heads["sparse"].linear.bias.data.fill_(1.0)
    export_head(model, tmp_path / "sparse", "sparse")
    peer = SparseEncoder(str(tmp_path / "sparse"), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(peer_scores(peer), scores(model, "sparse"), atol=1e-4, rtol=1e-4)
    assert scores(model, "sparse").max() > 0.1
    again = load(str(tmp_path / "sparse"), device="cpu")
    np.testing.assert_allclose(scores(again, "sparse"), scores(model, "sparse"), atol=1e-6)


def test_a_sparse_head_beside_a_pooling_of_its_own_comes_back(tmp_path):
    """The dense part alone needs embedsmith's module there; the head's own takes its place and keeps what it names."""
    model = load(str(lm.folder(tmp_path / "lm")), pooling="attention", heads=("sparse",), new_heads=True, device="cpu")
    export_head(model, tmp_path / "sparse", "sparse")
    peer = SparseEncoder(str(tmp_path / "sparse"), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(peer_scores(peer), scores(model, "sparse"), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(load(str(tmp_path / "sparse"), device="cpu").encode(QUERIES), model.encode(QUERIES))


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "llama"])
def test_multivectors(tmp_path, kind):
    model = model_of(tmp_path, kind)
    export_head(model, tmp_path / "multi", "multivector")
    peer = MultiVectorEncoder(str(tmp_path / "multi"), device="cpu")
    np.testing.assert_allclose(peer_scores(peer), scores(model, "multivector"), atol=1e-5)
    assert {path.name for path in (tmp_path / "multi").iterdir() if path.is_dir()} == {
        *("1_Dense", "2_MultiVectorMask", "3_Normalize")
    }


def test_a_head_that_is_not_there_is_an_error_and_leaves_nothing(tmp_path):
    model = model_of(tmp_path, heads=("sparse",), multivector_dim=None)
    with pytest.raises(ModelError, match=r"no head 'multivector'(.|\n)*dense, sparse"):
        export_head(model, tmp_path / "multi", "multivector")
    with pytest.raises(ModelError, match="no head 'multivector'"):
        export_head(model, tmp_path / "multi", "pylate")
    assert not (tmp_path / "multi").exists()


@pytest.fixture
def pylate(monkeypatch):
    """In place of PyLate, where it is not installed, what our module takes of it (bench/pylate_scores.py runs the
    real one)."""

    class Linear(torch.nn.Module):
        def __init__(self, in_features, out_features, bias):
            super().__init__()
            self.linear = torch.nn.Linear(in_features, out_features, bias)

    if importlib.util.find_spec("pylate") is None:
        monkeypatch.setitem(sys.modules, "pylate", types.ModuleType("pylate"))
        monkeypatch.setitem(sys.modules, "pylate.models", types.SimpleNamespace(Dense=Linear))
    monkeypatch.delitem(sys.modules, "embedsmith.models.late", raising=False)
    yield
    sys.modules.pop("embedsmith.models.late", None)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "llama"])
def test_multivectors_for_pylate(tmp_path, kind, pylate):
    """The module that the folder names, on states and masks of a padded batch: ours, without the CLS."""
    model = model_of(tmp_path, kind)
    export_head(model, tmp_path / "late", "pylate")
    plain, dense = json.loads((tmp_path / "late" / "modules.json").read_text())
    assert plain["type"] == "sentence_transformers.models.Transformer"
    place, _, name = dense["type"].rpartition(".")
    module = getattr(importlib.import_module(place), name).load(str(tmp_path / "late" / dense["path"]))
    general = json.loads((tmp_path / "late" / "config_sentence_transformers.json").read_text())
    assert general["model_type"] == "ColBERT"
    assert general["query_prefix"] == general["document_prefix"] == ""
    assert (general["skiplist_words"], general["do_query_expansion"]) == ([], False)
    assert general["query_length"] == general["document_length"] == model.max_length
    padded = model.tokenize(DOCUMENTS).pad(model.pad_id)
    with torch.no_grad():
        states = model.backbone(padded.id_NT, padded.mask_NT.long()).last_hidden_state
        features = {"input_ids": padded.id_NT, "attention_mask": padded.mask_NT.long(), "token_embeddings": states}
        made = module(features)
        expected = model(padded, ("multivector",))["multivector"]
    assert torch.equal(made["attention_mask"].bool(), expected.mask_NT)
    assert int(expected.mask_NT.sum()) < int(padded.mask_NT.sum())
    torch.testing.assert_close(made["token_embeddings"], expected.vector_NTD, atol=1e-5, rtol=0)


def test_what_a_form_cannot_do_is_an_error(tmp_path):
    model = model_of(tmp_path)
    model.settings = type(model.settings)("cls", 40, PROMPTS, include_prompt=False)
    with pytest.raises(ModelError, match="cannot do what this model does"):
        export_head(model, tmp_path / "multi", "multivector")
    assert not (tmp_path / "multi").exists()


def test_prompts_that_a_head_leaves_out_stay_out_where_that_can_be_said(tmp_path):
    model = model_of(tmp_path, heads_include_prompt=None)
    export_head(model, tmp_path / "sparse", "sparse")
    peer = SparseEncoder(str(tmp_path / "sparse"), trust_remote_code=True)
    np.testing.assert_allclose(peer_scores(peer), scores(model, "sparse"), atol=1e-5)
    with pytest.raises(ModelError, match=r"take no part in this head(?s:.*)heads_include_prompt=true"):
        export_head(model, tmp_path / "multi", "multivector")
