"""Queries filled up with mask tokens: only late interaction reads them, in training, encoding, saved and exported."""

import json

import numpy as np
import pytest
import torch

from embedsmith.core.recipe import parse
from embedsmith.models import load
from embedsmith.models.exports.libraries import export_head
from embedsmith.train import Recipe, train
from tests.models import lm

QUERIES = ["the red cat", "a big old tree by the new red mat", "far"]
DOCUMENTS = ["the cat sat on the mat", "a dog ran by the tree"]
HEADS = ("dense", "sparse", "multivector")


def model_of(path, **options):
    torch.manual_seed(1)
    folder = lm.folder(path / "lm")
    options = {"heads": HEADS, "multivector_dim": 6, "pooling": "mean", "new_heads": True, **options}
    return load(str(folder), device="cpu", **options)


def test_only_late_interaction_reads_them_and_no_word_sees_them(tmp_path):
    plain, filled = model_of(tmp_path), model_of(tmp_path, expansion={"length": 8, "cut": False})
    filled.load_state_dict(plain.state_dict())
    before, after = (one.represent(QUERIES, role="query", outputs=HEADS) for one in (plain, filled))
    torch.testing.assert_close(after["dense"].vector_ND, before["dense"].vector_ND, rtol=0, atol=1e-6)
    vocabulary = torch.arange(len(plain.tokenizer))
    torch.testing.assert_close(after["sparse"].over(vocabulary), before["sparse"].over(vocabulary), rtol=0, atol=1e-6)
    lengths = [len(plain.tokenize([text], "query").id_S) for text in QUERIES]
    assert after["multivector"].mask_NT.sum(1).tolist() == [max(length, 8) - 1 for length in lengths]  # without the CLS
    for row, length in enumerate(lengths):
        words = [side["multivector"].vector_NTD[row, 1:length] for side in (before, after)]
        torch.testing.assert_close(words[0], words[1], rtol=0, atol=1e-6)
    same = [one.represent(DOCUMENTS, role="document", outputs=HEADS)["multivector"] for one in (plain, filled)]
    torch.testing.assert_close(same[0].vector_NTD, same[1].vector_NTD)


def test_longer_queries_are_cut_unless_they_are_not(tmp_path):
    cut = model_of(tmp_path, expansion={"length": 6})
    assert set(cut.tokenize(QUERIES, "query").length_N.tolist()) == {6}
    assert cut.tokenize(DOCUMENTS, "document").length_N.max() > 6


def test_saved_with_the_model_and_read_by_sentence_transformers(tmp_path):
    from sentence_transformers import MultiVectorEncoder

    model = model_of(tmp_path, expansion={"length": 8})
    model.save(tmp_path / "saved")
    again = load(str(tmp_path / "saved"), device="cpu")
    assert again.settings.expansion == model.settings.expansion
    assert again.settings.lengths == {"query": 8}
    export_head(model, tmp_path / "late", "multivector")
    peer = MultiVectorEncoder(str(tmp_path / "late"), device="cpu")
    theirs = np.asarray(peer.similarity(peer.encode_query(QUERIES), peer.encode_document(DOCUMENTS)))
    for one in (model, again):
        query, document = (
            one.represent(texts, role=role, outputs=("multivector",))["multivector"]
            for texts, role in ((QUERIES, "query"), (DOCUMENTS, "document"))
        )
        np.testing.assert_allclose(query.scores(document)[0].numpy(), theirs, atol=1e-5)


@pytest.mark.parametrize("attend", [False, True])
def test_trained_from_a_recipe(tree, tmp_path, attend):
    tree["model"] |= {"heads": ["multivector"], "expansion": {"length": 6, "attend": attend}}
    tree["data"] = [tree["data"][0] | {"loss": {"type": "infonce", "head": "multivector"}}]
    tree["train"] |= {"steps": 2, "log_with": []}
    folder = train(parse(Recipe, tree))
    assert load(str(folder), device="cpu").settings.expansion.attend is attend
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["gradient_norm"] > 0 for line in lines)
