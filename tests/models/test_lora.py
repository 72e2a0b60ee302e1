"""Adapters: found targets, exact checkpoints, merging, and refusals."""

import copy
import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from embedsmith.core.errors import MissingExtraError, ModelError
from embedsmith.models import load
from embedsmith.models import lora as adapters
from embedsmith.models.lora import LoraConfig, add_adapter, auto_targets, expert_weights, merged
from tests.models.families import MIXTURES, tiny
from tests.models.test_decoders import TEXTS, byte_tokenizer, embed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny("qwen3", vocab_size=280).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def disturb(model):
    """As if it had been trained: a new adapter gives the base's vectors."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def test_targets_of_every_kind_of_layer():
    mixture = ["down_proj", "gate_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj", "up_proj"]
    assert auto_targets(tiny("deepseek_v3")) == mixture
    assert auto_targets(tiny("qwen3")) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert auto_targets(tiny("gpt2")) == ["c_attn", "c_fc", "c_proj"]
    assert expert_weights(tiny("qwen3_moe")) == ["experts.down_proj", "experts.gate_up_proj"]


def test_targets_of_another_family_are_refused():
    with pytest.raises(ModelError, match="found in 0 of 2 layers"):
        add_adapter(tiny("qwen3"), LoraConfig(targets=("query_key_value",)))


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_an_adapter_survives_apart_and_merged(base, tmp_path, kind):
    model = embed(base, pooling="mean", attention="bidirectional", lora={"r": 4, "kind": kind}, head={"out": 8})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "projections" in name for name in trained)
    assert any("projections" in name for name in trained)
    disturb(model)
    vectors = model.encode(TEXTS)
    assert np.abs(vectors - embed(base, pooling="mean", attention="bidirectional").encode(TEXTS)[:, :8]).max() > 1e-2
    model.save(tmp_path / "apart", merge=False)
    assert not (tmp_path / "apart/model.safetensors").exists()
    again = embed(tmp_path / "apart", lora={"r": 4, "kind": kind})
    np.testing.assert_array_equal(again.encode(TEXTS), vectors)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained
    assert again.attention.mode == "bidirectional"
    model.save(tmp_path / "merged")
    whole = embed(tmp_path / "merged")
    np.testing.assert_allclose(whole.encode(TEXTS), vectors, atol=1e-5)
    np.testing.assert_allclose(embed(tmp_path / "apart").encode(TEXTS), vectors, atol=1e-5)


def test_experts_are_adapted_when_asked():
    backbone = tiny("qwen3_moe")
    add_adapter(backbone, LoraConfig(r=2, experts=True))
    assert any("experts" in name for name, p in backbone.named_parameters() if p.requires_grad)
    disturb(backbone)
    whole = merged(backbone)
    assert not any("lora" in name for name, _ in whole.named_parameters())


def test_a_merge_that_changes_vectors_is_refused(base, monkeypatch):
    model = embed(base, pooling="mean", lora={"r": 4})
    disturb(model)
    monkeypatch.setattr(adapters, "_merge_layers", lambda whole: tiny("qwen3", vocab_size=280))
    with pytest.raises(ModelError, match="merging the adapter changes the states"):
        merged(model.backbone)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_weights_of_16_bits_are_rounded_once(base, kind):
    """Each merged weight is the one of the same adapter in the same weights at full precision, rounded."""
    model = embed(base, pooling="mean", dtype="bfloat16", lora={"r": 4, "kind": kind})
    disturb(model)
    exact = adapters._merge_layers(copy.deepcopy(model.backbone).float())
    for name, weight in adapters._merge_layers(copy.deepcopy(model.backbone)).named_parameters():
        assert weight.dtype == torch.bfloat16, name
        assert torch.equal(weight, exact.get_parameter(name).bfloat16()), name


def test_an_adapter_that_cannot_be_merged_stays_beside_its_base_and_gives_the_same_vectors(base, tmp_path, monkeypatch):
    model = embed(base, pooling="mean", dtype="bfloat16", lora={"r": 4})
    disturb(model)
    model.save(tmp_path / "apart", merge=False)
    monkeypatch.setattr(adapters, "SAME", 1.1)
    again = embed(tmp_path / "apart", dtype="bfloat16")
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))
    again.save(tmp_path / "again", merge=False)
    np.testing.assert_array_equal(embed(tmp_path / "again", dtype="bfloat16").encode(TEXTS), model.encode(TEXTS))


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    torch.manual_seed(5)
    backbone = tiny("qwen3", vocab_size=280, hidden_size=24)
    backbone.save_pretrained(other)
    model = embed(base, pooling="mean", lora={"r": 4})
    model.save(tmp_path / "apart", merge=False)
    with pytest.raises(ModelError, match="another base: hidden_size 16, not 24"):
        embed(tmp_path / "apart", base=str(other))
    contract = json.loads((tmp_path / "apart/embedding_config.json").read_text())
    assert contract["base"]["path"] == str(base.resolve())


def test_an_adapter_of_a_base_that_has_changed_since_is_refused(base, tmp_path):
    """Of the same shape, with the same embeddings, in the same place: trained on since, or merged into."""
    here = tmp_path / "here"
    shutil.copytree(base, here)
    model = embed(here, pooling="mean", lora={"r": 4})
    model.save(tmp_path / "apart", merge=False)
    assert embed(tmp_path / "apart", dtype="bfloat16").encode(TEXTS).shape == (5, 16), "the same in fewer digits"
    disturb(model)
    model.backbone = merged(model.backbone)
    shutil.rmtree(here)
    model.save(here)
    with pytest.raises(
        ModelError, match=r"another base: layers.0.self_attn.q_proj.weight is changed, (.*) and \d+ more"
    ):
        embed(tmp_path / "apart")
    with pytest.raises(ModelError, match="is changed"):
        embed(tmp_path / "apart", dtype="bfloat16")


def test_four_bits_need_their_extra(base):
    if find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is here")
    with pytest.raises(MissingExtraError, match="bitsandbytes"):
        load(str(base), pooling="mean", lora={"four_bit": True})


def gradients(model):
    model.train().zero_grad()
    vector_ND = model(model.tokenize(TEXTS).pad(0))["dense"].vector_ND
    (vector_ND * torch.arange(float(vector_ND.shape[1]))).sum().backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def four_bit(tmp_path):
    """A 4-bit decoder, wide enough for the blocks of its weights, with an adapter that has been trained a little."""
    pytest.importorskip("bitsandbytes", reason='needs bitsandbytes: pip install "embedsmith[qlora]"')
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    tiny("qwen3", vocab_size=280, **wide).save_pretrained(tmp_path / "wide")
    byte_tokenizer().save_pretrained(tmp_path / "wide")
    lora = {"r": 4, "dropout": 0.0, "four_bit": True}
    model = embed(tmp_path / "wide", pooling="mean", attention="bidirectional", lora=lora)
    disturb(model)
    return model


def test_four_bits_have_the_gradient_of_the_same_numbers_in_full(four_bit):
    """It is easily lost: what bitsandbytes packs for inference on a CPU has none."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    four_bit.encode(TEXTS)  # as the self-test and every evaluation do
    found = gradients(four_bit)
    assert {p.dtype for p in four_bit.parameters() if p.requires_grad} == {torch.float32}
    plain = copy.deepcopy(four_bit)
    for name, module in list(plain.named_modules()):
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            parent, _, leaf = name.rpartition(".")
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
            layer.weight.data.copy_(weight)
            setattr(plain.get_submodule(parent), leaf, layer)
    for name, gradient in gradients(plain.float()).items():
        assert torch.nn.functional.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.99, name


