"""Parameters in shards over the ranks (FSDP2): each rank keeps its part of the backbone's weights and optimizer state.

Every forward and backward pass of a sharded backbone is a collective, so all ranks must make the same number of them in
the same order: chunk counts are agreed, with idle chunks where a rank has fewer, and either all chunks keep their graph
or none does. FSDP2 averages the gradient of its parameters itself; heads and extras stay whole and are averaged as
ever.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from embedsmith.core.collectives import complete_gradients, max_over_ranks, rank, world_size
from embedsmith.core.errors import MissingExtraError, RecipeError
from embedsmith.models import Embedder
from embedsmith.models.self_test import layers_of
from embedsmith.train.checkpoint import whole
from embedsmith.train.config import Recipe
from embedsmith.train.step import Chunk


class Shards:
    """The sharding of one model. `whole`: on the first rank a copy in main memory, to save and nothing else."""

    def __init__(self, model: Embedder) -> None:
        heads = model.token_heads.items()  # also those that lay in the model's folder unasked
        _refuse(["splade" if name == "sparse" else name for name, head in heads if head.reads_words])
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


# Optimizer state and gradients in shards over the ranks by DeepSpeed (ZeRO-2); every rank keeps all weights.
# DeepSpeed's engine is given the weights, the optimizer and, once a step, the gradients, and nothing else: it never
# runs a forward or backward pass, so chunks may be as many as they like, replayed or not, and differ from rank to rank.
# All backward passes of a step lie in one `reducing` block, at whose end the gradients are averaged and cut into
# shards. Until then they are whole: what ZeRO-2 saves in the middle of a backward pass is not saved here (FSDP2 does
# save it).

_MOMENTS = ("exp_avg", "exp_avg_sq")


def check_zero() -> None:
    """Errors: `MissingExtraError` without DeepSpeed, `RecipeError` in a single process."""
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingExtraError("deepspeed", "deepspeed")
    if not dist.is_initialized():
        raise RecipeError("train.shard=zero2 needs several processes", fix="start the run with accelerate launch")


class Zero(torch.optim.Optimizer):
    """AdamW whose state is cut over the ranks. Its groups hold the model's own parameters, and its `state_dict` is that
    of a plain AdamW, so a checkpoint continues on any number of ranks.

    The norm of a step's gradient, before clipping, is in `norm`. A weight that no loss reads decays with the others.
    """

    def __init__(self, modules: nn.Module, inner: torch.optim.AdamW, clip_norm: float | None) -> None:
        super().__init__([dict(group) for group in inner.param_groups], dict(inner.defaults))
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        config = {
            "train_micro_batch_size_per_gpu": 1,  # counted nowhere: batches are the plan's
            "zero_optimization": {"stage": 2, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": clip_norm or 0.0,
            "steps_per_print": 2**31,
        }
        self.engine, *_ = deepspeed.initialize(model=modules, optimizer=inner, config=config)
        self.inner = inner
        self.norm = 0.0

    @contextmanager
    def reducing(self) -> Iterator[None]:
        """Around all backward passes of one step."""
        with self.engine.coalesce_grad_reduction():
            yield
            complete_gradients(p for group in self.param_groups for p in group["params"])

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for mine, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            theirs["lr"] = mine["lr"]
        self.engine.step()
        self.norm = float(self.engine.get_global_grad_norm())

    def state_dict(self) -> dict[str, Any]:
        """As a plain AdamW's, with whole tensors. Collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        groups = super().state_dict()["param_groups"]
        state: dict[int, dict[str, Tensor]] = {}
        for place, (mine, numbers) in enumerate(zip(self.param_groups, groups, strict=True)):
            shard = self._shard(place)
            if shard not in self.inner.state:  # before the first step
                continue
            self._link(place)
            for number, parameter in zip(numbers["params"], mine["params"], strict=True):
                whole = {name: safe_get_full_optimizer_state(parameter, name).cpu() for name in _MOMENTS}
                state[number] = {"step": self.inner.state[shard]["step"].cpu().clone(), **whole}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse, on any number of ranks."""
        from deepspeed.utils import safe_set_full_optimizer_state

        groups, state = state_dict["param_groups"], state_dict["state"]
        super().load_state_dict({"state": {}, "param_groups": groups})
        if not state:
            return
        for place, (mine, numbers) in enumerate(zip(self.param_groups, groups, strict=True)):
            shard = self._shard(place)
            empty = {name: torch.zeros_like(shard.detach()) for name in _MOMENTS}
            self.inner.state[shard] = {"step": state[numbers["params"][0]]["step"].to(shard.device), **empty}
            self._link(place)
            for number, parameter in zip(numbers["params"], mine["params"], strict=True):
                for name in _MOMENTS:
                    safe_set_full_optimizer_state(parameter, state[number][name].to(parameter.device), name)

    def _shard(self, place: int) -> Tensor:
        """This rank's numbers of a group, one behind another."""
        shard: Tensor = self.engine.optimizer.single_partition_of_fp32_groups[place]
        return shard

    def _link(self, place: int) -> None:
        """Let parameters know their part of the moments. DeepSpeed does so by itself after the first step of the first
        group, when the other groups have no moments yet, and then never again."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        lazy_init_hp_params_optimizer_state(
            self.engine.optimizer.bit16_groups[place], self._shard(place), self.inner.state
        )
