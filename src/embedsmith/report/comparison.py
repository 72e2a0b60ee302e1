"""Reports of a comparison of models and of their geometry: scores with confidence, histograms of similarities, single
items with their texts, and the shape of each model's space."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from embedsmith.evaluate.compare import Comparison, Difference, Interval
from embedsmith.evaluate.model_geometry import Geometry, meaning_of
from embedsmith.evaluate.result import Example, Results, TaskResult, short_names
from embedsmith.report.page import Section, chart, charts, environment_section, finite, page, table

_BINS = 40  # at most; each holds eight values or so


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


def score_section(made: Comparison) -> Section:
    """A table and a bar chart of main scores, and the differences to the first model."""
    intervals = [[Interval.of(result) for result in results] for results in made.results]
    gaps = [made.differences(place) for place in range(1, len(made.models))]
    head = ["task", "score", *made.models]
    rows = []
    for row, result in enumerate(made.results[0]):
        cells = [_with_bounds(each[row]) for each in intervals]
        cells = [cells[0], *(f"{cell}<br>{_gap(gap[row])}" for cell, gap in zip(cells[1:], gaps, strict=True))]
        rows.append([html.escape(result.task), html.escape(result.metric), *cells])
    note = "Scores times 100, each with the bounds of 95 % of 1,000 resamples of its items."
    if gaps:
        note += (
            f" Below them the difference to {html.escape(made.models[0])}, resampled in pairs: the same items of both"
            " models; * marks bounds without zero."
        )
    pictures = charts(_score_charts(made, intervals, gaps))
    return Section("scores", "Scores", table(head, rows, numbers_from=2) + f'<p class="soft">{note}</p>{pictures}')


def _with_bounds(interval: Interval) -> str:
    if math.isnan(interval.value):
        return "undefined"
    bounds = "" if math.isnan(interval.low) else f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"
    return f'{100 * interval.value:.2f}<br><span class="soft">{bounds}</span>'


def _gap(gap: Difference) -> str:
    value, low, high = gap.interval.value, gap.interval.low, gap.interval.high
    if math.isnan(value):
        return "undefined"
    kind = ("good" if value > 0 else "bad") if gap.clear else "soft"
    bounds = "" if math.isnan(low) else f' <span class="soft">({100 * low:+.2f} to {100 * high:+.2f})</span>'
    return f'<span class="{kind}">{100 * value:+.2f}{"*" if gap.clear else ""}</span>{bounds}'


def _score_charts(
    made: Comparison, intervals: Sequence[Sequence[Interval]], gaps: Sequence[Sequence[Difference]]
) -> list[str]:
    """Bars of the main scores, and the differences to the first model where there is another; both with bounds."""

    def bounds(values: Sequence[Interval]) -> dict[str, Any]:
        above, below = ([100 * (i.high - i.value) for i in values], [100 * (i.value - i.low) for i in values])
        return {"type": "data", "symmetric": False, "array": finite(above), "arrayminus": finite(below)}

    bars = []
    for name, each in zip(made.models, intervals, strict=True):
        error = {**bounds(each), "thickness": 1.2, "color": "#8a929a"}
        values = finite([100 * interval.value for interval in each])
        bars.append({"type": "bar", "name": name, "x": made.tasks(), "y": values, "error_y": error})
    pictures = [chart(bars, title="Main scores", y="score × 100", barmode="group")]
    if gaps:
        kind = {"type": "scatter", "mode": "markers", "marker": {"size": 9}, "orientation": "h"}
        rows: dict[str, Any] = {**kind, "cliponaxis": False, "y": made.tasks()}
        # The first model keeps its colour, as do the others.
        points = [{**rows, "name": made.models[0], "x": [0.0] * len(made.tasks())}]
        for name, row in zip(made.models[1:], gaps, strict=True):
            found = [gap.interval for gap in row]
            points.append({**rows, "name": name, "x": finite([100 * i.value for i in found]), "error_x": bounds(found)})
        height = max(120 + 22 * len(made.tasks()) * len(made.models), 240)
        title, axis = f"Difference to {made.models[0]}", {"autorange": "reversed"}
        pictures.append(chart(points, title=title, x="points", height=height, scattermode="group", yaxis=axis))
    return pictures


def words_about(made: Comparison, *, named: bool = True) -> list[str]:
    """What happened to the scores, in sentences of HTML. `named`: say with which model."""
    sentences = []
    for place, name in enumerate(made.models[1:], start=1):
        for gap, new, old in zip(made.differences(place), made.results[place], made.results[0], strict=True):
            sentences.append(_sentence(f" with {html.escape(name)}" if named else "", gap, new, old))
    return sentences


def _sentence(by: str, gap: Difference, new: TaskResult, old: TaskResult) -> str:
    task, value = html.escape(gap.task), gap.interval.value
    if math.isnan(value):
        return f"<b>{task}</b>: a score{by} or of the model before it does not exist."
    moved = "rose" if value > 0 else "fell" if value < 0 else "stayed"
    change = f"{moved} from {100 * old.main_score:.2f} to {100 * new.main_score:.2f} ({100 * value:+.2f})"
    if gap.items == 0:
        return f"<b>{task}</b>: {change}{by}; how sure this is cannot be told without the single items."
    bounds = f"between {100 * gap.interval.low:+.2f} and {100 * gap.interval.high:+.2f} in 95 % of resamples"
    sure = "clear" if gap.clear else "within what chance would do"
    return f"<b>{task}</b>: {new.metric} {change}{by}. The change lies {bounds}: {sure}."


def similarity_section(results: Results, name: str) -> Section:
    """Histograms of similarities of texts that belong together and of those that do not."""
    pictures = []
    for result in results:
        parts = {key: values[np.isfinite(values)] for key, values in split_similarities(result).items()}
        if not parts or any(len(values) == 0 for values in parts.values()):
            continue
        everything = np.concatenate(list(parts.values()))
        edges = np.histogram_bin_edges(everything, bins=min(_BINS, max(8, len(everything) // 8)))
        middle = ((edges[:-1] + edges[1:]) / 2).tolist()
        traces = []
        for key, values in parts.items():
            share = np.histogram(values, bins=edges)[0] / len(values)
            style = {"opacity": 0.6, "width": float(edges[1] - edges[0])}
            traces.append({"type": "bar", "name": key, "x": middle, "y": share.tolist(), **style})
        pictures.append(chart(traces, title=result.task, x="similarity", y="share", barmode="overlay", bargap=0))
    words = f'<p class="soft">Of {html.escape(name)}. The less the two overlap, the better it tells them apart.</p>'
    return Section("similarities", "Similarities", words + charts(pictures) if pictures else "")


def split_similarities(result: TaskResult) -> dict[str, np.ndarray]:
    """Similarities of what belongs together and of what does not, where the items show it."""
    items = result.items
    if "similarity_relevant" in items:
        return {"best relevant document": items["similarity_relevant"], "best other": items["similarity_other"]}
    similarity = items.get("cosine", items.get("similarity"))
    if similarity is None:
        return {}
    if "label" in items:
        return {"positive pairs": similarity[items["label"] == 1], "negative pairs": similarity[items["label"] == 0]}
    low, high = np.quantile(items["score"], (0.2, 0.8))
    return {"scored highest": similarity[items["score"] >= high], "scored lowest": similarity[items["score"] <= low]}


def example_section(results: Results) -> Section:
    """The items that went worst and best, with their texts."""
    body = ""
    for result in results:
        if result.examples:
            half = (len(result.examples) + 1) // 2
            worst, best = result.examples[:half], result.examples[half:]
            body += f"<h3>{html.escape(result.task)}: worst</h3>" + "".join(_example(each) for each in worst)
            body += f"<h3>{html.escape(result.task)}: best</h3>" if best else ""
            body += "".join(_example(each) for each in reversed(best))
    return Section("examples", "Worst and best", body)


def _example(example: Example) -> str:
    first = next(iter(example.texts.values()), "")
    texts = "".join(
        f'<p class="label">{html.escape(name)}</p><div class="text">{html.escape(_short(text))}</div>'
        for name, text in example.texts.items()
    )
    numbers = " · ".join(f"{html.escape(name)} {value:.3f}" for name, value in example.numbers.items())
    value = "?" if math.isnan(example.value) else f"{example.value:.2f}"
    title = f"{value}  {_short(first, 110)}"
    body = f'<p class="soft">{html.escape(example.item_id)} · {numbers}</p>{texts}'
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def _short(text: str, length: int = 900) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


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
