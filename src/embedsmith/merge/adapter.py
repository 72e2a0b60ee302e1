"""A merge written as a LoRA adapter on its base: the sum of adapters in their factors, or the best one of a rank.

    sum_i c_i s_i B_i A_i = [c_1 s_1 B_1 | c_2 s_2 B_2 ...] [A_1; A_2; ...]

Adapters are summed without ever being dense: the product above is exact, at the sum of their ranks, and cut to a rank
by QR of both factors and a singular value decomposition of the small core. Whatever else (whole parents, element
methods) is cut from the dense V_m, matrix by matrix. Averaging A and B apart would be wrong.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from embedsmith.core.errors import RecipeError
from embedsmith.core.progress import progress_bar
from embedsmith.merge.lora_parent import CONFIG, WEIGHTS, LowRank
from embedsmith.merge.merge_plan import Plan
from embedsmith.merge.method import Combine, Job
from embedsmith.merge.methods.coefficient import CoefficientMethod
from embedsmith.merge.stream import blocks
from embedsmith.models.backbone import skeleton

_DENSE_SVD = 2048
"""The shorter side up to which all singular values are computed; above, the leading ones by a randomised range."""


@dataclass(frozen=True)
class Factors:
    """V_m of one matrix, about left_RK right_KC; `energy`: its share of |V_m|^2."""

    left_RK: Tensor
    right_KC: Tensor
    energy: float


@dataclass(frozen=True)
class Extracted:
    """Factors by canonical name; `left_out`: share of the merge's |V_m|^2 in weights that LoRA has no place for."""

    by_name: Mapping[str, Factors]
    left_out: float

    def report(self) -> dict[str, Any]:
        return {
            "rank": {name: found.left_RK.shape[1] for name, found in self.by_name.items()},
            "energy": {name: found.energy for name, found in self.by_name.items()},
            "left_out": self.left_out,
        }


def extract(plan: Plan, rank: int | None) -> tuple[Extracted, dict[str, Any]]:
    """The merge as factors of at most `rank` (`None`: exact, which only sums of adapters are), and the methods' report.

    Errors: `RecipeError` without a base, for heads beside the encoder, and for a missing rank.
    """
    outside = [name for name in plan.names if not name.startswith("backbone.")]
    if plan.base is None:
        raise RecipeError("an adapter lies on a base, and the merge has none", where="adapter", fix="set base")
    if outside:
        fix = "write the merge as a whole: leave adapter out"
        raise RecipeError(f"{outside[0]} lies beside the encoder; an adapter holds the encoder's changes", fix=fix)
    found: dict[str, Factors] = {}
    lost = 0.0
    facts: dict[str, Any] = {}
    with progress_bar("factors", sum(len(names) for _, names in plan.by_method)) as bar:
        for method, names in plan.by_method:
            job = plan.job(names)
            summable = isinstance(method, CoefficientMethod)
            pairs = {name: own for name in names if summable and (own := factor_pairs(plan, name)) is not None}
            coefficients = method.by_name(job) if isinstance(method, CoefficientMethod) else {}
            combine = method.prepare(job)
            fits = _matrices(plan, names)
            for name in names:
                if name in pairs:
                    factors = summed(pairs[name], coefficients[name], rank)
                else:
                    dense = merged_delta(job, name, combine, method.by_rows)
                    factors = cut(dense, rank, name) if name in fits else None
                    lost += 0.0 if name in fits else float(dense.square().sum())
                if factors is not None:
                    found[name] = factors
                bar.advance()
            for key, value in job.report.items():
                facts.setdefault(key, {}).update(value)
    kept = sum(float(((f.left_RK.T @ f.left_RK) * (f.right_KC @ f.right_KC.T)).sum()) for f in found.values())
    return Extracted(found, lost / (lost + kept) if lost else 0.0), facts


def merged_delta(job: Job, name: str, combine: Combine, by_rows: bool) -> Tensor:
    """V_m of one tensor in its shape, float64."""
    parts = []
    for block in blocks(job.parents, job.base, (name,), size=job.block, by_rows=by_rows):
        assert block.base_E is not None
        parts.append(combine(block).double() - block.base_E.double())
    shape = job.parents[0].tensors[name].shape
    return torch.cat(parts).view(shape) if parts else torch.zeros(shape, dtype=torch.float64)


