"""What updates the weights: the optimizer (`optimizers.py`) with its learning rate, and how a run is spread over ranks.
Whole copies, FSDP2 and DeepSpeed's ZeRO-2 stand behind one protocol (`Engine`).

The rate is a pure function of the step: there is no scheduler to prepare, to step once too often on several ranks, or
to checkpoint.

Whole copies: every rank has all weights; gradients are averaged after the last backward pass.

FSDP2 (`train.shard: true`): each rank keeps its part of the backbone's weights and optimizer state. Every forward and
backward pass of a sharded backbone is a collective, so all ranks must make the same number of them in the same order:
chunk counts are agreed, with idle chunks where a rank has fewer, and either all chunks keep their graph or none does.
FSDP2 averages the gradient of its parameters itself; heads and extras stay whole and are averaged as ever. With
`train.shard_ranks` the ranks form a mesh of two axes: so many hold the weights together, and there are several copies;
weights are gathered within a copy, and the shards of gradients averaged between the copies.

ZeRO-2 (`train.shard: zero2`): every rank keeps all weights, and its part of the gradients and the optimizer state.
DeepSpeed's engine is given the weights, the optimizer and, once a step, the gradients, and nothing else: it never runs
a forward or backward pass, so chunks may be as many as they like, replayed or not, and differ from rank to rank. All
backward passes of a step lie in one `backward` block, at whose end the gradients are averaged and cut into shards.
Until then they are whole: what ZeRO-2 saves in the middle of a backward pass is not saved here (FSDP2 does save it).
"""

import copy
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from embedsmith.core.collectives import agreed_by_hosts, average_gradients, complete_gradients, rank, world_size
from embedsmith.core.errors import MissingExtraError, RecipeError
from embedsmith.core.tokens import IntArray
from embedsmith.core.transfer import read
from embedsmith.models import Embedder, Model
from embedsmith.models.self_test import layers_of
from embedsmith.train.checkpoint import whole
from embedsmith.train.config import Recipe, TrainConfig
from embedsmith.train.optimizers import make_optimizer
from embedsmith.train.rank_memory import STATE_BYTES
from embedsmith.train.step import Chunk, Health


def learning_rate(config: TrainConfig, step: int, steps: int, peak: float) -> float:
    """Rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then decay to `min_learning_rate`."""
    warm = math.ceil(config.warmup * steps) if config.warmup < 1 else int(config.warmup)
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / (steps - warm)
    left = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[config.schedule]
    floor = min(config.min_learning_rate, peak)
    return floor + (peak - floor) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, steps: int) -> float:
    """Set every group's rate for this step; returns the main one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step, steps, group["peak_lr"])
    return learning_rate(config, step, steps, config.learning_rate)


Agreement = Callable[[list[Chunk], IntArray], list[Chunk]]


class Engine(Protocol):
    """What differs between the ways of spreading a run. `optimizer` updates the weights of the model and of the extras
    of its losses. `agreed`: makes the chunks of all ranks alike, where a forward pass is a collective (see `Memory`).
    `backward()` is around all backward passes of a step. `repeats`: whether a step may be begun anew in its midst, with
    its gradients thrown away: not where a collective is part of its passes. `to_hold`: bytes that the first update of
    the weights will allocate for good."""

    optimizer: torch.optim.Optimizer
    agreed: Agreement | None
    backward: Callable[[], AbstractContextManager[None]]
    repeats: bool

    @property
    def to_hold(self) -> int: ...

    def try_backward(self, value: Tensor) -> None:
        """A backward pass whose gradients are thrown away, with the memory and the collectives of a step's."""
        ...

    def average(self) -> None:
        """Average the gradients over ranks: before `step` where something is made of them first. Not of ZeRO-2."""
        ...

    def step(self, health: Health | None = None, scale: float = 1.0, averaged: bool = False) -> float:
        """Average the gradients over ranks (unless they are `averaged`), divide them by `scale`, clip them, and update
        the weights where their norm is finite. Returns the norm before clipping, the same on every rank.

        Errors: `TrainingError` where `health` tells of a value that is not finite, before any weight is changed.
        """
        ...

    def whole_model(self) -> Model:
        """The model with all its weights, to be saved by the first rank. Collective."""
        ...


