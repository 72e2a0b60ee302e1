"""Keywords in the place of a recipe: texts, dicts and settings, put together to what a recipe's file would hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from embedsmith.core.errors import RecipeError
from embedsmith.core.recipe import parse, read_tree
from embedsmith.data import Source

R = TypeVar("R")


def recipe_of(schema: type[R], given: Any, changes: Mapping[str, Any], where: str) -> R:
    """The recipe that `given` (one of these, a path, a dict or `None`) becomes with `changes`; those that are `None`
    change nothing.

    Errors: `RecipeError` for unknown keys, with the nearest known one, and for a whole recipe with changes.
    """
    if isinstance(given, schema):
        if changed := [key for key, value in changes.items() if value is not None]:
            raise RecipeError(
                f"a whole {schema.__name__} and {changed[0]} are both given",
                where=where,
                fix=f"put {changed[0]} into the recipe: dataclasses.replace(recipe, {changed[0]}=VALUE)",
            )
        return given
    tree = read_tree(given) if isinstance(given, str | Path) else given
    return parse(schema, keyed(tree, changes), where=str(given) if isinstance(given, str | Path) else where)


def keyed(tree: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's tree with changes; of sections that both have as dicts, the keys of both. Paths become texts."""
    made = dict(tree or {})
    for key, value in changes.items():
        if value is None:
            continue
        both = isinstance(value, Mapping) and isinstance(made.get(key), Mapping)
        made[key] = {**made[key], **value} if both else str(value) if isinstance(value, Path) else value
    return made


def model_tree(given: Any) -> Any:
    """The section `model`: a folder or hub id alone is its path. Errors: `RecipeError` for a loaded model."""
    if hasattr(given, "represent"):
        fix = "give its folder or hub id; a model in memory can be saved first: model.save(FOLDER)"
        raise RecipeError("model is a loaded model", expected="a folder or hub id, or a dict of its settings", fix=fix)
    return {"path": str(given)} if isinstance(given, str | Path) else given


def source_trees(given: Any) -> list[Any]:
    """The section `data`: one source or several."""
    several = isinstance(given, list | tuple) and not is_rows(given)
    return [source_tree(one) for one in given] if several else [source_tree(given)]


def source_tree(given: Any) -> Any:
    """One source: a path alone, or rows in memory, become its only key."""
    if isinstance(given, str | Path):
        return {"path": str(given)}
    if isinstance(given, Source):
        return given
    if isinstance(given, Mapping):
        return {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    return {"rows": given}


def is_rows(given: Any) -> bool:
    """Whether a list holds rows of data, and not sources: dicts that name no path."""
    first = given[0] if len(given) else None
    return isinstance(first, Mapping) and "path" not in first and "rows" not in first
