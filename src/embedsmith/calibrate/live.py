"""One live model whose weights are rebuilt in place: theta = theta_0 + sum_i c_i V_i. No candidate is ever written.

What data methods, the search and the diagnostics share. A group is a set of weights with coefficients of its own: one
for the whole model, or one a block. Names are those of the model's parameters; tied weights are one parameter.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embedsmith.core.encoder import Role
from embedsmith.core.errors import CheckpointError, ModelError, RecipeError
from embedsmith.core.reps import Reps
from embedsmith.core.seeds import derive_seed
from embedsmith.core.settings import section
from embedsmith.core.tokens import IntArray, TokenBatch
from embedsmith.data import Record, RecordSet, Source, read_source, text_id
from embedsmith.merge.gram import groups
from embedsmith.merge.parents import Parent
from embedsmith.merge.recipe import Granularity
from embedsmith.models import Embedder, load

Weights = Mapping[str, Tensor]
"""Tensors by parameter name."""


@dataclass
class Cost:
    """Texts a method has encoded. A forward pass counts once, a backward pass twice."""

    forward: int = 0
    backward: int = 0

    @property
    def texts(self) -> int:
        return self.forward + 2 * self.backward


@dataclass
class LiveMerge:
    """theta_0, the task vectors V_i of M parents, and one model that takes any combination of them.

    `groups`: group number of every parameter, from 0. It is an `Encoder`, so tasks score it as it stands.
    """

    model: Embedder
    base: dict[str, Tensor]
    deltas: list[dict[str, Tensor]]
    names: tuple[str, ...]
    groups: dict[str, int]
    group_names: tuple[str, ...]
    cost: Cost = field(default_factory=Cost)

    @property
    def parents(self) -> int:
        return len(self.deltas)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

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
        for name, parameter in self.parameters.items():
            weights = coefficient_GM[self.groups[name]].tolist()
            total = torch.zeros_like(self.base[name])
            for weight, delta in zip(weights, self.deltas, strict=True):
                if weight != 0.0:
                    total.add_(delta[name], alpha=weight)
            parameter.copy_(total.add_(self.base[name]))

    @torch.no_grad()
    def place_delta(self, delta: Weights) -> None:
        """Set every weight to theta_0 + delta; a parameter without one is the base's."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.base[name] + delta[name] if name in delta else self.base[name])

    def place_parent(self, parent: int) -> None:
        """The weights of one parent."""
        self.place(torch.eye(self.parents, dtype=torch.float64)[parent])

    def place_base(self) -> None:
        self.place(torch.zeros(self.parents, dtype=torch.float64))

    @contextmanager
    def projecting(self) -> Iterator[Tensor]:
        """Within the block every gradient is turned into inner products <g, V_i> as soon as it is ready, added to the
        yielded projection_GM, and dropped: the peak is the gradient of one tensor."""
        projection_GM = torch.zeros(len(self.group_names), self.parents, dtype=torch.float64)
        handles = [p.register_post_accumulate_grad_hook(self._hook(n, projection_GM)) for n, p in self._trainable()]
        try:
            yield projection_GM
        finally:
            for handle in handles:
                handle.remove()

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _hook(self, name: str, projection_GM: Tensor) -> Any:
        group = self.groups[name]

        def project(parameter: Tensor) -> None:
            assert parameter.grad is not None
            for i, delta in enumerate(self.deltas):
                projection_GM[group, i] += _dot(parameter.grad, delta[name])
            parameter.grad = None

        return project

    def encode(self, tokens: TokenBatch, heads: Sequence[str], rows: IntArray | None = None) -> Reps:
        """The model's forward pass on a ragged batch or some of its rows, with gradient where it is switched on."""
        count = len(tokens) if rows is None else len(rows)
        self.cost.forward += count
        self.cost.backward += count if torch.is_grad_enabled() else 0
        padded = tokens.pad(self.model.pad_id, self.model.device, self.model.padding_left, rows)
        reps: Reps = self.model(padded, heads)
        return reps

    def represent(
        self, texts: Sequence[str], *, role: Role, task: str | None = None, outputs: Sequence[str] = ("dense",)
    ) -> Reps:
        """See `core.encoder.Encoder`."""
        self.cost.forward += len(texts)
        return self.model.represent(texts, role=role, task=task, outputs=outputs, show_progress=False)


def open_live(
    parents: Sequence[Parent],
    base: Parent | None = None,
    *,
    granularity: Granularity = "model",
    device: str | torch.device | None = None,
    max_length: int | None = None,
) -> LiveMerge:
    """The base's weights in one live model, and M task vectors in memory, in fp32.

    Pooling, prompts and tokenizer are those of the first parent that is a whole embedder. Without a base the first
    parent takes its place: enough for methods whose weights sum to 1.
    Errors: `CheckpointError` for parents without the weights that the model needs.
    """
    start = parents[0] if base is None else base
    folder = str(_embedder([*parents, start]))
    model = load(folder, device=device) if max_length is None else load(folder, device=device, max_length=max_length)
    names = [name for name, _ in model.named_parameters()]
    for one in (start, *parents):
        if missing := [name for name in names if name not in one.tensors]:
            raise CheckpointError(f"the weight {missing[0]} is missing", where=one.id, fix="merge models of one kind")
    tensors = {name: _finite(start, name).to(model.device) for name in names}
    deltas = [{name: _finite(one, name).to(model.device) - tensors[name] for name in names} for one in parents]
    chosen = groups(names, granularity)
    live = LiveMerge(
        model=model,
        base=tensors,
        deltas=deltas,
        names=tuple(one.id for one in parents),
        groups={name: place for place, members in enumerate(chosen.values()) for name in members},
        group_names=tuple(chosen),
    )
    live.place_base()
    return live


