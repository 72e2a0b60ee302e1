"""What a merge is made of: lengths, angles, sign conflicts, energy by block, what is missing of each parent, a map.

From the Gram matrix of the task vectors and one more pass over the weights; nothing is written but the report.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from embedsmith.core.errors import RecipeError
from embedsmith.core.progress import progress_bar
from embedsmith.merge.merge_plan import Plan
from embedsmith.merge.method import Gram, groups
from embedsmith.merge.methods.formulas import karcher, normalised, order_spread, sequential_slerp
from embedsmith.merge.recipe import Granularity
from embedsmith.merge.stream import blocks

THRESHOLDS = (0.0, 0.5, 1.0)
"""An element takes part in a sign conflict where both vectors are above so many times their own rms."""


@dataclass
class Pass:
    """What the second pass adds up, by tensor name.

    `with_merge` [M]: <V_m, V_i>; `merge_square`: |V_m|^2. `signs` [R, M, M, 2]: elements where both are above the
    threshold, and where their signs differ as well. `mass` [M, M, 2]: sums of the smaller magnitude, alike.
    """

    with_merge: dict[str, Tensor] = field(default_factory=dict)
    merge_square: dict[str, float] = field(default_factory=dict)
    signs: dict[str, Tensor] = field(default_factory=dict)
    mass: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """Everything explained, from which tables and pictures are made. `plan` has a base."""

    names: tuple[str, ...]
    gram: Gram
    seen: Pass
    weight_M: Tensor

    def group_rows(self, granularity: Granularity) -> list[dict[str, Any]]:
        """One row a group: length of every V_i, against theta_0, its share of the energy, frozen share, angles of
        pairs, sign conflict less what the angle lets expect, and the interference of the merge."""
        tensors = list(self.gram.full_by_name)
        whole = self.gram.of(tensors).diagonal()
        return [self._row(key, members, whole) for key, members in groups(tensors, granularity).items()]

    def _row(self, key: str, members: Sequence[str], whole: Tensor) -> dict[str, Any]:
        full = self.gram.full(members)
        gram_MM = full[:-1, :-1]
        size = sum(self.gram.size_by_name[name] for name in members)
        moved_M = torch.stack([self.gram.nonzero_by_name[name] for name in members]).sum(0)
        row: dict[str, Any] = {"group": key, "weights": size}
        for i, name in enumerate(self.names):
            square = float(gram_MM[i, i])
            row[f"norm/{name}"] = math.sqrt(max(square, 0.0))
            row[f"relative/{name}"] = math.sqrt(max(square, 0.0) / max(float(full[-1, -1]), 1e-300))
            row[f"energy/{name}"] = square / max(float(whole[i]), 1e-300)
            row[f"frozen/{name}"] = 1 - int(moved_M[i]) / max(size, 1)
            row[f"missing/{name}"] = self.missing(members)[i]
        for i, j in itertools.combinations(range(len(self.names)), 2):
            label = f"{self.names[i]}|{self.names[j]}"
            row[f"angle/{label}"] = angle(gram_MM, i, j)
            row |= {f"{key_}/{label}": value for key_, value in self.conflict(members, i, j).items()}
        return row

    def missing(self, members: Sequence[str]) -> list[float]:
        """I_i = 1 - <V_m, V_i> / |V_i|^2: 0 where the merge holds all of a parent's move, 1 where nothing. NaN where
        the parent did not move."""
        own = self.gram.of(members).diagonal()
        shared = torch.stack([self.seen.with_merge[name] for name in members]).sum(0)
        return [1 - float(s) / float(k) if float(k) > 0 else float("nan") for s, k in zip(shared, own, strict=True)]

    def outside_span(self) -> float:
        """|V_m - its projection on the span of the V_i| / |V_m|: 0 for coefficient methods."""
        tensors = list(self.gram.full_by_name)
        shared_M = torch.stack([self.seen.with_merge[name] for name in tensors]).sum(0)
        square = sum(self.seen.merge_square.values())
        inside = float(shared_M @ torch.linalg.pinv(self.gram.of(tensors), hermitian=True) @ shared_M)
        return math.sqrt(max(square - inside, 0.0) / square) if square > 0 else 0.0

    def conflict(self, members: Sequence[str], i: int, j: int) -> dict[str, float]:
        """Shares of elements whose signs differ, at each threshold; `conflict_excess`: above what two Gaussian vectors
        of that angle have (angle / pi); `conflict_mass`: weighed by the smaller magnitude."""
        counts = torch.stack([self.seen.signs[name] for name in members]).sum(0)[:, i, j]
        mass = torch.stack([self.seen.mass[name] for name in members]).sum(0)[i, j]
        found = {f"conflict_{r:g}": _ratio(c[1], c[0]) for r, c in zip(THRESHOLDS, counts, strict=True)}
        expected = angle(self.gram.of(members), i, j) / 180
        return found | {"conflict_excess": found["conflict_0"] - expected, "conflict_mass": _ratio(mass[1], mass[0])}

    def effective_tasks(self) -> float:
        """Participation ratio of the eigenvalues of the cosine matrix: how many independent directions there are."""
        value = torch.linalg.eigvalsh(cosines(self.gram.of(list(self.gram.full_by_name)))).clamp_min(0)
        return float(value.sum() ** 2 / value.square().sum())

    def order_spread(self) -> dict[str, float]:
        """Degrees between sequential SLERPs of the parents in different orders, for both accumulations."""
        gram_MM = self.gram.of(list(self.gram.full_by_name))
        return {how: order_spread(gram_MM, self.weight_M, how) for how in ("sum", "mean")}

    def positions(self) -> dict[str, tuple[float, float]]:
        """Classical multidimensional scaling of the base, the parents, this merge and three others to a plane."""
        tensors = list(self.gram.full_by_name)
        gram_MM = self.gram.of(tensors)
        shared_M = torch.stack([self.seen.with_merge[name] for name in tensors]).sum(0)
        square = torch.tensor([[sum(self.seen.merge_square.values())]], dtype=torch.float64)
        inner = torch.cat([torch.cat([gram_MM, shared_M[:, None]], 1), torch.cat([shared_M[None], square], 1)])
        ways = {
            "average": normalised(self.weight_M),
            "slerp": sequential_slerp(gram_MM, self.weight_M, on_antipodal="linear"),
            "karcher": karcher(gram_MM, self.weight_M),
        }
        place = torch.zeros(1 + len(inner) + len(ways), len(inner), dtype=torch.float64)
        place[1 : 1 + len(inner)] = torch.eye(len(inner), dtype=torch.float64)
        place[1 + len(inner) :, :-1] = torch.stack(list(ways.values()))
        labels = ["base", *self.names, "this merge", *ways]
        return dict(zip(labels, map_of(place @ inner @ place.T), strict=True))


def explain(plan: Plan) -> Facts:
    """Measure a planned merge. Errors: `RecipeError` without a base: there are no task vectors then."""
    if plan.base is None:
        raise RecipeError("there are no task vectors to explain without a base", where="base", fix="set base")
    names = tuple(name for _, own in plan.by_method for name in own)
    job = plan.job(names)
    return Facts(tuple(p.id for p in plan.parents), job.gram, _second_pass(plan, job.gram), plan.weight_M)


def _second_pass(plan: Plan, gram: Gram) -> Pass:
    assert plan.base is not None, "checked by explain"
    found = Pass()
    total = sum(gram.size_by_name.values())
    with progress_bar("explaining", total) as bar:
        for method, names in plan.by_method:
            combine = method.prepare(plan.job(names))
            for block in blocks(plan.parents, plan.base, names, by_rows=method.by_rows):
                assert block.base_E is not None
                delta_ME = block.delta_ME.double()
                merged_E = combine(block).double() - block.base_E.double()
                _add(found.with_merge, block.name, delta_ME @ merged_E)
                found.merge_square[block.name] = found.merge_square.get(block.name, 0.0) + float(merged_E @ merged_E)
                full = gram.full_by_name[block.name]
                rms_M = (full.diagonal()[:-1].clamp_min(0) / plan.base.size(block.name)).sqrt()
                _add(found.signs, block.name, sign_counts(delta_ME, rms_M))
                _add(found.mass, block.name, sign_mass(delta_ME))
                bar.advance(block.stop - block.start)
    return found


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def sign_counts(delta_ME: Tensor, rms_M: Tensor) -> Tensor:
    """[R, M, M, 2] for R thresholds: elements where both are above the threshold times their rms (and not 0), and of
    those the ones with different signs."""
    rows = []
    for r in THRESHOLDS:
        sign_ME = torch.where(delta_ME.abs() > r * rms_M[:, None], delta_ME.sign(), torch.zeros_like(delta_ME))
        both_MM = sign_ME.abs() @ sign_ME.abs().T
        rows.append(torch.stack([both_MM, (both_MM - sign_ME @ sign_ME.T) / 2], -1))
    return torch.stack(rows)


def sign_mass(delta_ME: Tensor) -> Tensor:
    """[M, M, 2]: sum of min(|a|, |b|), and of those elements whose signs differ."""
    count = len(delta_ME)
    found = torch.zeros(count, count, 2, dtype=torch.float64)
    for i, j in itertools.combinations(range(count), 2):
        least_E = torch.minimum(delta_ME[i].abs(), delta_ME[j].abs())
        both = torch.stack([least_E.sum(), least_E[delta_ME[i] * delta_ME[j] < 0].sum()])
        found[i, j] = found[j, i] = both
    return found


def cosines(gram_MM: Tensor) -> Tensor:
    """cos(V_i, V_j); 0 with a vector of length zero, 1 with itself."""
    length_M = gram_MM.diagonal().clamp_min(0).sqrt()
    scale_MM = length_M[:, None] * length_M[None, :]
    cosine_MM = torch.where(scale_MM > 0, gram_MM / scale_MM.clamp_min(1e-300), torch.zeros_like(gram_MM))
    return cosine_MM.clamp(-1, 1).fill_diagonal_(1.0)


def angle(gram_MM: Tensor, i: int, j: int) -> float:
    """Degrees between two task vectors; 90 where one is zero."""
    return math.degrees(math.acos(float(cosines(gram_MM)[i, j])))


def map_of(inner: Tensor) -> list[tuple[float, float]]:
    """Points in the plane whose distances are as near to those of the inner products as a linear map allows."""
    square = inner.diagonal()[:, None] + inner.diagonal()[None, :] - 2 * inner
    centred = torch.eye(len(inner), dtype=torch.float64) - 1 / len(inner)
    value, vector = torch.linalg.eigh(-0.5 * centred @ square @ centred)
    place = vector[:, -2:].flip(-1) * value[-2:].flip(-1).clamp_min(0).sqrt()
    return [(float(x), float(y)) for x, y in place]


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part) / float(whole) if float(whole) > 0 else float("nan")
