"""Malformed model folders: each ends in an error of ours that names the file, before anything large is allocated."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, CLIPConfig, CLIPModel

from embedsmith.core.errors import EmbedsmithError, ModelError, RecipeError
from embedsmith.models import load
from embedsmith.models.backbone import shard_names
from tests.tinybert import WORDS, tiny_bert, tiny_tokenizer

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with every file that an embedder may have."""
    root = tmp_path_factory.mktemp("whole")
    options = {"dimension": 8, "heads": ("dense", "multivector"), "echo": "{text} {text}", "prompts": {"query": "the "}}
    torch.manual_seed(0)
    load(str(tiny_bert(root / "bert")), pooling="mean", new_heads=True, device="cpu", **options).save(root / "model")
    return root / "model"


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def refused(folder, file, match=None, **options):
    started = time.monotonic()
    with pytest.raises(EmbedsmithError, match=match) as caught:
        load(str(folder), device="cpu", **options)
    assert file in str(caught.value)
    assert time.monotonic() - started < 20


def edit(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def put(*place_and_value):
    *place, last, value = place_and_value

    def change(tree):
        for key in place:
            tree = tree[key]
        tree[last] = value

    return change


FILES = (
    *("config.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    *("embedding_config.json", "tokenizer_config.json", "tokenizer.json", "1_Pooling/config.json"),
    "2_Dense/config.json",
)
CONTENTS = {
    "list": b"[1, 2]",
    "number": b"7",
    "string": b'"x"',
    "null": b"null",
    "nothing": b"",
    "deep": b'{"a":' * 50_000,
    "latin-1": b'{"a": "\xe9"}',
}


@pytest.mark.parametrize("file", FILES)
def test_json_that_is_no_object(folder, file):
    kept = (folder / file).read_bytes()
    for content in (*CONTENTS.values(), kept.decode().encode("utf-16")):
        (folder / file).write_bytes(content)
        refused(folder, file)
    (folder / file).unlink()
    (folder / file).mkdir()
    refused(folder, "")  # a folder of that name


GENERAL = "config_sentence_transformers.json"
VALUES = {
    "sizes": [
        *((CONFIG, put(key, 10**power)) for power in (7, 12, 30) for key in ("num_hidden_layers",)),
        *((CONFIG, put(key, 10**12)) for key in ("hidden_size", "vocab_size", "intermediate_size")),
        *((CONFIG, put("max_position_embeddings", size)) for size in (10**11, 10**18, -1)),
        *(("2_Dense/config.json", put("out_features", size)) for size in (10**11, 0, -1, 1.5)),
    ],
    "types": [
        (CONFIG, put("num_hidden_layers", "2")),
        (CONFIG, put("hidden_dropout_prob", float("nan"))),
        (CONFIG, put("num_attention_heads", -1)),
        (CONFIG, put("model_type", "nothing-known")),
        ("modules.json", put(0, "type", 3)),
        ("modules.json", put(0, None)),
        ("sentence_bert_config.json", put("max_seq_length", "32")),
        ("sentence_bert_config.json", put("max_seq_length", 1)),
        (GENERAL, put("prompts", ["query: "])),
        (GENERAL, put("prompts", "query", 3)),
        (GENERAL, put("default_prompt_name", "passage")),
        (GENERAL, put("similarity_fn_name", "nearest")),
        (GENERAL, put("truncate_dim", -1)),
        ("1_Pooling/config.json", put("pooling_mode_mean_tokens", "yes")),
        ("2_Dense/config.json", put("activation_function", "os.system")),
        ("embedding_config.json", put("version", 2)),
        ("embedding_config.json", put("base", {"layers": 3})),
        ("embedding_config.json", put("modules", 1, "path", "../../elsewhere")),
        ("embedding_config.json", put("eos_id", -1)),
        ("embedding_config.json", put("eos_id", 10**30)),
        ("tokenizer_config.json", put("model_max_length", "long")),
        ("tokenizer_config.json", put("unk_token", "")),
        ("tokenizer.json", put("model", {})),
        ("tokenizer.json", put("post_processor", 7)),
    ],
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_that_mean_nothing(folder, kind):
    for file, change in VALUES[kind]:
        kept = (folder / file).read_bytes()
        edit(folder / file, change)
        refused(folder, file)
        (folder / file).write_bytes(kept)
    load(str(folder), device="cpu")


@pytest.mark.parametrize(
    "options",
    [
        *({key: size} for size in (10**11, 0) for key in ("dimension", "multivector_dim", "positions")),
        {"head": {"out": 10**9}},
        {"head": {"out": 8, "type": "mlp", "hidden": 10**9}},
        {"pooler": {"latents": 10**11}, "pooling": "latent"},
        {"lora": {"r": 10**10}},
        {"max_length": 10**12},
        {"heads": ("dense", "multivector"), "multivector_dim": 1e11},
        {"echo": "again"},
    ],
)
def test_sizes_and_settings_that_are_asked_for(whole, options):
    with pytest.raises((ModelError, RecipeError)):
        load(str(whole), device="cpu", **options)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "1_Pooling/config.json"])
def test_a_pipe_in_a_files_place(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=f"{name}: this is a pipe"):
        load(str(folder))


def test_a_link_to_nothing_in_a_files_place(folder):
    (folder / "1_Pooling" / "config.json").unlink()
    (folder / "1_Pooling" / "config.json").symlink_to("absent.json")
    with pytest.raises(ModelError, match=r"config\.json: a link to absent\.json, which is not there"):
        load(str(folder))


def test_a_module_whose_name_is_too_long(folder):
    kinds = (("", "sentence_transformers.models.Transformer"), ("x" * 5000, "sentence_transformers.models.Pooling"))
    edit(folder / "embedding_config.json", put("modules", [{"path": path, "type": kind} for path, kind in kinds]))
    with pytest.raises(ModelError, match="cannot read from this path"):
        load(str(folder))


def test_weights_that_are_no_whole_file(folder):
    path = folder / WEIGHTS
    kept = path.read_bytes()
    for content in (b"", kept[:100], kept[:-1], kept + bytes(16), struct.pack("<Q", 2**62) + kept[8:]):
        path.write_bytes(content)
        refused(folder, WEIGHTS, "a weights file is damaged")


@pytest.fixture
def sharded(folder):
    backbone = BertModel.from_pretrained(folder, add_pooling_layer=False)
    (folder / WEIGHTS).unlink()
    backbone.save_pretrained(folder, max_shard_size="5KB")
    return folder


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("../model.safetensors", "does not lie beside this index"),
        ("/etc/passwd", "does not lie beside this index"),
        ("deeper/model.safetensors", "does not lie beside this index"),
        ("", "does not lie beside this index"),
        ("absent.safetensors", "1 of . weight files are missing: absent"),
        ("x" * 5000, "weight files are missing"),
        (None, "weight_map"),
    ],
)
def test_shards_that_are_elsewhere(sharded, name, match):
    first = min(json.loads((sharded / INDEX).read_text())["weight_map"])
    edit(sharded / INDEX, put("weight_map", first, name))
    refused(sharded, str(sharded), match)
    with pytest.raises(ModelError, match=match):  # what merges read
        shard_names(sharded / INDEX)


