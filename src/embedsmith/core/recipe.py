"""Recipes: YAML in, a tree of dataclasses out. The dataclasses are the only schema; an override is `a.b=c`."""

import dataclasses
import functools
import json
import re
import shlex
import types
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from embedsmith.core.aliases import name_here, other_verb
from embedsmith.core.errors import RecipeError
from embedsmith.core.files import atomic_file
from embedsmith.core.inputs import kind_of, read_text
from embedsmith.core.settings import descriptions, did_you_mean, to_plain
from embedsmith.core.shelf import SHELVES
from embedsmith.core.shipped import as_typed

T = TypeVar("T")

RECIPE_BYTES, VALUES, DEPTH = 2**20, 100_000, 60
"""What a recipe may have at most: bytes (1 MiB), values with all aliases written out, and levels of nesting."""

_UNUSABLE = re.compile("[\0\ud800-\udfff]")
_NAME_HERE = re.compile(r"use (?:type: )?(\w+|\{.*\})(?=$|[;,])")
"""The fix of a name of another tool (core/aliases.py), where it is a value by itself."""


def load_recipe(path: str | Path, schema: type[T], overrides: Sequence[str] = ()) -> T:
    """Read a YAML (or JSON) file, apply `key.path=value` overrides, and check it against `schema`.

    Errors: `RecipeError` naming the file and the key, with the nearest known key.
    """
    tree = read_tree(path)
    for override in overrides:
        apply_override(tree, override)
    return parse(schema, tree, where=str(path))


def read_tree(path: str | Path) -> dict[str, Any]:
    """The plain tree of a YAML (or JSON) file. Errors: `RecipeError` naming the file, whatever is in it."""
    tree = _parsed(read_text(path, RecipeError, most=RECIPE_BYTES), "the recipe", path)
    if not isinstance(tree, dict):
        raise RecipeError(f"a recipe is a mapping of keys to values, not {kind_of(tree)}", where=path)
    return tree


def parse_value(text: str, what: str) -> Any:
    """A value as YAML has it. Errors: `RecipeError` that calls it `what`."""
    return _parsed(text, what, None)


def _parsed(text: str, what: str, where: object) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except RecursionError as error:
        raise RecipeError(f"{what} is nested too deeply", where=where, fix="write it flat") from error
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        # the others than the first come from values such as 2024-13-45 or !!int x
        fix = "check indentation and quotes in the line that it names"
        raise RecipeError(f"{what} is not valid YAML: {error}", where=where, fix=fix) from error


class _StrictLoader(yaml.SafeLoader):
    """YAML that says what it seems to say, of a size that a recipe can have. YAML itself lets a key appear twice and
    keeps the last, which in a recipe is a mistake; a few lines of aliases of aliases stand for billions of values; and
    a text may hold what no path and no UTF-8 file can."""

    _depth = _nodes = 0

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _values_in(node, {}) > VALUES:
            raise _mistake(f"it stands for more than {VALUES:,} values: aliases of aliases", node)
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth, self._nodes = self._depth + 1, self._nodes + 1
        try:
            if self._depth > DEPTH or self._nodes > VALUES:
                what = f"nested deeper than {DEPTH}" if self._depth > DEPTH else f"more than {VALUES:,} values"
                event: Any = self.peek_event()  # type: ignore[no-untyped-call]
                raise yaml.composer.ComposerError(None, None, what, event.start_mark)
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and not value.isprintable() and _UNUSABLE.search(value):
            raise _mistake("a text holds a NUL or half of a surrogate pair", node)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((key for key, count in Counter(map(repr, keys)).items() if count > 1), None):
            raise _mistake(f"the key {twice} appears twice", node)
        return super().construct_mapping(node, deep)


