"""Steps of two parts: retrieval and similarity in one optimizer step (Conan's cross-GPU batch balance)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from embedsmith.core.collectives import rank, world_size
from embedsmith.core.errors import RecipeError
from embedsmith.losses import balance_weights
from embedsmith.train.config import Balance
from embedsmith.train.feed import Lane
from embedsmith.train.supply import Planner, Supply


def balanced_lanes(balance: Balance, supplies: Sequence[Supply], plan_of: Planner) -> tuple[list[Lane], int]:
    """This rank's lanes, and the steps of an epoch (those of the retrieval sources; similarity is cycled).

    Errors: `RecipeError` without a source of each kind, or with too few ranks to split.
    """
    retrieval = [supply for supply in supplies if not supply.in_pairs]
    sts = [supply for supply in supplies if supply.in_pairs]
    if not retrieval or not sts:
        raise RecipeError("train.balance needs a retrieval source and a source of scored pairs", where="data")
    world, me = world_size(), rank()
    if balance.mode == "balanced":
        weight, beta = balance_weights("balanced", world, world, balance.beta)
        shared = 1 if balance.spread_negatives else world
        plan = plan_of(retrieval, shared)
        lanes = [
            Lane(retrieval, plan, me, world, weight, spread=balance.spread_negatives),
            Lane(sts, plan_of(sts, world), me, world, beta),
        ]
        return lanes, plan.steps_per_epoch
    first_sts = world - balance.sts_ranks
    weight, beta = balance_weights("split", first_sts, balance.sts_ranks, balance.beta)
    groups = [dist.new_group(list(ranks)) for ranks in (range(first_sts), range(first_sts, world))]
    plan = plan_of(retrieval, first_sts)
    if me < first_sts:
        lane = Lane(retrieval, plan, me, first_sts, weight, groups[0])
    else:
        lane = Lane(sts, plan_of(sts, balance.sts_ranks), me - first_sts, balance.sts_ranks, beta, groups[1])
    return [lane], plan.steps_per_epoch
