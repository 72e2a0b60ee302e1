"""The verbs of the command line, a file a group. Rooms are imported inside the functions, so that `--help` costs no
torch."""

from typing import Any


def show(what: Any, **options: Any) -> None:
    """Print a table or another thing of rich on the terminal."""
    from rich.console import Console

    Console().print(what, **options)
