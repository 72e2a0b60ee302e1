"""Parents made of tensors in memory, and a method's result as tensors: what tests of methods need and no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedsmith.core.shelf import merge_methods
from embedsmith.merge.method import Job
from embedsmith.merge.parents import Held, Parent

SHAPES = {"backbone.layer.0.weight": (40, 30), "backbone.layer.0.bias": (40,), "backbone.layer.1.weight": (7, 11)}


def held(name: str, tensors: Mapping[str, Tensor], weight: float = 1.0, trajectory: str | None = None) -> Parent:
    weights = {key: Held(tensor) for key, tensor in tensors.items()}
    return Parent(name, Path(name), Path(name), weights, (), weight=weight, trajectory=trajectory)


def random_family(
    count: int = 3, shapes: Mapping[str, tuple[int, ...]] = SHAPES, seed: int = 0, step: float = 1e-3
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """theta_0 and `count` descendants."""
    generator = torch.Generator().manual_seed(seed)
    base = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    moved = [
        {key: value + step * torch.randn(value.shape, generator=generator) for key, value in base.items()}
        for _ in range(count)
    ]
    return base, moved


def job_of(base: Mapping[str, Tensor], moved: Sequence[Mapping[str, Tensor]], **settings: Any) -> Job:
    weights = settings.pop("weights", [1.0] * len(moved))
    runs = settings.pop("trajectories", [None] * len(moved))
    parents = tuple(held(str(place), tensors, trajectory=runs[place]) for place, tensors in enumerate(moved))
    origin = held("base", base)
    weight_M = torch.tensor(weights, dtype=torch.float64)
    return Job(parents, origin, float_names([*parents, origin]), weight_M, **settings)


def run(method: Any, job: Job) -> dict[str, Tensor]:
    """The merged tensors in float64, flat."""
    method = merge_methods.build(method)
    combine = method.prepare(job)
    found: dict[str, list[Tensor]] = {name: [] for name in job.names}
    for block in job.blocks(by_rows=method.by_rows):
        found[block.name].append(combine(block))
    return {name: torch.cat(parts) for name, parts in found.items()}


def deltas(base: Mapping[str, Tensor], moved: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """[M, P] float64: whole models as vectors, tensors in order."""
    return torch.stack([torch.cat([(one[k].double() - base[k].double()).flatten() for k in base]) for one in moved])


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.double().flatten() for value in tensors.values()])


def float_names(models: Sequence[Parent]) -> tuple[str, ...]:
    """Names of float tensors that every model has, in the first one's order (its file order)."""
    common = set.intersection(*(set(model.tensors) for model in models))
    return tuple(n for n in models[0].tensors if n in common and models[0].tensors[n].dtype.is_floating_point)