def _embedder(models: Sequence[Parent]) -> Path:
    """The first folder that says how to pool; an adapter's is its plain base model's, which does not."""
    return next((one.folder for one in models if (one.folder / "modules.json").exists()), models[0].folder)


def _finite(model: Parent, name: str) -> Tensor:
    """A whole tensor. Errors: `CheckpointError` where it holds NaN or infinity: better now than after an hour."""
    tensor = model.tensor(name)
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(
            f"the weight {name} holds NaN or infinity",
            where=model.id,
            fix="leave this parent out; its training diverged or its file is damaged",
        )
    return tensor


def _dot(left: Tensor, right: Tensor) -> float:
    return float((left.reshape(-1) * right.reshape(-1).to(left.device)).sum(dtype=torch.float64))


def linear_modules(model: Embedder) -> dict[str, nn.Linear]:
    """The linear layers by module name, without those of token heads. Errors: `ModelError` when there are none."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not found:
        raise ModelError("this model has no linear layer")
    return found


# The texts data methods look at: small samples of training sources, drawn once, with frozen candidates.

ROLES: tuple[Role, ...] = ("query", "document")
ALIKE = 0.8
"""A graded pair from this score on counts as a query and its answer, where a method needs some."""


@section
@dataclass(frozen=True, kw_only=True)
class Probe:
    """Which texts, and how many.

    `sources`: where they come from: for methods that look at every parent on its own task, one a parent in the
    parents' order, or a single one for all. `examples`: of each source. `negatives`: K, candidates of a query beside
    its own document: its own negatives first, then other records' documents.
    """

    sources: tuple[Source, ...]
    examples: int = 512
    negatives: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise RecipeError("probe.sources: at least one source is needed")
        if self.examples < 1 or self.negatives < 1:
            raise RecipeError(f"examples {self.examples}, negatives {self.negatives}", expected="at least 1")

    def read(self) -> list[RecordSet]:
        """A sample of every source, the same for the same seed."""
        return [
            sample(read_source(source).texts_only("a merge that reads data", source.path), self.examples, self.seed)
            for source in self.sources
        ]

    def of_parents(self, parents: int) -> list[RecordSet]:
        """One sample a parent. Errors: `RecipeError` when the numbers do not fit."""
        sets = self.read()
        if len(sets) not in (1, parents):
            raise RecipeError(f"{len(sets)} probe sources for {parents} parents", expected=f"1 or {parents}")
        return sets * parents if len(sets) == 1 else sets


def sample(records: RecordSet, count: int, seed: int) -> RecordSet:
    """At most `count` records, in the order of the file."""
    if len(records.records) <= count:
        return records
    rows = random.Random(derive_seed("probe", seed, records.name)).sample(range(len(records.records)), count)
    return replace(records, records=[records.records[row] for row in sorted(rows)])


@dataclass(frozen=True)
class Candidates:
    """One query, its instruction, and its frozen list of documents: the right one first."""

    query: str
    documents: tuple[str, ...]
    instruction: str | None = None


def frozen_candidates(records: RecordSet, negatives: int, seed: int) -> list[Candidates]:
    """The candidate lists of the per-query losses: d+ and K others, drawn once.

    Scored pairs take part from a score of 0.8 on. A text that is one of the query's positives is never a negative; a
    pool with fewer than K others gives shorter lists.
    Errors: `RecipeError` for records without any query and document.
    """
    usable = [record for record in records.records if record.positives and _is_answer(record)]
    pool = list({text_id(record.positives[0]): record.positives[0] for record in usable}.items())
    if len(pool) < 2:
        raise RecipeError(
            f"{records.name} has {len(pool)} documents that answer a query",
            expected="at least 2: retrieval records, or scored pairs of which some are alike",
            fix="use a definition that needs no labels: definition=embedding",
        )
    return [
        _candidates(record, pool, negatives, random.Random(derive_seed("candidates", seed, n)))
        for n, record in enumerate(usable)
    ]


def _is_answer(record: Record) -> bool:
    if record.task != "sts":
        return True
    score = record.positive_scores[0] if record.positive_scores else None
    return score is not None and score >= ALIKE


def _candidates(record: Record, pool: Sequence[tuple[int, str]], count: int, chance: random.Random) -> Candidates:
    taken = {text_id(text) for text in (*record.positives, record.query)}
    chosen: list[str] = []
    others = (pool[place] for place in chance.sample(range(len(pool)), len(pool)))
    for id_, text in (*((text_id(text), text) for text in record.negatives), *others):
        if len(chosen) == count:
            break
        if id_ not in taken:
            taken.add(id_)
            chosen.append(text)
    return Candidates(record.query, (record.positives[0], *chosen), record.instruction)


def texts_of(records: RecordSet) -> list[tuple[str, Role]]:
    """Every distinct text with its role, for methods that need no labels. Both sides of a scored pair are queries."""
    found: dict[tuple[str, Role], None] = {}
    for record in records.records:
        found[record.query, "query"] = None
        for text in record.positives:
            found[text, "query" if record.task == "sts" else "document"] = None
    return list(found)
