"""Saving: the legacy sentence-transformers layout with the backbone in the root.

sentence-transformers 2 to 6, transformers' AutoModel, text-embeddings-inference, vLLM and infinity all read it; the
schema that sentence-transformers 5.4+ writes is refused or misread by the servers.
Token heads lie beside the backbone as in BGE-M3; who does not know them sees the dense model.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save_file

from embedsmith.core.files import atomic_folder
from embedsmith.models.adapters import has_adapter, is_quantized, merged, save_adapter, transplanted
from embedsmith.models.card import model_card
from embedsmith.models.contract import POOLER_FILE, contract_of, write_contract
from embedsmith.models.folder import POOLING_NAMES, POOLING_SWITCHES, read_json
from embedsmith.models.heads import Projection, activation_path
from embedsmith.models.poolers import save_pooler
from embedsmith.models.quiet import quiet
from embedsmith.models.special import ensure_padding
from embedsmith.models.token_heads import head_file, save_token_head

if TYPE_CHECKING:
    from embedsmith.models.embedder import Embedder

EMULATED = "5.1.0"
"""The sentence-transformers version whose layout this is: the last series with the legacy schema."""

MODULE = "embedsmith.models.sentence.EmbedsmithModule"
"""What sentence-transformers loads a model through that its own modules cannot express."""


def save(model: Embedder, folder: str | Path, merge: bool = True) -> None:
    """Write `model` to `folder`, which appears whole or not at all; a folder already there is replaced.

    Errors: `CheckpointError` when the disk is full or the place cannot be written; `ModelError` when merging an
    adapter would change the vectors.
    """
    with atomic_folder(folder) as root, quiet():
        apart = has_adapter(model.backbone) and not merge
        _save_backbone(model, root, apart)
        _save_tokenizer(model, root)
        kinds = ["Transformer", "Pooling", *("Dense" for _ in model.projections)]
        kinds += ["Normalize"] if model.settings.normalize else []
        modules = [_module(index, kind) for index, kind in enumerate(kinds)]
        contract = contract_of(model, apart)
        if not contract.standard:
            contract, modules = replace(contract, modules=tuple(modules)), [{**_module(0, ""), "type": MODULE}]
        write_json(root / "modules.json", modules)
        write_contract(contract, root)
        settings = model.settings
        write_json(
            root / "sentence_bert_config.json",
            {"max_seq_length": settings.max_length, "do_lower_case": settings.lower_case},
        )
        write_json(root / "config_sentence_transformers.json", _general(model))
        write_json(root / _path(1, "Pooling") / "config.json", _pooling(model))
        if model.pooler is not None:
            save_pooler(model.pooler, root / POOLER_FILE)
        for index, projection in enumerate(model.projections, start=2):
            assert isinstance(projection, Projection)
            _save_projection(projection, root / _path(index, "Dense"))
        if settings.normalize:
            (root / _path(len(kinds) - 1, "Normalize")).mkdir()
        for name, head in model.token_heads.items():
            save_token_head(head, root / head_file(name, head))
        (root / "README.md").write_text(model_card(model), encoding="utf-8")


def _save_backbone(model: Embedder, root: Path, apart: bool) -> None:
    backbone: Any = model.backbone
    if apart:
        save_adapter(backbone, root, str((model.base or {}).get("path", "")))
        return
    if has_adapter(backbone):
        backbone = merged(backbone if not is_quantized(backbone) else transplanted(backbone, _plain_base(model)))
    backbone.save_pretrained(root)


def _plain_base(model: Embedder) -> Any:
    """The base of a quantised backbone, at full precision: an adapter is merged into that, never into 4 bits."""
    from embedsmith.models.backbone import load_backbone, locate
    from embedsmith.models.config import ModelConfig

    assert model.base is not None
    folder = locate(str(model.base["path"]), model.base["revision"])
    layers = model.base["layers"]
    config = ModelConfig(path=str(folder), layers=None if layers is None else tuple(layers))
    return load_backbone(folder, config, model.attention.mode)


def _save_tokenizer(model: Embedder, root: Path) -> None:
    """Without the truncation that tokenising leaves in the tokenizer's state, and with a pad token for everybody."""
    tokenizer = model.tokenizer
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    ensure_padding(tokenizer)
    bound = tokenizer.model_max_length
    tokenizer.model_max_length = model.settings.max_length
    try:
        tokenizer.save_pretrained(root)
    finally:
        tokenizer.model_max_length = bound
    if model.settings.eos_id is not None:
        # a family's own class would build its processing anew and forget the end token
        path = root / "tokenizer_config.json"
        write_json(path, {**read_json(path), "tokenizer_class": "PreTrainedTokenizerFast"})


def _path(index: int, kind: str) -> str:
    return "" if index == 0 else f"{index}_{kind}"


def _module(index: int, kind: str) -> dict[str, Any]:
    return {
        "idx": index,
        "name": str(index),
        "path": _path(index, kind),
        "type": f"sentence_transformers.models.{kind}",
    }


def _pooling(model: Embedder) -> dict[str, Any]:
    theirs = next((name for name, ours in POOLING_NAMES.items() if ours == model.settings.pooling), None)
    return {
        "word_embedding_dimension": model.pooled_width,
        **{switch: mode == theirs for switch, mode in POOLING_SWITCHES.items()},
        "include_prompt": model.settings.include_prompt,
    }


def _general(model: Embedder) -> dict[str, Any]:
    return {
        "__version__": {
            "sentence_transformers": EMULATED,
            "transformers": transformers.__version__,
            "pytorch": torch.__version__,
        },
        "prompts": dict(model.settings.prompts),
        "default_prompt_name": model.settings.default_prompt,
        "similarity_fn_name": "cosine",
    }


def _save_projection(projection: Projection, folder: Path) -> None:
    """The activation is always named: a Dense without one means Tanh."""
    config = {
        "in_features": projection.linear.in_features,
        "out_features": projection.linear.out_features,
        "bias": projection.linear.bias is not None,
        "activation_function": activation_path(projection),
    }
    write_json(folder / "config.json", config | ({"use_residual": True} if projection.use_residual else {}))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in projection.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
