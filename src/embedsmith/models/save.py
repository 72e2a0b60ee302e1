"""Saving: the legacy sentence-transformers layout with the backbone in the root.

sentence-transformers 2 to 6, transformers' AutoModel, text-embeddings-inference, vLLM and infinity all read it; the
schema that sentence-transformers 5.4+ writes is refused or misread by the servers.
Token heads lie beside the backbone as in BGE-M3; who does not know them sees the dense model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save_file

from embedsmith.core.files import atomic_folder
from embedsmith.models.card import model_card
from embedsmith.models.folder import POOLING_NAMES, POOLING_SWITCHES
from embedsmith.models.heads import Projection, activation_path
from embedsmith.models.quiet import quiet
from embedsmith.models.token_heads import FILES, save_token_head

if TYPE_CHECKING:
    from embedsmith.models.embedder import Embedder

EMULATED = "5.1.0"
"""The sentence-transformers version whose layout this is: the last series with the legacy schema."""


def save(model: Embedder, folder: str | Path) -> None:
    """Write `model` to `folder`, which appears whole or not at all; a folder already there is replaced.

    Errors: `CheckpointError` when the disk is full or the place cannot be written.
    """
    with atomic_folder(folder) as root, quiet():
        _save_backbone(model, root)
        kinds = ["Transformer", "Pooling", *("Dense" for _ in model.projections)]
        kinds += ["Normalize"] if model.settings.normalize else []
        _write_json(root / "modules.json", [_module(index, kind) for index, kind in enumerate(kinds)])
        settings = model.settings
        _write_json(
            root / "sentence_bert_config.json",
            {"max_seq_length": settings.max_length, "do_lower_case": settings.lower_case},
        )
        _write_json(root / "config_sentence_transformers.json", _general(model))
        _write_json(root / _path(1, "Pooling") / "config.json", _pooling(model))
        for index, projection in enumerate(model.projections, start=2):
            assert isinstance(projection, Projection)
            _save_projection(projection, root / _path(index, "Dense"))
        if settings.normalize:
            (root / _path(len(kinds) - 1, "Normalize")).mkdir()
        for name, head in model.token_heads.items():
            save_token_head(head, root / FILES[name])
        (root / "README.md").write_text(model_card(model), encoding="utf-8")


def _save_backbone(model: Embedder, root: Path) -> None:
    """Weights and tokenizer, without the truncation that tokenising leaves in the tokenizer's state."""
    backbone: Any = model.backbone
    backbone.save_pretrained(root)
    tokenizer = model.tokenizer
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    bound = tokenizer.model_max_length
    tokenizer.model_max_length = model.settings.max_length
    try:
        tokenizer.save_pretrained(root)
    finally:
        tokenizer.model_max_length = bound


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
    theirs = next(name for name, ours in POOLING_NAMES.items() if ours == model.settings.pooling)
    return {
        "word_embedding_dimension": int(model.config.hidden_size),
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
    _write_json(folder / "config.json", config | ({"use_residual": True} if projection.use_residual else {}))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in projection.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
