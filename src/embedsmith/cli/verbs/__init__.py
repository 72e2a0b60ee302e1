"""The verbs of the command line, a file a group. Rooms are imported inside the functions, so that `--help` costs no
torch; what they print passes through `show` and `say`."""

import sys
from typing import Any

from embedsmith.core.text_out import printable


def show(what: Any, **options: Any) -> None:
    """Print a table or another thing of rich on the terminal."""
    from embedsmith.core.terminal import show as shown

    shown(what, **options)


def say(text: object) -> None:
    """Print a line."""
    sys.stdout.write(f"{printable(text)}\n")
    sys.stdout.flush()
