"""The shelf: everything that has a name in a recipe, a listing or on the command line is one decorated class or
function in one file. This is where such things are found, in the tree by their folder and outside it by the
entry-point group `embedsmith`.

    @losses.register("my_loss", formula="...", source="...")
    @dataclass(frozen=True)
    class MyLoss(Loss): ...

A package of your own names the modules that do so in its pyproject.toml, and needs nothing else:

    [project.entry-points.embedsmith]
    my_package = "my_package.losses"
"""

import dataclasses
import functools
import importlib
import pkgutil
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from embedsmith.core.aliases import name_here
from embedsmith.core.errors import EmbedsmithError, RecipeError
from embedsmith.core.settings import descriptions, did_you_mean, is_plain, section, to_plain

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A thing on a shelf, and what listings and docs say of it."""

    name: str
    thing: T
    formula: str = ""
    source: str = ""

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (getattr(self.thing, "__doc__", None) or "").strip().split("\n")[0]

    @property
    def package(self) -> str:
        """The package that brought it: `embedsmith`, or a user's own."""
        return str(getattr(self.thing, "__module__", type(self.thing).__module__)).partition(".")[0]


class Shelf(Generic[T]):
    """Named things of one kind.

    `places`: modules that hold them; of a package, all files in its folder. They are imported on first use and one
    place after the other until a name is found, so that parsing costs only what it needs; packages of users come last.
    A class that is a dataclass is a component: a recipe writes `{type: NAME, setting: value}`.
    """

    def __init__(self, kind: str, *places: str) -> None:
        self.kind, self.places = kind, places
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, *, formula: str = "", source: str = "") -> Callable[[T], T]:
        """Decorator that puts a class or function on the shelf.

        Errors: `RecipeError` when another thing has the name already.
        """

        def add(thing: T) -> T:
            entry = Entry(name, thing, formula, source)
            there = self._entries.get(name)
            if there is not None and _home(there.thing) != _home(thing):
                raise RecipeError(
                    f"two things are called {name!r} on the shelf of every {self.kind}: {_home(there.thing)} and "
                    f"{_home(thing)}",
                    fix="give one of them another name",
                )
            if isinstance(thing, type) and dataclasses.is_dataclass(thing):
                section(thing)
                thing.registered_name = name  # type: ignore[attr-defined]
            self._entries[name] = entry
            return thing

        return add

    def entries(self, plugins: bool = True) -> list[Entry[T]]:
        """All of them by name; without `plugins` only those of the tree."""
        for place in self.places:
            load_place(place)
        if plugins:
            load_plugins()
        return [self._entries[name] for name in sorted(self._entries)]

    def names(self) -> list[str]:
        return [entry.name for entry in self.entries()]

    def entry(self, name: str) -> Entry[T]:
        """Errors: `RecipeError` for an unknown name, with the nearest known one."""
        for _ in self._loading():
            if name in self._entries:
                return self._entries[name]
        known, here = self.names(), name_here(self.kind, name)
        raise RecipeError(
            f"unknown {self.kind} {name!r}{'' if here else did_you_mean(name, known)}",
            expected=f"one of {', '.join(known)}",
            fix=f"use {here}" if here else None,
        )

    def get(self, name: str) -> T:
        """Errors: `RecipeError` for an unknown name, with the nearest known one."""
        return self.entry(name).thing

    def _loading(self) -> Iterator[None]:
        """Import one place after the other; the user's packages last."""
        yield
        for place in self.places:
            load_place(place)
            yield
        load_plugins()
        yield

    def build(self, value: Any) -> Any:
        """A component from an instance, a name, or a mapping with a `type` key."""
        if dataclasses.is_dataclass(value) and not isinstance(value, type) and hasattr(type(value), "registered_name"):
            return value
        if isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
            keys = list(value) if isinstance(value, Mapping) else []
            near = next((key for key in keys if key in ("name", "method") or did_you_mean(str(key), ["type"])), None)
            raise RecipeError(
                f"{value!r} is not a {self.kind}",
                expected=f"a name, or a mapping with a `type` key naming a {self.kind}",
                fix=f"write type: {value[near]} in the place of {near}: {value[near]}" if near else None,
            )
        arguments = {key: item for key, item in value.items() if key != "type"}
        from pydantic import TypeAdapter

        thing: Any = self.get(value["type"])
        return TypeAdapter(thing).validate_python(arguments)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(self.build)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        """A name, or an object with the fields of a component: what they hold, their defaults and meanings. Shallow,
        because wrappers hold components of their own kind."""
        from pydantic import TypeAdapter

        choices: list[dict[str, Any]] = [{"type": "string", "enum": self.names()}]
        for entry in self.entries():
            component: Any = entry.thing
            properties: dict[str, Any] = {"type": {"const": entry.name}}
            meanings, hints = descriptions(component), typing.get_type_hints(component, include_extras=True)
            for f in dataclasses.fields(component):
                properties[f.name] = TypeAdapter(hints[f.name]).json_schema() if is_plain(hints[f.name]) else {}
                properties[f.name] |= {} if f.default is dataclasses.MISSING else {"default": to_plain(f.default)}
                properties[f.name] |= {"description": meanings[f.name]} if f.name in meanings else {}
            choices.append(
                {
                    "type": "object",
                    "title": entry.name,
                    "description": entry.summary,
                    "required": ["type"],
                    "properties": properties,
                    "additionalProperties": False,
                }
            )
        return {"anyOf": choices}


