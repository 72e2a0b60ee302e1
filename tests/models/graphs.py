"""Eight families as tiny random models, and what is compared between a model and its graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModel, T5EncoderModel

from embedsmith.core.tokens import TokenBatch
from embedsmith.models import Embedder, load
from tests.models.tiny import tokenizer

_SHAPE = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
_DECODER = {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 2, "eos_token_id": 3}
_TWO_KINDS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bert": ("bert", {}, {"pooling": "mean"}),
    "xlm-roberta": ("xlm-roberta", {"max_position_embeddings": 42}, {"pooling": "cls"}),
    "mpnet": ("mpnet", {"max_position_embeddings": 42, "pad_token_id": 1}, {"pooling": "mean"}),
    "modernbert": ("modernbert", {"local_attention": 8, **_TWO_KINDS}, {"pooling": "weighted_mean"}),
    "deberta": (
        "deberta-v2",
        {
            "relative_attention": True,
            "position_buckets": 8,
            "max_relative_positions": 40,
            "pos_att_type": ["p2c", "c2p"],
        }
        | {"position_biased_input": False, "norm_rel_ebd": "layer_norm", "share_att_key": True, "type_vocab_size": 0},
        {"pooling": "cls"},
    ),
    "t5": (
        "t5",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "eos_token_id": 3},
        {"pooling": "mean", "dimension": 24, "max_length": 40},
    ),
    "qwen3": ("qwen3", _DECODER, {"pooling": "last", "append_eos": True, "eos_token": "[SEP]"}),
    "gemma3": (
        "gemma3_text",
        {**_DECODER, **_TWO_KINDS, "sliding_window": 8, "query_pre_attn_scalar": 8},
        {"pooling": "max", "attention": "bidirectional"},
    ),
}
LONGEST = 40


def model_of(family: str, folder: Path, **options: Any) -> Embedder:
    """An embedder of a family, from a folder made for it."""
    kind, changes, known = FAMILIES[family]
    torch.manual_seed(0)
    shape = {"vocab_size": 120, "pad_token_id": 0} if kind == "t5" else _SHAPE
    config = CONFIG_MAPPING[kind](**{**shape, **changes})
    backbone = T5EncoderModel(config) if kind == "t5" else AutoModel.from_config(config)
    backbone.eval().save_pretrained(folder)
    tokenizer(LONGEST).save_pretrained(folder)
    return load(str(folder), device="cpu", **{**known, **options})


def apart(model: Embedder, graph: Embedder, lengths: list[int], left: bool, head: str = "dense") -> float:
    """The largest difference between a head's numbers, for made-up texts of these lengths. The first third of each is
    its prompt."""
    chance = np.random.default_rng(sum(lengths))
    rows = [chance.integers(4, 64, length).tolist() for length in lengths]
    padded = TokenBatch.from_rows(rows, [length // 3 for length in lengths], is_query=False).pad(
        model.pad_id, left=left
    )
    kept, model.padding_left = model.padding_left, left
    with torch.no_grad():
        expected, found = model(padded, (head,))[head], graph(padded, (head,))[head]
    model.padding_left = kept
    assert type(expected) is type(found)
    pairs = zip(expected.tensors(), found.tensors(), strict=True)
    return max(float((one.float() - other.float()).abs().max()) for one, other in pairs)


def largest_difference(model: Embedder, graph: Embedder, head: str = "dense") -> float:
    """Over every length to the longest, batches of 1 to 33, both padding sides."""
    chance = np.random.default_rng(0)
    batches = [[length] for length in range(1, LONGEST + 1)]
    batches += [chance.integers(1, LONGEST + 1, size).tolist() for size in (2, 3, 7, 16, 33)]
    return max(apart(model, graph, lengths, left, head) for lengths in batches for left in (False, True))
