"""RegMean: merge linear layers in closed form, so that each keeps every parent's outputs on that parent's own texts.

    W_m^T = (sum_i a_i G_i + rho I)^-1 (sum_i a_i G_i W_i^T + rho Wbar^T),   G_i = E[x x^T] of the layer's inputs

Source: Jin et al. 2023 (2212.09849); the ridge leads to the average and not to zero.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from embedsmith.calibrate.live_model import LiveMerge, combine_deltas
from embedsmith.calibrate.probe import ROLES, ProbedMethod, distinct_texts
from embedsmith.core.errors import ModelError
from embedsmith.core.progress import progress_bar
from embedsmith.core.settings import NotNegative, Share
from embedsmith.core.shelf import merge_methods
from embedsmith.core.tokens import PaddedTokens, TokenBatch, chunk_rows
from embedsmith.data import RecordSet
from embedsmith.merge.method import Combine, Job
from embedsmith.models import Embedder


@dataclass
class InputGrams:
    """Gram matrices gram_HH (fp64) by the first module that read an input; `shared` names it for the others, so that
    query, key and value keep one matrix between them. `mass`: sum of the weights of the inputs."""

    by_input: dict[str, Tensor] = field(default_factory=dict)
    mass: dict[str, float] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)

    def of(self, module: str) -> Tensor:
        """E[x x^T] of a linear layer's inputs."""
        owner = self.shared[module]
        return self.by_input[owner] / max(self.mass[owner], 1e-38)

    def add(self, owner: str, x: Tensor, weight_NT: Tensor) -> None:
        """Add sum_t w_t x_t x_t^T in fp64, and sum_t w_t. A pooled input [N, D] has one vector a text."""
        weight = weight_NT.sum(-1).bool().to(x.dtype) if x.dim() == 2 else weight_NT.to(x.dtype)
        rows_SH = x.reshape(-1, x.shape[-1])
        weight_S = weight.reshape(-1, 1)
        inside_S = weight_S[:, 0] > 0  # padding may hold NaN
        rows_SH, weight_S = rows_SH[inside_S], weight_S[inside_S]
        gram_HH = (rows_SH.T @ (rows_SH * weight_S)).double()
        known = self.by_input.get(owner)
        self.by_input[owner] = gram_HH if known is None else known + gram_HH
        self.mass[owner] = self.mass.get(owner, 0.0) + float(weight_S.sum(dtype=torch.float64))

    @contextmanager
    def collecting(self, modules: Mapping[str, nn.Linear], weight_of: Callable[[], Tensor]) -> Iterator[None]:
        """Within the block every forward pass is added. `weight_of()` gives weight_NT of the pass under way: 0 for
        padding, which is no input of the task."""
        seen: dict[int, tuple[Tensor, str]] = {}

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def add_input(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                x = inputs[0]
                if name in self.shared:
                    seen.clear()
                else:  # held until then, so that no other tensor takes its id
                    self.shared[name] = seen.setdefault(id(x), (x, name))[1]
                if self.shared[name] == name:
                    self.add(name, x.detach(), weight_of())

            return add_input

        handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def normalised(self) -> dict[str, Tensor]:
        """Copies of trace 1, to see how much more texts change them."""
        return {name: gram / gram.trace().clamp_min(1e-38) for name, gram in self.by_input.items()}


@merge_methods.register(
    "regmean", formula="(sum_i a_i G_i + rho I)^-1 (sum_i a_i G_i W_i^T + rho Wbar^T)", source="2212.09849"
)
@dataclass(frozen=True, kw_only=True)
class RegMean(ProbedMethod):
    """Linear layers that keep each parent's outputs on its own texts, in closed form; the rest is averaged.

    `off_diagonal`: alpha, the share kept of G's off-diagonal; 0 is a weighted mean by input feature. `ridge`: rho,
    relative to the mean of the diagonal. `gram_norm`: `trace` divides G by its trace, so that a task with larger
    activations does not drown the others; `none` leaves it. `token_weight`: every `text` has mass 1, or every `token`.
    `tolerance`: stop reading texts when doubling their number changes every Gram matrix by less than this share (0:
    read all).
    """

    off_diagonal: Share = 0.9
    ridge: NotNegative = 1e-4
    gram_norm: Literal["trace", "none"] = "trace"
    token_weight: Literal["text", "token"] = "text"
    tolerance: NotNegative = 0.01

    def prepare(self, job: Job) -> Combine:
        live = self.live(job)
        delta = self.merge(live, self.probe.of_parents(live.parents), job.weight_M.tolist())
        job.report["regmean"] = {"texts": live.texts}
        return combine_deltas(delta, job.weight_M)

    def merge(self, live: LiveMerge, sets: Sequence[RecordSet], weights: Sequence[float]) -> dict[str, Tensor]:
        """V_m by parameter: linear weights solved where every parent's texts reached the layer, everything else
        (biases, norms, tables) the weighted mean."""
        shares = [weight / sum(weights) for weight in weights]
        merged = {name: torch.zeros_like(base) for name, base in live.base.items()}
        for name, mean in merged.items():
            for share, delta in zip(shares, live.deltas, strict=True):
                mean.add_(delta[name], alpha=share)
        inputs = []
        for parent, records in enumerate(sets):
            live.place_parent(parent)
            inputs.append(self.collect(live, records))
        for module in linear_modules(live.model):
            name = f"{module}.weight"
            if name in merged and all(module in each.shared for each in inputs):
                deltas = [delta[name] for delta in live.deltas]
                merged[name] = self.solve(deltas, [each.of(module) for each in inputs], weights)
        return merged

    def collect(self, live: LiveMerge, records: RecordSet) -> InputGrams:
        """Gram matrices of all linear layers of the model as it stands, over the texts of one task."""
        grams = InputGrams()
        weight: list[Tensor] = []
        previous: dict[str, Tensor] = {}
        done, check = 0, 64
        chunks = token_chunks(live, records)
        hooked = grams.collecting(linear_modules(live.model), lambda: weight[0])
        with hooked, torch.no_grad(), progress_bar("regmean", len(chunks)) as bar:
            for padded in chunks:
                weight[:] = [self.token_weights(padded)]
                live.model(padded, ("dense",))
                live.texts += len(padded.id_NT)
                done += len(padded.id_NT)
                bar.advance()
                if self.tolerance > 0 and done >= check:
                    check = 2 * done
                    current = grams.normalised()
                    changes = (
                        float((current[name] - before).norm() / current[name].norm().clamp_min(1e-38))
                        for name, before in previous.items()
                    )
                    if previous and max(changes) < self.tolerance:
                        break
                    previous = current
        return grams

    def token_weights(self, padded: PaddedTokens) -> Tensor:
        """weight_NT: 1 a token, or a text's mass of 1 shared by its tokens; 0 for padding."""
        mask_NT = padded.mask_NT.double()
        return mask_NT if self.token_weight == "token" else mask_NT / mask_NT.sum(1, keepdim=True).clamp_min(1)

    def solve(self, deltas: Sequence[Tensor], grams: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """V_m [d_out, d_in] of one linear layer. In terms of deltas, which is better conditioned, and the same: the
        ridge leads to the weighted mean of the deltas.

        Solved in fp64 (fp32 above 8192 inputs) by Cholesky; a matrix that is not positive definite has its eigenvalues
        clipped at rho. Without any input (all Gram matrices zero) it is the mean.
        """
        total = sum(weights)
        mean_OI = sum(
            (w / total * d.double() for w, d in zip(weights, deltas, strict=True)), torch.zeros((), dtype=torch.float64)
        )
        used = [self._shrunk(gram) for gram in grams]
        left_II = sum((w * g for w, g in zip(weights, used, strict=True)), torch.zeros_like(used[0]))
        rho = self.ridge * float(left_II.diagonal().mean())
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

    def _shrunk(self, gram_II: Tensor) -> Tensor:
        """alpha G + (1 - alpha) diag(G), of trace 1 unless the settings keep it; fp32 where fp64 would be too large."""
        gram_II = gram_II.float() if len(gram_II) > 8192 else gram_II.double()
        diagonal_II = torch.diag(gram_II.diagonal())
        shrunk_II = self.off_diagonal * gram_II + (1 - self.off_diagonal) * diagonal_II
        trace = float(shrunk_II.trace())
        return shrunk_II / trace if self.gram_norm == "trace" and trace > 0 else shrunk_II


def linear_modules(model: Embedder) -> dict[str, nn.Linear]:
    """The linear layers by module name. Errors: `ModelError` when there are none."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not found:
        raise ModelError("this model has no linear layer")
    return found


def token_chunks(live: LiveMerge, records: RecordSet) -> list[PaddedTokens]:
    """The distinct texts of a sample, tokenized under their roles, in padded chunks of similar length. The order of
    chunks is mixed: a sample that ends early has short texts and long ones."""
    parts = []
    for role in ROLES:
        texts = [text for text, own in distinct_texts(records) if own == role]
        if texts:
            parts.append(live.model.tokenize(texts, role, records.task))
    tokens = TokenBatch.concatenate(parts)
    chunks = chunk_rows(tokens.length_N, 2048, 32)
    order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(0)).tolist()
    model = live.model
    return [tokens.take(chunks[place]).pad(model.pad_id, model.device, model.padding_left) for place in order]
