"""Components by name: how a recipe's `{type: infonce, temperature: 0.02}` becomes a frozen dataclass, and back."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from embedsmith.core.errors import RecipeError

C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Entry:
    """A registered component and what `embedsmith losses` and the docs say of it."""

    name: str
    cls: type
    formula: str
    source: str

    @property
    def summary(self) -> str:
        return (self.cls.__doc__ or "").strip().split("\n")[0]


class Registry:
    """Named components of one kind. `modules` are imported on first use, and one after the other until a name is
    found, so that parsing costs only what it needs."""

    def __init__(self, kind: str, *modules: str) -> None:
        self.kind, self.modules = kind, modules
        self._entries: dict[str, Entry] = {}

    def register(self, name: str, *, formula: str = "", source: str = "") -> Callable[[C], C]:
        """Class decorator for a frozen dataclass; unknown fields in a recipe become errors."""

        def add(cls: C) -> C:
            cls.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)  # type: ignore[attr-defined]
            cls.registered_name = name  # type: ignore[attr-defined]
            self._entries[name] = Entry(name, cls, formula, source)
            return cls

        return add

    def class_named(self, class_name: str) -> type | None:
        """The component whose class has this name, among those registered so far."""
        return next((entry.cls for entry in self._entries.values() if entry.cls.__name__ == class_name), None)

    def entries(self) -> list[Entry]:
        for module in self.modules:
            importlib.import_module(module)
        return [self._entries[name] for name in sorted(self._entries)]

    def get(self, name: str) -> type:
        for module in self.modules:
            importlib.import_module(module)
            if name in self._entries:
                return self._entries[name].cls
        known = [entry.name for entry in self.entries()]
        raise RecipeError(
            f"unknown {self.kind} {name!r}{did_you_mean(name, known)}", expected=f"one of {', '.join(known)}"
        )

    def build(self, value: Any) -> Any:
        """A component from an instance, a name, or a mapping with a `type` key."""
        if dataclasses.is_dataclass(value) and not isinstance(value, type) and hasattr(type(value), "registered_name"):
            return value
        if isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
            raise RecipeError(
                f"{value!r} is not a {self.kind}",
                expected=f"a name, or a mapping with a `type` key naming a {self.kind}",
            )
        arguments = {key: item for key, item in value.items() if key != "type"}
        return TypeAdapter(self.get(value["type"])).validate_python(arguments)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.build)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        choices: list[dict[str, Any]] = [{"type": "string", "enum": [entry.name for entry in self.entries()]}]
        for entry in self.entries():
            choices.append(
                {
                    "type": "object",
                    "title": entry.name,
                    "description": entry.summary,
                    "required": ["type"],
                    **_fields(entry),
                }
            )
        return {"anyOf": choices}


def _fields(entry: Entry) -> dict[str, Any]:
    """Names and defaults of a component's fields. Shallow, because wrappers hold components of their own kind."""
    properties: dict[str, Any] = {"type": {"const": entry.name}}
    for f in dataclasses.fields(entry.cls):
        properties[f.name] = {} if f.default is dataclasses.MISSING else {"default": to_plain(f.default)}
    return {"properties": properties, "additionalProperties": False}


def to_plain(value: Any) -> Any:
    """A recipe value as YAML can hold it: the inverse of parsing."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = getattr(type(value), "registered_name", None)
        head = {} if name is None else {"type": name}
        return head | {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def did_you_mean(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


losses = Registry("loss", "embedsmith.losses")
merge_methods = Registry("merge method", "embedsmith.merge.methods", "embedsmith.calibrate")
curation_steps = Registry("curation step", "embedsmith.curate")
generators = Registry("generator", "embedsmith.curate")
REGISTRIES = (losses, merge_methods, curation_steps, generators)
