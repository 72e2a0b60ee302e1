"""Any model to an embedder's folder, untrained: what `embedsmith convert` does."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from embedsmith.core.errors import MissingExtraError, ModelError
from embedsmith.core.recipe import apply_override, parse
from embedsmith.models.backbone import locate
from embedsmith.models.config import ModelConfig
from embedsmith.models.folder import read_folder
from embedsmith.models.load import load
from embedsmith.models.quiet import quiet


def convert(model: str, out: Path, changes: Sequence[str] = ()) -> str:
    """Load `model` as `ModelConfig` and the changes (`key=value`) say, and save it to `out`; returns what was made.

    A folder that does not say how to pool gets the last token, or the mean where attention is bidirectional. A `.gguf`
    file is turned into plain weights first (extra `gguf`).
    Errors: `ModelError` and `RecipeError` as for `load`; `ModelError` for a GGUF file that transformers cannot read.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = str(_from_gguf(Path(model), Path(scratch))) if model.endswith(".gguf") else model
        tree: dict[str, Any] = {"path": path}
        for change in changes:
            apply_override(tree, change)
        config = parse(ModelConfig, tree, where="convert")
        if config.pooling is None and read_folder(locate(config.path, config.revision)).pooling is None:
            both_ways = config.attention in ("bidirectional", "softmask")
            tree["pooling"] = "mean" if both_ways else "last"
        embedder = load(parse(ModelConfig, tree, where="convert"), device="cpu")
        embedder.save(out)
    found, size = embedder.attention, sum(p.numel() for p in embedder.parameters())
    kind = "causal" if found.causal else "bidirectional" if found.mode != "native" else "native"
    kind += " in part" if found.causal_layers else ""
    return (
        f"{out}: {type(embedder.backbone).__name__}, {size:,} parameters, {embedder.dimension} numbers a text, "
        f"{embedder.settings.pooling} pooling, {kind} attention, up to {embedder.max_length} tokens"
    )


def _from_gguf(file: Path, scratch: Path) -> Path:
    """A plain transformers folder of a GGUF file. Quantised weights come back in float32, as exact as they were."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "gguf")
    if not file.is_file():
        raise ModelError("there is no such file", where=file, fix="check the path")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            loaded = AutoModel.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"transformers cannot read this GGUF file: {error}", where=file) from error
    config = loaded.config
    if "quantization_config" in config.__dict__:  # saving refuses a model that was once quantised
        del config.quantization_config
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict(), strict=False)
    plain.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    return scratch
