"""`load`: a folder or hub id, and what to change about it, to an `Embedder`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from tokenizers.normalizers import Lowercase, Sequence
from torch import nn

from embedsmith.core.errors import ModelError
from embedsmith.core.recipe import parse
from embedsmith.models.backbone import load_backbone, load_tokenizer, locate, positions_of
from embedsmith.models.config import ModelConfig, Settings, derive_max_length
from embedsmith.models.embedder import Embedder
from embedsmith.models.folder import FolderFacts, read_folder
from embedsmith.models.heads import orthogonal_projection
from embedsmith.models.pooling import POOLINGS
from embedsmith.models.token_heads import build_token_heads


def load(path: str | ModelConfig, /, *, device: str | torch.device | None = None, **overrides: Any) -> Embedder:
    """An embedder in eval mode from a transformers folder, a sentence-transformers folder or a hub id.

    `overrides` are the fields of `ModelConfig`. `device=None` is the current GPU where there is one, else the CPU.
    Errors: `ModelError` naming the file and the fix; `RecipeError` for an unknown override.
    """
    if isinstance(path, ModelConfig):
        config = dataclasses.replace(path, **overrides)
    else:
        config = parse(ModelConfig, {"path": str(path), **overrides}, where="load")
    folder = locate(config.path, config.revision)
    facts = read_folder(folder)
    tokenizer = load_tokenizer(facts.backbone, config.trust_remote_code)
    backbone: Any = load_backbone(facts.backbone, config)
    if facts.lower_case:
        _lower_case(tokenizer)
    settings = decide(config, facts, tokenizer, positions_of(backbone))
    width = backbone.config.hidden_size
    token_heads = build_token_heads(config, facts.backbone, width, tokenizer)
    embedder = Embedder(backbone, tokenizer, settings, projections(config, facts, width), token_heads)
    return embedder.to(best_device() if device is None else device).eval()


def decide(config: ModelConfig, facts: FolderFacts, tokenizer: Any, positions: int | None) -> Settings:
    """What the user said, else what the folder says. Errors: `ModelError` when neither says which pooling."""
    pooling = config.pooling or facts.pooling
    if pooling is None or pooling not in POOLINGS:
        raise ModelError(
            "this folder does not say how to pool" if pooling is None else f"unknown pooling {pooling!r}",
            where=config.path,
            expected=f"pooling, one of {', '.join(POOLINGS)}",
            fix="say it, for example pooling=mean: it must be the one the model was trained with",
        )
    settings = Settings(
        pooling=pooling,
        max_length=derive_max_length(config.max_length, facts.max_length, tokenizer.model_max_length, positions),
        prompts=facts.prompts,
        default_prompt=facts.default_prompt,
        include_prompt=facts.include_prompt,
        normalize=_first(config.normalize, facts.normalize, True),
        lower_case=facts.lower_case,
    )
    return settings if config.prompts is None else settings.with_prompts(config.prompts)


def projections(config: ModelConfig, facts: FolderFacts, hidden_size: int) -> list[nn.Module]:
    """The folder's dense layers, then a new one where another dimension is asked for."""
    layers: list[nn.Module] = list(facts.projections)
    width = facts.projections[-1].linear.out_features if facts.projections else hidden_size
    if config.dimension is not None and config.dimension != width:
        if config.dimension < 1:
            raise ModelError(f"dimension={config.dimension}", expected="at least 1")
        layers.append(orthogonal_projection(width, config.dimension))
    return layers


def best_device() -> str:
    """The current CUDA device, Apple's GPU, or the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _first(*values: bool | None) -> bool:
    return next(value for value in values if value is not None)


def _lower_case(tokenizer: Any) -> None:
    """sentence-transformers' `do_lower_case`: lower-case before whatever else the tokenizer normalises."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    steps = [normalizer] if normalizer is not None else []
    if isinstance(normalizer, Sequence):
        steps = [normalizer[place] for place in range(len(normalizer))]
    if not any(isinstance(step, Lowercase) for step in steps):
        tokenizer.backend_tokenizer.normalizer = Sequence([Lowercase(), *steps])
