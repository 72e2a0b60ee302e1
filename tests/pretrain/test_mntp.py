"""Masked next-token prediction: against a loop over tokens, on both padding sides, replayed, saved; what is hidden."""

import pytest
import torch
import torch.nn.functional as F

from embedsmith.core.errors import ModelError
from embedsmith.models import load
from embedsmith.pretrain import mntp
from embedsmith.pretrain.losses import MNTP
from embedsmith.pretrain.mntp import MntpHead, hidden_words
from embedsmith.pretrain.whole_words import shown_by_bert
from embedsmith.train.step import Memory, run_step
from tests.models import lm
from tests.models.families import tiny
from tests.models.test_decoders import byte_tokenizer
from tests.train.tiny import gradients, retrieval_part

TEXTS = ["the cat sat on the mat", "a dog", "the big old tree by the new red mat ran far"]


def decoder(path, **options):
    return load(
        str(lm.folder(path, "llama")),
        **{
            "pooling": "mean",
            "attention": "bidirectional",
            "heads": ("mntp",),
            "device": "cpu",
            "new_heads": True,
            **options,
        },
    )


def every_third(padded, special_S):
    """In place of chance, and counted from the first real token."""
    place_NT = padded.mask_NT.cumsum(1) - 1
    return padded.mask_NT & ~torch.isin(padded.id_NT, special_S) & (place_NT % 3 == 2)


def naive(model, text):
    ids = torch.from_numpy(model.tokenize([text]).id_S)
    special = set(model.tokenizer.all_special_ids)
    hidden = [t for t in range(len(ids)) if int(ids[t]) not in special and t % 3 == 2]
    shown = ids.clone()
    shown[hidden] = model.token_heads["mntp"].mask_id
    state_TH = model.backbone(shown[None], use_cache=False).last_hidden_state[0]
    output_VH = model.token_heads["mntp"].lm.output_VH
    return sum(F.cross_entropy((output_VH @ state_TH[t - 1])[None], ids[t][None]) for t in hidden), len(hidden)


@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_a_loop(tmp_path, monkeypatch, side):
    model = decoder(tmp_path, padding_side=side)
    monkeypatch.setattr(mntp, "hidden_words", every_third)
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))
    made = model(model.tokenize(TEXTS).pad(model.pad_id, left=side == "left"), ("mntp", "dense"))
    assert made["dense"].vector_ND.shape == (3, 16)
    for row, text in zip(made["mntp"].vector_ND, TEXTS, strict=True):
        total, count = naive(model, text)
        assert row[1] == count
        torch.testing.assert_close(row[0], torch.as_tensor(total, dtype=row.dtype), rtol=1e-4, atol=1e-5)
    assert made["mntp"].vector_ND[0, 1] > 0


def test_what_is_hidden(tmp_path):
    model = decoder(tmp_path)
    padded = model.tokenize(["the cat sat on the mat by the tree"] * 400).pad(model.pad_id, left=True)
    special_S = model.token_heads["mntp"].special_S
    torch.manual_seed(0)
    hidden_NT = hidden_words(padded, special_S)
    assert not hidden_NT[torch.isin(padded.id_NT, special_S)].any()
    assert not hidden_NT[:, 0].any()
    words = ~torch.isin(padded.id_NT[0], special_S)
    words[0] = False
    assert 0.18 < hidden_NT[:, words].float().mean() < 0.22
    head = model.token_heads["mntp"]
    shown_NT = shown_by_bert(padded.id_NT, hidden_NT, head.mask_id, len(head.lm.output_VH))
    assert torch.equal(shown_NT[~hidden_NT], padded.id_NT[~hidden_NT])
    assert 0.75 < (shown_NT[hidden_NT] == model.token_heads["mntp"].mask_id).float().mean() < 0.85


def test_replayed_chunks_hide_the_same_words(tmp_path):
    found = []
    for kept in (None, 1):
        model = decoder(tmp_path / f"lm{kept}").train()
        encode = lambda tokens, heads, rows, model=model: model(tokens.pad(model.pad_id, rows=rows), heads)
        torch.manual_seed(5)
        output = run_step(encode, *retrieval_part(MNTP("both")), Memory(24, kept))
        found.append((output.value, gradients(model), output.replayed_chunks))
    (value, kept_all, none), (again, replayed, some) = found
    assert (none, some > 3) == (0, True)
    torch.testing.assert_close(value, again)
    assert max(float(gradient.abs().max()) for gradient in kept_all) > 1e-3
    for one, other in zip(kept_all, replayed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_saved_and_left_out_by_name(tmp_path):
    model = decoder(tmp_path / "lm")
    model.save(tmp_path / "saved")
    again = load(str(tmp_path / "saved"), device="cpu")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    load(str(tmp_path / "saved"), heads=("dense",), device="cpu").save(tmp_path / "dense")
    assert not (tmp_path / "dense" / MntpHead.file).exists()


def test_words_for_a_mask(tmp_path):
    tiny("qwen3", vocab_size=280).save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    head = load(str(tmp_path), pooling="mean", heads=("mntp",), new_heads=True, device="cpu").token_heads["mntp"]
    assert tokenizer.convert_ids_to_tokens(head.mask_id) == "_"
    monkey = byte_tokenizer()
    monkey.get_vocab = dict  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="neither a mask token nor the word"):
        MntpHead(head.lm, monkey)


def test_adapters_leave_the_output_layer_alone(tmp_path):
    model = decoder(tmp_path, lora={"r": 2})
    assert not any(parameter.requires_grad for parameter in model.token_heads.parameters())
    assert any(parameter.requires_grad for parameter in model.parameters())
