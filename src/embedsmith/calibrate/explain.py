"""What a merge is made of: lengths, angles, sign conflicts, energy by block, what is missing of each parent, a map.

From the Gram matrix of the task vectors and one more pass over the weights; nothing is written but the report:
explain.json, groups.csv, and explain.html to look at.
"""

import csv
import html
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from embedsmith.calibrate.live_model import LiveMerge, cosines
from embedsmith.calibrate.probe import Probe, TaskBatches
from embedsmith.core.errors import RecipeError
from embedsmith.core.files import atomic_file
from embedsmith.core.outputs import claimed, refuse_foreign_file
from embedsmith.core.progress import progress_bar
from embedsmith.merge.merge_plan import Plan, make_plan
from embedsmith.merge.method import Gram, groups
from embedsmith.merge.methods.formulas import karcher, normalised, order_spread, sequential_slerp
from embedsmith.merge.recipe import Granularity, MergeRecipe
from embedsmith.report.page import PAGE_MARK, Section, chart, finite, page, table

THRESHOLDS = (0.0, 0.5, 1.0)
"""An element takes part in a sign conflict where both vectors are above so many times their own rms."""
BATCH = 32
"""Examples of each task in one batch."""
LENGTHS = tuple(round(0.2 * step, 1) for step in range(9))


@dataclass
class Facts:
    """Everything explained, from which tables and pictures are made.

    By tensor name: `with_merge` [M]: <V_m, V_i>; `merge_square`: |V_m|^2. `signs` [R, M, M, 2]: elements where both
    are above the threshold, and where their signs differ as well. `mass` [M, M, 2]: sums of the smaller magnitude,
    alike.
    """

    names: tuple[str, ...]
    gram: Gram
    weight_M: Tensor
    with_merge: dict[str, Tensor] = field(default_factory=dict)
    merge_square: dict[str, float] = field(default_factory=dict)
    signs: dict[str, Tensor] = field(default_factory=dict)
    mass: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """Measure a planned merge: from its Gram matrix, and in a second pass over the weights. Errors: `RecipeError`
        without a base, since there are no task vectors then."""
        if plan.base is None:
            raise RecipeError("there are no task vectors to explain without a base", where="base", fix="set base")
        gram = plan.job(tuple(name for _, own in plan.by_method for name in own)).gram
        found = cls(tuple(p.id for p in plan.parents), gram, plan.weight_M)
        with progress_bar("explaining", sum(gram.size_by_name.values())) as bar:
            for method, names in plan.by_method:
                job = plan.job(names)
                combine = method.prepare(job)
                for block in job.blocks(by_rows=method.by_rows):
                    assert block.base_E is not None
                    delta_ME = block.delta_ME.double()
                    found._add(block.name, delta_ME, combine(block).double() - block.base_E.double())
                    bar.advance(block.stop - block.start)
        return found

    def _add(self, name: str, delta_ME: Tensor, merged_E: Tensor) -> None:
        square_M = self.gram.full_by_name[name].diagonal()[:-1].clamp_min(0)
        rms_M = (square_M / self.gram.size_by_name[name]).sqrt()
        self.merge_square[name] = self.merge_square.get(name, 0.0) + float(merged_E @ merged_E)
        own = (delta_ME @ merged_E, sign_counts(delta_ME, rms_M), sign_mass(delta_ME))
        for sums, value in zip((self.with_merge, self.signs, self.mass), own, strict=True):
            sums[name] = sums[name] + value if name in sums else value

    def group_rows(self, granularity: Granularity) -> list[dict[str, Any]]:
        """One row a group: the length of every V_i beside that of theta_0, the group's share of the energy, the share
        of frozen elements, the angles between pairs, the sign conflict beyond what the angle explains, and the
        interference of the merge."""
        tensors = list(self.gram.full_by_name)
        whole = self.gram.of(tensors).diagonal()
        rows = []
        for key, members in groups(tensors, granularity).items():
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
                row[f"angle/{label}"] = math.degrees(math.acos(float(cosines(gram_MM)[i, j])))  # 90 where one is zero
                row |= {f"{key_}/{label}": value for key_, value in self.conflict(members, i, j).items()}
            rows.append(row)
        return rows

    def missing(self, members: Sequence[str]) -> list[float]:
        """I_i = 1 - <V_m, V_i> / |V_i|^2: 0 where the merge holds all of a parent's move, 1 where nothing. NaN where
        the parent did not move."""
        own = self.gram.of(members).diagonal()
        shared = torch.stack([self.with_merge[name] for name in members]).sum(0)
        return [1 - float(s) / float(k) if float(k) > 0 else float("nan") for s, k in zip(shared, own, strict=True)]

    def outside_span(self) -> float:
        """|V_m - its projection on the span of the V_i| / |V_m|: 0 for coefficient methods."""
        tensors = list(self.gram.full_by_name)
        shared_M = torch.stack([self.with_merge[name] for name in tensors]).sum(0)
        square = sum(self.merge_square.values())
        inside = float(shared_M @ torch.linalg.pinv(self.gram.of(tensors), hermitian=True) @ shared_M)
        return math.sqrt(max(square - inside, 0.0) / square) if square > 0 else 0.0

    def conflict(self, members: Sequence[str], i: int, j: int) -> dict[str, float]:
        """Shares of elements whose signs differ, at each threshold; `conflict_excess`: above what two Gaussian vectors
        of that angle have (angle / pi); `conflict_mass`: weighed by the smaller magnitude."""
        counts = torch.stack([self.signs[name] for name in members]).sum(0)[:, i, j]
        mass = torch.stack([self.mass[name] for name in members]).sum(0)[i, j]
        found = {f"conflict_{r:g}": _ratio(c[1], c[0]) for r, c in zip(THRESHOLDS, counts, strict=True)}
        expected = math.degrees(math.acos(float(cosines(self.gram.of(members))[i, j]))) / 180
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
        shared_M = torch.stack([self.with_merge[name] for name in tensors]).sum(0)
        square = torch.tensor([[sum(self.merge_square.values())]], dtype=torch.float64)
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


