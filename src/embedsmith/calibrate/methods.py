"""Merging methods that read data, as recipe values. Each opens the models as one live model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from embedsmith.calibrate.cocktail import CocktailConfig, cocktail_weights
from embedsmith.calibrate.fisher import FisherConfig, fisher_of_parents, merge_by_fisher
from embedsmith.calibrate.live import LiveMerge, Probe, open_live
from embedsmith.calibrate.matching import MatchBatches, Objective
from embedsmith.calibrate.positioning import Positioned, PositioningConfig, ProbeBatches, self_position
from embedsmith.calibrate.regmean import RegMeanConfig, merge_by_regmean
from embedsmith.core.progress import log
from embedsmith.core.shelf import merge_methods
from embedsmith.merge.method import Base, Combine, Job, combine_coefficients
from embedsmith.merge.recipe import Granularity
from embedsmith.merge.stream import Block


@merge_methods.register(
    "fisher", formula="sum_i a_i F_i theta_i / sum_i a_i F_i", source="Matena and Raffel 2022 (2111.09832)"
)
@dataclass(frozen=True, kw_only=True)
class Fisher(FisherConfig):
    """Every weight is the mean of the parents', weighed by how much each parent's loss depends on it."""

    base: ClassVar[Base] = "optional"
    by_rows: ClassVar[bool] = False

    probe: Probe

    def prepare(self, job: Job) -> Combine:
        live = open_live(job.parents, job.base)
        sets = self.probe.of_parents(live.parents)
        hashes = [parent.content_hash for parent in job.parents] if job.cache is not None else None
        fishers = fisher_of_parents(live, sets, self, self.probe.negatives, job.cache, hashes)
        merged = merge_by_fisher(live.deltas, fishers, job.weight_M.tolist(), self)
        job.report["fisher"] = {
            "effective_parents": merged.effective_parents,
            "below_the_floor": dict(zip(live.names, merged.at_floor, strict=True)),
            "texts": live.cost.texts,
        }
        log.info("fisher: %.2f of %d parents count", merged.effective_parents, live.parents)
        return combine_deltas(merged.delta, job.weight_M)


@merge_methods.register(
    "regmean", formula="(sum_i a_i G_i + rho I)^-1 (sum_i a_i G_i W_i^T + rho Wbar^T)", source="2212.09849, 2508.03121"
)
@dataclass(frozen=True, kw_only=True)
class RegMean(RegMeanConfig):
    """Linear layers that keep each parent's outputs on its own texts, in closed form; the rest is averaged."""

    base: ClassVar[Base] = "optional"
    by_rows: ClassVar[bool] = False

    probe: Probe

    def prepare(self, job: Job) -> Combine:
        live = open_live(job.parents, job.base)
        delta = merge_by_regmean(live, self.probe.of_parents(live.parents), job.weight_M.tolist(), self)
        job.report["regmean"] = {"texts": live.cost.texts}
        return combine_deltas(delta, job.weight_M)


@merge_methods.register(
    "self_positioning",
    formula="min over a, lambda: mean task loss(theta_0 + lambda U(a)) + mu lambda",
    source="2410.15035; optimiser settings are our own",
)
@dataclass(frozen=True, kw_only=True)
class SelfPositioning(PositioningConfig):
    """Direction and length of the merge by gradient descent on a small probe set. The job's weights are not used."""

    base: ClassVar[Base] = "needed"
    by_rows: ClassVar[bool] = False

    probe: Probe

    def prepare(self, job: Job) -> Combine:
        live = open_live(job.parents, job.base, granularity=_granularity(job, self))
        batches = ProbeBatches.of(live, self.probe.sources, self.probe.read(), self)
        found = _told("self_positioning", live, self_position(live, batches, self), job)
        return combine_coefficients(by_name(live, found.coefficient_GM, job))


@merge_methods.register(
    "parent_matching",
    formula="min over a, lambda: mean_i |cos_merged - cos_i|^2 on parent i's texts",
    source="embedsmith",
)
@dataclass(frozen=True, kw_only=True)
class ParentMatching(PositioningConfig):
    """Direction and length so that the merge sees each parent's texts as that parent does; reads no label.

    Squared differences of cosines between parents of one base are small, and so is the default `mu`. At 0 the length
    runs away.
    """

    base: ClassVar[Base] = "needed"
    by_rows: ClassVar[bool] = False

    probe: Probe
    objective: Objective = "similarity"
    mu: float = 1e-4

    def prepare(self, job: Job) -> Combine:
        live = open_live(job.parents, job.base, granularity=_granularity(job, self))
        batches = MatchBatches.match(live, self.probe.of_parents(live.parents), self, self.objective)
        found = _told("parent_matching", live, self_position(live, batches, self), job)
        return combine_coefficients(by_name(live, found.coefficient_GM, job))


@merge_methods.register("lm_cocktail", formula="w = softmax(-L_i / T)", source="LM-Cocktail (2311.13534)")
@dataclass(frozen=True, kw_only=True)
class LMCocktail(CocktailConfig):
    """The parents' mean, weighed by their losses on a few examples of the task at hand."""

    base: ClassVar[Base] = "optional"
    by_rows: ClassVar[bool] = False

    probe: Probe

    def prepare(self, job: Job) -> Combine:
        live = open_live(job.parents, job.base)
        batches = ProbeBatches.whole(live, self.probe.sources, self.probe.read(), self.batch_size, self.probe.seed)
        found = cocktail_weights(live, batches, self)
        job.report["lm_cocktail"] = {
            "losses": dict(zip(live.names, found.losses, strict=True)),
            "weights_at_temperature": {f"{t:g}": list(weights) for t, weights in found.at_temperature.items()},
            "texts": live.cost.texts,
        }
        return combine_coefficients(by_name(live, found.weight_M[None], job))


def _granularity(job: Job, config: PositioningConfig) -> Granularity:
    return "block" if config.per_block and job.granularity == "model" else job.granularity


def _told(name: str, live: LiveMerge, found: Positioned, job: Job) -> Positioned:
    """Say where it ended, in the log and in merge.json; a bound that was reached is a red flag."""
    job.report[name] = {
        "weights": dict(zip(live.names, found.weights, strict=True)),
        "length": found.length,
        "held_out": found.objective,
        "gap": found.gap,
        "texts": live.cost.texts,
        "trajectory": found.trajectory,
    }
    log.info(
        "%s: weights %s, length %.3f, held-out objective %.4f, %d texts encoded",
        name,
        _listed(live, found.weights),
        found.length,
        found.objective,
        live.cost.texts,
    )
    if found.at_bound:
        log.warning("%s: the length ended at its bound: raise mu, or take a probe closer to the use", name)
    return found


def _listed(live: LiveMerge, weights: tuple[float, ...]) -> str:
    return ", ".join(f"{name} {weight:.3f}" for name, weight in zip(live.names, weights, strict=True))


def by_name(live: LiveMerge, coefficient_GM: Tensor, job: Job) -> dict[str, Tensor]:
    """c_M of every tensor of the job, also noted in merge.json. A tensor that the live model has not gets the mean
    over the groups."""
    job.report["coefficients"] = dict(zip(live.group_names, coefficient_GM.tolist(), strict=False))
    mean_M = coefficient_GM.mean(0)
    return {name: coefficient_GM[live.groups[name]] if name in live.groups else mean_M for name in job.names}


def combine_deltas(delta: Mapping[str, Tensor], weight_M: Tensor) -> Combine:
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
