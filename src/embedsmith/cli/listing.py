"""What `embedsmith list` and `embedsmith losses` print: every named thing of every shelf, what it does, its settings,
where it comes from, and which package brought it."""

import dataclasses
import inspect
import re
from typing import Any

from rich.table import Table
from rich.text import Text

from embedsmith.core.errors import RecipeError
from embedsmith.core.settings import descriptions, did_you_mean, to_plain
from embedsmith.core.shelf import SHELVES, Entry, Shelf, losses
from embedsmith.core.shipped import shipped_recipes


def shelf_named(kind: str) -> Shelf[Any]:
    """A shelf by its kind: `loss`, `merge-method`, or in the plural. Errors: `RecipeError` for an unknown one."""
    asked = kind.lower().replace("-", " ").replace("_", " ")
    known = {shelf.kind: shelf for shelf in SHELVES}
    plural = {"losses": losses} | {f"{name}s": shelf for name, shelf in known.items()}
    if asked not in known | plural:
        raise RecipeError(
            f"no shelf holds a {kind!r}{did_you_mean(asked, known)}", expected=f"one of {', '.join(known)}"
        )
    return (known | plural)[asked]


def all_shelves() -> Table:
    """One row a shelf: its kind and the names on it; those of users' packages with the package."""
    view = Table("kind", "names", title="the shelf", show_lines=True)
    for shelf in SHELVES:
        view.add_row(shelf.kind, Text(", ".join(_name(entry) for entry in shelf.entries())))
    view.add_row("recipe", Text(", ".join(shipped_recipes())))
    return view


def recipes() -> Table:
    """The recipes that ship: what each is typed as, the verb it is for, and what it does."""
    view = Table("name", "verb", "what it is", title="shipped recipes", show_lines=True)
    for one in shipped_recipes().values():
        view.add_row(*map(Text, (one.name, one.verb, one.summary)))
    return view


def one_shelf(shelf: Shelf[Any]) -> Table:
    """One row a thing; of losses also the batches they read and the formula."""
    view = Table(title=f"shelf: {shelf.kind}", show_lines=True)
    names = ("name", "batches", "formula") if shelf is losses else ("name", "what it is")
    for column in (*names, "settings and defaults", "source"):
        view.add_column(column, overflow="fold")
    for entry in shelf.entries():
        about = (batches(entry), entry.formula) if shelf is losses else (entry.summary,)
        view.add_row(*(Text(cell) for cell in (_name(entry), *about, settings(entry), entry.source)))
    return view


def everything_about(shelf: Shelf[Any], name: str) -> str:
    """Everything about one thing. Errors: `RecipeError` for an unknown name, with the nearest known one."""
    entry = shelf.entry(name)
    head = f"{_name(entry)}  ({batches(entry)})" if shelf is losses else f"{_name(entry)}  ({shelf.kind})"
    facts = {"formula": entry.formula, "source": entry.source, "settings": settings(entry)}
    lines = [f"  {key}: {text}" for key, text in facts.items() if text]
    document = inspect.cleandoc(getattr(entry.thing, "__doc__", None) or "")
    return "\n".join([head, "", *lines, *(["", document] if document else []), *_meanings(entry)])


def _meanings(entry: Entry[Any]) -> list[str]:
    """One line a setting that the docstring does not describe in its own words: those that a class inherits."""
    if not dataclasses.is_dataclass(entry.thing):
        return []
    shown = entry.thing.__doc__ or ""
    cls: Any = entry.thing
    entry_of = r"\b{}`?(?:, `?\w+`?)*:\s"
    inherited = {n: text for n, text in descriptions(cls).items() if not re.search(entry_of.format(n), shown)}
    return ["", *(f"{name}: {text}" for name, text in inherited.items())] if inherited else []


def batches(entry: Entry[Any]) -> str:
    """The batches a loss reads; a wrapper reads those of the loss it holds."""
    kinds = getattr(entry.thing, "batches", ())
    return ", ".join(kind.named for kind in kinds) if isinstance(kinds, tuple) else "as its parts"


def settings(entry: Entry[Any]) -> str:
    """`name=default` of every field; a name alone must be given."""
    if not dataclasses.is_dataclass(entry.thing):
        return ""
    shown = []
    for f in (f for f in dataclasses.fields(entry.thing) if f.init):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        shown.append(f.name if default is dataclasses.MISSING else f"{f.name}={to_plain(default)}")
    return ", ".join(shown)


def _name(entry: Entry[Any]) -> str:
    return entry.name if entry.package == "embedsmith" else f"{entry.name} ({entry.package})"
