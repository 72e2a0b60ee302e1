"""The terminal: whatever is printed passes here, so that no text from outside is read as markup or as a command."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from embedsmith.core.text_out import printable


class Terminal(Console):
    """A console of rich without markup and emoji codes, which shows control characters instead of sending them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Everything passes here before it is laid out: cells, titles, and what stands inside of them."""
        if isinstance(renderable, str):
            renderable = printable(renderable)
        elif isinstance(renderable, Text) and (clean := printable(renderable.plain)) != renderable.plain:
            renderable = renderable.copy()
            renderable.plain = clean
        return super().render(renderable, options)


def show(what: RenderableType, **options: Any) -> None:
    """Print a table or another thing of rich."""
    Terminal().print(what, **options)


def text_of(what: RenderableType, width: int = 120) -> str:
    """A table or another thing of rich as plain text, for logs and for Python."""
    console = Terminal(width=width, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(what)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")


class Printed(ABC):
    """A result that prints as its table: by `print`, at the end of a notebook's cell, and in a session."""

    @abstractmethod
    def table(self) -> RenderableType:
        """What is shown."""

    def __str__(self) -> str:
        return text_of(self.table())

    def __repr__(self) -> str:
        return str(self)
