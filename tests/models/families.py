"""Tiny random decoders of many families, from their configs: two layers, sixteen numbers a state."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModel

from embedsmith.models.attention import prepare_config

_SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = {"head_dim": 8}
_MIXTURE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "shared_expert_intermediate_size": 16,
}
_LATENT = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_RECURRENT = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

DENSE = (
    "llama qwen2 qwen3 mistral gemma gemma3_text phi phi3 olmo2 granite smollm3 glm cohere cohere2 starcoder2 gpt_neox"
    " seed_oss exaone4 stablelm nemotron"
)
FAMILIES: dict[str, dict[str, Any]] = {name: _HEADS for name in DENSE.split()} | {
    "gemma2": _HEADS,
    "gpt2": _GPT2,
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "falcon": {},
    "modernbert-decoder": _HEADS,
    "qwen3_moe": _HEADS | _MIXTURE,
    "llama4_text": _HEADS | _MIXTURE,
    "deepseek_v2": _MIXTURE | _LATENT | {"head_dim": 4, "topk_method": "greedy"},
    "deepseek_v3": _MIXTURE | _LATENT | {"q_lora_rank": 8, "head_dim": 4},
    "qwen3_next": _HEADS | _MIXTURE | _RECURRENT,
}
OTHER_MIXTURES: dict[str, dict[str, Any]] = dict.fromkeys(
    ["glm4_moe", "ernie4_5_moe", "qwen2_moe", "mixtral", "hunyuan_v1_moe"], _HEADS | _MIXTURE
)
_PLAIN = """afmoe aria_text cohere2_moe dots1 exaone_moe flex_olmo gpt_oss granitemoe granitemoeshared hy_v3
    inkling_text jamba jetmoe kolibri1 laguna llama4_text mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text
    muse_spark_text nemotron_h olmoe phimoe qwen3_5_moe_text qwen3_vl_moe_text qwen4_exp_text solar_open"""
_MLA = "bailing_hybrid glm4_moe_lite kimi_linear mistral4 mistral_large4_text"
_MLA_FACTORED = "axk1 axk2 deepseek_v32 deepseek_v4 dots3_note_text glm_moe_dsa hy_v4 longcat_flash"
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]}
_CONV = {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}
ALL_MIXTURES: dict[str, dict[str, Any]] = {
    **{name: shape for name, shape in (FAMILIES | OTHER_MIXTURES).items() if "num_experts" in shape},
    **dict.fromkeys(_PLAIN.split(), _HEADS | _MIXTURE),
    **dict.fromkeys(_MLA.split(), _HEADS | _MIXTURE | _LATENT),
    **dict.fromkeys(_MLA_FACTORED.split(), _HEADS | _MIXTURE | _LATENT | {"q_lora_rank": 8}),
    "lfm2_moe": _HEADS | _MIXTURE | _CONV,
    "granitemoehybrid": _HEADS | _MIXTURE | _MAMBA,
    "zaya": _HEADS | _MIXTURE | {"num_experts_per_tok": 1},
}
"""Mixtures of experts of transformers 5.23 that read texts, by the config of a tiny one."""
MIXTURES = ("deepseek_v2", "deepseek_v3", "qwen3_moe", "llama4_text", "qwen3_next", *OTHER_MIXTURES)
NO_SDPA = ("gemma2",)
"""Families whose soft-capped scores transformers computes under eager only."""


def tiny(family: str, implementation: str = "sdpa", mode: str = "native", **changes: Any) -> Any:
    """The backbone of a family, built for an attention mode and not yet switched to it."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        **{**_SHAPE, **(ALL_MIXTURES | FAMILIES)[family], "initializer_range": 0.3, **changes}
    )
    return AutoModel.from_config(prepare_config(config, mode), attn_implementation=implementation).eval()
