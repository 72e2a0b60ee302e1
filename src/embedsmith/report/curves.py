"""Sections about the course of a run: losses, scores on the way, negatives, padding and speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from embedsmith.report.page import Section, chart, charts, finite

Line = Mapping[str, float]
_PLAIN = ("learning_rate", "gradient_norm", "tokens_per_second", "padding_share")
_HARDNESS = "negatives_"
_OWN = ("score/", "validation_loss/", "geometry/", "loss/", _HARDNESS)


def curve_section(lines: Sequence[Line]) -> list[Section]:
    """Training losses by source, then their parts (heads among them) source by source, scores and geometry."""
    keys = [key for key in dict.fromkeys(key for line in lines for key in line) if key != "step"]
    curves = [_curves(lines, [key for key in keys if key.startswith("loss/")], "Training loss by source", "loss")]
    curves.append(
        _curves(lines, [key for key in keys if key.startswith("validation_loss/")], "Validation loss by source", "loss")
    )
    parts = [key for key in keys if "/" in key and not key.startswith(_OWN)]
    for source in dict.fromkeys(key.rsplit("/", 1)[1] for key in parts):
        mine = [key for key in parts if key.rsplit("/", 1)[1] == source]
        curves.append(_curves(lines, mine, f"Parts of the loss on {source}", "value", strip=f"/{source}"))
    curves.append(_curves(lines, [key for key in keys if key.startswith("score/")], "Scores while training", "score"))
    curves.append(_curves(lines, [key for key in keys if key in _PLAIN[:1]], "Learning rate", ""))
    curves.append(_curves(lines, [key for key in keys if key in _PLAIN[1:2]], "Gradient norm before clipping", ""))
    space = []
    for key in [
        key for key in keys if key.startswith("geometry/")
    ]:  # geometry/token/svd_entropy becomes `tokens: svd entropy`
        kind, _, name = key.split("/", 1)[1].rpartition("/")
        of = {"sentence": "texts: ", "token": "tokens: "}.get(kind, f"{kind}: " if kind else "")
        space.append(_curves(lines, [key], of + name.replace("_", " "), ""))
    training = Section("training", "Training", charts(curves))
    return [training, Section("space", "Geometry while training", charts(space))]


def hardness_section(lines: Sequence[Line]) -> Section:
    """How hard the negatives were, how many were replaced and how many may be false, by source, and what mining anew
    took, where the run reported it."""
    keys = [key for key in dict.fromkeys(key for line in lines for key in line) if key.startswith(_HARDNESS)]
    curves = []
    for measure in dict.fromkeys(key.split("/", 1)[0] for key in keys):
        mine = [key for key in keys if key.startswith(f"{measure}/")]
        curves.append(_curves(lines, mine, measure.removeprefix(_HARDNESS).replace("_", " "), ""))
    curves.append(_curves(lines, ["remine_seconds"], "Seconds spent on mining anew, so far", "s", least=0.0))
    return Section("negatives", "Negatives", charts(curves))


def throughput_section(lines: Sequence[Line]) -> Section:
    """Tokens a second and the share of padding."""
    speed = _curves(lines, ["tokens_per_second"], "Tokens a second, all ranks", "")
    padding = _curves(lines, ["padding_share"], "Share of padding", "", least=0.0)
    return Section("throughput", "Padding and speed", charts([speed, padding]))


def _curves(
    lines: Sequence[Line], keys: Sequence[str], title: str, y: str, *, strip: str = "", least: float | None = None
) -> str:
    """One line a key over steps; empty without any value."""
    traces = []
    last = [PurePath(key.split("/", 1)[-1]).name for key in keys]
    for key, short in zip(keys, last, strict=True):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            steps, values = zip(*points)
            whole = key.split("/", 1)[-1]  # a column of a task, such as stsb-en/64: two tasks may have it
            name = key.removesuffix(strip) if strip else short if last.count(short) == 1 else whole
            mode = "lines+markers" if len(points) < 40 else "lines"
            trace = {"type": "scatter", "mode": mode, "name": name, "x": list(steps), "y": finite(values)}
            traces.append({**trace, "showlegend": len(keys) > 1 or bool(strip)})
    axis: dict[str, Any] = {} if least is None else {"yaxis": {"rangemode": "tozero"}}
    return chart(traces, title=title, x="step", y=y, height=300, **axis) if traces else ""
