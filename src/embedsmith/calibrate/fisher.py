"""Fisher merging: theta_m = sum_i a_i F_i theta_i / sum_i a_i F_i, every element by how much its parent cares for it.

F is defined per query with a frozen list of candidates C_q = (d+, d_1 .. d_K): p(d|q) = softmax(cos(q, d) / t) and
F = E_q [(grad log p)^2], squared query by query and never as the square of a batch's gradient. Source: Matena and
Raffel 2022 (2111.09832); the definitions for contrastive encoders are our own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from embedsmith.calibrate.live import Candidates, LiveMerge, Weights, frozen_candidates, texts_of
from embedsmith.core.encoder import Role
from embedsmith.core.errors import RecipeError
from embedsmith.core.files import write_cache
from embedsmith.core.progress import progress_bar
from embedsmith.core.reps import Dense, in_fp32
from embedsmith.core.settings import section
from embedsmith.core.tokens import TokenBatch
from embedsmith.data import RecordSet
from embedsmith.models import Embedder

Definition = Literal["isolated", "detached", "shared", "batch_square", "embedding"]
Expectation = Literal["empirical", "sampled", "exact"]


@section
@dataclass(frozen=True)
class FisherConfig:
    """How F is measured, and how it is used.

    `definition`: A `isolated`: one query and its own candidates a backward pass. B `detached`: candidates are the
    documents of a batch, those of other queries as fixed vectors (2 texts a query carry gradient). C `shared`: the
    in-batch loss of each query, one backward pass a query over one graph. D `batch_square`: the square of the batch's
    summed gradient, divided by the number of queries: biased, fast, what other tools do. E `embedding`: without
    labels, (grad <e, f(x)>)^2 with e ~ N(0, I), `draws` of them a text.
    `expectation`: `empirical` takes d = d+; `sampled` draws d from p(d|q), which keeps its signal where the model is
    already right; `exact` sums over all d, weighted by p. B, C and D are empirical.
    `temperature`: t of the parents' own training; F scales with 1/t^2. `batch_size`: queries in B, C and D.
    `floor`: of F, relative to its tensor's mean; an absolute one would be above all of F. `shrink`: s in
    (1 - s) F + s mean(F). `normalise`: every parent's F has length 1 as a whole, so that none drowns the others.
    """

    definition: Definition = "isolated"
    expectation: Expectation = "sampled"
    temperature: float = 0.05
    batch_size: int = 16
    draws: int = 1
    floor: float = 1e-3
    shrink: float = 0.1
    normalise: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.batch_size < 2 or self.draws < 1:
            raise RecipeError("fisher: temperature > 0, batch_size >= 2 and draws >= 1 are needed")
        if self.floor < 0 or not 0 <= self.shrink <= 1:
            raise RecipeError(f"fisher: floor {self.floor}, shrink {self.shrink}", expected="floor >= 0, 0 to 1")


def measure(live: LiveMerge, records: RecordSet, config: FisherConfig, negatives: int = 7) -> dict[str, Tensor]:
    """F of the live model as it stands, by parameter, in fp32, from a sample of its task.

    In eval mode, with the model's own prompts, pooling and length. Queries and documents both contribute; a tied
    parameter's gradient is summed by autograd and squared once. The distinct backward passes of one example are
    squared separately.
    """
    live.model.eval()
    live.model.zero_grad(set_to_none=True)
    total = {name: torch.zeros_like(p, dtype=_at_least_fp32(p)) for name, p in live.model.named_parameters()}
    examples = texts_of(records) if config.definition == "embedding" else None
    lists = [] if examples is not None else frozen_candidates(records, negatives, config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    with progress_bar(f"fisher {records.name}", len(examples or lists)) as bar:
        if examples is not None:
            pieces = _embedding(live, examples, records.task, config, generator)
        else:
            pieces = _per_query(live, lists, records.task, config, generator)
        count = 0
        for weight, examples_done in pieces:
            for name, parameter in live.model.named_parameters():
                if parameter.grad is not None:
                    total[name].addcmul_(parameter.grad.to(total[name].dtype), parameter.grad, value=weight)
                    parameter.grad = None
            count += examples_done
            bar.advance(examples_done)
    return {name: tensor / max(count, 1) for name, tensor in total.items()}


Backward = tuple[float, int]
"""A backward pass has just left its gradients: the weight of their squares, and how many examples it completes."""


def _per_query(
    live: LiveMerge, lists: Sequence[Candidates], task: str, config: FisherConfig, generator: torch.Generator
) -> Iterator[Backward]:
    if config.definition == "isolated":
        for each in lists:
            yield from _isolated(live, each, task, config, generator)
        return
    by_batch = {"detached": _detached, "shared": _shared, "batch_square": _batch_square}[config.definition]
    for start in range(0, len(lists), config.batch_size):
        batch = lists[start : start + config.batch_size]
        if len(batch) > 1:  # a query alone with its own document has no loss
            yield from by_batch(live, batch, task, config.temperature)


def _isolated(
    live: LiveMerge, each: Candidates, task: str, config: FisherConfig, generator: torch.Generator
) -> Iterator[Backward]:
    """A: log p(d|q) over the query's own candidates, one example."""
    query_1D, document_KD = _vectors(live, [each], task)
    log_p_K = F.log_softmax(document_KD @ query_1D[0] / config.temperature, dim=0)
    p_K = log_p_K.detach().exp()
    if config.expectation == "exact":
        for k in range(len(p_K)):
            log_p_K[k].backward(retain_graph=k + 1 < len(p_K))
            yield float(p_K[k]), int(k + 1 == len(p_K))
        return
    sampled = config.expectation == "sampled"
    k = int(torch.multinomial(p_K.float().cpu(), 1, generator=generator)) if sampled else 0
    log_p_K[k].backward()
    yield 1.0, 1


