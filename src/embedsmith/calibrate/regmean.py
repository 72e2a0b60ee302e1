"""RegMean: merge linear layers in closed form, so that each keeps every parent's outputs on that parent's own texts.

    W_m^T = (sum_i a_i G_i + rho I)^-1 (sum_i a_i G_i W_i^T + rho Wbar^T),   G_i = E[x x^T] of the layer's inputs

Source: Jin et al. 2023 (2212.09849); the ridge leads to the average and not to zero. RegMean++ measures a block's
inputs on the blocks already merged (2508.03121, as described there; details reconstructed).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from embedsmith.calibrate.live import ROLES, LiveMerge, Weights, linear_modules, texts_of
from embedsmith.core.errors import RecipeError
from embedsmith.core.progress import progress_bar
from embedsmith.core.settings import section
from embedsmith.core.tokens import PaddedTokens, TokenBatch, chunk_rows
from embedsmith.data import RecordSet


@section
@dataclass(frozen=True)
class RegMeanConfig:
    """How Gram matrices are taken and solved.

    `off_diagonal`: alpha, the share kept of G's off-diagonal; 0 is a weighted mean by input feature. `ridge`: rho,
    relative to the mean of the diagonal. `gram_norm`: `trace` divides G by its trace, so that a task with larger
    activations does not drown the others. `token_weight`: every `text` has mass 1, or every `token`.
    `sequential`: RegMean++. `tolerance`: stop reading texts when doubling their number changes every Gram matrix by
    less than this share (0: read all).
    """

    off_diagonal: float = 0.9
    ridge: float = 1e-4
    gram_norm: Literal["trace", "none"] = "trace"
    token_weight: Literal["text", "token"] = "text"
    sequential: bool = False
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.off_diagonal <= 1 or self.ridge < 0 or self.tolerance < 0:
            raise RecipeError("regmean: off_diagonal from 0 to 1, ridge and tolerance not negative")


@dataclass
class Grams:
    """Gram matrices gram_HH (fp64) by the first module that read an input; `shared` names it for the others, so that
    query, key and value keep one matrix between them."""

    by_input: dict[str, Tensor] = field(default_factory=dict)
    mass: dict[str, float] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)

    def of(self, module: str) -> Tensor:
        """E[x x^T] of a linear layer's inputs."""
        owner = self.shared[module]
        return self.by_input[owner] / max(self.mass[owner], 1e-38)

    def add(self, owner: str, gram_HH: Tensor, mass: float) -> None:
        known = self.by_input.get(owner)
        self.by_input[owner] = gram_HH if known is None else known + gram_HH
        self.mass[owner] = self.mass.get(owner, 0.0) + mass

    def shapes(self) -> dict[str, Tensor]:
        """Trace-normalised copies, to see how much more texts change them."""
        return {name: gram / gram.trace().clamp_min(1e-38) for name, gram in self.by_input.items()}


@contextmanager
def collecting(modules: Mapping[str, nn.Linear], grams: Grams, weight_of: Callable[[], Tensor]) -> Iterator[None]:
    """Within the block every forward pass adds to `grams`. `weight_of()` gives weight_NT of the pass under way: 0 for
    padding, which is no input of the task."""
    seen: dict[int, tuple[Tensor, str]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            if name in grams.shared:
                seen.clear()
            else:  # held until then, so that no other tensor takes its id
                grams.shared[name] = seen.setdefault(id(x), (x, name))[1]
            if grams.shared[name] == name:
                grams.add(name, *_gram(x.detach(), weight_of()))

        return look

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gram(x: Tensor, weight_NT: Tensor) -> tuple[Tensor, float]:
    """sum_t w_t x_t x_t^T in fp64, and sum_t w_t. A pooled input [N, D] has one vector a text."""
    weight = weight_NT.sum(-1).bool().to(x.dtype) if x.dim() == 2 else weight_NT.to(x.dtype)
    rows_SH = x.reshape(-1, x.shape[-1])
    weight_S = weight.reshape(-1, 1)
    keep_S = weight_S[:, 0] > 0  # padding may hold NaN
    rows_SH, weight_S = rows_SH[keep_S], weight_S[keep_S]
    return (rows_SH.T @ (rows_SH * weight_S)).double(), float(weight_S.sum(dtype=torch.float64))


def token_weights(padded: PaddedTokens, config: RegMeanConfig) -> Tensor:
    """weight_NT: 1 a token, or a text's mass of 1 shared by its tokens; 0 for padding."""
    mask_NT = padded.mask_NT.double()
    return mask_NT if config.token_weight == "token" else mask_NT / mask_NT.sum(1, keepdim=True).clamp_min(1)


def collect(live: LiveMerge, records: RecordSet, config: RegMeanConfig) -> Grams:
    """Gram matrices of all linear layers of the model as it stands, over the texts of one task."""
    modules = linear_modules(live.model)
    grams = Grams()
    weight: list[Tensor] = []
    previous: dict[str, Tensor] = {}
    done, check = 0, 64
    chunks = token_chunks(live, records)
    with collecting(modules, grams, lambda: weight[0]), torch.no_grad(), progress_bar("regmean", len(chunks)) as bar:
        for padded in chunks:
            weight[:] = [token_weights(padded, config)]
            live.model(padded, ("dense",))
            live.cost.forward += len(padded.id_NT)
            done += len(padded.id_NT)
            bar.advance()
            if config.tolerance > 0 and done >= check:
                check = 2 * done
                current = grams.shapes()
                if previous and _largest_change(previous, current) < config.tolerance:
                    break
                previous = current
    return grams


def _largest_change(before: Weights, after: Weights) -> float:
    return max(float((after[name] - before[name]).norm() / after[name].norm().clamp_min(1e-38)) for name in before)


def token_chunks(live: LiveMerge, records: RecordSet) -> list[PaddedTokens]:
    """The distinct texts of a sample, tokenized under their roles, in padded chunks of similar length. The order of
    chunks is mixed: a sample that ends early has short texts and long ones."""
    parts = []
    for role in ROLES:
        texts = [text for text, own in texts_of(records) if own == role]
        if texts:
            parts.append(live.model.tokenize(texts, role, records.task))
    tokens = TokenBatch.concatenate(parts)
    chunks = chunk_rows(tokens.length_N, 2048, 32)
    order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(0)).tolist()
    model = live.model
    return [tokens.take(chunks[place]).pad(model.pad_id, model.device, model.padding_left) for place in order]


