"""How far work is, on the first rank only: a bar on a terminal, and lines of plain text where there is none, in a log
file or a notebook."""

import logging
import sys
import time
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


_on_screen: list[str] = []  # labels of the bars that are shown, or told in lines: at most one


QUIET = 60.0
"""Seconds after which a line tells how far work is that notes nothing by itself."""


class Bar:
    """One running bar; `advance` it, and `note` a short text beside it, which without a terminal is a line of the log
    (`in_lines`) with what is done and how much time is left."""

    def __init__(self, progress: Progress, label: str, total: int | None, done: int, in_lines: bool = False) -> None:
        self._progress, self._label, self._total, self._in_lines = progress, label, total, in_lines
        self._task = progress.add_task(printable(label), total=total, completed=done, note="")
        self._first = self._done = done
        self._start = self._told = time.monotonic()

    def advance(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)
        self._done += count
        if self._in_lines and time.monotonic() - self._told > QUIET:
            self._tell()

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=printable(text))
        if self._in_lines:
            self._tell(text)

    def _tell(self, *notes: str) -> None:
        self._told = time.monotonic()
        count = f"{self._done:,}" if self._total is None else f"{self._done:,}/{self._total:,}"
        made, left = self._done - self._first, (self._total or 0) - self._done
        times = [f"{duration((self._told - self._start) / made * left)} left"] if made and left > 0 else []
        log.info("%s", " · ".join([f"{self._label} {count}", *notes, *times]))


def duration(seconds: float) -> str:
    """A time in words: `12 s`, `3 min 5 s`, `2 h 10 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextmanager
def progress_bar(label: str, total: int | None, done: int = 0, visible: bool | None = None) -> Iterator[Bar]:
    """A bar on the terminal. `visible=None` shows it where stderr is a terminal, on the first rank, and else tells how
    far the work is in lines of the log.

    Only the outermost bar is shown: the terminal has room for one that moves (rich refuses a second).
    """
    watched = sys.stderr.isatty()
    shown = (watched if visible is None else visible) and not _on_screen
    in_lines = visible is None and not watched and not _on_screen
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
        mine = [label] if shown or in_lines else []
        _on_screen.extend(mine)
        try:
            yield Bar(progress, label, total, done, in_lines)
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
