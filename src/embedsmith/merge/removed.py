"""Names and settings that merging once had: each is an error that says what to use instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedsmith.core.errors import RecipeError

REMOVED: Mapping[str, str] = {
    "magmax": "use ties with density: 1 and aggregate: max, which elects the sign of every element first",
    "nan": "use average, with a weight of 1 / length for every parent (merge --explain prints the lengths)",
    "warp": "use slerp with scale: ETA, which is the same merge",
    "parent_matching": "use self_positioning, or regmean where there are no labels",
    "regmean.sequential": "leave it out: regmean measures every layer on the parents themselves",
    "fisher.definition=detached": "use definition: isolated, which gives every query its own candidates",
    "fisher.definition=shared": "use definition: isolated, which gives every query its own candidates",
    "search.searcher=halving": "use searcher: grid, or cma for more than a few parents",
    "search.points": "set evaluations, the number of merges that are scored",
    "search.keep": "leave it out: every merge is scored on all items of the goal",
    "parents.examples": "leave it out: python -m bench.merging --parts growth fits length against data",
}
"""A method, METHOD.SETTING, METHOD.SETTING=VALUE or a key of the recipe, to what to use instead."""


def refuse_removed_method(method: Any) -> Any:
    """Errors: `RecipeError` for a method, a setting or a value that is gone."""
    settings = {"type": method} if isinstance(method, str) else method
    if isinstance(settings, Mapping):
        kind = settings.get("type")
        for place in [kind, *(f"{kind}.{key}" for key in settings), *(f"{kind}.{k}={v}" for k, v in settings.items())]:
            _refuse(place, f"merge method {place}")
    return method


def refuse_removed_keys(parents: Any) -> Any:
    """Errors: `RecipeError` for a key of a parent that is gone."""
    for parent in parents if isinstance(parents, list | tuple) else []:
        for key in parent if isinstance(parent, Mapping) else []:
            _refuse(f"parents.{key}", f"key {key} of a parent")
    return parents


def _refuse(place: Any, what: str) -> None:
    if isinstance(place, str) and place in REMOVED:
        raise RecipeError(f"the {what} is no longer there", fix=REMOVED[place])
