"""Fisher merging: theta_m = sum_i a_i F_i theta_i / sum_i a_i F_i, every element by how much its parent cares for it.

F is defined per query with a frozen list of candidates C_q = (d+, d_1 .. d_K): p(d|q) = softmax(cos(q, d) / t) and
F = E_q [(grad log p)^2], squared query by query and never as the square of a batch's gradient. Source: Matena and
Raffel 2022 (2111.09832); the definitions for contrastive encoders are our own.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from embedsmith.calibrate.live_model import LiveMerge, Weights, combine_deltas
from embedsmith.calibrate.probe import FrozenCandidates, ProbedMethod, distinct_texts, frozen_candidates
from embedsmith.core.encoder import Role
from embedsmith.core.files import write_cache
from embedsmith.core.progress import log, progress_bar
from embedsmith.core.reps import Dense, in_fp32
from embedsmith.core.settings import Count, NotNegative, Positive, Range, Share
from embedsmith.core.shelf import merge_methods
from embedsmith.core.tokens import TokenBatch
from embedsmith.data import RecordSet
from embedsmith.merge.method import Combine, Job

Backward = tuple[float, int]
"""A backward pass has just left its gradients: the weight of their squares, and how many examples it completes."""
NOISE = 1e-10
"""Mean F of a tensor, relative to that of the model, below which it is squares of float32 rounding errors."""


@merge_methods.register(
    "fisher", formula="sum_i a_i F_i theta_i / sum_i a_i F_i", source="Matena and Raffel 2022 (2111.09832)"
)
@dataclass(frozen=True, kw_only=True)
class Fisher(ProbedMethod):
    """Every weight is the mean of the parents', weighed by how much each parent's loss depends on it.

    `definition`: `isolated`: one query and its own candidates a backward pass. `batch_square`: the square of the
    batch's summed gradient, divided by the number of queries: biased, fast, what other tools do. `embedding`: without
    labels, (grad <e, f(x)>)^2 with e ~ N(0, I), `draws` of them a text.
    `expectation`: of `isolated`: `empirical` takes d = d+; `sampled` draws d from p(d|q), which keeps its signal where
    the model is already right; `exact` sums over all d, weighted by p.
    `temperature`: the temperature t of the parents' own training; F scales with 1/t^2. `batch_size`: queries of a
    `batch_square`.
    `draws`: random directions a text under `embedding`. `floor`: the least F, relative to its tensor's mean; an
    absolute one would be above all of F. `shrink`: the share s in (1 - s) F + s mean(F). `normalise`: every parent's F
    has length 1 as a whole, so that none drowns the others. `seed`: of candidates, draws and directions.
    """

    definition: Literal["isolated", "batch_square", "embedding"] = "isolated"
    expectation: Literal["empirical", "sampled", "exact"] = "sampled"
    temperature: Positive = 0.05
    batch_size: Annotated[int, Range(ge=2)] = 16
    draws: Count = 1
    floor: NotNegative = 1e-3
    shrink: Share = 0.1
    normalise: bool = True
    seed: int = 0

    def prepare(self, job: Job) -> Combine:
        live = self.live(job)
        sets = self.probe.of_parents(live.parents)
        hashes = [] if job.cache is None else [parent.content_hash for parent in job.parents]
        fishers = self.of_parents(live, sets, job.cache, hashes)
        delta, at_floor, effective = self.merge(live.deltas, fishers, job.weight_M.tolist())
        job.report["fisher"] = {
            "effective_parents": effective,
            "below_the_floor": live.by_parent(at_floor),
            "texts": live.texts,
        }
        log.info("fisher: %.2f of %d parents count", effective, live.parents)
        return combine_deltas(delta, job.weight_M)

    def of_parents(
        self, live: LiveMerge, sets: Sequence[RecordSet], cache: Path | None = None, hashes: Sequence[str] = ()
    ) -> list[dict[str, Tensor]]:
        """F of every parent on its own texts, measured on the parent's own weights.

        With a `cache` folder and the parents' content `hashes`, F is measured once for a parent, its texts and the
        settings, and kept there as fisher-KEY.safetensors with what it was measured from in the header.
        """
        fishers = []
        for parent, records in enumerate(sets):
            measured_from = {} if cache is None else self._measured_from(hashes[parent], records)
            key = hashlib.sha256(repr(sorted(measured_from.items())).encode()).hexdigest()[:32]
            file = None if cache is None else cache / f"fisher-{key}.safetensors"
            if file is not None and file.exists():
                fishers.append({name: tensor.to(live.model.device) for name, tensor in load_file(file).items()})
                continue
            live.place_parent(parent)
            fishers.append(self.measure(live, records))
            if file is not None:
                state = {name: tensor.cpu().contiguous() for name, tensor in fishers[-1].items()}
                write_cache(file, save(state, metadata=measured_from))
        return fishers

    def _measured_from(self, content_hash: str, records: RecordSet) -> dict[str, str]:
        """What F depends on. How it is used (floor, shrink, normalise) is not part of it."""
        texts = repr([(r.query, r.positives, r.negatives) for r in records.records])
        names = ("definition", "expectation", "temperature", "batch_size", "draws", "seed")
        return {
            "model": content_hash,
            "texts": hashlib.sha256(texts.encode()).hexdigest(),
            "negatives": str(self.probe.negatives),
            "max_length": str(self.probe.max_length),
            **{name: str(getattr(self, name)) for name in names},
        }

    def measure(self, live: LiveMerge, records: RecordSet) -> dict[str, Tensor]:
        """F of the live model as it stands, by parameter, in fp32, from a sample of its task.

        In eval mode, with the model's own prompts, pooling and length. Queries and documents both contribute; a tied
        parameter's gradient is summed by autograd and squared once. The distinct backward passes of one example are
        squared separately.
        """
        live.model.eval()
        live.model.zero_grad(set_to_none=True)
        total = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for name, p in live.model.named_parameters()
        }
        generator = torch.Generator().manual_seed(self.seed)
        if self.definition == "embedding":
            texts = distinct_texts(records)
            size, passes = len(texts), self._of_embeddings(live, texts, records.task, generator)
        else:
            lists = frozen_candidates(records, self.probe.negatives, self.seed)
            size = len(lists)
            isolated = self.definition == "isolated"
            passes = (
                self._of_queries(live, lists, records.task, generator)
                if isolated
                else self._of_batches(live, lists, records.task)
            )
        count = 0
        with progress_bar(f"fisher {records.name}", size) as bar:
            for weight, completed in passes:
                for name, parameter in live.model.named_parameters():
                    if parameter.grad is not None:
                        total[name].addcmul_(parameter.grad.to(total[name].dtype), parameter.grad, value=weight)
                        parameter.grad = None
                count += completed
                bar.advance(completed)
        return {name: tensor / max(count, 1) for name, tensor in total.items()}

    def _of_queries(
        self, live: LiveMerge, lists: Sequence[FrozenCandidates], task: str, generator: torch.Generator
    ) -> Iterator[Backward]:
        """`isolated`: log p(d|q) over the query's own candidates, one example."""
        for each in lists:
            query_1D, document_KD = _vectors(live, [each], task)
            log_p_K = F.log_softmax(document_KD @ query_1D[0] / self.temperature, dim=0)
            p_K = log_p_K.detach().exp()
            if self.expectation == "exact":
                for k in range(len(p_K)):
                    log_p_K[k].backward(retain_graph=k + 1 < len(p_K))
                    yield float(p_K[k]), int(k + 1 == len(p_K))
                continue
            sampled = self.expectation == "sampled"
            k = int(torch.multinomial(p_K.float().cpu(), 1, generator=generator)) if sampled else 0
            log_p_K[k].backward()
            yield 1.0, 1

    def _of_batches(self, live: LiveMerge, lists: Sequence[FrozenCandidates], task: str) -> Iterator[Backward]:
        """`batch_square`: (sum_q grad -log p(d+|q))^2 over the documents of the batch, which `measure` divides by the
        number of queries. Another query's document with the same text is no negative."""
        answers = [FrozenCandidates(each.query, each.documents[:1], each.instruction) for each in lists]
        for start in range(0, len(answers), self.batch_size):
            batch = answers[start : start + self.batch_size]
            if len(batch) < 2:  # a query alone with its own document has no loss
                continue
            query_QD, document_QD = _vectors(live, batch, task)
            score_QQ = query_QD @ document_QD.T / self.temperature
            rows = []
            for q, own in enumerate(batch):
                same = [place != q and other.documents == own.documents for place, other in enumerate(batch)]
                score_Q = score_QQ[q].masked_fill(torch.tensor(same, device=score_QQ.device), float("-inf"))
                rows.append(F.log_softmax(score_Q, dim=0)[q])
            (-torch.stack(rows)).sum().backward()
            yield 1.0, len(batch)

    def _of_embeddings(
        self, live: LiveMerge, texts: Sequence[tuple[str, Role]], task: str, generator: torch.Generator
    ) -> Iterator[Backward]:
        """`embedding`: (grad <e, f(x)>)^2 of the vector itself, the mean over `draws` of e."""
        for text, role in texts:
            vector_D = _dense(live, live.model.tokenize([text], role, task))[0]
            for draw in range(self.draws):
                noise_D = torch.randn(len(vector_D), generator=generator).to(vector_D)
                last = draw + 1 == self.draws
                (vector_D @ noise_D).backward(retain_graph=not last)
                yield 1.0 / self.draws, int(last)

    def merge(
        self, deltas: Sequence[Weights], fishers: Sequence[Weights], weights: Sequence[float]
    ) -> tuple[dict[str, Tensor], list[float], float]:
        """V_m = sum_i a_i F_i V_i / sum_i a_i F_i, element by element, F normalised, shrunk and floored.

        Also returns the share of elements whose F was raised, by parent, and how many parents count: the exponential of
        the mean entropy of the weights, 1 where one parent decides alone, M where all count the same.
        """
        scales, noise = [], []
        for fisher in fishers:
            length = math.sqrt(sum(float(tensor.square().sum(dtype=torch.float64)) for tensor in fisher.values()))
            total = sum(float(tensor.sum(dtype=torch.float64)) for tensor in fisher.values())
            scales.append(1 / max(length, 1e-38) if self.normalise else 1.0)
            noise.append(NOISE * scales[-1] * (total / max(sum(tensor.numel() for tensor in fisher.values()), 1)))
        merged: dict[str, Tensor] = {}
        raised = [0] * len(deltas)
        elements, entropy = 0, 0.0
        for name, first in deltas[0].items():
            own = [fisher[name] * scale for fisher, scale in zip(fishers, scales, strict=True)]
            used, counts = self._floored(own, noise)
            raised = [before + count for before, count in zip(raised, counts, strict=True)]
            share_M = torch.stack([weight * value for weight, value in zip(weights, used, strict=True)])
            share_M = share_M / share_M.sum(0)
            merged[name] = sum((share_M[i] * delta[name] for i, delta in enumerate(deltas)), torch.zeros_like(first))
            entropy += float(torch.special.entr(share_M).sum(dtype=torch.float64))
            elements += first.numel()
        return merged, [count / elements for count in raised], math.exp(entropy / elements)

    def _floored(self, fishers: Sequence[Tensor], noise: Sequence[float]) -> tuple[list[Tensor], list[int]]:
        """One tensor's F of all parents, shrunk and floored, and how many elements of each lay below the floor. Where a
        parent's F is rounding noise throughout (a pooler; the bias of keys, which softmax cancels) the parents count by
        their a_i alone."""
        if any(float(fisher.mean()) <= least for fisher, least in zip(fishers, noise, strict=True)):
            return [torch.ones_like(fisher) for fisher in fishers], [fisher.numel() for fisher in fishers]
        used, counts = [], []
        for fisher in fishers:
            mean = fisher.mean()
            used.append(fisher.mul(1 - self.shrink).add_(self.shrink * mean).clamp_min(self.floor * mean))
            counts.append(int((fisher < self.floor * mean).sum()))
        return used, counts


def _vectors(live: LiveMerge, lists: Sequence[FrozenCandidates], task: str) -> tuple[Tensor, Tensor]:
    """query_QD and document_KD of all lists, of length 1; one forward pass for both."""
    role: Role = "query" if task == "sts" else "document"
    own = [each.instruction for each in lists]
    queries = live.model.tokenize([each.query for each in lists], "query", task, own if any(own) else None)
    documents = live.model.tokenize([text for each in lists for text in each.documents], role, task)
    vector_ND = F.normalize(_dense(live, TokenBatch.concatenate([queries, documents])), dim=-1)
    return vector_ND[: len(lists)], vector_ND[len(lists) :]


def _dense(live: LiveMerge, tokens: TokenBatch) -> Tensor:
    dense = live.encode(tokens, ("dense",))["dense"]
    assert isinstance(dense, Dense)
    return in_fp32(dense.vector_ND)
