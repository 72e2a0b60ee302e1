"""The explanation of a merge in files: explain.json, groups.csv, and explain.html to look at."""

import csv
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from embedsmith.calibrate.explain import Facts, cosines, explain
from embedsmith.calibrate.landscape import Landscape
from embedsmith.calibrate.live_model import open_live
from embedsmith.calibrate.probe import Probe
from embedsmith.calibrate.task_batches import TaskBatches
from embedsmith.core.files import atomic_file
from embedsmith.core.outputs import claimed, refuse_foreign_file
from embedsmith.merge.merge_plan import make_plan
from embedsmith.merge.recipe import MergeRecipe
from embedsmith.report.page import PAGE_MARK, Section, chart, finite, page, table

BATCH = 32
"""Examples of each task in one batch."""


@dataclass(frozen=True)
class Explanation:
    """Facts of the weights, as `tables` by granularity too, and, where a probe was given, the landscape."""

    facts: Facts
    landscape: Landscape | None = None
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
        }
        if seen is not None:
            plain |= {"along_length": seen.along, "barriers": seen.barriers, "gradient_cosines": seen.gradients}
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
            *([] if self.landscape is None else _losses(self.landscape)),
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


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def explain_recipe(recipe: MergeRecipe, probe: Probe | None = None) -> Explanation:
    """Explain the merge that a recipe describes; it is not written. `probe`: texts for the losses and the gradients."""
    plan = make_plan(recipe)
    facts = explain(plan)
    tables = {key: facts.group_rows(key) for key in ("model", "block", "module", "tensor")}
    landscape = None
    if probe is not None:
        live = open_live(plan.parents, plan.base)
        batches = TaskBatches.whole(live, probe.sources, probe.read(), BATCH, 0)
        landscape = Landscape.around_slerp(batches, facts.weight_M)
    return Explanation(facts, landscape, tables)


def write_explanation(recipe: MergeRecipe, folder: Path, files: Sequence[str]) -> Path:
    """Write the explanation of a merge, not the merge; returns the page. `files`: texts for the losses, by default
    those that the recipe's own method reads."""
    with claimed(folder, "merge --explain"):
        marks = {"explain.json": '"effective_tasks":', "groups.csv": "granularity,", "explain.html": PAGE_MARK}
        for name, text in marks.items():
            refuse_foreign_file(folder / name, text)
        return explain_recipe(recipe, Probe.of_recipe(recipe, files)).save(folder)


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


def _losses(seen: Landscape) -> list[Section]:
    x = [row["length"] for row in seen.along]
    lines = [{"type": "scatter", "name": t, "x": x, "y": finite([row[t] for row in seen.along])} for t in seen.tasks]
    body = chart(lines, title="loss along the length of the SLERP", x="lambda", y="loss")
    cells = [[html.escape(r["parent"]), html.escape(r["task"]), f"{r['barrier']:.4f}"] for r in seen.barriers]
    body += table(["from parent", "task", "barrier to the merge"], cells, numbers_from=2)
    heat = "".join(
        chart(
            [{"type": "heatmap", "z": rows, "x": list(seen.tasks), "y": list(seen.tasks), "zmin": -1, "zmax": 1}],
            title=f"cosine of the tasks' gradients at the {place}",
        )
        for place, rows in seen.gradients.items()
    )
    return [Section("losses", "Losses", body), Section("gradients", "Gradient conflict", heat)]
