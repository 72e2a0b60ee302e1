"""One live model whose weights are rebuilt in place: theta = theta_0 + sum_i c_i V_i. No candidate is ever written.

What the methods that read texts, the search and the diagnostics share. A group is a set of weights with coefficients of
its own: one for the whole model, or one a block. Names are those of the model's parameters; tied weights are one
parameter.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from embedsmith.core.encoder import Role
from embedsmith.core.errors import CheckpointError
from embedsmith.core.reps import Reps
from embedsmith.core.tokens import IntArray, TokenBatch
from embedsmith.merge.method import Combine, Job, groups
from embedsmith.merge.parents import Parent
from embedsmith.merge.recipe import Granularity
from embedsmith.merge.tensor_blocks import Block
from embedsmith.models import Embedder, load

Weights = Mapping[str, Tensor]
"""Tensors by parameter name."""


@dataclass
class LiveMerge:
    """theta_0, the task vectors V_i of M parents, and one model that takes any combination of them.

    `groups`: group number of every parameter, from 0. It is an `Encoder`, so tasks score it as it stands. `texts`: how
    many it has encoded; a forward pass counts once, a backward pass twice.
    """

    model: Embedder
    base: dict[str, Tensor]
    deltas: list[dict[str, Tensor]]
    names: tuple[str, ...]
    groups: dict[str, int]
    group_names: tuple[str, ...]
    texts: int = 0

    @classmethod
    def of(
        cls,
        parents: Sequence[Parent],
        base: Parent | None = None,
        granularity: Granularity = "model",
        device: str | torch.device | None = None,
        max_length: int | None = None,
    ) -> Self:
        """The base's weights in one live model, and M task vectors in memory, in fp32.

        Pooling, prompts and tokenizer are those of the first parent that is a whole embedder; it cuts texts at
        `max_length` tokens, by default where that parent does. Without a base the first
        parent takes its place: enough for methods whose weights sum to 1.
        Errors: `CheckpointError` for parents without the weights that the model needs, or with weights that are not
        finite: better now than after an hour.
        """
        start = parents[0] if base is None else base
        models = [*parents, start]
        # the first folder that says how to pool; an adapter's is its plain base model's, which does not
        folder = next((one.folder for one in models if (one.folder / "modules.json").exists()), models[0].folder)
        model = load(str(folder), device=device)
        if max_length is not None and max_length < model.settings.max_length:
            model = load(str(folder), device=device, max_length=max_length)
        names = [name for name, _ in model.named_parameters()]
        for one in (start, *parents):
            if missing := [name for name in names if name not in one.tensors]:
                fix = "merge models of one kind"
                raise CheckpointError(f"the weight {missing[0]} is missing", where=one.id, fix=fix)
        tensors = {name: start.tensor(name).to(model.device) for name in names}
        deltas = [{name: one.tensor(name).to(model.device) - tensors[name] for name in names} for one in parents]
        chosen = groups(names, granularity)
        place = {name: place for place, members in enumerate(chosen.values()) for name in members}
        live = cls(model, tensors, deltas, tuple(one.id for one in parents), place, tuple(chosen))
        live.place(torch.zeros(live.parents, dtype=torch.float64))
        return live

    @property
    def parents(self) -> int:
        return len(self.deltas)

    def by_parent(self, values: Sequence[float]) -> dict[str, float]:
        """One value a parent, by the parents' names."""
        return dict(zip(self.names, values, strict=True))

    def gram(self) -> Tensor:
        """gram_GMM: inner products of the task vectors in each group, summed in fp64."""
        gram_GMM = torch.zeros(len(self.group_names), self.parents, self.parents, dtype=torch.float64)
        for name, group in self.groups.items():
            for i in range(self.parents):
                for j in range(i + 1):
                    value = _dot(self.deltas[i][name], self.deltas[j][name])
                    gram_GMM[group, i, j] += value
                    gram_GMM[group, j, i] = gram_GMM[group, i, j]
        return gram_GMM

    @torch.no_grad()
    def place(self, coefficient_GM: Tensor) -> None:
        """Set every weight to theta_0 + sum_i c_gi V_i, the base added last. [M] serves all groups."""
        coefficient_GM = coefficient_GM.detach().double().cpu().expand(len(self.group_names), self.parents)
        for name, parameter in self.model.named_parameters():
            weights = coefficient_GM[self.groups[name]].tolist()
            total = torch.zeros_like(self.base[name])
            for weight, delta in zip(weights, self.deltas, strict=True):
                if weight != 0.0:
                    total.add_(delta[name], alpha=weight)
            parameter.copy_(total.add_(self.base[name]))

    def place_parent(self, parent: int) -> None:
        """The weights of one parent."""
        self.place(torch.eye(self.parents, dtype=torch.float64)[parent])

    @contextmanager
    def projecting(self) -> Iterator[Tensor]:
        """Within the block every gradient is turned into inner products <g, V_i> as soon as it is ready, added to the
        yielded projection_GM, and dropped: the peak is the gradient of one tensor."""
        projection_GM = torch.zeros(len(self.group_names), self.parents, dtype=torch.float64)

        def hook(name: str) -> Callable[[Tensor], None]:
            def project(parameter: Tensor) -> None:
                assert parameter.grad is not None
                for i, delta in enumerate(self.deltas):
                    projection_GM[self.groups[name], i] += _dot(parameter.grad, delta[name])
                parameter.grad = None

            return project

        trainable = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        handles = [p.register_post_accumulate_grad_hook(hook(name)) for name, p in trainable]
        try:
            yield projection_GM
        finally:
            for handle in handles:
                handle.remove()

    def encode(self, tokens: TokenBatch, heads: Sequence[str], rows: IntArray | None = None) -> Reps:
        """The model's forward pass on a ragged batch or some of its rows, with gradient where it is switched on."""
        count = len(tokens) if rows is None else len(rows)
        self.texts += 3 * count if torch.is_grad_enabled() else count
        padded = tokens.pad(self.model.pad_id, self.model.device, self.model.padding_left, rows)
        reps: Reps = self.model(padded, heads)
        return reps

    def represent(
        self, texts: Sequence[str], *, role: Role, task: str | None = None, outputs: Sequence[str] = ("dense",)
    ) -> Reps:
        """See `core.encoder.Encoder`."""
        self.texts += len(texts)
        return self.model.represent(texts, role=role, task=task, outputs=outputs, show_progress=False)

    def coefficients_by_name(self, coefficient_GM: Tensor, job: Job) -> dict[str, Tensor]:
        """c_M of every tensor of the job, also noted in merge.json. A tensor that is not in the live model
        gets the mean over the groups."""
        job.report["coefficients"] = dict(zip(self.group_names, coefficient_GM.tolist(), strict=False))
        mean_M = coefficient_GM.mean(0)
        return {name: coefficient_GM[self.groups[name]] if name in self.groups else mean_M for name in job.names}


