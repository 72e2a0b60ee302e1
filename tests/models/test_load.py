"""Folders that load, and folders that must not: nothing random, nothing guessed."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, BertConfig, BertForMaskedLM, T5Config, T5Model

from embedsmith.core.errors import ModelError, RecipeError
from embedsmith.models import ModelConfig, backbone, load
from tests.models import tiny


@pytest.fixture
def plain(tmp_path):
    return tiny.folder(tmp_path / "plain")


@pytest.fixture
def saved(tmp_path):
    tiny.embedder(tmp_path / "base", dimension=8).save(tmp_path / "saved")
    return tmp_path / "saved"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(path, match, **overrides):
    with pytest.raises(ModelError, match=match) as caught:
        load(str(path), device="cpu", **overrides)
    assert str(path) in str(caught.value)


def test_a_folder_that_does_not_say_how_to_pool_is_an_error(plain):
    refused(plain, r"does not say how to pool(.|\n)*pooling=mean")
    with pytest.raises(RecipeError, match=r"unknown pooling 'wean' \(did you mean 'mean'\?\)(.|\n)*latent, max, mean"):
        load(str(plain), pooling="wean")
    with pytest.raises(RecipeError, match="unknown pooling 'median'"):
        load(ModelConfig(str(plain), pooling="median"))


def test_a_config_and_overrides_are_the_same_thing(plain):
    config = ModelConfig(str(plain), pooling="cls", max_length=9)
    assert load(config, device="cpu").settings == load(str(plain), pooling="cls", max_length=9, device="cpu").settings
    assert load(config, device="cpu", pooling="last").settings.pooling == "last"
    with pytest.raises(RecipeError, match="did you mean 'pooling'"):
        load(str(plain), poling="cls")


def test_no_such_folder(tmp_path):
    refused(tmp_path / "absent", "no such model folder")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "no such model folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no tokenizer")


def test_a_hub_id_without_a_network_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("nobody/no-such-model", "could not be fetched(.|\n)*give a local folder")


def test_a_folder_without_a_tokenizer_is_an_error_not_five_tokens(plain):
    (plain / "tokenizer.json").unlink()
    refused(plain, "has no tokenizer", pooling="mean")


def test_a_missing_shard_is_named(tmp_path):
    tiny.folder(tmp_path)
    tiny.backbone().save_pretrained(tmp_path, max_shard_size="10KB")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    load(str(tmp_path), pooling="mean", device="cpu")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].unlink()
    refused(tmp_path, f"1 of {len(shards)} weight files are missing: {shards[1].name}", pooling="mean")


def test_damaged_files_are_named(plain):
    weights = (plain / "model.safetensors").read_bytes()
    (plain / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(plain, "a weights file is damaged", pooling="mean")
    (plain / "config.json").write_text('{"model_type":')
    refused(plain, r"config\.json: the file: Invalid JSON", pooling="mean")


def test_missing_weights_are_never_random(plain):
    state = load_file(plain / "model.safetensors")
    del state["encoder.layer.1.output.dense.weight"]
    save_file(state, plain / "model.safetensors", metadata={"format": "pt"})
    refused(plain, r"1 weights are missing and would be random: encoder\.layer\.1\.output", pooling="mean")


def test_weights_without_a_place_are_an_error(plain):
    change(plain / "config.json", num_hidden_layers=2)
    refused(plain, r"have no place in the model that config.json describes: encoder\.layer\.2", pooling="mean")


def test_weights_of_another_shape_are_an_error(plain):
    change(plain / "config.json", intermediate_size=64)
    refused(plain, "cannot load the model", pooling="mean")


def test_a_language_model_checkpoint_loads_without_its_head_and_without_a_random_pooler(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=120, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    first, second = (load(str(tmp_path), pooling="mean", device="cpu") for _ in range(2))
    first.save(tmp_path / "saved")
    again = load(str(tmp_path / "saved"), device="cpu")
    for model in (second, again):
        state = model.state_dict()
        assert state.keys() == first.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in first.state_dict().items())


def test_the_encoder_of_an_encoder_decoder(tmp_path):
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 120}
    T5Model(T5Config(**shape)).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model = load(str(tmp_path), pooling="mean", device="cpu")
    assert type(model.backbone).__name__ == "T5EncoderModel"
    alone = np.stack([model.encode(text) for text in tiny.TEXTS])
    np.testing.assert_allclose(model.encode(tiny.TEXTS), alone, atol=1e-5)
    model.save(tmp_path / "saved")
    np.testing.assert_array_equal(
        load(str(tmp_path / "saved"), device="cpu").encode(tiny.TEXTS), model.encode(tiny.TEXTS)
    )


def test_positions_of_roberta_start_behind_the_padding_index(tmp_path):
    """40 positions, padding index 0: the longest text has 39 tokens, and one more would be an index error."""
    model = tiny.embedder(tmp_path, "roberta")
    assert model.max_length == 39
    assert np.isfinite(model.encode("fox " * 100)).all()


def test_modules_this_cannot_do_are_named(saved):
    modules = json.loads((saved / "modules.json").read_text())
    for index, kind in ((2, "sentence_transformers.models.LSTM"), (1, "evil.package.Pooling")):
        broken = [dict(entry) for entry in modules]
        broken[index]["type"] = kind
        (saved / "modules.json").write_text(json.dumps(broken))
        with pytest.raises(ModelError, match=f"the module '{kind}' is not supported"):
            load(str(saved))
    (saved / "modules.json").write_text(json.dumps([modules[0], modules[2], modules[1]]))
    refused(saved, "in the order Transformer, Dense, Pooling")
    (saved / "modules.json").write_text(json.dumps([modules[0], {**modules[1], "path": "../../elsewhere"}]))
    refused(saved, "leaves the folder")


def test_an_activation_is_looked_up_and_never_imported(saved):
    change(saved / "2_Dense/config.json", activation_function="os.system")
    with pytest.raises(ModelError, match=r"unknown activation 'os\.system'"):
        load(str(saved))
    change(saved / "2_Dense/config.json", activation_function="os.Tanh")
    with pytest.raises(ModelError, match=r"unknown activation 'os\.Tanh'"):
        load(str(saved))


def test_poolings_that_are_not_known_are_named_unless_one_is_given(saved):
    config = saved / "1_Pooling/config.json"
    change(config, pooling_mode_max_tokens=True)
    refused(saved, r"layer 1 \(Dense\) takes 16 numbers, and gets 32")  # mean and max side by side
    config.write_text('{"embedding_dimension": 16, "pooling_mode": ["mean", "median"], "include_prompt": true}')
    refused(saved, r"pooling mean \+ median is not supported")
    config.unlink()
    refused(saved, "this file is missing")


def test_a_dense_module_without_its_weights_is_an_error(saved):
    (saved / "2_Dense/model.safetensors").write_bytes(b"short")
    refused(saved, "cannot read the weights of a Dense module")
    (saved / "2_Dense/model.safetensors").unlink()
    refused(saved, "the weights of a Dense module are missing")


def test_files_that_are_not_json_are_named(saved):
    (saved / "modules.json").write_text("[")
    refused(saved, r"modules\.json: the file: Invalid JSON")


def test_own_prompts_replace_the_folder_s(tmp_path):
    tiny.embedder(tmp_path / "base", prompts={"query": "q: ", "document": "d: "}).save(tmp_path / "saved")
    kept, changed = (load(str(tmp_path / "saved"), device="cpu", prompts=p) for p in (None, {"query": ""}))
    assert kept.settings.prompts == {"query": "q: ", "document": "d: "}
    assert changed.settings.prompts == {"query": ""}


def test_dtype_of_the_weights(plain):
    model = load(str(plain), pooling="mean", dtype="bfloat16", dimension=8, device="cpu")
    assert model.backbone.dtype == torch.bfloat16
    assert model.projections[0].linear.weight.dtype == torch.float32
    assert model.encode(tiny.TEXTS).dtype == np.float32


@pytest.mark.parametrize("kind", ["bert", "gpt2", "modernbert"])
def test_no_model_is_larger_than_the_bound_by_its_sizes(kind):
    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert sum(one.numel() for one in [*model.parameters(), *model.buffers()]) <= backbone._at_most(config.to_dict())


def test_weights_are_counted_only_where_they_might_not_fit(plain, monkeypatch):
    built = []
    count = AutoModel.from_config
    monkeypatch.setattr(AutoModel, "from_config", lambda *args, **more: built.append(args) or count(*args, **more))
    load(str(plain), pooling="mean", device="cpu")
    assert not built
    monkeypatch.setattr(backbone, "memory", lambda: 2**10)
    load(str(plain), pooling="mean", device="cpu")
    assert len(built) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that is asked for")
@pytest.mark.parametrize(("device", "message"), [("cuda", "embedsmith doctor"), ("gpu", "cpu, cuda, cuda:1 or mps")])
def test_a_device_that_is_not_there_is_told_before_anything_is_loaded(device, message):
    with pytest.raises(ModelError, match=message):
        load("nowhere", device=device)
