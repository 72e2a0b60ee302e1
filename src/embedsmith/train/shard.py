"""Parameters in shards over the ranks (FSDP2): each rank keeps its part of the backbone's weights and optimizer state.

Every forward and backward pass of a sharded backbone is a collective, so all ranks must make the same number of them in
the same order: chunk counts are agreed, with idle chunks where a rank has fewer, and either all chunks keep their graph
or none does. FSDP2 averages the gradient of its parameters itself; heads and extras stay whole and are averaged as
ever.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from embedsmith.core.collectives import max_over_ranks, rank, world_size
from embedsmith.core.errors import RecipeError
from embedsmith.models import Embedder
from embedsmith.models.probe import layers_of
from embedsmith.models.token_heads import TokenHead
from embedsmith.train.config import Recipe
from embedsmith.train.moments import whole
from embedsmith.train.step import Chunk


class Shards:
    """The sharding of one model. `whole`: on the first rank a copy in main memory, to save and nothing else."""

    def __init__(self, model: Embedder) -> None:
        heads = model.token_heads.items()  # also those that lay in the model's folder unasked
        _refuse(["splade" if name == "sparse" else name for name, head in heads if not isinstance(head, TokenHead)])
        self.whole = copy.deepcopy(model).cpu() if rank() == 0 else None
        device = next(model.backbone.parameters()).device
        mesh = init_device_mesh(device.type, (world_size(),))
        for layer in layers_of(model.backbone):
            fully_shard(layer, mesh=mesh)
        fully_shard(model.backbone, mesh=mesh)

    def gathered(self, model: Embedder) -> Embedder:
        """The model with all weights in one place, on the first rank; elsewhere the model itself. Collective."""
        state = {name: whole(tensor) for name, tensor in model.state_dict().items()}
        if self.whole is None:
            return model
        self.whole.load_state_dict(state)
        return self.whole


def check(recipe: Recipe) -> None:
    """Errors: `RecipeError` for what needs the whole model in the middle of a sharded run."""
    if recipe.evaluate.tasks:
        raise RecipeError(
            "evaluate.tasks under train.shard: one rank alone cannot encode with a sharded model",
            fix="remove evaluate.tasks and score the checkpoints afterwards; validation sources work",
        )
    if recipe.train.mining is not None:
        raise RecipeError(
            "train.mining under train.shard: ranks would encode different numbers of texts with a sharded model",
            fix="remove train.mining and mine beforehand (embedsmith mine), or train without train.shard",
        )
    words = sorted({"retromae", "mntp"} & set(recipe.model.heads or ())) + ["splade"] * (
        recipe.model.sparse == "splade"
    )
    _refuse(words)
    if not dist.is_initialized():
        raise RecipeError("train.shard needs several processes", fix="start the run with torchrun")


def _refuse(words: list[str]) -> None:
    if words:
        raise RecipeError(
            f"the head {words[0]} under train.shard: it reads the word table of the backbone, which no rank has whole",
            fix="train this stage without train.shard, or leave the head out (model.heads)",
        )


def agreed(chunks: list[Chunk], device: torch.device) -> list[Chunk]:
    """The same number of chunks on every rank, all kept or all replayed; idle ones encode one text for nothing."""
    count = max_over_ranks(len(chunks), device)
    keep = not max_over_ranks(int(not all(chunk.keep for chunk in chunks)), device)
    idle = Chunk(chunks[-1].rows[:1], keep, idle=True)
    return [*(replace(chunk, keep=keep) for chunk in chunks), *[idle] * (count - len(chunks))]


def clip(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """The norm of all gradients together, which are scaled down to `limit` where it is larger."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    groups = [[p for p in trained if isinstance(p, DTensor) == sharded] for sharded in (True, False)]
    norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups if group]
    full: list[Tensor] = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total: Tensor = torch.linalg.vector_norm(torch.stack(full))
    for group in groups:
        for parameter in group:
            assert parameter.grad is not None
            parameter.grad.mul_((limit / (total + 1e-6)).clamp(max=1.0))
    return total
