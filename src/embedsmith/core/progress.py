"""Progress bars and log lines: on the first rank only, and no bars where there is no terminal."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from embedsmith.core.collectives import rank
from embedsmith.core.terminal import Terminal
from embedsmith.core.text_out import PrintableLines, printable

log = logging.getLogger("embedsmith")
log.addFilter(lambda record: rank() == 0)


@contextmanager
def lines_shown() -> Iterator[None]:
    """Within the block, what embedsmith logs is shown on stderr, as on the command line: in scripts and in notebooks.
    A program that has set up its logging gets the lines there."""
    if log.hasHandlers():
        yield
        return
    handler, level = logging.StreamHandler(), log.level
    handler.setFormatter(PrintableLines("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


_on_screen: list[str] = []  # labels of the bars the terminal shows: at most one


class Bar:
    """One running bar; `advance` it, and `note` a short text beside it."""

    def __init__(self, progress: Progress, label: str, total: int | None, done: int) -> None:
        self._progress = progress
        self._task = progress.add_task(printable(label), total=total, completed=done, note="")

    def advance(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=printable(text))


@contextmanager
def progress_bar(label: str, total: int | None, done: int = 0, visible: bool | None = None) -> Iterator[Bar]:
    """A bar on the terminal. `visible=None` shows it where stderr is a terminal, on the first rank.

    Only the outermost bar is shown: the terminal has room for one that moves (rich refuses a second).
    """
    shown = (sys.stderr.isatty() if visible is None else visible) and not _on_screen
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(
        *columns, console=Terminal(stderr=True), disable=not shown or rank() != 0, transient=False
    ) as progress:
        mine = [label] if shown else []
        _on_screen.extend(mine)
        try:
            yield Bar(progress, label, total, done)
        finally:
            del _on_screen[: len(mine)]


@contextmanager
def transformers_silenced() -> Iterator[None]:
    """Within the block, transformers shows no bars and warnings of its own: what matters of them is an error here."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
