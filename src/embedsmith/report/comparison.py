"""Reports of a comparison of models and of their geometry."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from embedsmith.evaluate.compare import Comparison
from embedsmith.evaluate.model_geometry import Geometry, meaning_of
from embedsmith.evaluate.result import short_names
from embedsmith.report.page import Section, chart, charts, environment_section, finite, page, table
from embedsmith.report.scores import example_section, score_section, similarity_section, words_about


def comparison_page(made: Comparison, geometries: Sequence[Geometry] = ()) -> str:
    """HTML; `geometries` are those of the same models, in their order, where they were measured."""
    made = made.short()
    last, name = made.results[-1], made.models[-1]
    sections = [score_section(made), similarity_section(last, name)]
    if geometries:
        sections.append(geometry_section([geometry.as_dict() for geometry in geometries], made.models))
    examples = example_section(last)
    sections += [replace(examples, title=f"{examples.title} of {name}"), environment_section(None)]
    count = len(made.tasks())
    lead = f"{len(made.models)} models on {count} task{'s' if count > 1 else ''}, measured against {made.models[0]}"
    return page("Comparison of models", lead, words_about(made), sections)


def geometry_page(geometries: Sequence[Mapping[str, Any]], names: Sequence[str], together: Mapping[str, float]) -> str:
    """HTML of one model's geometry (given as `Geometry.as_dict()`), or of two with how alike they are."""
    names = short_names(names)
    rows = [[html.escape(name), f"{value:.4g}", meaning_of(f"both/{name}")] for name, value in together.items()]
    alike = Section("alike", "How alike", table(("measure", "value", "what it says"), rows, 1, 2))
    dimensions = " and ".join(str(len(geometry["variance"])) for geometry in geometries)
    words = [f"Vectors of {dimensions} numbers."]
    for name, geometry in zip(names, geometries, strict=True):
        numbers = geometry["geometry"]
        mean, rank = numbers["sentence/anisotropy"], numbers["sentence/effective_rank"]
        holds = int(numbers["sentence/directions_for_90"])
        words.append(
            f"<b>{html.escape(name)}</b>: two texts have a cosine of {mean:.3f} on average, {rank:.0f} directions are "
            f"effectively in use, and {holds} hold 90 % of the variance."
        )
    return page("Geometry", " and ".join(names), words, [geometry_section(geometries, names), alike])


def geometry_section(geometries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Section:
    """Numbers and pictures of each model's space, given as `Geometry.as_dict()`."""
    rows = []
    for key in dict.fromkeys(key for geometry in geometries for key in geometry["geometry"]):
        values = [geometry["geometry"].get(key) for geometry in geometries]
        numbers = ["–" if value is None or math.isnan(value) else f"{value:.4g}" for value in values]
        rows.append([html.escape(key), *numbers, f'<span class="soft">{html.escape(meaning_of(key))}</span>'])
    body = '<p class="soft">The token measures are reconstructed: CoDiEmb names them without formulas.</p>'
    body += charts(_geometry_charts(geometries, names))
    body += table(("measure", *names, "what it says"), rows, 1, 1 + len(names))
    return Section("geometry", "Geometry", body)


def _geometry_charts(geometries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Spectrum, cosines, widths and variances; one line a model (of the cosines two)."""
    spectra, cosines, widths, variances = [], [], [], []
    for name, geometry in zip(names, geometries, strict=True):
        line = {"type": "scatter", "mode": "lines", "name": name}
        spectrum = [value if value > 1e-8 else math.nan for value in geometry["spectrum"]]
        spectra.append({**line, "x": list(range(1, len(spectrum) + 1)), "y": finite(spectrum)})
        variances.append({**line, "y": finite(sorted(geometry["variance"], reverse=True))})
        counts = geometry["histograms"]
        for key, label in (("random", "any two texts"), ("pairs", "texts that belong together")):
            if (total := sum(counts[key])) > 0:
                dash = {"type": "scatter", "mode": "lines", "line": {"dash": "solid" if key == "random" else "dot"}}
                middle, share = [(a + b) / 2 for a, b in pairwise(counts["edges"])], [n / total for n in counts[key]]
                cosines.append({**dash, "name": f"{name}: {label}", "x": middle, "y": share})
        found = geometry["geometry"].items()
        kept = sorted((int(key.split("/")[1]), value) for key, value in found if key.startswith("width/"))
        narrow = {"x": [str(width) for width, _ in kept], "y": finite([value for _, value in kept])}
        widths.append({**line, "mode": "lines+markers", **narrow})
    power, category = {"type": "log", "exponentformat": "power"}, {"type": "category"}
    of_widths = "Matryoshka: neighbours kept at each width"
    return [
        chart(
            spectra, title="Spectrum: variance along each principal direction", x="direction", y="share", yaxis=power
        ),
        chart(cosines, title="Cosines", x="cosine", y="share"),
        chart(widths, title=of_widths, x="numbers kept", y="share of neighbours", xaxis=category),
        chart(variances, title="Variance of every coordinate, sorted", x="coordinate", y="variance"),
    ]
