"""What `embedsmith losses` prints: every registered loss, its formula, settings, source and the batches it reads."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from rich.table import Table
from rich.text import Text

from embedsmith.core.batch import PairBatch, RetrievalBatch
from embedsmith.core.settings import to_plain
from embedsmith.core.shelf import Entry, losses

_KINDS = {RetrievalBatch: "retrieval", PairBatch: "pairs"}


def table() -> Table:
    """One row a loss."""
    view = Table(title="losses", show_lines=True)
    for column in ("name", "batches", "formula", "settings and defaults", "source"):
        view.add_column(column, overflow="fold")
    for entry in losses.entries():
        cells = (entry.name, kinds(entry), entry.formula, settings(entry), entry.source)
        view.add_row(*(Text(cell) for cell in cells))
    return view


def explain(name: str) -> str:
    """Everything about one loss. Errors: `RecipeError` for an unknown name, with the nearest known one."""
    cls = losses.get(name)
    entry = next(entry for entry in losses.entries() if entry.thing is cls)
    facts = f"  {entry.formula}\n  source: {entry.source}\n  settings: {settings(entry)}"
    return f"{entry.name}  ({kinds(entry)})\n\n{facts}\n\n{inspect.cleandoc(cls.__doc__ or '')}"


def kinds(entry: Entry[Any]) -> str:
    """The batches a loss reads; a wrapper reads those of the loss it holds."""
    batches = getattr(entry.thing, "batches", ())
    return ", ".join(_KINDS[kind] for kind in batches) if isinstance(batches, tuple) else "as its parts"


def settings(entry: Entry[Any]) -> str:
    """`name=default` of every field; a name alone must be given."""
    return ", ".join(_setting(f) for f in dataclasses.fields(entry.thing))


def _setting(f: dataclasses.Field[object]) -> str:
    if f.default is not dataclasses.MISSING:
        return f"{f.name}={to_plain(f.default)}"
    if f.default_factory is not dataclasses.MISSING:
        return f"{f.name}={to_plain(f.default_factory())}"
    return f.name
