"""`embedsmith evaluate` as a user types it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from embedsmith.cli import app
from embedsmith.core.errors import EmbedsmithError
from tests.evaluate.fakes import HashEncoder
from tests.evaluate.test_load import data


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for the models room; keeps what was asked of it."""
    asked: list[Any] = []

    def load(path: str, **options: Any) -> HashEncoder:
        asked.append((path, options))
        return HashEncoder()

    monkeypatch.setattr("embedsmith.models.load", load)
    monkeypatch.setattr("embedsmith.api.evaluating.load_either", lambda path, options: load(path, **options))
    return asked


@pytest.mark.parametrize(
    "tasks",
    [
        ["--tasks", "stsb-en-test", "cranfield"],
        ["--tasks", "stsb-en-test,cranfield"],
        ["--tasks", "stsb-en-test cranfield"],
        ["--tasks", "stsb-en-test", "--tasks", "cranfield"],
        ["-t", "stsb-en-test", "-t", "cranfield"],
        ["stsb-en-test", "cranfield"],
    ],
)
def test_tasks_may_be_listed_in_any_usual_way(tmp_path: Path, loaded: list[Any], tasks: list[str]) -> None:
    out = tmp_path / "out.json"
    folder = str(data(tmp_path / "data"))
    result = CliRunner().invoke(app, ["evaluate", "my-model", *tasks, "--data", folder, "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "stsb-en-test" in result.output
    read = json.loads(out.read_text())
    assert [task["task"] for task in read["tasks"]] == ["stsb-en-test", "cranfield"]
    assert (read["model"], read["engine"]) == ("my-model", "embedsmith")
    assert loaded == [("my-model", {})]


def test_max_length_reaches_the_model_and_items_the_file(tmp_path: Path, loaded: list[Any]) -> None:
    folder, out = data(tmp_path / "data"), tmp_path / "out.json"
    path = str(folder / "retrieval" / "cranfield")
    options = ["--max-length", "256", "--items", "--json", str(out)]
    assert CliRunner().invoke(app, ["evaluate", "m", "--tasks", path, *options]).exit_code == 0
    assert loaded == [("m", {"max_length": 256})]
    assert json.loads(out.read_text())["tasks"][0]["item_ids"] == ["7", "q8"]


@pytest.mark.parametrize("arguments", [["--tasks", "nothing"], [], ["--engine", "magic", "--tasks", "cranfield"]])
def test_a_mistake_is_an_error_of_ours(tmp_path: Path, loaded: list[Any], arguments: list[str]) -> None:
    folder = str(data(tmp_path))
    result = CliRunner().invoke(app, ["evaluate", "m", *arguments, "--data", folder])
    assert result.exit_code != 0
    assert isinstance(result.exception, EmbedsmithError)


def test_options_of_loading_reach_the_model(tmp_path: Path, loaded: list[Any]) -> None:
    path, out = str(data(tmp_path / "data") / "retrieval" / "cranfield"), tmp_path / "out.json"
    said = ["evaluate", "m", "--tasks", f"long:{path}", "model.mcls=256", "model.positions=8192", "--json", str(out)]
    result = CliRunner().invoke(app, said)
    assert result.exit_code == 0, result.output
    assert loaded == [("m", {"mcls": 256, "positions": 8192})]
    assert json.loads(out.read_text())["mcls"] == 256


def test_models_are_compared_under_the_same_options(tmp_path: Path, loaded: list[Any]) -> None:
    path = str(data(tmp_path / "data") / "retrieval" / "cranfield")
    result = CliRunner().invoke(app, ["compare", "a/b", "c/d", "model.pooling=mean", "-t", path])
    assert result.exit_code == 0, result.output
    assert loaded == [("a/b", {"pooling": "mean"}), ("c/d", {"pooling": "mean"})]
