"""A merge written as a LoRA adapter on its base: the sum of adapters in their factors, or the best one of a rank.

    sum_i c_i s_i B_i A_i = [c_1 s_1 B_1 | c_2 s_2 B_2 ...] [A_1; A_2; ...]

Adapters are summed without ever being dense: the product above is exact, at the sum of their ranks, and cut to a rank
by QR of both factors and a singular value decomposition of the small core. Whatever else (whole parents, element
methods) is cut from the dense V_m, matrix by matrix. Averaging A and B apart would be wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from embedsmith.core.errors import RecipeError
from embedsmith.core.progress import log, progress_bar
from embedsmith.merge.lora_parent import CONFIG, WEIGHTS, LowRank
from embedsmith.merge.merge_plan import Plan
from embedsmith.merge.method import Combine, Job
from embedsmith.merge.methods.coefficient import CoefficientMethod
from embedsmith.merge.parents import Parent, Weights
from embedsmith.models.backbone import skeleton
from embedsmith.models.folder import write_json

_DENSE_SVD = 2048
"""The shorter side up to which all singular values are computed; above, the leading ones by a randomised range."""


Pair = tuple[Tensor, Tensor] | None
"""A parent's factors over the base's weight; `None` where the parent has the base's own."""


@dataclass(frozen=True)
class Factors:
    """V_m of one matrix, about left_RK right_KC; `energy`: its share of |V_m|^2."""

    left_RK: Tensor
    right_KC: Tensor
    energy: float

    @classmethod
    def summed(cls, pairs: Sequence[Pair], coef_M: Tensor, rank: int | None) -> Self | None:
        """sum_i c_i left_i right_i in factors, cut to `rank`; `None` where nothing moved."""
        moved = [(float(c), pair) for c, pair in zip(coef_M, pairs, strict=True) if pair is not None and c]
        if not moved:
            return None
        left_RK = torch.cat([c * left for c, (left, _) in moved], 1).double()
        right_KC = torch.cat([right for _, (_, right) in moved], 0).double()
        out, core_l = torch.linalg.qr(left_RK)
        back, core_r = torch.linalg.qr(right_KC.T)
        u, s, v = torch.linalg.svd(core_l @ core_r.T)
        return cls._leading(out @ u, s, v @ back.T, rank, float(s.square().sum()))

    @classmethod
    def of_dense(cls, delta_RC: Tensor, rank: int | None, name: str) -> Self | None:
        """The nearest matrix of `rank` to V_m; `None` where nothing moved. Errors: `RecipeError` without a rank."""
        whole = float(delta_RC.square().sum())
        if whole == 0:
            return None
        if rank is None:
            raise RecipeError(
                f"{name} is no sum of adapters, so an adapter cannot hold it exactly",
                where="adapter",
                fix="set adapter.rank",
            )
        if min(delta_RC.shape) <= _DENSE_SVD:
            u, s, v = torch.linalg.svd(delta_RC, full_matrices=False)
            return cls._leading(u, s, v, rank, whole)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(delta_RC, q=min(rank + 8, *delta_RC.shape), niter=4)
        return cls._leading(u, s, v.T, rank, whole)

    @classmethod
    def _leading(cls, left: Tensor, s: Tensor, right: Tensor, rank: int | None, whole: float) -> Self:
        """The leading `rank` directions, without those that are 0, their size shared between both sides."""
        count = max(1, int((s > 1e-12 * s[0]).sum()))
        count = count if rank is None else min(rank, count)
        root = s[:count].sqrt()
        return cls(left[:, :count] * root, root[:, None] * right[:count], float(s[:count].square().sum()) / whole)


