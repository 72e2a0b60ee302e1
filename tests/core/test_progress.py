"""Bars: one at a time; lines where there is no terminal."""

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest

from embedsmith.core.progress import duration, progress_bar


def test_a_bar_inside_a_bar_stays_quiet_and_the_next_one_shows(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("outer", 2, visible=True) as outer:
        with progress_bar("inner", 2, visible=True) as inner:
            inner.advance(2)
        outer.advance(2)
    shown = capsys.readouterr().err
    assert "outer" in shown
    assert "inner" not in shown
    with progress_bar("later", 1, visible=True) as later:
        later.advance()
    assert "later" in capsys.readouterr().err


def test_an_invisible_bar_does_not_hide_the_one_inside(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("outer", 1, visible=False), progress_bar("inner", 1, visible=True) as inner:
        inner.advance()
    assert "inner" in capsys.readouterr().err


def test_without_a_terminal_a_note_is_a_line_with_what_is_done_and_left(caplog, monkeypatch) -> None:
    now = iter([0.0, 30.0, 40.0, 200.0, 200.0, 200.0])
    monkeypatch.setattr("embedsmith.core.progress.time", SimpleNamespace(monotonic=lambda: next(now)))
    with (
        caplog.at_level(logging.INFO, logger="embedsmith"),
        progress_bar("outer", 40, done=10) as outer,
    ):
        outer.advance(10)
        outer.note("loss 0.5")
        outer.advance(10)
        with progress_bar("inner", 2) as inner:
            inner.note("quiet")
    assert caplog.messages == [
        "outer 20/40 · loss 0.5 · 1 min 20 s left",
        "outer 30/40 · 1 min 40 s left",
    ]


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (7199, "1 h 59 min")])
def test_times_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_lines_are_shown_where_no_logging_is_set_up_and_only_within() -> None:
    code = (
        "from embedsmith.core.progress import lines_shown, log\n"
        "log.info('before')\n"
        "with lines_shown(), lines_shown(): log.info('within \\x1b')\n"
        "log.info('after')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "within \\u001b\n"
