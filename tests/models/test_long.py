"""Long texts: a longer position table, and many CLS in one text."""

import numpy as np
import pytest
import torch
from transformers import AutoModel

from embedsmith.core.errors import ModelError
from embedsmith.core.tokens import TokenBatch
from embedsmith.models import load
from embedsmith.models.tokenize import room_for, with_cls_blocks
from tests.models import lm

SHORT = ["the cat sat on the mat", "a dog", ""]
LONG = " ".join(["the big old tree by the red mat"] * 9)  # 72 words, the table has 40 positions


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_a_longer_table_keeps_short_texts_and_reads_long_ones(tmp_path, kind):
    """RoBERTa's table starts behind its padding index."""
    folder = str(lm.folder(tmp_path / "lm", kind, positions=40 if kind == "bert" else 41))
    before, after = load(folder, pooling="cls", device="cpu"), load(folder, pooling="cls", positions=100, device="cpu")
    assert (before.max_length, after.max_length) == (40, 100)
    np.testing.assert_array_equal(before.encode(SHORT), after.encode(SHORT))
    assert len(after.tokenize([LONG]).id_S) == 74
    assert np.abs(before.encode([LONG]) - after.encode([LONG])).max() > 1e-3
    after.save(tmp_path / "saved")
    again = load(str(tmp_path / "saved"), device="cpu")
    assert again.max_length == 100
    np.testing.assert_array_equal(again.encode([LONG, *SHORT]), after.encode([LONG, *SHORT]))
    ids = torch.from_numpy(after.tokenize([LONG]).id_S)[None]
    peer = AutoModel.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        vector_H = peer(ids, torch.ones_like(ids)).last_hidden_state[0, 0]
    np.testing.assert_allclose(vector_H / vector_H.norm(), after.encode(LONG), atol=1e-5)


def test_new_rows_repeat_the_old_ones(tmp_path):
    model = load(str(lm.folder(tmp_path)), pooling="cls", positions=100, device="cpu")
    table = model.backbone.embeddings.position_embeddings.weight
    assert torch.equal(table[40:80], table[:40])
    assert torch.equal(table[80:], table[:20])


@pytest.mark.parametrize(
    ("kind", "positions", "says"), [("bert", 39, "40 or more"), ("llama", 100, "max_length alone")]
)
def test_impossible_positions(tmp_path, kind, positions, says):
    with pytest.raises(ModelError, match=rf"positions={positions}(.|\n)*{says}"):
        load(str(lm.folder(tmp_path, kind)), pooling="last", positions=positions)


def test_8192_positions_and_a_document_of_100000_tokens(tmp_path):
    model = load(
        str(lm.folder(tmp_path)),
        pooling="cls",
        positions=8192,
        heads=("sparse", "multivector"),
        new_heads=True,
        device="cpu",
    )
    tokens = model.tokenize(["cat " * 100_000])
    assert tokens.length_N.tolist() == [8192]
    short = load(str(tmp_path), pooling="cls", max_length=32, heads=("sparse",), new_heads=True, device="cpu")
    reps = short.represent(["cat " * 100_000, ""], role="document", outputs=("dense", "sparse"))
    assert reps["sparse"].weight_NT.shape[1] == 32


@pytest.mark.parametrize(
    ("block", "max_length", "ends"), [(256, 8192, 1), (3, 12, 1), (3, 13, 1), (1, 9, 2), (5, 40, 0)]
)
def test_as_many_tokens_as_fit(block, max_length, ends):
    """The most content n for which n + ceil(n / block) + ends is within the limit, by trying."""
    fits = [n for n in range(max_length) if n + -(-n // block) + ends <= max_length]
    assert room_for(max_length, block, ends) == 1 + max(fits) + ends


def test_a_cls_before_every_block():
    rows = [[2, 5, 6, 7, 8, 9, 3], [2, 5, 6, 7, 3], [2, 5, 6, 7, 8, 3], [2, 3]]
    made = with_cls_blocks(TokenBatch.from_rows(rows, [0, 0, 5, 0], True), 3, 1)
    expected = [[2, 5, 6, 7, 2, 8, 9, 3], [2, 5, 6, 7, 3], [2, 5, 6, 7, 2, 8, 3], [2, 3]]
    found = [made.id_S[made.offset_P[n] : made.offset_P[n + 1]].tolist() for n in range(4)]
    assert found == expected
    assert made.body_N.tolist() == [0, 0, 6, 0]
    assert made.is_query_N.all()


def test_mcls_against_the_backbone(tmp_path):
    """The mean of the states of all CLS in one pass; a text of one block is as it was."""
    folder = str(lm.folder(tmp_path))
    plain = load(folder, pooling="cls", heads=("multivector", "sparse"), new_heads=True, device="cpu")
    torch.manual_seed(0)
    model = load(folder, pooling="cls", mcls=8, heads=("multivector", "sparse"), new_heads=True, device="cpu")
    model.load_state_dict(plain.state_dict())
    np.testing.assert_allclose(model.encode(SHORT), plain.encode(SHORT), atol=1e-6)
    ids = torch.from_numpy(model.tokenize([LONG]).id_S)
    cls_id = int(ids[0])
    assert (ids == cls_id).nonzero()[:, 0].tolist() == [0, 9, 18, 27, 36]
    assert len(ids) == 40
    with torch.no_grad():
        state_TH = model.backbone(ids[None], torch.ones_like(ids)[None]).last_hidden_state[0]
    mean_H = state_TH[ids == cls_id].mean(0)
    np.testing.assert_allclose(model.encode([LONG, "a"])[0], mean_H / mean_H.norm(), atol=1e-5)
    reps = model.represent([LONG], role="document", outputs=("multivector", "sparse"))
    assert int(reps["multivector"].mask_NT.sum()) == 35  # no CLS among the words
    assert (reps["sparse"].weight_NT[reps["sparse"].coordinate_NT == cls_id] == 0).all()


@pytest.mark.parametrize(
    ("kind", "pooling", "block"), [("bert", "mean", 256), ("bert", "cls", 0), ("llama", "last", 4)]
)
def test_impossible_mcls(tmp_path, kind, pooling, block):
    with pytest.raises(ModelError, match=rf"mcls={block} with {pooling}"):
        load(str(lm.folder(tmp_path, kind)), pooling=pooling, mcls=block)