def _detached(live: LiveMerge, batch: Sequence[Candidates], task: str, temperature: float) -> Iterator[Backward]:
    """B: query and d+ carry gradient, the other queries' documents are fixed vectors."""
    with torch.no_grad():
        _, fixed_QD = _vectors(live, [_only_answer(each) for each in batch], task)
    for q, each in enumerate(batch):
        query_1D, own_1D = _vectors(live, [_only_answer(each)], task)
        document_QD = torch.cat([fixed_QD[:q], own_1D, fixed_QD[q + 1 :]])
        score_Q = _without_copies(document_QD @ query_1D[0] / temperature, batch, q)
        F.log_softmax(score_Q, dim=0)[q].backward()
        yield 1.0, 1


def _shared(live: LiveMerge, batch: Sequence[Candidates], task: str, temperature: float) -> Iterator[Backward]:
    """C: one backward pass a query over the batch's one graph."""
    for q, loss in enumerate(losses := _in_batch(live, batch, task, temperature)):
        loss.backward(retain_graph=q + 1 < len(losses))
        yield 1.0, 1


def _batch_square(live: LiveMerge, batch: Sequence[Candidates], task: str, temperature: float) -> Iterator[Backward]:
    """D: (sum_q grad L_q)^2, which `measure` divides by the number of queries."""
    _in_batch(live, batch, task, temperature).sum().backward()
    yield 1.0, len(batch)


def _in_batch(live: LiveMerge, batch: Sequence[Candidates], task: str, temperature: float) -> Tensor:
    """loss_Q: -log p(d+|q) over the documents of the batch."""
    query_QD, document_QD = _vectors(live, [_only_answer(each) for each in batch], task)
    score_QQ = query_QD @ document_QD.T / temperature
    rows = [F.log_softmax(_without_copies(score_QQ[q], batch, q), dim=0)[q] for q in range(len(batch))]
    return -torch.stack(rows)


def _without_copies(score_Q: Tensor, batch: Sequence[Candidates], q: int) -> Tensor:
    """Another query's document with the same text is no negative."""
    same = [place != q and other.documents[0] == batch[q].documents[0] for place, other in enumerate(batch)]
    return score_Q.masked_fill(torch.tensor(same, device=score_Q.device), float("-inf"))


def _only_answer(each: Candidates) -> Candidates:
    return Candidates(each.query, each.documents[:1], each.instruction)


def _embedding(
    live: LiveMerge,
    texts: Sequence[tuple[str, Role]],
    task: str,
    config: FisherConfig,
    generator: torch.Generator,
) -> Iterator[Backward]:
    """E: (grad <e, f(x)>)^2 of the vector itself, the mean over `draws` of e."""
    for text, role in texts:
        vector_D = _forward(live, live.model.tokenize([text], role, task))[0]
        for draw in range(config.draws):
            noise_D = torch.randn(len(vector_D), generator=generator).to(vector_D)
            last = draw + 1 == config.draws
            (vector_D @ noise_D).backward(retain_graph=not last)
            yield 1.0 / config.draws, int(last)


def _vectors(live: LiveMerge, lists: Sequence[Candidates], task: str) -> tuple[Tensor, Tensor]:
    """query_QD and document_KD of all lists, of length 1; one forward pass for both."""
    model: Embedder = live.model
    role: Role = "query" if task == "sts" else "document"
    own = [each.instruction for each in lists]
    queries = model.tokenize([each.query for each in lists], "query", task, own if any(own) else None)
    documents = model.tokenize([text for each in lists for text in each.documents], role, task)
    vector_ND = F.normalize(_forward(live, TokenBatch.concatenate([queries, documents])), dim=-1)
    return vector_ND[: len(lists)], vector_ND[len(lists) :]


def _forward(live: LiveMerge, tokens: TokenBatch) -> Tensor:
    dense = live.encode(tokens, ("dense",))["dense"]
    assert isinstance(dense, Dense)
    return in_fp32(dense.vector_ND)


