"""The verb `curate`: what its arguments mean."""

import shlex
from collections.abc import Sequence
from typing import Any

from embedsmith.api.curating import curation_tools
from embedsmith.core.errors import RecipeError
from embedsmith.core.recipe import apply_override, parse, read_tree
from embedsmith.curate import CurateRecipe, Report, curate


def run_curate(
    source: str,
    more: Sequence[str],
    steps: Sequence[str],
    *,
    data: str | None = None,
    overwrite: bool = False,
    engine: str | None = None,
    address: str | None = None,
) -> Report:
    """`RECIPE.yaml [key=value ...]`, or `IN OUT [key=value ...]` with steps. `engine`, and the `address` of a Ray
    cluster, go before what the recipe says.

    Errors: `RecipeError` for arguments that are neither, and all that a curation raises.
    """
    tree = tree_of(source, more, steps)
    if engine or address:
        tree["engine"] = _engine_of(tree.get("engine"), engine or "ray", address)
    recipe = parse(CurateRecipe, tree, where=source if _is_recipe(source) else "curate")
    return curate(recipe, curation_tools(data), overwrite=overwrite)


def tree_of(source: str, more: Sequence[str], steps: Sequence[str]) -> dict[str, Any]:
    overrides = [text for text in more if "=" in text]
    places = [text for text in more if "=" not in text]
    if _is_recipe(source):
        tree = read_tree(source)
        if places:
            raise RecipeError(f"{places[0]!r} after a recipe", expected="changes such as output=kept.jsonl")
    else:
        if len(places) != 1:
            raise RecipeError(
                "where should the result go?" if not places else f"one output, not {len(places)}",
                expected="embedsmith curate IN OUT.jsonl --step NAME",
            )
        tree = {"input": {"path": source}, "output": places[0], "steps": []}
    if steps:
        tree["steps"] = [*(tree.get("steps") or []), *map(step_of, steps)]
    for override in overrides:
        apply_override(tree, override)
    return tree


def _engine_of(known: Any, name: str, address: str | None) -> dict[str, Any]:
    """The recipe's settings of the engine that is asked for, if it has any."""
    settings = known if isinstance(known, dict) and known.get("type") == name else {}
    return {**settings, "type": name} | ({"address": address} if address else {})


def step_of(text: str) -> dict[str, Any]:
    """`length query_min=3` (or a YAML mapping) as a recipe writes it. Errors: `RecipeError`."""
    name, *settings = shlex.split(text)
    step: dict[str, Any] = {"type": name}
    for setting in settings:
        apply_override(step, setting)
    return step


def _is_recipe(source: str) -> bool:
    return source.endswith((".yaml", ".yml"))
