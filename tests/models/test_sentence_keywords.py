"""The keywords of sentence-transformers' `encode` mean what they mean there, or the error says what to use."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from embedsmith.core.errors import ModelError
from embedsmith.models import load
from tests.models import tiny

PROMPTS = {"query": "fox ", "document": "", "title": "dog dog "}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tiny.embedder(folder / "plain").save(folder / "saved")
    model = load(str(folder / "saved"), prompts=PROMPTS, normalize=False)
    model.save(folder / "mine")
    return model, SentenceTransformer(str(folder / "mine"), device="cpu")


@pytest.mark.parametrize(
    "keywords",
    [
        {"batch_size": 2},
        {"normalize_embeddings": True, "batch_size": 1},
        {"normalize_embeddings": False, "show_progress_bar": False},
        {"convert_to_tensor": True, "device": "cpu"},
        {"convert_to_numpy": False},
        {"prompt_name": "title"},
        {"prompt_name": "query", "normalize_embeddings": True, "precision": "binary"},
        {"prompt": "dog ", "convert_to_tensor": True},
        {"truncate_dim": 4, "normalize_embeddings": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("texts", [tiny.TEXTS, tiny.TEXTS[0]], ids=["several", "one"])
def test_encode_gives_what_sentence_transformers_gives(both, keywords, texts):
    mine, theirs = (model.encode(texts, **keywords) for model in both)
    assert type(mine) is type(theirs)
    if isinstance(mine, list):
        assert all(isinstance(one, torch.Tensor) for one in mine)
        mine, theirs = (torch.stack(each) for each in (mine, theirs))
    assert mine.shape == theirs.shape
    assert mine.dtype == theirs.dtype
    np.testing.assert_allclose(np.asarray(mine), np.asarray(theirs), atol=1e-5)


def test_queries_and_documents_have_methods_of_their_own(both):
    mine, theirs = both
    for name in ("encode_query", "encode_document"):
        ours = getattr(mine, name)(tiny.TEXTS, convert_to_tensor=True)
        torch.testing.assert_close(ours, getattr(theirs, name)(tiny.TEXTS, convert_to_tensor=True), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"batchsize": 2}, "did you mean 'batch_size'"),
        ({"batch_size": 0}, "a whole number from 1"),
        ({"prompt_name": "titel"}, "did you mean 'title'"),
        ({"output_value": "token_embeddings"}, r'outputs=\("tokens",\)'),
        ({"pool": None}, "--processes 4"),
        ({"device": ["cpu", "cpu"]}, "--processes 4"),
        ({"device": "meta"}, r"model\.to\('meta'\)"),
    ],
    ids=str,
)
def test_what_is_not_done_here_is_an_error_with_the_way_to_do_it(both, keywords, message):
    with pytest.raises(ModelError, match=message):
        both[0].encode(tiny.TEXTS, **keywords)
