"""What one rank of a training run holds in memory, by what takes it: the one home of that arithmetic.

Weights, gradients and the optimizer's state follow from the shapes of the weights and from how they are spread over the
ranks (`engine.py`), to the byte. What a token's graph takes is measured on the model itself: the tensors that its
forward pass keeps for the backward pass. Not counted: the representations, scores and fragments of a step, and what the
libraries themselves take (a CUDA context has about half a GB).
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from embedsmith.models.self_test import layers_of

Shard = bool | Literal["zero2"]

STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "muon": 8}
"""What an optimizer holds of a weight, at most."""


@dataclass(frozen=True)
class WeightFacts:
    """One tensor of weights. `layer`: the place of the backbone's layer that it is part of; `None` for others.
    `spread`: whether FSDP2 cuts it (the backbone alone). `table`: whether it is looked up and not multiplied."""

    shape: tuple[int, ...]
    itemsize: int
    trained: bool
    layer: int | None
    spread: bool
    table: bool

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def part(self, ranks: int) -> int:
        """Numbers of the largest of so many shards: FSDP2 cuts the first axis."""
        if not self.shape:
            return 1
        return math.ceil(self.shape[0] / ranks) * math.prod(self.shape[1:])


def weight_facts(model: nn.Module, extras: nn.Module | None = None) -> list[WeightFacts]:
    """All weights of a model and of the extras of its losses. The model may be on the meta device, or in shards."""
    backbone: nn.Module = model.backbone  # type: ignore[assignment]
    layer_of = {id(p): place for place, layer in enumerate(layers_of(backbone)) for p in layer.parameters()}
    tables = {id(m.weight) for m in backbone.modules() if isinstance(m, nn.Embedding)}
    inside = {id(p) for p in backbone.parameters()}
    everything = [*model.parameters(), *(() if extras is None else extras.parameters())]
    return [
        WeightFacts(
            tuple(p.shape), p.element_size(), p.requires_grad, layer_of.get(id(p)), id(p) in inside, id(p) in tables
        )
        for p in everything
    ]


@dataclass(frozen=True)
class RankMemory:
    """Bytes that a rank holds at most. `weights`: what it keeps of them. `gathered`: what FSDP2 collects for the layers
    under way, with their gradients. `casts`: the weights in 16 bits that autocast multiplies. `activations`: what the
    graphs hold that are alive together."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    casts: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = (f"{name} {in_bytes(value)}" for name, value in asdict(self).items() if value)
        return f"{in_bytes(self.total)} ({', '.join(parts)})"