def check_shard(recipe: Recipe) -> None:
    """Errors: `RecipeError` for a single process, or for what needs the whole model in the middle of a sharded run;
    `MissingExtraError` for ZeRO-2 without DeepSpeed."""
    if recipe.train.shard and recipe.task == "rerank":
        raise RecipeError(
            "train.shard of a reranker", fix="set train.shard=false; model.lora trains a large one on one card"
        )
    if recipe.train.shard and recipe.train.optimizer != "adamw":
        raise RecipeError(
            f"train.optimizer={recipe.train.optimizer} under train.shard: its state cannot be cut over the ranks",
            fix="set train.optimizer=adamw, or train.shard=false",
        )
    if recipe.train.shard == "zero2":
        if recipe.train.precision == "fp16":
            raise RecipeError(
                "train.precision=fp16 under train.shard=zero2: DeepSpeed would clip and judge scaled gradients",
                fix="set train.shard=true or train.shard=false, or train.precision=bf16",
            )
        if importlib.util.find_spec("deepspeed") is None:
            raise MissingExtraError("deepspeed", "deepspeed")
        if not dist.is_initialized():
            raise RecipeError("train.shard=zero2 needs several processes", fix="start the run with accelerate launch")
        return
    if not recipe.train.shard:
        return
    if recipe.evaluate.tasks:
        raise RecipeError(
            "scores under train.shard: one rank alone cannot encode with a sharded model",
            fix="set evaluate.tasks=[] evaluate.held_out=null and score the checkpoints afterwards; validation sources "
            "work",
        )
    if recipe.train.mining is not None:
        raise RecipeError(
            "train.mining under train.shard: ranks would encode different numbers of texts with a sharded model",
            fix="remove train.mining and mine beforehand (embedsmith mine), or train without train.shard",
        )
    words = sorted({"retromae", "mntp", "tsdae"} & set(recipe.model.heads or ())) + ["splade"] * (
        recipe.model.sparse == "splade"
    )
    _refuse_heads(words)
    if not dist.is_initialized():
        raise RecipeError("train.shard needs several processes", fix="start the run with torchrun")
    if (together := recipe.train.shard_ranks) is not None and world_size() % together:
        raise RecipeError(
            f"train.shard_ranks={together} of {world_size()} ranks",
            expected=f"a number that divides {world_size()}, such as the cards of one node",
        )


def make_engine(model: Model, extras: nn.ModuleDict, config: TrainConfig) -> Engine:
    """Spread the model as `train.shard` says, once it is on its device."""
    if config.shard == "zero2":
        return Zero2(model, extras, config)
    return Fsdp2(model, extras, config) if config.shard else WholeCopies(model, extras, config)


class WholeCopies:
    """Every rank has all weights (data parallelism)."""

    def __init__(self, model: Model, extras: nn.ModuleDict, config: TrainConfig) -> None:
        self.model, self.limit = model, config.clip_norm or float("inf")
        self.parameters = [*model.parameters(), *extras.parameters()]
        self.optimizer: torch.optim.Optimizer = make_optimizer(model, extras, config)
        self.agreed: Agreement | None = None
        self.backward: Callable[[], AbstractContextManager[None]] = nullcontext
        self.repeats = True
        self.bytes_a_weight = STATE_BYTES[config.optimizer]

    @property
    def to_hold(self) -> int:
        weights = (weight for group in self.optimizer.param_groups for weight in group["params"])
        mine = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights)
        return 0 if self.optimizer.state else self.bytes_a_weight * sum(weight.numel() for weight in mine)

    def try_backward(self, value: Tensor) -> None:
        try:
            value.backward()
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def average(self) -> None:
        average_gradients(self.parameters)

    def step(self, health: Health | None = None, scale: float = 1.0, averaged: bool = False) -> float:
        if not averaged:
            self.average()
        _divide([p.grad for p in self.parameters if p.grad is not None], scale)
        return self.update(nn.utils.clip_grad_norm_(self.parameters, self.limit), health)

    def update(self, norm: Tensor, health: Health | None) -> float:
        """The optimizer's step, unless the norm is not finite. The only time a step waits for the device."""
        if health is None:
            value = read(norm[None])[0]
        else:
            fault_F = health.fault_F
            value, *faults = read(torch.cat([norm.to(fault_F)[None], fault_F]))
            health.check(faults)
        if math.isfinite(value):
            self.optimizer.step()
        return value

    def whole_model(self) -> Model:
        return self.model