def test_a_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    more = load_file(first) | {key: tensor + 1 for key, tensor in load_file(second).items()}
    save_file(more, first, {"format": "pt"})
    refused(sharded, second.name, "is in this file and in")


def words_added(folder, special=False):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["zugzwang", "kiosk"], special_tokens=special)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def test_a_tokenizer_larger_than_the_embedding_table(tmp_path):
    """Refused with both sizes; the two ways out that are named work."""
    rows = len(tiny_tokenizer())
    tiny_bert(tmp_path)
    size = words_added(tmp_path)
    refused(tmp_path, str(tmp_path), rf"{size} tokens and the embedding table {rows} rows", pooling="mean")
    tiny_tokenizer().save_pretrained(tmp_path)
    load(str(tmp_path), pooling="mean", device="cpu")
    words_added(tmp_path)
    backbone = BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    backbone.resize_token_embeddings(size)
    backbone.save_pretrained(tmp_path)
    load(str(tmp_path), pooling="mean", device="cpu").encode(["the kiosk"])


def test_marks_without_a_row_are_refused_in_texts(tmp_path):
    """As EmbeddingGemma's mark for pictures: no text has it, and one that has it is named."""
    tiny_bert(tmp_path)
    words_added(tmp_path, special=True)
    model = load(str(tmp_path), pooling="mean", device="cpu")
    model.encode(["the cat", "a dog"])
    with pytest.raises(EmbedsmithError, match="text 1 has the mark 'kiosk'"):
        model.encode(["the cat", "the kiosk"])


