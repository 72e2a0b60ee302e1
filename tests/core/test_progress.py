"""Bars: one at a time."""

import pytest

from embedsmith.core.progress import progress_bar


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
