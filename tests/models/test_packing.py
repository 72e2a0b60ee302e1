"""Packing: the texts of a chunk in one row, with the vectors and gradients of the padded chunk."""

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import BertConfig, BertModel, modeling_flash_attention_utils
from transformers.integrations import flex_attention as flex_module

from embedsmith.core.errors import ModelError
from embedsmith.models import load, packing
from tests.models.families import tiny
from tests.models.test_decoders import TEXTS, byte_tokenizer, embed


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("packing")

    def folder(family, **changes):
        place = root / "-".join([family, *map(str, changes.values())])
        if not place.exists():
            tiny(family, vocab_size=280, **changes).save_pretrained(place)
            byte_tokenizer().save_pretrained(place)
        return str(place)

    return folder


def vectors_and_gradient(model):
    padded = model.tokenize([text for text in TEXTS if text]).pad(model.pad_id, left=model.padding_left)
    assert not padded.mask_NT.all()
    model.zero_grad()
    reps = model(padded, ("dense", "middle"))
    (reps["dense"].vector_ND * torch.arange(16.0)).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return reps["dense"].vector_ND.detach(), reps["middle"].vector_ND.detach(), gradient


def both(path, **options):
    plain, row = embed(path, **options), embed(path, **options, packing=True)
    assert row.packing
    return plain, row


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3", "gpt2", "stablelm", "qwen3_moe"])
def test_a_packed_chunk_equals_the_padded_one(folders, family, attention, implementation):
    options = {"pooling": "mean", "attention": attention, "attn_implementation": implementation}
    for plain, row in zip(*map(vectors_and_gradient, both(folders(family), **options))):
        torch.testing.assert_close(row, plain, rtol=0, atol=1e-5 * max(1.0, float(plain.abs().max())))


@pytest.mark.parametrize(
    "options",
    [
        {"pooling": "last", "padding_side": "left"},
        {"pooling": "weighted_mean", "lora": {"r": 2}},
        {"pooling": "attention", "attention": "bidirectional"},
        {"pooling": "mean", "echo": "{text} {text}"},
        {"pooling": "last", "gradient_checkpointing": True},
    ],
)
def test_packing_is_only_a_way_to_compute(folders, tmp_path, options):
    torch.manual_seed(0)
    plain = embed(folders("qwen3"), **options)
    plain.save(tmp_path / "saved", merge=False)
    row = embed(str(tmp_path / "saved"), packing=True)
    np.testing.assert_allclose(row.encode(TEXTS), plain.encode(TEXTS), atol=1e-5)
    assert not embed(str(tmp_path / "saved")).packing


def test_without_bounds_texts_would_see_each_other(folders, monkeypatch):
    """What the self-test is there for: it notices a mask that keeps nothing apart."""
    through = lambda sees, implementation, dtype: torch.ones_like(sees)
    monkeypatch.setattr(packing, "as_mask", through)
    with pytest.raises(ModelError, match="Qwen3Model cannot be packed: a text's states depend on what else"):
        embed(folders("qwen3"), pooling="mean", attention="bidirectional", packing=True)


@pytest.mark.parametrize(
    ("family", "changes", "options", "message"),
    [
        ("qwen3_next", {}, {}, "Qwen3NextModel cannot be packed"),
        ("mistral", {"sliding_window": 4}, {}, "a token of MistralModel sees 4 tokens"),
        ("qwen3", {}, {"attention": "softmask"}, "packing under attention=softmask"),
    ],
)
def test_what_cannot_be_packed_is_refused(folders, family, changes, options, message):
    with pytest.raises(ModelError, match=message) as caught:
        embed(folders(family, **changes), pooling="mean", packing=True, **options)
    assert "set model.packing=false" in str(caught.value)


def test_a_window_as_long_as_the_texts_is_none(folders):
    assert embed(folders("mistral", sliding_window=64), pooling="mean", packing=True).packing


def test_an_encoder_with_a_short_position_table(tmp_path):
    """The row may be longer than the table: positions begin anew with every text."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=280, max_position_embeddings=50, initializer_range=0.3, **shape)
    BertModel(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    plain, row = both(str(tmp_path), pooling="mean")
    np.testing.assert_allclose(row.encode(TEXTS), plain.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_flex_attention_gets_blocks(folders, monkeypatch, attention):
    """On a CPU uncompiled and without gradient, which torch has not there."""
    plain_flex = lambda query, key, value, training=False, **rest: flex_attention(query, key, value, **rest)
    monkeypatch.setattr(flex_module, "compile_friendly_flex_attention", plain_flex)
    model = embed(folders("qwen3"), pooling="mean", attention=attention)
    expected = model.encode(TEXTS)
    model.backbone.set_attn_implementation("flex_attention")
    model.packing = True
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-5)


def varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale, **_):
    """What flash attention computes, text by text."""
    rows = []
    groups = query.shape[1] // key.shape[1]
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist()):
        assert end - start <= max_seqlen_q
        q, k, v = (t[start:end].float().transpose(0, 1) for t in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale)
        rows.append(seen.transpose(0, 1))
    return torch.cat(rows).to(query.dtype)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_flash_attention_gets_lengths(folders, monkeypatch, attention):
    """The kernel's part by a loop in its place; the kernel itself: the test below."""

    def kernels(_implementation):
        process = lambda **given: {
            "max_seqlen_q": given["max_seqlen_q"],
            "max_seqlen_k": given["max_seqlen_k"],
            "causal": given["is_causal"],
            "softmax_scale": given["softmax_scale"],
        }
        return (None, varlen, None, None, None), (process, None)

    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", kernels)
    model = embed(folders("qwen3"), pooling="mean", attention=attention)
    expected = model.encode(TEXTS)
    model.backbone.config._attn_implementation = "flash_attention_2"
    model.packing = True
    got = model.encode(TEXTS)
    assert (got * expected).sum(1).min() > 0.999
    assert np.abs(got - expected).max() > 0  # computed in bf16, as the kernel does


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_kernels_equal_sdpa_on_a_gpu(tmp_path, implementation, attention):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="needs flash-attn")
    tiny("qwen3", vocab_size=280, hidden_size=64, head_dim=32).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    options = {"pooling": "mean", "attention": attention, "max_length": 48, "device": "cuda"}
    expected = load(str(tmp_path), **options).encode(TEXTS)
    row = load(str(tmp_path), **options, attn_implementation=implementation, packing=True)
    assert (row.encode(TEXTS) * expected).sum(1).min() > 0.999
    padded = row.tokenize(TEXTS).pad(row.pad_id, "cuda")
    row.train()(padded)["dense"].vector_ND.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in row.parameters() if p.grad is not None)


@pytest.mark.parametrize("options", [{}, {"packing": True}, {"adapter": True}])
def test_a_compiled_backbone_has_the_same_vectors(folders, tmp_path, monkeypatch, options):
    """Graphs without their kernels; also of a backbone that an adapter was merged into."""
    compiled = []
    real = torch.compile
    stand_in = lambda call, **how: compiled.append(how) or real(call, **how, backend="eager")
    monkeypatch.setattr(torch, "compile", stand_in)
    path, how = folders("qwen3"), {"pooling": "mean", "attention": "bidirectional"}
    if options.get("adapter"):
        embed(path, **how, lora={"r": 2}).save(tmp_path / "apart", merge=False)
        path, how, options = str(tmp_path / "apart"), {}, {}
    expected = embed(path, **how).encode(TEXTS)
    model = embed(path, **how, **options, compile=True)
    assert compiled == [{"dynamic": True}]
    assert model.backbone._compiled_call_impl is not None
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-5)
