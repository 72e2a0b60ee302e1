"""Recipes: YAML in, a tree of dataclasses out. The dataclasses are the only schema; an override is `a.b=c`."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from embedsmith.core.errors import RecipeError
from embedsmith.core.files import atomic_file
from embedsmith.core.settings import descriptions, did_you_mean, to_plain
from embedsmith.core.shelf import SHELVES

T = TypeVar("T")


def load_recipe(path: str | Path, schema: type[T], overrides: Sequence[str] = ()) -> T:
    """Read a YAML (or JSON) file, apply `key.path=value` overrides, and check it against `schema`.

    Errors: `RecipeError` naming the file and the key, with the nearest known key.
    """
    tree = read_tree(path)
    for override in overrides:
        apply_override(tree, override)
    return parse(schema, tree, where=str(path))


def read_tree(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot read the recipe ({error.strerror})", where=path, fix="check the path") from error
    try:
        tree = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {error}", where=path) from error
    if not isinstance(tree, dict):
        raise RecipeError(f"a recipe is a mapping of keys to values, not {type(tree).__name__}", where=path)
    return tree


class _StrictLoader(yaml.SafeLoader):
    """YAML lets a key appear twice and keeps the last; a recipe with two `train:` blocks is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} appears twice", node.start_mark)
        return super().construct_mapping(node, deep)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `a.b.0.c=value` in place. The value is YAML; list entries are numbered from 0; missing mappings are made."""
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"{override!r} is not an override", expected="key.path=value, for example train.steps=500")
    *parents, last = path.split(".")
    node: Any = tree
    for key in parents:
        if isinstance(node, list):
            node = node[_index(node, key, override)]
        else:
            if not isinstance(node.get(key), dict | list):
                node[key] = {}
            node = node[key]
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of {override!r} is not valid YAML: {error}") from error
    if isinstance(node, list):
        node[_index(node, last, override)] = parsed
    else:
        node[last] = parsed


def _index(node: list[Any], key: str, override: str) -> int:
    if not key.isdecimal() or int(key) >= len(node):
        raise RecipeError(
            f"{key!r} in {override!r} is not a place in a list of {len(node)}", expected="a number from 0"
        )
    return int(key)


def parse(schema: type[T], tree: Any, where: str = "recipe") -> T:
    """Check a plain tree against a dataclass. All problems are reported at once."""
    try:
        return TypeAdapter(schema).validate_python(tree)
    except ValidationError as error:
        lines = [line for detail in error.errors() for line in _explain(detail, schema, ())]
        raise RecipeError("\n  ".join(lines), where=where) from None  # whose words repeat the input


def _explain(detail: Any, schema: Any, prefix: tuple[Any, ...]) -> list[str]:
    location = prefix + tuple(detail["loc"])
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ValidationError):  # a component's own fields, checked inside the registry
        return [line for inner in cause.errors() for line in _explain(inner, cause.title, location)]
    place = ".".join(str(part) for part in location) or "the recipe"
    if detail["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(schema, tuple(detail["loc"])[:-1])
        hint = did_you_mean(str(location[-1]), known)
        return [f"{place}: unknown key{hint or (f'; known here: {chr(44).join(known)}' if known else '')}"]
    if detail["type"] in ("missing", "missing_argument"):
        return [f"{place}: this key is required"]
    if isinstance(cause, Exception):
        return [f"{place}: {cause}"]
    return [f"{place}: {detail['msg']} (got {detail['input']!r})"]


def _known_keys(schema: Any, location: tuple[Any, ...]) -> list[str]:
    """The fields of the dataclass found by walking `location` down the type hints."""
    if isinstance(schema, str):
        found = (shelf.class_named(schema) for shelf in SHELVES)  # an error carries only the class's name
        schema = next((cls for cls in found if cls is not None), None)
    for part in location:
        options = _dataclasses_in(schema)
        if options and isinstance(part, str):
            hints = typing.get_type_hints(options[0], include_extras=False)
            schema = hints.get(part)
    return sorted({f.name for option in _dataclasses_in(schema) for f in dataclasses.fields(option)})


def _dataclasses_in(hint: Any) -> list[type]:
    if dataclasses.is_dataclass(hint):
        return [hint] if isinstance(hint, type) else []
    if typing.get_origin(hint) in (
        typing.Union,
        types.UnionType,
        list,
        tuple,
        dict,
        typing.Annotated,
        Sequence,
        Mapping,
    ):
        return [found for argument in typing.get_args(hint) for found in _dataclasses_in(argument)]
    return []


def save_recipe(recipe: Any, path: str | Path) -> None:
    with atomic_file(path) as file:
        yaml.safe_dump(to_plain(recipe), file, sort_keys=False, allow_unicode=True)


def schema_json(schema: type) -> str:
    """The JSON Schema of a recipe, for editors."""
    made = TypeAdapter(schema).json_schema(schema_generator=_Described)
    return json.dumps(made, indent=2, ensure_ascii=False)


class _Described(GenerateJsonSchema):
    """The schema with the meaning of every field, from the docstring of its class."""

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        made = super().dataclass_schema(schema)
        for name, text in descriptions(schema["cls"]).items():
            made["properties"][name]["description"] = text
        return made