def in_bytes(value: float) -> str:
    """A number of bytes for people: three digits and a unit of thousands."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.0f} PB"


def rank_memory(
    facts: Iterable[WeightFacts],
    *,
    shard: Shard,
    ranks: int,
    optimizer: str,
    half: bool,
    replayed_layers: bool = False,
    activations: float = 0,
) -> RankMemory:
    """What a rank holds of such weights under `train.shard`.

    `half`: matrices are multiplied in 16 bits. `replayed_layers`: layers are computed again in the backward pass
    (`model.gradient_checkpointing`), so the casts of one layer are alive at a time. `activations`: bytes of the graphs
    that are alive together.

    - whole copies: w bytes of weights, 4 of a gradient and `STATE_BYTES` of the optimizer for each that is trained;
    - FSDP2: the largest shard of each of the backbone's weights, gradients and states, and beside it whole what is
      outside of the layers, two layers (one computes, the next is under way) and the gradients of one;
    - ZeRO-2: whole weights and, until the end of the backward pass, gradients; of a shard the fp32 copy that DeepSpeed
      updates, its gradient and the optimizer's state.
    """
    known = list(facts)
    cut = shard is True and ranks > 1

    def held(fact: WeightFacts) -> int:
        return fact.part(ranks) if cut and fact.spread else fact.count

    trained = [fact for fact in known if fact.trained]
    weights = sum(held(fact) * fact.itemsize for fact in known)
    gradients = sum(held(fact) * fact.itemsize for fact in trained)
    states = STATE_BYTES[optimizer] * sum(held(fact) for fact in trained)
    if shard == "zero2":
        part = math.ceil(sum(fact.count for fact in trained) / ranks)
        gradients += 4 * part
        states = (4 + STATE_BYTES[optimizer]) * part
    gathered = _gathered(known) if cut else 0
    return RankMemory(weights, gradients, states, gathered, _casts(known, replayed_layers) * half, int(activations))


def _of_layers(facts: Sequence[WeightFacts], size: Callable[[WeightFacts], int]) -> list[int]:
    """A size of every layer."""
    layers = sorted({fact.layer for fact in facts if fact.layer is not None})
    return [sum(size(fact) for fact in facts if fact.layer == layer) for layer in layers]


def _gathered(facts: Sequence[WeightFacts]) -> int:
    def size(fact: WeightFacts) -> int:
        return fact.count * fact.itemsize

    outside = [fact for fact in facts if fact.spread and fact.layer is None]
    whole = sum(size(fact) * (1 + fact.trained) for fact in outside)
    trained = max(_of_layers([fact for fact in facts if fact.trained], size), default=0)
    return whole + 2 * max(_of_layers(facts, size), default=0) + trained


def _casts(facts: Sequence[WeightFacts], replayed_layers: bool) -> int:
    matrices = [fact for fact in facts if len(fact.shape) > 1 and not fact.table and fact.itemsize == 4]

    def size(fact: WeightFacts) -> int:
        return 2 * fact.count

    outside = sum(size(fact) for fact in matrices if fact.layer is None)
    of_layers = _of_layers(matrices, size)
    return outside + (max(of_layers, default=0) if replayed_layers else sum(of_layers))


def kept_for_backward(forward: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, without the weights themselves: every storage once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in weights if not _in_shards(tensor)}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage is let go and its place taken by another

    def seen(tensor: Tensor) -> Tensor:
        if not _in_shards(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)
        return tensor

    with saved_tensors_hooks(seen, lambda tensor: tensor), torch.enable_grad():
        made = forward()
    del made
    return sum(sizes.values())


def _in_shards(tensor: Tensor) -> bool:
    return type(tensor) not in (Tensor, nn.Parameter)


def bytes_of_a_token(kind: Any, architecture: Any, length: int, replayed_layers: bool) -> float:
    """What the graph of a forward pass in 16 bits holds for each token of texts of `length` tokens, without reading any
    weight: measured on two layers of the architecture with weights of their own, times its layers. Attention is one
    that keeps no scores, as on a card. `kind`: the class of transformers that builds it from its config.

    With `replayed_layers` every layer keeps its input in 32 bits, and one is computed again at a time.
    """
    shape = architecture.get_text_config()
    layers, hidden = int(shape.num_hidden_layers), int(shape.hidden_size)
    one, two = (_slope(_shortened(kind, architecture, count), length) for count in (1, 2))
    layer = max(two - one, 0.0)
    if replayed_layers:
        return 4.0 * hidden * layers + layer
    return one + (layers - 1) * layer


def _shortened(kind: Any, architecture: Any, layers: int) -> Any:
    config = copy.deepcopy(architecture)
    shape = config.get_text_config()
    shape.num_hidden_layers, shape.vocab_size, shape.pad_token_id = layers, 8, 0
    if getattr(shape, "layer_types", None):
        shape.layer_types = shape.layer_types[:layers]
    for name in ("attention_probs_dropout_prob", "attention_dropout"):
        if hasattr(shape, name):
            setattr(shape, name, 0.0)
    return kind.from_config(config).train()


def _slope(model: Any, length: int) -> float:
    def forward(rows: int) -> object:
        id_NT = torch.ones(rows, length, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=id_NT, attention_mask=torch.ones_like(id_NT))

    one, two = (kept_for_backward(lambda rows=rows: forward(rows), model.parameters()) for rows in (1, 2))  # type: ignore[misc]
    return (two - one) / length
