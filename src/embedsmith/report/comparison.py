"""Reports of a comparison of models and of their geometry."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from embedsmith.evaluate.compare import Comparison
from embedsmith.evaluate.model_geometry import MEANING, Geometry
from embedsmith.evaluate.result import short_names
from embedsmith.report.page import Section, environment_section, geometry_section, page, table
from embedsmith.report.scores import example_section, score_section, similarity_section, words_about


def comparison_page(made: Comparison, looks: Sequence[Geometry] = ()) -> str:
    """HTML; `looks` are the geometries of the same models, in their order, where they were looked at."""
    made = made.short()
    last, name = made.results[-1], made.models[-1]
    sections = [score_section(made), similarity_section(last, name)]
    if looks:
        sections.append(geometry_section([look.as_dict() for look in looks], made.models))
    sections += [example_section(last), environment_section(None)]
    count = len(made.tasks())
    lead = f"{len(made.models)} models on {count} task{'s' if count > 1 else ''}, measured against {made.models[0]}"
    return page("Comparison of models", lead, words_about(made), _named(sections, name))


def _named(sections: list[Section], name: str) -> list[Section]:
    return [Section(s.key, f"{s.title} of {name}" if s.key == "examples" else s.title, s.body) for s in sections]


def geometry_page(looks: Sequence[Mapping[str, Any]], names: Sequence[str], together: Mapping[str, float]) -> str:
    """HTML of one model's geometry, or of two with how alike they are."""
    names = short_names(names)
    rows = [[html.escape(name), f"{value:.4g}", MEANING.get(f"both/{name}", "")] for name, value in together.items()]
    alike = Section("alike", "How alike", table(("measure", "value", "what it says"), rows, 1, 2))
    dimensions = " and ".join(str(len(look["variance"])) for look in looks)
    words = [f"Vectors of {dimensions} numbers."]
    words += [_in_words(html.escape(name), look["geometry"]) for name, look in zip(names, looks, strict=True)]
    return page("Geometry", " and ".join(names), words, [geometry_section(looks, names), alike])


def _in_words(name: str, numbers: Mapping[str, Any]) -> str:
    mean, rank = numbers["sentence/anisotropy"], numbers["sentence/effective_rank"]
    holds = int(numbers["sentence/directions_for_90"])
    return (
        f"<b>{name}</b>: two texts have a cosine of {mean:.3f} on average, {rank:.0f} directions are effectively"
        f" in use, and {holds} hold 90 % of the variance."
    )
