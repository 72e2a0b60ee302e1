"""A family of tiny models: one base and parents that moved a little from it, in folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from embedsmith.models import load
from tests.tinybert import tiny_bert

STEP = 0.02


def tiny_base(folder: Path, **settings: object) -> Path:
    """A tiny embedder as a sentence-transformers folder."""
    bert = tiny_bert(folder.with_name(folder.name + "-bert"))
    load(str(bert), new_heads=True, **{"pooling": "mean", **settings}).save(folder)
    return folder


def child(base: Path, folder: Path, seed: int, step: float = STEP, **settings: object) -> Path:
    """A fine-tuned copy: every weight moved by a little noise, heads included."""
    model = load(str(base), new_heads=True, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (
                step * torch.randn(parameter.shape, generator=generator) * parameter.abs().mean().clamp_min(0.05)
            )
    model.save(folder)
    return folder


def family(root: Path, count: int = 2, step: float = STEP, **settings: object) -> tuple[Path, list[Path]]:
    """A base and `count` children of it."""
    base = tiny_base(root / "base", **settings)
    return base, [child(base, root / f"parent{place}", place + 1, step) for place in range(count)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The backbone's tensors."""
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, changes: Mapping[str, torch.Tensor | None], metadata: str = "pt") -> None:
    """Put other tensors into a folder's weights; `None` takes one away."""
    found = {**weights(folder), **changes}
    kept = {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": metadata})