def _matrices(plan: Plan, names: Sequence[str]) -> dict[str, nn.Module]:
    """The weights LoRA has a place for: those of linear layers and of tables."""
    kinds = dict(skeleton(plan.like.facts.backbone, plan.recipe.trust_remote_code).named_modules())
    modules = {name: kinds.get(module_of(name)) for name in names if name.endswith(".weight")}
    return {name: module for name, module in modules.items() if isinstance(module, nn.Linear | nn.Embedding)}


def module_of(name: str) -> str:
    """`backbone.encoder.layer.0.output.dense.weight` to the encoder's own name of the module."""
    return name.removeprefix("backbone.").removesuffix(".weight")


Pair = tuple[Tensor, Tensor] | None
"""A parent's factors over the base's weight; `None` where the parent has the base's own."""


def factor_pairs(plan: Plan, name: str) -> list[Pair] | None:
    """Each parent's factors; nothing where a parent is more than the base with an adapter."""
    assert plan.base is not None
    own = plan.base.tensors[name]
    found: list[Pair] = []
    for parent in plan.parents:
        weights = parent.tensors[name]
        if weights == own:
            found.append(None)
        elif isinstance(weights, LowRank) and weights.magnitude_R is None and weights.whole == own:
            found.append((weights.left_RK, weights.right_KC))
        else:
            return None
    return found


def summed(pairs: Sequence[Pair], coef_M: Tensor, rank: int | None) -> Factors | None:
    """sum_i c_i left_i right_i in factors, cut to `rank`; `None` where nothing moved."""
    moved = [(float(c), pair) for c, pair in zip(coef_M, pairs, strict=True) if pair is not None and c]
    if not moved:
        return None
    left_RK = torch.cat([c * left for c, (left, _) in moved], 1).double()
    right_KC = torch.cat([right for _, (_, right) in moved], 0).double()
    out, core_l = torch.linalg.qr(left_RK)
    back, core_r = torch.linalg.qr(right_KC.T)
    u, s, v = torch.linalg.svd(core_l @ core_r.T)
    return _kept(out @ u, s, v @ back.T, rank, float(s.square().sum()))


def cut(delta_RC: Tensor, rank: int | None, name: str) -> Factors | None:
    """The nearest matrix of `rank` to a dense V_m; `None` where nothing moved. Errors: `RecipeError` without a rank."""
    whole = float(delta_RC.square().sum())
    if whole == 0:
        return None
    if rank is None:
        fix = "set adapter.rank"
        raise RecipeError(
            f"{name} is no sum of adapters, so an adapter cannot hold it exactly", where="adapter", fix=fix
        )
    if min(delta_RC.shape) <= _DENSE_SVD:
        u, s, v = torch.linalg.svd(delta_RC, full_matrices=False)
        return _kept(u, s, v, rank, whole)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(delta_RC, q=min(rank + 8, *delta_RC.shape), niter=4)
    return _kept(u, s, v.T, rank, whole)


def _kept(left: Tensor, s: Tensor, right: Tensor, rank: int | None, whole: float) -> Factors:
    """The leading `rank` directions, without those that are 0, their size shared between both sides."""
    count = max(1, int((s > 1e-12 * s[0]).sum()))
    count = count if rank is None else min(rank, count)
    root = s[:count].sqrt()
    return Factors(left[:, :count] * root, root[:, None] * right[:count], float(s[:count].square().sum()) / whole)


def write_adapter(found: Extracted, plan: Plan, folder: Path) -> None:
    """peft's two files: scale 1 in every module, and each module's own rank."""
    assert plan.base is not None
    kinds = _matrices(plan, list(found.by_name))
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, factors in found.by_name.items():
        module = module_of(name)
        ranks[module] = factors.left_RK.shape[1]
        left, right = factors.left_RK.float(), factors.right_KC.float()
        key = f"base_model.model.{module}."
        if isinstance(kinds[name], nn.Embedding):
            state |= {f"{key}lora_embedding_A": left.T.contiguous(), f"{key}lora_embedding_B": right.T.contiguous()}
        else:
            state |= {f"{key}lora_A.weight": right.contiguous(), f"{key}lora_B.weight": left.contiguous()}
    most = max(ranks.values(), default=1)
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": str(plan.base.folder),
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted(ranks),
    }
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