def _dot(left: Tensor, right: Tensor) -> float:
    return float((left.reshape(-1) * right.reshape(-1).to(left.device)).sum(dtype=torch.float64))


def combine_deltas(delta: Weights, weight_M: Tensor) -> Combine:
    """theta_0 + V_m with V_m in memory; a tensor without one is the weighted mean of the parents. Where there is no
    base, V_m counts from the first parent."""
    share_M = (weight_M / weight_M.sum()).tolist()

    def combine(block: Block) -> Tensor:
        if block.name not in delta:
            return torch.stack([w * p.double() for w, p in zip(share_M, block.parents, strict=True)]).sum(0)
        start_E = block.parents[0] if block.base_E is None else block.base_E
        own_E = delta[block.name].reshape(-1)[block.start : block.stop]
        return start_E.double() + own_E.cpu().double()

    return combine


def cosines(gram_MM: Tensor) -> Tensor:
    """cos(V_i, V_j); 0 with a vector of length zero, 1 with itself."""
    length_M = gram_MM.diagonal().clamp_min(0).sqrt()
    scale_MM = length_M[:, None] * length_M[None, :]
    cosine_MM = torch.where(scale_MM > 0, gram_MM / scale_MM.clamp_min(1e-300), torch.zeros_like(gram_MM))
    return cosine_MM.clamp(-1, 1).fill_diagonal_(1.0)