@dataclass(frozen=True)
class Name:
    """Annotates a setting that holds the name of a thing: `pooling: Annotated[str, Name(poolings)]`, or with `joined`
    the names of several, as in `mean+max`."""

    shelf: Shelf[Any]
    joined: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        def known(name: str) -> str:
            parts = name.split("+") if self.joined else [name]
            return "+".join(self.shelf.entry(part).name for part in parts)

        return core_schema.no_info_after_validator_function(known, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        one = {"type": "string", "enum": self.shelf.names()}
        return {"anyOf": [one, {"type": "string", "pattern": r"^\w+(\+\w+)+$"}]} if self.joined else one


def _home(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', thing)}"


@functools.cache
def load_place(place: str) -> None:
    """Import a module, and every file beside it where it is a package."""
    module = importlib.import_module(place)
    for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
        importlib.import_module(f"{place}.{found.name}")


@functools.cache
def load_plugins() -> None:
    """Import what installed packages name in the entry-point group `embedsmith`.

    Errors: `RecipeError` naming the package when one cannot be imported.
    """
    from importlib.metadata import entry_points

    for point in entry_points(group="embedsmith"):
        try:
            point.load()
        except EmbedsmithError:
            raise
        except Exception as error:
            package = point.dist.name if point.dist else point.value
            raise RecipeError(
                f"the package {package} extends embedsmith and cannot be imported ({type(error).__name__}: {error})",
                where=f"entry point {point.name} = {point.value}",
                fix=f"mend it, or remove it: pip uninstall {package}",
            ) from error


losses: Shelf[Any] = Shelf("loss", "embedsmith.losses", "embedsmith.pretrain.losses")
poolings: Shelf[Any] = Shelf("pooling", "embedsmith.models.pooling")
heads: Shelf[Any] = Shelf("head", "embedsmith.models.heads", "embedsmith.pretrain")
forms: Shelf[Any] = Shelf("model form", "embedsmith.models.forms")
merge_methods: Shelf[Any] = Shelf("merge method", "embedsmith.merge.methods", "embedsmith.calibrate")
file_kinds: Shelf[Any] = Shelf("file kind", "embedsmith.data.formats.file_kinds")
layouts: Shelf[Any] = Shelf("column layout", "embedsmith.data.formats.columns", "embedsmith.data.formats.common")
task_kinds: Shelf[Any] = Shelf("task kind", "embedsmith.evaluate.tasks")
metrics: Shelf[Any] = Shelf("metric", "embedsmith.evaluate.metrics")
searchers: Shelf[Any] = Shelf("searcher", "embedsmith.mining.searchers", "embedsmith.mining.bm25")
teachers: Shelf[Any] = Shelf("teacher", "embedsmith.mining.searchers")
balances: Shelf[Any] = Shelf("balance", "embedsmith.train.balance")
curation_steps: Shelf[Any] = Shelf("curation step", "embedsmith.curate")
generators: Shelf[Any] = Shelf("generator", "embedsmith.curate.generators")
engines: Shelf[Any] = Shelf("engine", "embedsmith.curate.engines")
verbs: Shelf[Any] = Shelf("verb", "embedsmith.cli.verbs")

SHELVES = tuple(shelf for shelf in list(globals().values()) if isinstance(shelf, Shelf))
