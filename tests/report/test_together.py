"""The section of a report that says how the tasks of a run got on."""

import json
import re

import pytest

from embedsmith.report import folder_page
from embedsmith.report.together import conflict_table, forgetting_words, losses_by_task

pytest.importorskip("plotly", reason="needs plotly: pip install 'embedsmith[report]'")

LINES = [
    {"step": 2, "cosine/a~b": 0.5, "cosine/a~b/layers 0-1": 0.1, "cosine/a~a": 0.9, "conflict_share/a~b": 0.25},
    {"step": 4, "cosine/a~b": -0.3, "cosine/a~b/layers 0-1": -0.3, "forgetting/probe": -0.01},
    {"step": 6, "cosine/a~b": -0.5, "conflict_time": 0.0123, "forgetting/probe": 0.0204, "weight/a": 2.0},
]


def test_conflicts_are_means_and_shares_by_pair_and_layer_group():
    rows = re.findall("<tr>(.*?)</tr>", conflict_table(LINES))
    cells = [[re.sub("<[^>]*>", "", cell) for cell in re.findall("<t[hd].*?</t[hd]>", row)] for row in rows]
    assert cells[0] == ["gradients of", "measured", "mean cosine", "below 0", "layers 0-1"]
    assert cells[1] == ["a and b", "3", "-0.100", "67%", "-0.100"]
    assert cells[2] == ["a and a", "1", "+0.900", "0%", ""]


def test_forgetting_is_said_by_the_last_scores():
    assert forgetting_words(LINES) == ["On the probe <b>probe</b> the model lies 2.04 points below its start."]
    assert "above" in forgetting_words(LINES[:2])[0]


def test_losses_of_a_task_are_the_mean_of_its_sources_where_it_has_several():
    lines = [{"step": 1, "loss/a": 1.0, "loss/b": 3.0}, {"step": 2, "loss/b": 5.0, "loss/s": 7.0}, {"step": 3}]
    task_of = {"a": "retrieval", "b": "retrieval", "s": "sts"}
    assert losses_by_task(lines, task_of) == [
        {"step": 1, "task_loss/retrieval": 2.0},
        {"step": 2, "task_loss/retrieval": 5.0, "task_loss/sts": 7.0},
    ]
    assert losses_by_task(lines, {"a": "retrieval", "s": "sts"}) == []
    assert losses_by_task(lines, {"a": "sts", "s": "sts"}) == []


def test_the_report_of_a_run_has_the_section(tmp_path):
    (tmp_path / "recipe.yaml").write_text("train: {}\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    text = folder_page(tmp_path)
    assert "<h2>Tasks together</h2>" in text
    words = (
        "Cosine between the gradients of",
        "Weights by the rule",
        "Measuring took 1.23% of the time",
        "2.04 points",
    )
    for word in words:
        assert word in text, word
    assert "Parts of the loss on a" not in text, "a weight is no part of a loss"
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss/a": 1.0}) + "\n")
    assert "Tasks together" not in folder_page(tmp_path)
