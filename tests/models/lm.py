"""Folders of tiny random language models: encoders with a masked-language head, decoders with and without ties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from tests.tinybert import tiny_tokenizer

_SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
_MARKS = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}


def language_model(kind: str, vocabulary: int, positions: int = 40) -> Any:
    torch.manual_seed(0)
    shape = {**_SHAPE, "vocab_size": vocabulary, "max_position_embeddings": positions}
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**shape))
    if kind == "xlm-roberta":
        return XLMRobertaForMaskedLM(XLMRobertaConfig(**shape))
    if kind == "distilbert":
        small = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "initializer_range": 0.3}
        return DistilBertForMaskedLM(DistilBertConfig(vocab_size=vocabulary, **small))
    if kind == "electra":
        return ElectraForMaskedLM(ElectraConfig(**shape, embedding_size=12))
    if kind == "modernbert":
        return ModernBertForMaskedLM(ModernBertConfig(**shape, **_MARKS))
    ties = {"num_key_value_heads": 2, "tie_word_embeddings": kind == "llama-tied"}
    return LlamaForCausalLM(LlamaConfig(**shape, **ties))


def folder(path: Path, kind: str = "bert", positions: int = 40) -> Path:
    tokenizer = tiny_tokenizer()
    model = language_model(kind, len(tokenizer), positions)
    with torch.no_grad():  # biases that are zero prove nothing
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.save_pretrained(path)
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(path)
    return path