def solve(deltas: Sequence[Tensor], grams: Sequence[Tensor], weights: Sequence[float], config: RegMeanConfig) -> Tensor:
    """V_m [d_out, d_in] of one linear layer. In terms of deltas, which is better conditioned, and the same: the ridge
    leads to the weighted mean of the deltas.

    Solved in fp64 (fp32 above 8192 inputs) by Cholesky; a matrix that is not positive definite has its eigenvalues
    clipped at rho. Without any input (all Gram matrices zero) it is the mean.
    """
    total = sum(weights)
    mean_OI = sum(
        (w / total * d.double() for w, d in zip(weights, deltas, strict=True)), torch.zeros((), dtype=torch.float64)
    )
    used = [_prepared(gram, config) for gram in grams]
    left_II = sum((w * g for w, g in zip(weights, used, strict=True)), torch.zeros_like(used[0]))
    rho = config.ridge * float(left_II.diagonal().mean())
    if float(left_II.diagonal().sum()) == 0.0:
        return mean_OI.to(deltas[0].dtype)
    right_IO = sum((w * (g @ d.to(g).T) for w, g, d in zip(weights, used, deltas)), rho * mean_OI.to(left_II).T)
    left_II.diagonal().add_(rho)
    factor, failed = torch.linalg.cholesky_ex(left_II)
    if int(failed) == 0:
        solved_IO = torch.cholesky_solve(right_IO, factor)
    else:
        value_I, vector_II = torch.linalg.eigh(left_II)
        floor = max(rho, 1e-12 * float(value_I.max()))
        solved_IO = vector_II @ ((vector_II.T @ right_IO) / value_I.clamp_min(floor)[:, None])
    return solved_IO.T.to(deltas[0].dtype).contiguous()


def _prepared(gram_II: Tensor, config: RegMeanConfig) -> Tensor:
    """alpha G + (1 - alpha) diag(G), of trace 1 unless told otherwise; fp32 where fp64 would be too large."""
    gram_II = gram_II.float() if len(gram_II) > 8192 else gram_II.double()
    diagonal_II = torch.diag(gram_II.diagonal())
    shrunk_II = config.off_diagonal * gram_II + (1 - config.off_diagonal) * diagonal_II
    trace = float(shrunk_II.trace())
    return shrunk_II / trace if config.gram_norm == "trace" and trace > 0 else shrunk_II


def merge_by_regmean(
    live: LiveMerge, records: Sequence[RecordSet], weights: Sequence[float], config: RegMeanConfig
) -> dict[str, Tensor]:
    """V_m by parameter: linear weights solved, everything else (biases, norms, tables) the weighted mean."""
    total = sum(weights)
    shares = [weight / total for weight in weights]
    merged = {name: _mean(live, name, shares) for name in live.base}
    if config.sequential:
        from embedsmith.calibrate.regmean_plus import solve_in_sequence

        return solve_in_sequence(live, records, merged, weights, config)
    grams = []
    for parent, own in enumerate(records):
        live.place_parent(parent)
        grams.append(collect(live, own, config))
    for module in linear_modules(live.model):
        solve_module(live, module, grams, weights, config, merged)
    return merged


def solve_module(
    live: LiveMerge,
    module: str,
    grams: Sequence[Grams],
    weights: Sequence[float],
    config: RegMeanConfig,
    merged: dict[str, Tensor],
) -> None:
    """Put one linear layer's solution into `merged`, if every parent's texts reached the layer."""
    name = f"{module}.weight"
    if name in merged and all(module in each.shared for each in grams):
        deltas = [delta[name] for delta in live.deltas]
        merged[name] = solve(deltas, [each.of(module) for each in grams], weights, config)


def _mean(live: LiveMerge, name: str, shares: Sequence[float]) -> Tensor:
    mean = torch.zeros_like(live.base[name])
    for share, delta in zip(shares, live.deltas, strict=True):
        mean.add_(delta[name], alpha=share)
    return mean
