"""Where mteb is not installed."""

import sys

import pytest

from embedsmith.core.errors import MissingExtraError
from embedsmith.evaluate.mteb.tasks import as_mteb_task, hub_task
from tests.evaluate.examples import small_tasks


def test_what_to_install_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    for ask in (lambda: as_mteb_task(small_tasks()["sts"]), lambda: hub_task("STS12")):
        with pytest.raises(MissingExtraError, match=r"embedsmith\[eval\]"):
            ask()
