"""`embedsmith doctor`: what it finds, and when it complains."""

import json
import re
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from embedsmith.cli import app, doctor
from embedsmith.cli.doctor import Dependency, diagnose


def test_this_machine_is_healthy_and_its_facts_are_there() -> None:
    found = diagnose()
    assert found.healthy
    assert {"torch", "transformers"} <= {package.name for package in found.required}
    assert "mteb" not in {package.name for package in found.required}
    extras = {extra.name: extra for extra in found.extras}
    assert "mteb" in {package.name for package in extras["eval"].packages}
    assert extras["search"].install == 'pip install "embedsmith[search]"'
    assert found.devices[0].name == "cpu"
    assert found.disk_free_gb > 0
    assert any("on the CPU" in line for line in found.advice) == (len(found.devices) == 1)


@pytest.mark.parametrize(
    ("installed", "wanted", "fits"),
    [("2.13.0+cpu", ">=2.9", True), ("2.8", ">=2.9", False), ("3.0rc1", ">=2.9", True), (None, "", False)],
)
def test_a_version_is_held_against_its_floor(installed: str | None, wanted: str, fits: bool) -> None:
    assert Dependency("x", installed, wanted).fits is fits


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions to pretend; `None` for a package that is not installed."""
    pretended: dict[str, str | None] = {}
    real = doctor.version

    def version(name: str) -> str:
        found = pretended.get(name, "")
        if found is None:
            raise PackageNotFoundError(name)
        return found or real(name)

    monkeypatch.setattr(doctor, "version", version)
    return pretended


def test_a_missing_and_an_old_package_are_problems_with_their_fix(versions: dict[str, str | None]) -> None:
    versions |= {"accelerate": None, "transformers": "4.57.0"}
    found = diagnose()
    assert len(found.problems) == 2
    assert any("accelerate is missing" in problem and "pip install" in problem for problem in found.problems)
    assert any(re.search(r"transformers is 4.57.0, >=5\S* is needed", problem) for problem in found.problems)


def test_a_missing_extra_is_no_problem(versions: dict[str, str | None]) -> None:
    versions |= {"mteb": None, "peft": None}
    found = diagnose()
    assert found.healthy
    assert not next(extra for extra in found.extras if extra.name == "lora").fits
    console = Console(width=150, record=True)
    console.print(found.table())
    shown = console.export_text()
    assert 'pip install "embedsmith[lora]"' in shown
    assert all(device.what in shown for device in found.devices)


def test_it_runs_without_torch(versions: dict[str, str | None]) -> None:
    versions["torch"] = None
    assert diagnose().devices == ()


def test_an_old_python_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    assert any("Python is 3.9.1" in problem for problem in diagnose().problems)


@pytest.mark.parametrize("missing", [{}, {"scipy": None}])
def test_the_verb_exits_with_1_when_something_is_missing(missing: Any, versions: dict[str, str | None]) -> None:
    versions |= missing
    as_json = CliRunner().invoke(app, ["doctor", "--json"])
    read = json.loads(as_json.stdout)
    assert as_json.exit_code == CliRunner().invoke(app, ["doctor"]).exit_code == len(missing)
    assert read["healthy"] is not bool(missing)
    assert {"name", "installed", "install", "packages"} <= read["extras"][0].keys()
