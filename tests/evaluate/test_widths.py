"""A model at several widths of its vectors."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from embedsmith.cli import app
from embedsmith.core.errors import EvaluationError
from embedsmith.core.reps import Dense
from embedsmith.evaluate import NarrowEncoder, evaluate, score_widths
from tests.evaluate.examples import NamedEncoder, small_tasks
from tests.evaluate.fakes import TableEncoder, vector

TASKS = [small_tasks()["sts"], small_tasks()["search"]]


def cut(width: int) -> TableEncoder:
    """The same texts with vectors that have only so many numbers, of length 1."""
    sts, search = TASKS
    texts = [*sts.text1, *sts.text2, *search.queries.values(), *search.corpus.values()]
    narrow = {text: vector(text)[:width] for text in texts}
    return TableEncoder({text: (row / row.norm()).tolist() for text, row in narrow.items()})


def test_each_width_scores_as_a_model_of_that_width() -> None:
    columns = score_widths(NamedEncoder(), TASKS, [2, 4]).columns
    assert list(columns) == ["full", "4", "2"]
    for name, encoder in (("full", NamedEncoder()), ("4", cut(4)), ("2", cut(2))):
        for result, expected in zip(columns[name], evaluate(encoder, TASKS), strict=True):
            assert dict(result.scores) == pytest.approx(dict(expected.scores), abs=1e-6)
    assert columns["2"].main_scores() != columns["4"].main_scores()


def test_each_text_is_encoded_once_for_all_widths() -> None:
    encoder = NamedEncoder()
    score_widths(encoder, TASKS, [2, 4])
    alone = NamedEncoder()
    evaluate(alone, TASKS)
    assert encoder.calls == alone.calls


def test_what_was_kept_is_not_encoded_again(tmp_path: Path) -> None:
    first = score_widths(NamedEncoder(), TASKS, [4], cache=tmp_path)
    again = NamedEncoder()
    second = score_widths(again, TASKS, [4], cache=tmp_path)
    assert again.calls == []
    assert {n: r.main_scores() for n, r in first.columns.items()} == {
        n: r.main_scores() for n, r in second.columns.items()
    }


@pytest.mark.parametrize(("widths", "message"), [([8], "8 of 8 numbers"), ([0], "the widths are"), ([], "the widths")])
def test_a_width_the_vectors_do_not_have(widths: list[int], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        score_widths(NamedEncoder(), TASKS, widths)


def test_other_outputs_are_left_as_they_are() -> None:
    narrow = NarrowEncoder(NamedEncoder(), 3)
    rep = narrow.represent(["a"], role="query")["dense"]
    assert isinstance(rep, Dense)
    assert rep.vector_ND.shape == (1, 3)
    assert float(torch.linalg.norm(rep.vector_ND)) == pytest.approx(1.0)
    assert narrow.fingerprint() != NarrowEncoder(NamedEncoder(), 4).fingerprint()


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    named = lambda path, _: NamedEncoder(width=8 if path == "a/b" else 6)
    monkeypatch.setattr("embedsmith.api.evaluating.load_either", named)
    monkeypatch.setattr("embedsmith.models.load", lambda path, **_: named(path, {}))
    rows = [{"text1": f"a {n}", "text2": f"b {n % 3}", "score": n} for n in range(9)]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_evaluate_at_widths(task: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = CliRunner().invoke(app, ["evaluate", "a/b", "--tasks", task, "--dims", "2", "4", "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert list(json.loads(out.read_text())["columns"]) == ["full", "4", "2"]


def test_compare_at_widths(task: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = CliRunner().invoke(app, ["compare", "a/b", "c/d", "-t", task, "--dims", "2,4", "--json", str(out)])
    assert result.exit_code == 0, result.output
    said = json.loads(out.read_text())
    assert list(said["scores"]) == ["a/b", "a/b at 4", "a/b at 2", "c/d", "c/d at 4", "c/d at 2"]
    assert [row["items"] for row in said["differences"]["a/b at 2"]] == [9]


def test_one_model_can_be_compared_with_itself_at_widths(task: str) -> None:
    result = CliRunner().invoke(app, ["compare", "a/b", "-t", task, "--dims", "2"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "options", [["--dims", "wide"], ["--dims", "0"], ["--dims", "2", "--head", "sparse"], ["--dims", "9"]]
)
def test_wrong_widths_are_told(task: str, options: list[str]) -> None:
    result = CliRunner().invoke(app, ["evaluate", "a/b", "-t", task, *options])
    assert result.exit_code != 0
    assert isinstance(result.exception, EvaluationError)