def _at_least_fp32(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


@dataclass(frozen=True)
class FisherMerge:
    """`delta` by parameter; `at_floor`: share of elements whose F was raised, by parent; `effective_parents`: the
    exponential of the mean entropy of the weights: 1 where one parent decides alone, M where all count the same."""

    delta: dict[str, Tensor]
    at_floor: tuple[float, ...]
    effective_parents: float


def merge_by_fisher(
    deltas: Sequence[Weights], fishers: Sequence[Weights], weights: Sequence[float], config: FisherConfig
) -> FisherMerge:
    """V_m = sum_i a_i F_i V_i / sum_i a_i F_i, element by element, F normalised, shrunk and floored."""
    scales = [1 / max(_length(fisher), 1e-38) if config.normalise else 1.0 for fisher in fishers]
    noise = [NOISE * scale * _mean(fisher) for fisher, scale in zip(fishers, scales, strict=True)]
    merged: dict[str, Tensor] = {}
    raised = [0] * len(deltas)
    elements, entropy = 0, 0.0
    for name, first in deltas[0].items():
        own = [fisher[name] * scale for fisher, scale in zip(fishers, scales, strict=True)]
        prepared = _prepare(own, noise, config)
        raised = [sofar + count for sofar, (_, count) in zip(raised, prepared)]
        share_M = torch.stack([weight * value for weight, (value, _) in zip(weights, prepared, strict=True)])
        share_M = share_M / share_M.sum(0)
        merged[name] = sum((share_M[i] * delta[name] for i, delta in enumerate(deltas)), torch.zeros_like(first))
        entropy += float(torch.special.entr(share_M).sum(dtype=torch.float64))
        elements += first.numel()
    return FisherMerge(merged, tuple(count / elements for count in raised), math.exp(entropy / elements))


def _prepare(fishers: Sequence[Tensor], noise: Sequence[float], config: FisherConfig) -> list[tuple[Tensor, int]]:
    """One tensor's F of all parents, shrunk and floored, and how many of its elements lay below the floor. Where a
    parent's F is rounding noise throughout (a pooler; the bias of keys, which softmax cancels) the parents count by
    their a_i alone."""
    if any(float(fisher.mean()) <= least for fisher, least in zip(fishers, noise, strict=True)):
        return [(torch.ones_like(fisher), fisher.numel()) for fisher in fishers]

    def prepared(fisher: Tensor) -> tuple[Tensor, int]:
        mean = fisher.mean()
        shrunk = fisher.mul(1 - config.shrink).add_(config.shrink * mean)
        return shrunk.clamp_min(config.floor * mean), int((fisher < config.floor * mean).sum())

    return [prepared(fisher) for fisher in fishers]


NOISE = 1e-10
"""Mean F of a tensor, relative to that of the model, below which it is squares of float32 rounding errors."""


def _mean(fisher: Weights) -> float:
    total = sum(float(tensor.sum(dtype=torch.float64)) for tensor in fisher.values())
    return total / max(sum(tensor.numel() for tensor in fisher.values()), 1)


def _length(fisher: Weights) -> float:
    return math.sqrt(sum(float(tensor.square().sum(dtype=torch.float64)) for tensor in fisher.values()))


def fisher_of_parents(
    live: LiveMerge,
    records: Sequence[RecordSet],
    config: FisherConfig,
    negatives: int = 7,
    cache: Path | None = None,
    hashes: Sequence[str] | None = None,
) -> list[dict[str, Tensor]]:
    """F of every parent on its own texts, measured on the parent's own weights.

    With a `cache` folder and the parents' content `hashes`, F is measured once for a parent, its texts and the
    settings, and kept there as fisher-KEY.safetensors with what it was measured from in the header.
    """
    fishers = []
    for parent, own in enumerate(records):
        about = None if cache is None or hashes is None else _about(hashes[parent], own, config, negatives)
        file = None if cache is None or about is None else cache / f"fisher-{_key(about)}.safetensors"
        if file is not None and file.exists():
            fishers.append({name: tensor.to(live.model.device) for name, tensor in load_file(file).items()})
            continue
        live.place_parent(parent)
        fishers.append(measure(live, own, config, negatives))
        if file is not None:
            _keep(file, fishers[-1], about or {})
    return fishers


def _about(content_hash: str, records: RecordSet, config: FisherConfig, negatives: int) -> dict[str, str]:
    """What F depends on. How it is used (floor, shrink, normalise) is not part of it."""
    texts = hashlib.sha256(repr([(r.query, r.positives, r.negatives) for r in records.records]).encode()).hexdigest()
    names = ("definition", "expectation", "temperature", "batch_size", "draws", "seed")
    settings = {name: str(getattr(config, name)) for name in names}
    return {"model": content_hash, "texts": texts, "negatives": str(negatives), **settings}


def _key(about: Mapping[str, str]) -> str:
    return hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()[:32]


def _keep(file: Path, fisher: Weights, about: dict[str, str]) -> None:
    write_cache(file, save({name: tensor.cpu().contiguous() for name, tensor in fisher.items()}, metadata=about))
