"""GGUF files: llama.cpp's names and metadata, weights as they were, and an error for what such a file cannot say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, dequantize
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from embedsmith.core.errors import CheckpointError, ModelError
from embedsmith.models import load
from embedsmith.models.exports.gguf import _QWEN2, write_gguf
from embedsmith.models.exports.libraries import convert
from tests.models.graphs import model_of
from tests.models.tiny import TEXTS


def fields(reader):
    return {name: field.contents() for name, field in reader.fields.items()}


@pytest.fixture(scope="module")
def small_bert(bert):
    return load(str(bert), pooling="cls", device="cpu")


def byte_pairs(folder: Path) -> Path:
    """A Qwen3 with a tokenizer of bytes, as Qwen's but smaller. (transformers takes every head for one of 128.)"""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate(letters)}
    for pair in (("t", "h"), ("th", "e"), ("Ġ", "the")):
        vocabulary["".join(pair)] = len(vocabulary)
    native = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e"), ("Ġ", "the")]))
    native.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_QWEN2), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    native.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    native.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=native, model_max_length=64)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3Config(
        **sizes, vocab_size=len(tokenizer) + 5, num_key_value_heads=2, head_dim=128, max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.3,
    )  # fmt: skip
    Qwen3Model(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("dtype", "room"), [("fp32", 0), ("fp16", 1e-3), ("int8", 1e-2)])
def test_bert_is_written_under_the_names_of_llama_cpp(small_bert, dtype, room, tmp_path):
    write_gguf(small_bert, tmp_path / "bert.gguf", dtype)
    reader = GGUFReader(str(tmp_path / "bert.gguf"))
    said = fields(reader)
    assert said["general.architecture"] == "bert"
    assert (said["bert.block_count"], said["bert.embedding_length"], said["bert.pooling_type"]) == (2, 16, 2)
    assert said["bert.attention.causal"] is False
    assert said["tokenizer.ggml.model"] == "bert"
    tokenizer = small_bert.tokenizer
    texts = said["tokenizer.ggml.tokens"]
    for text in ("[CLS]", "cat", "##x"):
        marked = {"cat": "\u2581cat", "##x": "x"}.get(text, text)
        assert texts[tokenizer.convert_tokens_to_ids(text)] == marked
    assert said["tokenizer.ggml.bos_token_id"] == tokenizer.cls_token_id
    assert said["tokenizer.ggml.seperator_token_id"] == tokenizer.sep_token_id
    found = {one.name: dequantize(one.data, one.tensor_type).reshape(-1) for one in reader.tensors}
    weights = small_bert.backbone.state_dict()
    names = {
        "token_embd.weight": "embeddings.word_embeddings.weight",
        "blk.1.attn_q.bias": "encoder.layer.1.attention.self.query.bias",
        "blk.0.ffn_down.weight": "encoder.layer.0.output.dense.weight",
        "blk.0.attn_output_norm.weight": "encoder.layer.0.attention.output.LayerNorm.weight",
    }
    for theirs, ours in names.items():
        expected = weights[ours].numpy().reshape(-1)
        np.testing.assert_allclose(found[theirs], expected, atol=room * np.abs(expected).max())
    assert len(found) == len([name for name in weights if "pooler" not in name])


def test_qwen3_comes_back_with_the_same_vectors(tmp_path):
    model = load(str(byte_pairs(tmp_path / "qwen")), pooling="last", device="cpu", prompts={"query": "the "})
    made = write_gguf(model, tmp_path / "file" / "qwen.gguf")
    assert "prompts are not in the file" in made.text
    said = fields(GGUFReader(str(made.path)))
    assert (said["qwen3.pooling_type"], said["tokenizer.ggml.add_eos_token"]) == (3, True)
    convert(str(made.path), tmp_path / "again", ["pooling=last"])
    again = load(str(tmp_path / "again"), device="cpu")
    texts = ["the fox", "a", "then they", *TEXTS[:3]]
    np.testing.assert_allclose(again.encode(texts), model.encode(texts), atol=1e-5)


def test_what_a_file_cannot_say_is_named_and_nothing_is_written(bert, small_bert, tmp_path):
    out = tmp_path / "out.gguf"
    cases = {
        "'xlm-roberta' cannot": model_of("xlm-roberta", tmp_path / "xlmr"),
        "max pooling": load(str(bert), pooling="max", device="cpu"),
        "layers between": load(str(bert), pooling="mean", dimension=4, device="cpu"),
        "left out of the pooling": load(str(bert), pooling="mean", include_prompt=False, device="cpu"),
        "lower case": model_of("bert", tmp_path / "cased"),
        "how this tokenizer cuts": model_of("qwen3", tmp_path / "qwen"),
    }
    for words, model in cases.items():
        with pytest.raises(ModelError, match=words):
            write_gguf(model, out)
    assert not out.exists()
    with pytest.raises(ModelError, match=r"the ending \.gguf"):
        write_gguf(small_bert, tmp_path / "out")
    out.write_text("mine")
    with pytest.raises(CheckpointError, match="not made by this verb"):
        write_gguf(small_bert, out)
    assert out.read_text() == "mine"


def test_the_same_file_again_is_left_and_another_needs_overwrite(small_bert, tmp_path, typed, bert):
    out = tmp_path / "out.gguf"
    write_gguf(small_bert, out)
    before = out.stat().st_mtime_ns
    write_gguf(small_bert, out)
    assert out.stat().st_mtime_ns == before
    with pytest.raises(CheckpointError, match="overwrite"):
        write_gguf(small_bert, out, "fp16")
    said, err, code = typed("export", bert, out, "--to", "gguf", "--dtype", "fp16", "--pooling", "cls", "--overwrite")
    assert (code, "GGUF of bert" in said) == (0, True), err
    assert typed("export", bert, out, "--to", "gguf", "--task", "x")[2] == 1
    assert typed("export", bert, out, "--to", "gguf", "--dtype", "fp8", "--pooling", "cls")[2] == 1