@dataclass(frozen=True)
class MergedAdapter:
    """Factors by canonical name, on the base. `left_out`: share of the merge's |V_m|^2 in weights that LoRA has no
    place for. `tables`: the names whose weights are a table's. `facts`: the methods' report."""

    base: Parent
    by_name: Mapping[str, Factors]
    left_out: float
    tables: frozenset[str]
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, plan: Plan, rank: int | None) -> Self:
        """A merge as factors of at most `rank` (`None`: exact, which only sums of adapters are).

        Errors: `RecipeError` without a base, for heads beside the encoder, and for a missing rank.
        """
        outside = [name for name in plan.names if not name.startswith("backbone.")]
        if plan.base is None:
            raise RecipeError("an adapter lies on a base, and the merge has none", where="adapter", fix="set base")
        if outside:
            fix = "write the merge as a whole: leave adapter out"
            raise RecipeError(f"{outside[0]} lies beside the encoder; an adapter holds the encoder's changes", fix=fix)
        modules = dict(skeleton(plan.like.facts.backbone, plan.recipe.trust_remote_code).named_modules())
        found: dict[str, Factors] = {}
        facts: dict[str, Any] = {}
        kinds: dict[str, type] = {}
        lost = 0.0
        with progress_bar("factors", sum(len(names) for _, names in plan.by_method)) as bar:
            for method, names in plan.by_method:
                job = plan.job(names)
                summed = isinstance(method, CoefficientMethod) and method.of == "task_vectors"
                coefficients = method.by_name(job) if isinstance(method, CoefficientMethod) and summed else {}
                combine = method.prepare(job)
                for name in names:
                    kinds[name] = type(modules.get(_module(name))) if name.endswith(".weight") else object
                    pairs = _pairs(plan.parents, plan.base.tensors[name], name) if name in coefficients else None
                    if pairs is not None:
                        factors = Factors.summed(pairs, coefficients[name], rank)
                    else:
                        dense = _dense(job, name, combine, method.by_rows)
                        fits = issubclass(kinds[name], nn.Linear | nn.Embedding)
                        factors = Factors.of_dense(dense, rank, name) if fits else None
                        lost += 0.0 if fits else float(dense.square().sum())
                    found |= {} if factors is None else {name: factors}
                    bar.advance()
                for key, value in job.report.items():
                    facts.setdefault(key, {}).update(value)
        kept = sum(float(((f.left_RK.T @ f.left_RK) * (f.right_KC @ f.right_KC.T)).sum()) for f in found.values())
        left_out = lost / (lost + kept) if lost else 0.0
        if left_out > 0:
            log.warning("%.2f %% of the merge lies in weights that an adapter has no place for", 100 * left_out)
        tables = frozenset(name for name in found if issubclass(kinds[name], nn.Embedding))
        return cls(plan.base, found, left_out, tables, facts)

    def report(self) -> dict[str, Any]:
        ranks = {name: found.left_RK.shape[1] for name, found in self.by_name.items()}
        energy = {name: found.energy for name, found in self.by_name.items()}
        return {**self.facts, "adapter": {"rank": ranks, "energy": energy, "left_out": self.left_out}}

    def write(self, folder: Path) -> None:
        """peft's two files: scale 1 in every module, and each module's own rank."""
        state: dict[str, Tensor] = {}
        for name, factors in self.by_name.items():
            left, right = factors.left_RK.float(), factors.right_KC.float()
            key = f"base_model.model.{_module(name)}."
            if name in self.tables:
                state |= {f"{key}lora_embedding_A": left.T.contiguous(), f"{key}lora_embedding_B": right.T.contiguous()}
            else:
                state |= {f"{key}lora_A.weight": right.contiguous(), f"{key}lora_B.weight": left.contiguous()}
        ranks = {_module(name): factors.left_RK.shape[1] for name, factors in self.by_name.items()}
        most = max(ranks.values(), default=1)
        config = {
            "peft_type": "LORA",
            "task_type": "FEATURE_EXTRACTION",
            "base_model_name_or_path": str(self.base.folder),
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
        write_json(folder / CONFIG, config)


def _module(name: str) -> str:
    """`backbone.encoder.layer.0.output.dense.weight` to the encoder's own name of the module."""
    return name.removeprefix("backbone.").removesuffix(".weight")


def _pairs(parents: Sequence[Parent], own: Weights, name: str) -> list[Pair] | None:
    """Each parent's factors over the base's weight; nothing where a parent is more than the base with an adapter."""
    found: list[Pair] = []
    for weights in (parent.tensors[name] for parent in parents):
        if weights == own:
            found.append(None)
        elif isinstance(weights, LowRank) and weights.magnitude_R is None and weights.whole == own:
            found.append((weights.left_RK, weights.right_KC))
        else:
            return None
    return found


def _dense(job: Job, name: str, combine: Combine, by_rows: bool) -> Tensor:
    """V_m of one tensor in its shape, float64."""
    parts = []
    for block in job.blocks((name,), by_rows):
        assert block.base_E is not None
        parts.append(combine(block).double() - block.base_E.double())
    shape = job.parents[0].tensors[name].shape
    return torch.cat(parts).view(shape) if parts else torch.zeros(shape, dtype=torch.float64)
