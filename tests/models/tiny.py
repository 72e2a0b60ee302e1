"""Small random encoders with a tokenizer of a few words: folders like real ones, in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from embedsmith.models import Embedder, load

TEXTS = [
    "query: what is late interaction",
    "late interaction compares the vectors of tokens",
    "a",
    "",
    "the quick brown fox jumps over the lazy dog and then it jumps over the quick brown dog again and again",
    "embedding models map a text to a vector",
    "向量 检索 café naïve",
]
POOLINGS = ("cls", "mean", "weighted_mean", "last", "max")
"""Those that sentence-transformers has too."""
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def vocabulary() -> dict[str, int]:
    """Special tokens, a few whole words, and letters for the rest: the same ids in every run, unlike a training's."""
    words = ["query", "passage", "late", "the", "fox", "dog", "jumps", "quick", "over", "vector", "vectors", "text"]
    words += ["inter", "action", ":", "向", "量", "検"]
    letters = "abcdefghijklmnopqrstuvwxyzéï"
    pieces = [*SPECIAL, *words, *(letter for letter in letters if letter not in words), *(f"##{c}" for c in letters)]
    return {piece: place for place, piece in enumerate(pieces)}


def tokenizer(max_length: int = 10**30, special: bool = True, lower: bool = False) -> PreTrainedTokenizerFast:
    native = Tokenizer(models.WordPiece(vocabulary(), unk_token="[UNK]"))
    native.normalizer = normalizers.Lowercase() if lower else normalizers.NFC()
    native.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if special:
        native.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=native,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=max_length,
    )


def backbone(kind: str = "bert") -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    common = {**shape, "vocab_size": 120, "max_position_embeddings": 40, "initializer_range": 0.4, "pad_token_id": 0}
    if kind == "llama":
        return LlamaModel(LlamaConfig(**common, num_key_value_heads=2)).eval()
    if kind == "roberta":
        return RobertaModel(RobertaConfig(**common)).eval()
    return BertModel(BertConfig(**common)).eval()


def folder(path: Path, kind: str = "bert", **tokenizer_options: Any) -> Path:
    """A plain transformers folder."""
    backbone(kind).save_pretrained(path)
    tokenizer(**tokenizer_options).save_pretrained(path)
    return path


def embedder(path: Path, kind: str = "bert", **overrides: Any) -> Embedder:
    options = {"pooling": "mean", "device": "cpu", "new_heads": True, **overrides}
    return load(str(folder(path, kind)), **options)