def map_of(inner: Tensor) -> list[tuple[float, float]]:
    """Points in the plane whose distances are as near to those of the inner products as a linear map allows."""
    square = inner.diagonal()[:, None] + inner.diagonal()[None, :] - 2 * inner
    centred = torch.eye(len(inner), dtype=torch.float64) - 1 / len(inner)
    value, vector = torch.linalg.eigh(-0.5 * centred @ square @ centred)
    place = vector[:, -2:].flip(-1) * value[-2:].flip(-1).clamp_min(0).sqrt()
    return [(float(x), float(y)) for x, y in place]


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part) / float(whole) if float(whole) > 0 else float("nan")


@dataclass(frozen=True)
class Explanation:
    """What the weights say, also as one of the `tables` for each granularity. Where a probe was given, what the losses
    say around the SLERP of the parents: `along` its length, at the `barriers` on the way to it, and by the cosines
    between the tasks' `gradients` at each place."""

    facts: Facts
    tables: dict[str, list[dict[str, Any]]]
    along: list[dict[str, Any]] = field(default_factory=list)
    barriers: list[dict[str, Any]] = field(default_factory=list)
    gradients: dict[str, list[list[float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: MergeRecipe, probe: Probe | None = None) -> Self:
        """Explain the merge that a recipe describes, without writing it. `probe`: texts for losses and gradients."""
        plan = make_plan(recipe)
        facts = Facts.of(plan)
        tables = {key: facts.group_rows(key) for key in ("model", "block", "module", "tensor")}
        if probe is None:
            return cls(facts, tables)
        live = LiveMerge.of(plan.parents, plan.base, max_length=probe.max_length)
        batches = TaskBatches.whole(live, probe.sources, probe.read(), BATCH, 0)
        slerp_M = sequential_slerp(live.gram().sum(0), facts.weight_M, on_antipodal="linear")
        own_GM = slerp_M.expand(len(live.group_names), -1)
        places = {"base": 0 * own_GM, "slerp": own_GM}
        gradients = {name: batches.gradient_cosines(place_GM) for name, place_GM in places.items()}
        return cls(facts, tables, batches.along_length(own_GM, LENGTHS), batches.barriers(own_GM), gradients)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not a number is null."""
        facts = self.facts
        tensors = list(facts.gram.full_by_name)
        plain: dict[str, Any] = {
            "parents": list(facts.names),
            "cosines": cosines(facts.gram.of(tensors)).tolist(),
            "effective_tasks": facts.effective_tasks(),
            "order_spread_degrees": facts.order_spread(),
            "missing": dict(zip(facts.names, facts.missing(tensors), strict=True)),
            "outside_span": facts.outside_span(),
            "map": facts.positions(),
            "groups": self.tables,
        }
        if self.along:
            plain |= {"along_length": self.along, "barriers": self.barriers, "gradient_cosines": self.gradients}
        clean: dict[str, Any] = _clean(plain)
        return clean

    def save(self, folder: str | Path) -> Path:
        """Write explain.json, groups.csv and explain.html. Errors: `MissingExtraError` without plotly."""
        folder = Path(folder)
        text = self.html()
        with atomic_file(folder / "explain.json") as file:
            json.dump(self.as_dict(), file, indent=1)
        rows = [{"granularity": key, **row} for key, own in self.tables.items() for row in own]
        with atomic_file(folder / "groups.csv") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        with atomic_file(folder / "explain.html") as file:
            file.write(text)
        return folder / "explain.html"

    def html(self) -> str:
        """One page with interactive charts. Errors: `MissingExtraError` without plotly."""
        facts = self.facts
        energy = self._bars("energy", "share of |V|^2 in each block")
        missing = self._bars("missing", "1 - <V_m, V_i> / |V_i|^2: 0 keeps all of a parent's move")
        conflict = ""
        if len(facts.names) > 1:
            title = "share of elements that move in opposite directions (0.5 is chance)"
            conflict = self._bars("conflict_0", title) + self._bars("conflict_mass", "weighed by the smaller move")
        sections = [
            _angles(facts),
            _map(facts),
            Section("energy", "Energy by block", energy),
            Section("missing", "What the merge loses of each parent", missing),
            Section("conflict", "Sign conflict", conflict),
            *(self._losses() if self.along else ()),
        ]
        spread = facts.order_spread()
        lines = [
            f"{len(facts.names)} parents that point in {facts.effective_tasks():.2f} independent directions.",
            f"The order of parents turns a sequential SLERP by up to {spread['sum']:.1f} degrees "
            f"({spread['mean']:.1f} with the paper's weights).",
            f"{facts.outside_span():.1%} of the merge lies outside what coefficients of the parents can reach.",
        ]
        return page("Merge explained", ", ".join(facts.names), lines, sections)

    def _bars(self, key: str, title: str) -> str:
        """One figure of every block, a bar a parent or a pair of them."""
        rows = self.tables["block"]
        columns = [column for column in rows[0] if column.startswith(f"{key}/")]
        groups = [row["group"].removeprefix("backbone.") for row in rows]
        data = [
            {"type": "bar", "name": column.partition("/")[2], "x": groups, "y": finite([row[column] for row in rows])}
            for column in columns
        ]
        return chart(data, title=title)

    def _losses(self) -> list[Section]:
        x, tasks = [row["length"] for row in self.along], [name for name in self.along[0] if name != "length"]
        lines = [{"type": "scatter", "name": t, "x": x, "y": finite([row[t] for row in self.along])} for t in tasks]
        body = chart(lines, title="loss along the length of the SLERP", x="lambda", y="loss")
        cells = [[html.escape(r["parent"]), html.escape(r["task"]), f"{r['barrier']:.4f}"] for r in self.barriers]
        body += table(["from parent", "task", "barrier to the merge"], cells, numbers_from=2)
        heat = "".join(
            chart(
                [{"type": "heatmap", "z": rows, "x": tasks, "y": tasks, "zmin": -1, "zmax": 1}],
                title=f"cosine of the tasks' gradients at the {place}",
            )
            for place, rows in self.gradients.items()
        )
        return [Section("losses", "Losses", body), Section("gradients", "Gradient conflict", heat)]


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_explanation(recipe: MergeRecipe, folder: Path, files: Sequence[str]) -> Path:
    """Write the explanation of a merge, not the merge; returns the page. `files`: texts for the losses, by default
    those that the recipe's own method reads."""
    with claimed(folder, "merge --explain"):
        marks = {"explain.json": '"effective_tasks":', "groups.csv": "granularity,", "explain.html": PAGE_MARK}
        for name, text in marks.items():
            refuse_foreign_file(folder / name, text)
        return Explanation.of(recipe, Probe.of_recipe(recipe, files)).save(folder)


def _angles(facts: Facts) -> Section:
    tensors = list(facts.gram.full_by_name)
    cosine_MM = cosines(facts.gram.of(tensors))
    degrees = torch.rad2deg(torch.acos(cosine_MM)).tolist()
    names = list(facts.names)
    heat = {"type": "heatmap", "z": degrees, "x": names, "y": names, "colorscale": "Viridis"}
    row = facts.group_rows("model")[0]
    cells = [[html.escape(n), f"{row[f'norm/{n}']:.4f}", f"{row[f'relative/{n}']:.3%}"] for n in names]
    body = chart([heat], title="degrees between task vectors")
    return Section("angles", "Lengths and angles", table(["parent", "length", "against the base"], cells) + body)


def _map(facts: Facts) -> Section:
    places = facts.positions()
    x, y = ([place[axis] for place in places.values()] for axis in (0, 1))
    dots = {
        "type": "scatter",
        "mode": "markers+text",
        "x": x,
        "y": y,
        "text": list(places),
        "textposition": "top center",
    }
    return Section("map", "Map", chart([dots], title="distances in weight space", yaxis={"scaleanchor": "x"}))
