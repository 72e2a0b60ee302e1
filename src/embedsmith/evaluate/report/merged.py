"""What a merge was made of, from its merge.json."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from embedsmith.evaluate.report.page import Section, code, table

_SHOWN = ("models", "coefficients", "notes")
_MODEL = ("id", "weight", "distance", "path")


def merge_words(merge: Mapping[str, Any] | None) -> list[str]:
    """Which models went in, and what the merge noted, in sentences of HTML."""
    models = _models(merge)
    parents = [model for model in models if model.get("distance", "-") != "-"]
    words = []
    if parents:
        names = ", ".join(f"<b>{_text(m['id'])}</b> ({_text(m['distance'])} from the base)" for m in parents)
        words.append(f"Made of {names}.")
    notes = (merge or {}).get("notes")
    return words + [_text(note) for note in (notes if isinstance(notes, list) else ())]


def merge_section(merge: Mapping[str, Any] | None) -> Section:
    """Tables of the models and of their coefficients, single values, and the rest as it stands in the file."""
    if not merge:
        return Section("merge", "Merge", "")
    models, coefficients = _models(merge), merge.get("coefficients")
    body = table(
        ("model", "weight", "moved", "folder"), [[_text(m.get(key, "")) for key in _MODEL] for m in models], 1, 3
    )
    rows, names = _coefficients(coefficients, models)
    body += f"<h3>Coefficients</h3>{table(('part', *names), rows)}" if rows else ""
    left = {key: value for key, value in merge.items() if value and not (key in _SHOWN and (rows or key != _SHOWN[1]))}
    plain = [[_text(key), _text(value)] for key, value in left.items() if not isinstance(value, dict | list)]
    deep = {key: value for key, value in left.items() if isinstance(value, dict | list)}
    body += "<h3>Settings</h3>" + table(("what", "value"), plain, numbers_from=9)
    body += code(json.dumps(deep, indent=2, ensure_ascii=False)) if deep else ""
    return Section("merge", "Merge", body)


def _models(merge: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    found = (merge or {}).get("models")
    return [each for each in found if isinstance(each, dict) and "id" in each] if isinstance(found, list) else []


def _coefficients(found: Any, models: Sequence[Mapping[str, Any]]) -> tuple[list[list[str]], list[str]]:
    """Rows of a table, one a part of the model, and the parents' names; nothing where the file has another shape."""
    lists = found.values() if isinstance(found, dict) else ()
    widths = {len(row) if isinstance(row, list) else 0 for row in lists}
    if len(widths) != 1 or 0 in widths or not all(isinstance(c, int | float) for row in lists for c in row):
        return [], []
    width = widths.pop()
    names = [str(model["id"]) for model in models][:width]
    names += [f"model {place + 1}" for place in range(len(names), width)]
    return [[_text(part), *(f"{value:.4g}" for value in row)] for part, row in found.items()], names


def _text(value: Any) -> str:
    return html.escape(str(value))