class Fsdp2(WholeCopies):
    """Weights and optimizer state of the backbone in shards over the ranks. `copy`: on the first rank the model in main
    memory, to save and nothing else."""

    def __init__(self, model: Model, extras: nn.ModuleDict, config: TrainConfig) -> None:
        assert isinstance(model, Embedder)  # `check_shard` refuses rerankers
        heads = model.token_heads.items()  # also those that lay in the model's folder unasked
        _refuse_heads(["splade" if n == "sparse" else n for n, head in heads if head.reads_words])
        self.copy = copy.deepcopy(model).cpu() if rank() == 0 else None
        self.device = next(model.backbone.parameters()).device
        together = config.shard_ranks or world_size()
        shape = (world_size(),) if together == world_size() else (world_size() // together, together)
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
        for layer in layers_of(model.backbone):
            fully_shard(layer, mesh=mesh)
        fully_shard(model.backbone, mesh=mesh)
        super().__init__(model, extras, config)
        self.agreed = self.same_chunks
        self.repeats = False

    def average(self) -> None:
        average_gradients(p for p in self.parameters if not isinstance(p, DTensor))  # FSDP2 averages its own

    def step(self, health: Health | None = None, scale: float = 1.0, averaged: bool = False) -> float:
        if not averaged:
            self.average()
        groups: tuple[list[Tensor], list[Tensor]] = ([], [])  # one norm cannot be taken of shards and whole tensors
        for parameter in self.parameters:
            if parameter.grad is not None:
                groups[not isinstance(parameter, DTensor)].append(parameter.grad)
        for group in groups:
            _divide(group, scale)
        norms = [nn.utils.get_total_norm(group) for group in groups if group]
        full: list[Tensor] = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        total: Tensor = torch.linalg.vector_norm(torch.stack(full))
        for gradient in (*groups[0], *groups[1]):
            gradient.mul_((self.limit / (total + 1e-6)).clamp(max=1.0))
        return self.update(total, health)

    def same_chunks(self, chunks: list[Chunk], length_N: IntArray) -> list[Chunk]:
        """The same number of chunks on every rank, all kept or all replayed; idle ones encode one text for nothing."""
        count = agreed_by_hosts(len(chunks))
        keep = not agreed_by_hosts(int(not all(chunk.keep for chunk in chunks)))
        row = chunks[-1].rows[:1]
        idle = Chunk(row, int(length_N[row].max(initial=1)), keep, idle=True)
        return [*(replace(chunk, keep=keep) for chunk in chunks), *[idle] * (count - len(chunks))]

    def whole_model(self) -> Model:
        state = {name: whole(tensor) for name, tensor in self.model.state_dict().items()}
        if self.copy is None:
            return self.model
        self.copy.load_state_dict(state)
        return self.copy


def _divide(gradients: list[Tensor], scale: float) -> None:
    """Take a loss scale out of gradients again, in few kernels."""
    if scale != 1 and gradients:
        torch._foreach_mul_(gradients, 1 / scale)


def _refuse_heads(words: list[str]) -> None:
    if words:
        raise RecipeError(
            f"the head {words[0]} under train.shard: it reads the word table of the backbone, which no rank has whole",
            fix="train this stage without train.shard, or leave the head out (model.heads)",
        )


_MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET_OF_ZERO2 = 100_000_000
"""Numbers of the gradients that DeepSpeed averages at once."""


class Zero2(WholeCopies):
    """Gradients and optimizer state in shards over the ranks, by DeepSpeed."""

    def __init__(self, model: Model, extras: nn.ModuleDict, config: TrainConfig) -> None:
        super().__init__(model, extras, config)
        inner = self.optimizer
        assert isinstance(inner, torch.optim.AdamW)
        self.zero = ZeroAdamW(nn.ModuleList([model, extras]), inner, config.clip_norm)
        self.optimizer, self.backward = self.zero, self.zero.reducing
        self.repeats = False

    @property
    def to_hold(self) -> int:
        """Of its shard the moments, and beside the whole gradients, which a probe has too, that of the shard and the
        bucket through which gradients go to their shards."""
        weights: int = sum(weight.numel() for group in self.zero.param_groups for weight in group["params"])
        moments = 0 if self.zero.inner.state else self.bytes_a_weight
        return (moments + 4) * math.ceil(weights / world_size()) + 4 * BUCKET_OF_ZERO2

    def try_backward(self, value: Tensor) -> None:
        """Not through `backward`, of which DeepSpeed would take note."""
        trained = [weight for group in self.zero.param_groups for weight in group["params"]]
        torch.autograd.grad(value, trained, allow_unused=True)

    def step(self, health: Health | None = None, scale: float = 1.0, averaged: bool = False) -> float:
        if health is not None:
            health.check(read(health.fault_F))
        self.zero.step()  # DeepSpeed leaves out the update where the norm is not finite, and says inf
        return self.zero.norm


class ZeroAdamW(torch.optim.Optimizer):
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
            "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": BUCKET_OF_ZERO2},
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
