"""What a model card says of names, prompts and recipes: as text and never as markup, and without folders of the machine
on which the model was made."""

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from embedsmith.core.text_out import printable

_MARKUP = re.compile(r"([\\`*\[\]~])")


def in_line(text: object) -> str:
    """A text in a line."""
    line = printable(" ".join(str(text).split()))
    return _MARKUP.sub(r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: str) -> str:
    """A text as code, in a line."""
    line = printable(text.replace("\n", "\\n"))
    fence = _longer_than_any("`", line, 1)
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


def row(*cells: str) -> str:
    """A row of a table; its cells are Markdown."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def block(text: str, language: str) -> str:
    """Lines as a block of code."""
    fence = _longer_than_any("`", text, 3)
    return f"{fence}{language}\n{printable(text.strip())}\n{fence}"


def _longer_than_any(sign: str, text: str, least: int) -> str:
    longest = max((len(run) for run in re.findall(f"{sign}+", text)), default=0)
    return sign * max(least, longest + 1)


def without_folders(tree: Any) -> Any:
    """A tree of settings where absolute paths are their last names."""
    if isinstance(tree, dict):
        return {without_folders(key): without_folders(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_folders(value) for value in tree]
    if not isinstance(tree, str) or "\n" in tree:
        return tree
    posix, windows = PurePosixPath(tree), PureWindowsPath(tree)
    if windows.drive and windows.is_absolute():
        return windows.name or tree
    return posix.name if len(posix.parts) > 2 and posix.parts[0] in ("/", "~") else tree
