"""Results: what they hold, print and write."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from embedsmith.core.errors import CheckpointError, EvaluationError
from embedsmith.core.shelf import metrics, task_kinds
from embedsmith.evaluate import Results, evaluate, load_task
from tests.evaluate.fakes import ConstantEncoder, HashEncoder
from tests.evaluate.test_tasks import PAIRS, collection


def results() -> Results:
    return evaluate(HashEncoder(), [PAIRS, collection()], about={"model": "hash"})


def test_results_are_found_by_place_and_by_name() -> None:
    found = results()
    assert len(found) == 2
    assert found["small"] is found[1]
    assert [result.task for result in found] == ["pairs", "small"]
    assert found.main_scores() == {
        "pairs": found[0].scores["cosine_spearman"],
        "small": found[1].scores["ndcg_at_10"],
    }
    with pytest.raises(KeyError):
        found["missing"]


def test_json_holds_everything_and_an_undefined_score_is_null(tmp_path: Path) -> None:
    evaluate(ConstantEncoder(), [PAIRS]).save(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["tasks"][0]["scores"]["cosine_spearman"] is None
    results().save(tmp_path / "r.json", items=True)
    read = json.loads((tmp_path / "r.json").read_text())
    assert read["model"] == "hash"
    assert read["tasks"][1]["main_score"] == results()[1].main_score
    assert len(read["tasks"][1]["items"]["ndcg_at_10"]) == len(read["tasks"][1]["item_ids"]) == 10
    assert "items" not in results().as_dict()["tasks"][1]


def test_results_that_cannot_be_written_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError):
        results().save(tmp_path / "file" / "r.json")
    with pytest.raises(EvaluationError, match="folder"):
        results().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_table_shows_scores_times_100_and_says_undefined() -> None:
    out = io.StringIO()
    Console(file=out, width=200).print(results().table())
    assert f"{100 * results()['small'].main_score:.2f}" in out.getvalue()
    Console(file=out, width=200).print(evaluate(ConstantEncoder(), [PAIRS]).table())
    assert "undefined" in out.getvalue()


def test_no_tasks_and_one_name_twice_are_errors() -> None:
    with pytest.raises(EvaluationError, match="no tasks"):
        evaluate(HashEncoder(), [])
    with pytest.raises(EvaluationError, match="two tasks are called 'pairs'"):
        evaluate(HashEncoder(), [PAIRS, PAIRS])


def test_a_task_and_a_metric_of_ones_own_run_as_the_docs_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shelf in (metrics, task_kinds):
        shelf.names()
        monkeypatch.setattr(shelf, "_entries", dict(shelf._entries))
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.S) if "@" in block]
    names: dict[str, Any] = {}
    exec(_IMPORTS + "\n".join(blocks), names)  # noqa: S102 (our own page)
    task = names["NearDuplicates"]("mine", [("a", "a"), ("a", "b")])
    assert evaluate(HashEncoder(), [task])[0].main_score == 0.5
    (tmp_path / "mine.jsonl").write_text('{"left": "a", "right": "a"}\n{"left": "a", "right": "b"}\n')
    assert load_task("mine", data_dir=tmp_path) == load_task("duplicates:mine", data_dir=tmp_path) == task
    scores = [result.scores for result in evaluate(HashEncoder(), [PAIRS, collection()])]
    assert "cosine_gap" in scores[0]
    assert "gain_of_first_at_10" in scores[1]


_IMPORTS = """
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from embedsmith.core.shelf import task_kinds
from embedsmith.data.formats.file_kinds import sound_rows
from embedsmith.evaluate.encoding import Reader
from embedsmith.evaluate.result import TaskResult
from embedsmith.evaluate.tasks.kinds import Format, TaskKind, has_columns
"""
