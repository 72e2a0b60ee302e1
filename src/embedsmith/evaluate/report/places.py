"""Sections about geometry and about where a report was made."""

from __future__ import annotations

import html
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any

from embedsmith.evaluate.look import MEANING
from embedsmith.evaluate.report.page import Section, chart, finite, table

_PACKAGES = ("embedsmith", "torch", "transformers", "accelerate", "numpy", "sentence-transformers", "mteb")


def environment() -> dict[str, str]:
    """Versions and machine, for the report and for whoever repeats the run."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment_section(saved: Mapping[str, Any] | None) -> Section:
    """What was saved with the run; without it, what there is now."""
    rows = [[html.escape(str(k)), html.escape(str(v))] for k, v in (saved or environment()).items()]
    note = "" if saved is not None else '<p class="soft">Of the machine that made this report.</p>'
    return Section("environment", "Environment", note + table(("what", "version"), rows, numbers_from=9))


def geometry_section(looks: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Section:
    """Numbers and pictures of each model's space, given as `Geometry.as_dict()`."""
    measures = dict.fromkeys(key for look in looks for key in look["geometry"])
    rows = [
        [html.escape(key), *(_number(look["geometry"].get(key)) for look in looks), _meaning(key)] for key in measures
    ]
    body = '<p class="soft">The token measures are reconstructed: CoDiEmb names them without formulas.</p>'
    pictures = [_spectra(looks, names), _cosines(looks, names), _widths(looks, names), _variances(looks, names)]
    body += f'<div class="charts">{"".join(pictures)}</div>' + table(
        ("measure", *names, "what it says"), rows, 1, 1 + len(names)
    )
    return Section("geometry", "Geometry", body)


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def _meaning(key: str) -> str:
    if key.startswith("width/"):
        return f'<span class="soft">neighbours kept by the first {key.split("/")[1]} numbers</span>'
    return f'<span class="soft">{html.escape(MEANING.get(key, ""))}</span>'


def _spectra(looks: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    traces = [
        {"type": "scatter", "mode": "lines", "name": name, "x": list(range(1, len(s) + 1)), "y": finite(s)}
        for name, s in (
            (name, [v if v > 1e-8 else math.nan for v in look["spectrum"]]) for name, look in zip(names, looks)
        )
    ]
    title = "Spectrum: variance along each principal direction"
    return chart(traces, title=title, x="direction", y="share", yaxis={"type": "log", "exponentformat": "power"})


def _cosines(looks: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    traces = []
    for name, look in zip(names, looks, strict=True):
        edges, counts = look["histograms"]["edges"], look["histograms"]
        middle = [(a + b) / 2 for a, b in pairwise(edges)]
        for key, label in (("random", "any two texts"), ("pairs", "texts that belong together")):
            if sum(counts[key]) > 0:
                total = sum(counts[key])
                line = {"type": "scatter", "mode": "lines", "line": {"dash": "solid" if key == "random" else "dot"}}
                y = [count / total for count in counts[key]]
                traces.append({**line, "name": f"{name}: {label}", "x": middle, "y": y})
    return chart(traces, title="Cosines", x="cosine", y="share")


def _widths(looks: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    traces = []
    for name, look in zip(names, looks, strict=True):
        kept = sorted((int(k.split("/")[1]), v) for k, v in look["geometry"].items() if k.startswith("width/"))
        line = {"type": "scatter", "mode": "lines+markers", "name": name}
        traces.append({**line, "x": [str(width) for width, _ in kept], "y": finite([v for _, v in kept])})
    title = "Matryoshka: neighbours kept at each width"
    return chart(traces, title=title, x="numbers kept", y="share of neighbours", xaxis={"type": "category"})


def _variances(looks: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    traces = [
        {"type": "scatter", "mode": "lines", "name": name, "y": finite(sorted(look["variance"], reverse=True))}
        for name, look in zip(names, looks)
    ]
    return chart(traces, title="Variance of every coordinate, sorted", x="coordinate", y="variance")