def test_four_bits_are_saved_apart_and_merged_into_full_weights(four_bit, tmp_path):
    vectors = four_bit.encode(TEXTS)
    four_bit.save(tmp_path / "apart", merge=False)
    again = embed(tmp_path / "apart", lora={"r": 4, "four_bit": True}).encode(TEXTS)
    assert (again * vectors).sum(1).min() > 0.9999
    four_bit.save(tmp_path / "merged")
    whole = embed(tmp_path / "merged").encode(TEXTS)
    np.testing.assert_allclose(embed(tmp_path / "apart").encode(TEXTS), whole, atol=1e-5)
    assert (whole * vectors).sum(1).min() > 0.5  # they differ by what four bits lose


def test_a_pruned_base_with_a_new_token_is_rebuilt_under_its_adapter(base, tmp_path):
    options = {"pooling": "cls", "attention": "bidirectional", "cls_token": "[CLS]", "layers": 1}
    model = embed(base, **options, lora={"r": 4})
    disturb(model)
    model.save(tmp_path / "apart", merge=False)
    np.testing.assert_array_equal(embed(tmp_path / "apart", lora={"r": 4}).encode(TEXTS), model.encode(TEXTS))


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_adapters_of_a_mixture_lie_on_the_layers_named(tmp_path, family, experts):
    """Every linear layer but routers, dense and shared ones included; the experts' weights only where they are asked
    for. Counted, and the same after saving and loading."""
    backbone = tiny(family)
    linear = {name for name, module in backbone.named_modules() if isinstance(module, torch.nn.Linear)}
    routers = {name for name in linear if not {"gate", "router", "shared_expert_gate"}.isdisjoint(name.split("."))}
    held = {
        name.rpartition(".")[0] for name, one in backbone.named_parameters() if one.dim() == 3 and "experts" in name
    }
    assert held, family
    add_adapter(backbone, LoraConfig(r=2, dropout=0.0 if experts else 0.05, experts=experts))

    def adapted(model):
        names = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
        return {name.replace(".base_layer", "") for name in names}

    assert adapted(backbone) == (linear - routers) | (held if experts else set())
    adapters.save_adapter(backbone, tmp_path, "")
    again = tiny(family)
    adapters.load_adapter(again, tmp_path, None)
    assert adapted(again) == adapted(backbone)
    state, other = backbone.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state if ".lora_" in name)