def test_tokens_around_every_text_that_have_no_row(tmp_path):
    tiny_bert(tmp_path)
    edit(tmp_path / "tokenizer.json", put("post_processor", "sep", ["[SEP]", 10**6]))
    refused(tmp_path, str(tmp_path), "have no row", pooling="mean")


def test_a_tokenizer_file_with_fixed_lengths(tmp_path):
    """all-MiniLM-L6-v2 is shipped so: the lengths of the file are none of the model's."""
    plain, fixed = tiny_bert(tmp_path / "plain"), tiny_bert(tmp_path / "fixed")
    cut = {"max_length": 6, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    filled = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    edit(fixed / "tokenizer.json", put("truncation", cut))
    edit(fixed / "tokenizer.json", put("padding", {"strategy": {"Fixed": 6}, **filled}))
    for options in ({"pooling": "last"}, {"pooling": "mean", "max_length": 8, "prompts": {"query": "the cat: "}}):
        one, two = (load(str(path), device="cpu", **options) for path in (plain, fixed))
        texts = ["the cat", " ".join(WORDS)]
        assert one.tokenize(texts, "query").id_S.tolist() == two.tokenize(texts, "query").id_S.tolist()
        assert (one.encode(texts, "query") == two.encode(texts, "query")).all()
    two.save(tmp_path / "saved")
    saved, original = (json.loads((path / "tokenizer.json").read_text()) for path in (tmp_path / "saved", plain))
    assert saved == original
    refused(
        fixed, "prompt 'query' takes 20 tokens of 16", pooling="mean", max_length=16, prompts={"query": "cat " * 20}
    )


@pytest.mark.parametrize("asked", [("dense", "sparse"), ("sparse",)])
def test_a_head_that_the_folder_lacks(folder, asked):
    refused(folder, "sparse_linear.pt", "would be random", heads=asked)
    assert "sparse" in load(str(folder), heads=asked, new_heads=True, device="cpu").outputs
    (folder / "colbert_linear.pt").unlink()
    refused(folder, "colbert_linear.pt", "this file is missing", heads=("dense", "multivector"))


def test_a_cross_encoder_and_a_model_of_pictures(tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertForSequenceClassification(BertConfig(vocab_size=80, **shape)).save_pretrained(tmp_path / "cross")
    text = {**shape, "vocab_size": 80, "max_position_embeddings": 32}
    CLIPModel(CLIPConfig(text_config=text, vision_config={**shape, "image_size": 8, "patch_size": 4})).save_pretrained(
        tmp_path / "clip"
    )
    for name, match in (("cross", "BertForSequenceClassification is no embedder"), ("clip", "no encoder of texts")):
        tiny_tokenizer().save_pretrained(tmp_path / name)
        refused(tmp_path / name, CONFIG, match, pooling="mean")
    edit(tmp_path / "cross" / CONFIG, lambda tree: tree.pop("architectures"))  # the way out that is named
    load(str(tmp_path / "cross"), pooling="mean", device="cpu")
