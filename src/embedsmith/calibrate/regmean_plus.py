"""RegMean++: block after block, each block's inputs come out of the blocks already merged.

Reconstructed from the method's published description: a parent's own block reads what the merged model's earlier
blocks make of that parent's texts. Hidden states are kept between blocks, so every block runs twice a parent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from embedsmith.calibrate.live import LiveMerge, Weights, linear_modules
from embedsmith.calibrate.regmean import (
    Grams,
    RegMeanConfig,
    collecting,
    solve_module,
    token_chunks,
    token_weights,
)
from embedsmith.core.errors import ModelError
from embedsmith.core.tokens import PaddedTokens
from embedsmith.data import RecordSet


@dataclass
class _Call:
    """How the model calls its blocks on one chunk: the state that travels, and each block's other arguments."""

    padded: PaddedTokens
    hidden_NTH: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of equal blocks that holds most of the weights. Errors: `ModelError` for a model without one."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    alike = [(name, m) for name, m in lists if len({type(block) for block in m}) == 1]
    if not alike:
        raise ModelError("this model has no list of equal blocks", fix="use regmean without sequential")
    return max(alike, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


def solve_in_sequence(
    live: LiveMerge,
    records: Sequence[RecordSet],
    merged: dict[str, Tensor],
    weights: Sequence[float],
    config: RegMeanConfig,
) -> dict[str, Tensor]:
    """`merged` (the average) with the linear weights of every block solved in order, then those after the blocks."""
    list_name, blocks = blocks_of(live.model)
    linear = linear_modules(live.model)
    with torch.no_grad():
        live.place_delta(merged)
        calls = [[_first_call(live, blocks, padded) for padded in token_chunks(live, own)] for own in records]
        for layer, block in enumerate(blocks):
            prefix = f"{list_name}.{layer}."
            inside = {name: module for name, module in linear.items() if name.startswith(prefix)}
            grams = []
            for parent, own_calls in enumerate(calls):
                _place_block(live, prefix, live.deltas[parent])
                grams.append(_grams_of_block(block, layer, inside, own_calls, config))
            for module in inside:
                solve_module(live, module, grams, weights, config, merged)
            _place_block(live, prefix, merged)
            for call in (call for own_calls in calls for call in own_calls):
                call.hidden_NTH = _run(block, layer, call)
        _solve_the_rest(live, calls, linear, f"{list_name}.", weights, config, merged)
    return merged


def _solve_the_rest(
    live: LiveMerge,
    calls: Sequence[Sequence[_Call]],
    linear: dict[str, nn.Linear],
    inside: str,
    weights: Sequence[float],
    config: RegMeanConfig,
    merged: dict[str, Tensor],
) -> None:
    """Linear layers outside the blocks, such as dense heads, on what the merged blocks give."""
    outside = {name: module for name, module in linear.items() if not name.startswith(inside)}
    if not outside:
        return
    grams = []
    for own_calls in calls:
        own, weight = Grams(), [torch.zeros(())]
        with collecting(outside, own, lambda weight=weight: weight[0]):  # type: ignore[misc]
            for call in own_calls:
                weight[0] = token_weights(call.padded, config)
                live.model(call.padded, ("dense",))
        grams.append(own)
    for module in outside:
        solve_module(live, module, grams, weights, config, merged)


def _first_call(live: LiveMerge, blocks: nn.ModuleList, padded: PaddedTokens) -> _Call:
    """One forward pass that notes how each block is called (masks and positions do not depend on the states)."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    first: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = args[0] if args else kwargs["hidden_states"]
        first.append(state) if not first else None
        found.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        live.model(padded, ("dense",))
    finally:
        for handle in handles:
            handle.remove()
    live.cost.forward += len(padded.id_NT)
    return _Call(padded, first[0], found)


def _grams_of_block(
    block: nn.Module, layer: int, inside: dict[str, nn.Linear], calls: Sequence[_Call], config: RegMeanConfig
) -> Grams:
    grams, weight = Grams(), [torch.zeros(())]
    with collecting(inside, grams, lambda: weight[0]):
        for call in calls:
            weight[0] = token_weights(call.padded, config)
            _run(block, layer, call)
    return grams


def _run(block: nn.Module, layer: int, call: _Call) -> Tensor:
    args, kwargs = call.arguments[layer]
    out = block(call.hidden_NTH, *args, **kwargs)
    state: Tensor = out[0] if isinstance(out, tuple) else out
    return state


def _place_block(live: LiveMerge, prefix: str, delta: Weights) -> None:
    for name, parameter in live.parameters.items():
        if name.startswith(prefix):
            parameter.copy_(live.base[name] + delta[name])
