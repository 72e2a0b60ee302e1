"""What `bench.gpu` computes on: random weights in real shapes, a tokenizer of whole words, and texts of mixed lengths.

Nothing is read but what a clone has. Lengths are those of package descriptions in subwords: queries of about 10 tokens,
documents with a median of 72 and a mean of 89, log-normal, cut at the model's maximum.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, Gemma3TextConfig, PreTrainedTokenizerFast, Qwen3Config, XLMRobertaConfig

WORDS, _FEW = 30_000, 2_000
_QUERY, _DOCUMENT = (10, 0.35), (72, 0.65)  # median and sigma of the logarithm of the number of words


@dataclass(frozen=True)
class Shape:
    """A model's configuration, how it pools, and its special tokens in the order of their ids."""

    config: Any
    pooling: str
    special: tuple[str, ...]
    around: str


def shape(name: str, tiny: bool) -> Shape:
    """`qwen3` is Qwen3-0.6B, `xlmr` XLM-RoBERTa-large (BGE-M3 without its longer table), `bert` BERT-base, `minilm`
    all-MiniLM-L6, `gemma` a small decoder with sliding windows; `tiny`: a miniature of the same family."""
    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": WORDS + 8,
    }
    small |= {"num_attention_heads": 2, "max_position_embeddings": 130 if tiny else 520}
    heads = {"num_key_value_heads": 1, "head_dim": 16}
    bert, roberta = ("[PAD]", "[UNK]", "[CLS]", "[SEP]"), ("<s>", "<pad>", "</s>", "<unk>")
    decoder, behind = ("<pad>", "<unk>", "</s>"), "$A </s>"
    known = {
        "qwen3": lambda: Shape(_qwen3(small | heads if tiny else {}), "last", decoder, behind),
        "gemma": lambda: Shape(
            Gemma3TextConfig(**small | heads, sliding_window=16, pad_token_id=0, eos_token_id=2, bos_token_id=None),
            "last", decoder, behind,
        ),
        "xlmr": lambda: Shape(_xlmr(small if tiny else {}), "cls", roberta, "<s> $A </s>"),
        "bert": lambda: Shape(BertConfig(**small if tiny else {}), "mean", bert, "[CLS] $A [SEP]"),
        "minilm": lambda: Shape(BertConfig(**small if tiny else _MINILM), "mean", bert, "[CLS] $A [SEP]"),
    }  # fmt: skip
    return known[name]()


_MINILM = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}


def _qwen3(small: dict[str, Any]) -> Qwen3Config:
    real = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    real |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_669, "max_position_embeddings": 32_768}
    return Qwen3Config(**real | small, tie_word_embeddings=True, pad_token_id=0, eos_token_id=2)


def _xlmr(small: dict[str, Any]) -> XLMRobertaConfig:
    real = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    real |= {"vocab_size": 250_002, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    return XLMRobertaConfig(**real | small, bos_token_id=0, pad_token_id=1, eos_token_id=2)


@cache
def vocabulary() -> tuple[str, ...]:
    return tuple(f"w{number}" for number in range(WORDS))


def tokenizer(one: Shape, max_length: int, words: int) -> PreTrainedTokenizerFast:
    """So many whole words between spaces, and the family's tokens around a text."""
    ids = {token: number for number, token in enumerate((*one.special, *vocabulary()[:words]))}
    unknown = next(token for token in one.special if "unk" in token.lower())
    native = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    native.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    used = [(token, ids[token]) for token in one.around.split() if token != "$A"]
    native.post_processor = processors.TemplateProcessing(single=one.around, special_tokens=used)
    named = {"pad_token": next(t for t in one.special if "pad" in t.lower()), "unk_token": unknown}
    named |= {"cls_token": used[0][0], "sep_token": used[-1][0]} if len(used) > 1 else {"eos_token": used[-1][0]}
    return PreTrainedTokenizerFast(tokenizer_object=native, model_max_length=max_length, **named)


def save_model(folder: Path, name: str, max_length: int, tiny: bool) -> str:
    """A transformers folder with random weights in bf16, which are made on the card where there is one."""
    one = shape(name, tiny)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModel.from_config(one.config)
    path = folder / name
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer(one, max_length, _FEW if tiny else WORDS).save_pretrained(path)
    return str(path)


def body_parameters(model: Any) -> int:
    """Parameters but those of embedding tables: what an MFU counts."""
    tables = {
        id(p) for module in model.modules() if isinstance(module, torch.nn.Embedding) for p in module.parameters()
    }
    return sum(p.numel() for p in model.parameters() if id(p) not in tables)


def texts(count: int, seed: int, kind: tuple[float, float] = _DOCUMENT, longest: int = 700) -> list[str]:
    """Texts of words drawn like those of a language (Zipf), of log-normal length."""
    chance = np.random.default_rng(seed)
    length_N = np.exp(chance.normal(np.log(kind[0]), kind[1], count)).round().clip(1, longest).astype(int)
    word_S = (WORDS ** chance.random(int(length_N.sum()))).astype(int) - 1  # the density falls as 1 over the rank
    words, stop_N = np.array(vocabulary(), dtype=object)[word_S], np.cumsum(length_N)
    return [" ".join(words[stop - length : stop]) for stop, length in zip(stop_N, length_N, strict=True)]


def write_pairs(path: Path, count: int, seed: int = 0, longest: int = 700) -> Path:
    rows = zip(texts(count, seed, _QUERY, 40), texts(count, seed + 1, longest=longest), strict=True)
    lines = (json.dumps({"query": f"{query} q{n}", "pos": [document]}) for n, (query, document) in enumerate(rows))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