def _mistake(what: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def _values_in(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, with every alias written out. A node that holds itself stands for too many."""
    if id(node) not in known:
        known[id(node)] = VALUES + 1
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        nodes = (one for part in parts for one in (part if isinstance(part, tuple) else (part,)))
        known[id(node)] = 1 + sum(_values_in(one, known) for one in nodes)
    return known[id(node)]


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `a.b.0.c=value` in place. The value is YAML; list entries are numbered from 0; missing mappings are made.
    Errors: `RecipeError` for a place that is not there, or that is inside something that is no section."""
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"{override!r} is not an override", expected="key.path=value, for example train.steps=500")
    *parents, last = path.split(".")
    node: Any = tree
    for number, key in enumerate(parents, start=1):
        place: Any = _index(node, key, override) if isinstance(node, list) else key
        held = node[place] if isinstance(node, list) else node.get(place)
        if held is not None and not isinstance(held, dict | list):
            whole = ".".join(parents[:number])
            raise RecipeError(
                f"{override!r} would replace {whole}={held!r} by a section with one key",
                expected="a key inside a section",
                fix=f"give {whole} as a whole section; the stage of a named recipe takes changes in its `set`",
            )
        if held is None:
            node[place] = held = {}
        node = held
    parsed = parse_value(value, f"the value of {override!r}")
    if isinstance(parsed, dict) and value.rstrip().endswith(":") and list(parsed.values()) == [None]:
        parsed = value  # a text such as `Query:` or `query: `, and no section with one empty key
    if isinstance(node, list):
        node[_index(node, last, override)] = parsed
    else:
        node[last] = parsed


def _index(node: list[Any], key: str, override: str) -> int:
    if not (key.isascii() and key.isdecimal()) or len(key) > 9 or int(key) >= len(node):
        raise RecipeError(
            f"{key!r} in {override!r} is not a place in a list of {len(node)}", expected="a number from 0"
        )
    return int(key)


def parse(schema: type[T], tree: Any, where: str = "recipe") -> T:
    """Check a plain tree against a dataclass. All problems are reported at once; a recipe of another verb is named."""
    known: Any = schema
    try:
        checked: T = _adapter(known).validate_python(tree)
    except ValidationError as error:
        fields = {f.name for f in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else set()
        if isinstance(tree, dict) and fields and (verb := other_verb(tree, fields)):
            file = f" {as_typed(where)}" if where.endswith((".yaml", ".yml", ".json")) else ""
            fix = f"embedsmith {verb}{file}"
            raise RecipeError(f"this looks like a recipe of {verb}", where=where, fix=fix) from None
        details = error.errors()
        deeper = {tuple(detail["loc"][:-2]) for detail in details if len(detail["loc"]) > 2}
        kept = [one for one in details if one["type"] != "string_type" or tuple(one["loc"][:-1]) not in deeper]
        lines = [_explain(detail, schema, tree) for detail in kept]
        raise RecipeError("\n  ".join(lines), where=where) from None  # whose words repeat the input
    return checked


@functools.cache
def _adapter(schema: Any) -> Any:
    """What checks a recipe of this class; building it costs more than all checks."""
    return TypeAdapter(schema)


def _explain(detail: Any, schema: Any, tree: Any) -> str:
    location = tuple(detail["loc"])
    known, held = _walk(schema, tree, location[:-1])
    place = ".".join(str(part) for part in (*held, *location[-1:])) or "the recipe"
    cause = detail.get("ctx", {}).get("error")
    if detail["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        name = str(location[-1])
        return f"{place}: unknown key{_hint(name, known, schema)}"
    if detail["type"] in ("missing", "missing_argument"):
        return f"{place}: this key is required"
    if isinstance(cause, Exception):
        return f"{place}: {cause}{_typed(place, cause, detail['input'])}"
    message = "this wants keys with their values" if detail["type"] == "dataclass_type" else detail["msg"]
    return f"{place}: {message} (got {detail['input']!r})"


def _typed(place: str, cause: Exception, given: Any) -> str:
    """The fix of a name of another tool as it is typed behind a command."""
    meant = _NAME_HERE.match(getattr(cause, "fix", None) or "")
    if meant is None:
        return ""
    place = f"{place}.type" if isinstance(given, Mapping) and meant[1].isidentifier() else place
    return f" (typed: {shlex.quote(f'{place}={meant[1]}')})"


def _hint(name: str, known: Sequence[str], schema: Any) -> str:
    """What was meant by an unknown key: a name of another tool, a near one, or a key that belongs elsewhere."""
    if here := name_here("key", name):
        return f" (it is {here} here)"
    if near := did_you_mean(name, known):
        return near
    if elsewhere := _place_of(name, schema, ()):
        return f" (it belongs in {'.'.join(elsewhere[:-1])}: {'.'.join(elsewhere)})"
    return f"; known here: {', '.join(known)}" if known else ""


def _place_of(name: str, schema: Any, path: tuple[str, ...]) -> tuple[str, ...] | None:
    """Where below a section a key of this name is, the highest first; of sections in lists none."""
    hints = typing.get_type_hints(schema) if dataclasses.is_dataclass(schema) else {}
    if path and name in hints:
        return (*path, name)
    below = [(key, found) for key, hint in hints.items() if len(found := _dataclasses_in(hint, lists=False)) == 1]
    return next((at for key, found in below if (at := _place_of(name, found[0], (*path, key)))), None)


def _walk(schema: Any, tree: Any, location: Sequence[Any]) -> tuple[list[str], list[Any]]:
    """The keys known at a place of a recipe, and the place itself, without the names that pydantic gives to the choices
    of a union."""
    held: list[Any] = []
    for part in location:
        inside = isinstance(tree, Mapping) and part in tree
        if not inside and not (isinstance(tree, list | tuple) and isinstance(part, int) and part < len(tree)):
            continue
        tree = tree[part]
        held.append(part)
        if isinstance(part, str):
            found = (typing.get_type_hints(one, include_extras=True) for one in _dataclasses_in(schema))
            options = [hints for hints in found if part in hints]
            schema = options[0][part] if options else None
        schema = _component(schema, tree) or schema
    return sorted({f.name for option in _dataclasses_in(schema) for f in dataclasses.fields(option)}), held


def _component(hint: Any, value: Any) -> type | None:
    """The class of the component that a value names, where a shelf stands in the hint."""
    name = value.get("type") if isinstance(value, Mapping) else None
    shelf = next((shelf for shelf in SHELVES if shelf in _extras(hint)), None)
    if shelf is None or not isinstance(name, str):
        return None
    with suppress(RecipeError):
        thing = shelf.get(name)
        return thing if isinstance(thing, type) else None
    return None


def _extras(hint: Any) -> list[Any]:
    """What is annotated in a hint, inside of containers too."""
    here = list(getattr(hint, "__metadata__", ()))
    return here + [extra for part in typing.get_args(hint) for extra in _extras(part)]


def _dataclasses_in(hint: Any, lists: bool = True) -> list[type]:
    if dataclasses.is_dataclass(hint):
        return [hint] if isinstance(hint, type) else []
    origins: tuple[Any, ...] = (typing.Union, types.UnionType, typing.Annotated)
    if typing.get_origin(hint) in (*origins, *((list, tuple, dict, Sequence, Mapping) if lists else ())):
        return [found for argument in typing.get_args(hint) for found in _dataclasses_in(argument, lists)]
    return []


def save_recipe(recipe: Any, path: str | Path) -> None:
    with atomic_file(path) as file:
        yaml.safe_dump(to_plain(recipe), file, sort_keys=False, allow_unicode=True)


def schema_json(schema: type) -> str:
    """The JSON Schema of a recipe, for editors."""
    return json.dumps(schema_tree(schema), indent=2, ensure_ascii=False)


def schema_tree(schema: type) -> dict[str, Any]:
    """The JSON Schema of a recipe, as a tree."""
    return TypeAdapter(schema).json_schema(schema_generator=_Described)


class _Described(GenerateJsonSchema):
    """The schema with the meaning of every field, from the docstring of its class."""

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        made = super().dataclass_schema(schema)
        for name, text in descriptions(schema["cls"]).items():
            made["properties"][name]["description"] = text
        return made
