"""The explanation of a merge in files: explain.json, groups.csv, and explain.html to look at."""

from __future__ import annotations

import csv
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedsmith.calibrate.explain import Facts, cosines, explain
from embedsmith.calibrate.explain_planes import (
    Plane,
    Probes,
    along_length,
    barriers,
    gradient_conflict,
    loss_plane,
)
from embedsmith.calibrate.growth import Growth, growth_of, growth_sections
from embedsmith.calibrate.live import Probe, open_live
from embedsmith.core.files import atomic_file
from embedsmith.merge.methods.formulas import average, karcher, sequential_slerp
from embedsmith.merge.plan import make_plan
from embedsmith.merge.recipe import MergeRecipe
from embedsmith.report.page import Section, chart, finite, page, table

LENGTHS = tuple(round(0.2 * step, 1) for step in range(9))


@dataclass(frozen=True)
class Landscape:
    """What the probe shows: losses along the length and over a plane, barriers, cosines of gradients by place."""

    along: list[dict[str, Any]]
    plane: Plane | None
    barriers: list[dict[str, Any]]
    gradients: dict[str, list[list[float]]]
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """Facts of the weights, and, where a probe was given, the landscape; `growth`: against the amount of data."""

    facts: Facts
    landscape: Landscape | None = None
    growth: Growth | None = None
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not a number is null."""
        facts, seen = self.facts, self.landscape
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
            "growth": None if self.growth is None else self.growth.as_dict(),
        }
        if seen is not None:
            plain |= {"along_length": seen.along, "barriers": seen.barriers, "gradient_cosines": seen.gradients}
            plain |= {"plane": None if seen.plane is None else vars(seen.plane)}
        clean: dict[str, Any] = _clean(plain)
        return clean

    def save(self, folder: str | Path) -> Path:
        """Write explain.json, groups.csv and explain.html. Errors: `MissingExtraError` without plotly."""
        folder = Path(folder)
        text = to_html(self)
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


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def explain_recipe(recipe: MergeRecipe, probe: Probe | None = None, sizes: Sequence[int] = ()) -> Explanation:
    """Explain the merge that a recipe describes; it is not written.

    `probe`: texts for the loss landscape and the gradients. `sizes`: examples each parent was trained on, for the fits
    of length against data; parents that name their `examples` by task need none, and joint ones show directions too.
    """
    plan = make_plan(recipe)
    facts = explain(plan)
    tables = {key: facts.group_rows(key) for key in ("model", "block", "module", "tensor")}
    landscape = None
    if probe is not None:
        probes = Probes.of(open_live(plan.parents, plan.base), probe.sources, probe.read())
        landscape = look_around(probes, facts.weight_M)
    examples = [{"examples": n} for n in sizes] if sizes else [parent.examples for parent in plan.parents]
    growth = growth_of(facts.gram.of(list(facts.gram.full_by_name)), examples) if any(examples) else None
    return Explanation(facts, landscape, growth, tables)


def look_around(probes: Probes, weight_M: Tensor, steps: int = 11) -> Landscape:
    """Losses around the SLERP of the parents, with base, parents, average, SLERP arc and Karcher mean marked."""
    live = probes.live
    gram_MM = live.gram().sum(0)
    slerp_M = sequential_slerp(gram_MM, weight_M, on_antipodal="linear")
    own_GM = slerp_M.expand(len(live.group_names), -1)
    plane = None
    if live.parents > 1:
        marks = {"average": average(weight_M), "slerp": slerp_M, "karcher": karcher(gram_MM, weight_M)}
        arc = {f"arc {t}": _on_arc(gram_MM, t) for t in (0.25, 0.5, 0.75)} if live.parents == 2 else {}
        plane = loss_plane(probes, 0, 1, marks | arc, steps)
    places = {"base": 0 * own_GM, "slerp": own_GM}
    gradients = {name: gradient_conflict(probes, place_GM) for name, place_GM in places.items()}
    return Landscape(along_length(probes, own_GM, LENGTHS), plane, barriers(probes, own_GM), gradients, probes.tasks)


def _on_arc(gram_MM: Tensor, t: float) -> Tensor:
    weight_M = torch.tensor([1 - t, t], dtype=torch.float64)
    return sequential_slerp(gram_MM, weight_M, on_antipodal="linear")


def to_html(explanation: Explanation) -> str:
    """One page with interactive charts. Errors: `MissingExtraError` without plotly."""
    facts = explanation.facts
    sections = [_angles(facts), _map(facts), _energy(explanation), _missing(explanation), _conflicts(explanation)]
    sections += [] if explanation.growth is None else growth_sections(explanation.growth)
    sections += _landscape(explanation.landscape)
    spread = facts.order_spread()
    lines = [
        f"{len(facts.names)} parents that point in {facts.effective_tasks():.2f} independent directions.",
        f"The order of parents turns a sequential SLERP by up to {spread['sum']:.1f} degrees "
        f"({spread['mean']:.1f} with the paper's weights).",
        f"{facts.outside_span():.1%} of the merge lies outside what coefficients of the parents can reach.",
    ]
    return page("Merge explained", ", ".join(facts.names), lines, sections)


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


def _bars(explanation: Explanation, key: str, title: str) -> str:
    rows = explanation.tables["block"]
    columns = [column for column in rows[0] if column.startswith(f"{key}/")]
    groups = [row["group"].removeprefix("backbone.") for row in rows]
    data = [
        {"type": "bar", "name": column.partition("/")[2], "x": groups, "y": finite([row[column] for row in rows])}
        for column in columns
    ]
    return chart(data, title=title)


def _energy(explanation: Explanation) -> Section:
    return Section("energy", "Energy by block", _bars(explanation, "energy", "share of |V|^2 in each block"))


def _missing(explanation: Explanation) -> Section:
    title = "1 - <V_m, V_i> / |V_i|^2: 0 keeps all of a parent's move"
    return Section("missing", "What the merge loses of each parent", _bars(explanation, "missing", title))


def _conflicts(explanation: Explanation) -> Section:
    if len(explanation.facts.names) < 2:
        return Section("conflict", "Sign conflict", "")
    body = _bars(explanation, "conflict_0", "share of elements that move in opposite directions (0.5 is chance)")
    body += _bars(explanation, "conflict_mass", "weighed by the smaller move")
    return Section("conflict", "Sign conflict", body)


def _landscape(seen: Landscape | None) -> list[Section]:
    if seen is None:
        return []
    x = [row["length"] for row in seen.along]
    lines = [{"type": "scatter", "name": t, "x": x, "y": finite([row[t] for row in seen.along])} for t in seen.tasks]
    body = chart(lines, title="loss along the length of the SLERP", x="lambda", y="loss")
    cells = [[html.escape(r["parent"]), html.escape(r["task"]), f"{r['barrier']:.4f}"] for r in seen.barriers]
    body += table(["from parent", "task", "barrier to the merge"], cells, numbers_from=2)
    planes = "" if seen.plane is None else "".join(_plane(seen.plane, n) for n in range(len(seen.tasks)))
    heat = "".join(
        chart(
            [{"type": "heatmap", "z": rows, "x": list(seen.tasks), "y": list(seen.tasks), "zmin": -1, "zmax": 1}],
            title=f"cosine of the tasks' gradients at the {place}",
        )
        for place, rows in seen.gradients.items()
    )
    return [
        Section("losses", "Losses", body),
        Section("planes", "Loss planes", planes),
        Section("gradients", "Gradient conflict", heat),
    ]


def _plane(plane: Plane, task: int) -> str:
    contour = {"type": "contour", "z": plane.losses[task], "x": plane.u, "y": plane.v, "colorscale": "Viridis"}
    x, y = ([place[axis] for place in plane.marks.values()] for axis in (0, 1))
    marks = {"type": "scatter", "mode": "markers+text", "x": x, "y": y, "text": list(plane.marks)}
    title = f"loss of {plane.tasks[task]} over the plane of base and two parents"
    return chart([contour, marks], title=title, height=460)
