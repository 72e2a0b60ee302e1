"""Denoising auto-encoding: against transformers' own decoder with cross-attention, replayed, saved; what is deleted."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BertModel

from embedsmith.core.errors import ModelError
from embedsmith.models import load
from embedsmith.pretrain import tsdae
from embedsmith.pretrain.losses import TSDAE
from embedsmith.train.step import Memory, run_step
from tests.models import lm
from tests.train.tiny import gradients, retrieval_part

TEXTS = ["the cat sat on the mat zz", "a dog", "the big old tree by the new red mat ran far"]


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(2)
    folder = lm.folder(tmp_path / "lm")
    return load(str(folder), pooling="mean", heads=("tsdae",), new_heads=True, device="cpu")


def test_the_decoder_is_that_of_transformers_with_tied_weights(model, monkeypatch):
    head, backbone = model.token_heads["tsdae"], model.backbone
    monkeypatch.setattr(tsdae, "DELETED", 0.0)
    config = type(backbone.config).from_dict(
        {**backbone.config.to_dict(), "is_decoder": True, "add_cross_attention": True}
    )
    decoder = BertModel(config, add_pooling_layer=False).eval()
    missing = decoder.load_state_dict(backbone.state_dict(), strict=False).missing_keys
    assert all("crossattention" in name for name in missing)
    for layer, cross in zip(decoder.encoder.layer, head.cross, strict=True):
        attention = layer.crossattention
        attention.self.value.load_state_dict(cross.value.state_dict())
        attention.output.dense.load_state_dict(cross.out.state_dict())
        cross.norm.weight.data.uniform_(0.5, 1.5)
        attention.output.LayerNorm.load_state_dict(cross.norm.state_dict())
        cross.norm.eps = attention.output.LayerNorm.eps
    tokens = model.tokenize(TEXTS)
    found = model(tokens.pad(model.pad_id), ("tsdae",))["tsdae"].vector_ND
    for row, text in zip(found, TEXTS, strict=True):
        ids = torch.from_numpy(model.tokenize([text]).id_S)[None]
        sentence = model.pooled_states(model.tokenize([text]).pad(model.pad_id))[:, None]
        state = decoder(ids, encoder_hidden_states=sentence).last_hidden_state[:, :-1]
        logits = head.lm.transform(state) @ backbone.get_input_embeddings().weight.T + head.lm.bias_V
        expected = F.cross_entropy(logits[0], ids[0, 1:], reduction="sum")
        assert row.tolist() == pytest.approx([expected.item(), ids.shape[1] - 1], rel=1e-4)


def test_whole_words_are_deleted_and_one_stays(model):
    torch.manual_seed(0)
    head, kept, rows = model.token_heads["tsdae"], 0, 300
    padded = model.tokenize(TEXTS * rows).pad(model.pad_id)
    shown = head._thinned(padded)
    special = set(model.tokenizer.all_special_ids)
    words = torch.tensor([sum(int(i) not in special for i in row) for row in padded.id_NT])
    for before, after, mask, body in zip(padded.id_NT, shown.id_NT, shown.mask_NT, shown.body_NT, strict=True):
        left = after[mask].tolist()
        there = [int(i) not in special for i in left]
        kept += sum(there)
        assert any(there)
        assert left[0] == before[0]
        assert left[-1] == model.tokenizer.sep_token_id
        assert body.equal(mask)
        remaining = iter(before.tolist())
        assert all(token in remaining for token in left), "in the same order"
    assert 0.3 < kept / int(words.sum()) < 0.55


def test_replayed_chunks_delete_the_same_words(model):
    model.train()
    found = []
    for memory in (Memory(10**9), Memory(12, 0)):
        model.zero_grad()
        torch.manual_seed(4)
        tokens, parts = retrieval_part(TSDAE(), queries=4, negatives=1)
        encode = lambda tokens, heads, rows: model(tokens.pad(model.pad_id, rows=rows), heads)
        output = run_step(encode, tokens, parts, memory)
        found.append((output.replayed_chunks > 0, [g.shape for g in gradients(model)], float(output.value)))
        assert sum(float(g.abs().sum()) for g in gradients(model)) > 0
    assert [replayed for replayed, _, _ in found] == [False, True]


def test_saved_and_left_behind(model, tmp_path):
    model.save(tmp_path / "saved")
    again = load(str(tmp_path / "saved"), device="cpu")
    padded = model.tokenize(TEXTS).pad(model.pad_id)
    values = []
    for one in (model, again):
        torch.manual_seed(1)
        values.append(one(padded, ("tsdae",))["tsdae"].vector_ND)
    torch.testing.assert_close(values[0], values[1])
    assert "tsdae" not in load(str(tmp_path / "saved"), heads=("dense",), device="cpu").outputs


def test_other_families_are_refused(tmp_path):
    with pytest.raises(ModelError, match="tsdae of LlamaModel"):
        load(str(lm.folder(tmp_path, "llama")), pooling="mean", heads=("tsdae",), new_heads=True, device="cpu")
