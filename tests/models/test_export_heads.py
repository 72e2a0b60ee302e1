"""Each head in sentence-transformers: it loads there and gives the same scores."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder

from embedsmith.core.errors import ModelError
from embedsmith.models import load
from embedsmith.models.export_heads import export_head
from tests.models import lm

QUERIES = ["the red cat", "a big old tree", "far"]
DOCUMENTS = ["the cat sat on the mat", "a dog ran by the tree", "", "new new red mat", "the big old tree"]
PROMPTS = {"query": "a dog: ", "document": ""}


def model_of(path, kind="bert", **options):
    torch.manual_seed(1)
    pooling = "last" if "llama" in kind else "cls"
    options = {"heads": ("sparse", "multivector"), "multivector_dim": 6, "prompts": PROMPTS, **options}
    return load(str(lm.folder(path / "lm", kind)), pooling=pooling, device="cpu", **options)


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
    assert not (tmp_path / "multi").exists()


def test_what_a_form_cannot_do_is_an_error(tmp_path):
    model = model_of(tmp_path)
    model.settings = type(model.settings)("cls", 40, PROMPTS, include_prompt=False)
    with pytest.raises(ModelError, match="cannot do what this model does"):
        export_head(model, tmp_path / "multi", "multivector")
    assert not (tmp_path / "multi").exists()
