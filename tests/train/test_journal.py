"""metrics.jsonl continues where the checkpoint is, not where the process died, and holds means of what was measured."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from embedsmith.core.errors import CheckpointError
from embedsmith.train import journal
from embedsmith.train.journal import Journal, Meter, cut_back
from embedsmith.train.step import StepOutput
from tests.core.test_files import tiny_disk


def test_lines_after_the_checkpoint_and_half_lines_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "loss": s / 2}) + "\n" for s in (10, 20, 30)]
    path.write_text('{"step": 5, "lo\n[1]\n' + "".join(lines) + '{"step": 40, "lo')
    cut_back(path, 20)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20]


def test_a_missing_file_is_fine(tmp_path):
    cut_back(tmp_path / "metrics.jsonl", 5)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_share_of_the_time_spent_waiting_for_data_is_told(monkeypatch):
    """A source that takes three times as long for a step as the model does."""
    now, notes = [0.0], []
    monkeypatch.setattr(journal, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    meter, bar = journal.Meter(), SimpleNamespace(note=notes.append)

    def source(seconds):
        for step in range(5):
            now[0] += seconds
            yield step

    for seconds, share in ((3.0, 0.75), (0.0, 0.0)):  # the second report is of what came since the first
        for _ in meter.waiting(source(seconds)):
            now[0] += 1.0
        assert meter.report(0.1, 1.0, bar)["wait"] == share
    assert [note.rsplit(" · ", 1)[1] for note in notes] == ["75% waiting for data", "0% waiting for data"]


def nobody():
    """As an accelerator with one tracker: what was logged, and whether the tracker was told of the end."""
    logged, ended = [], []
    tracker = SimpleNamespace(finish=lambda: ended.append(True))
    log = lambda values, step: logged.append((step, values))
    return SimpleNamespace(log=log, trackers=[tracker]), logged, ended


def test_a_line_is_there_at_once_and_every_tracker_is_closed(tmp_path, caplog):
    accelerator, logged, ended = nobody()
    journal = Journal(tmp_path, accelerator, {}, (), 0)
    for step, loss in ((1, 0.5), (2, math.nan), (3, math.inf)):
        journal.write(step, {"loss": loss, "rate": 0.1})
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step
    assert logged == [(1, {"loss": 0.5, "rate": 0.1}), (2, {"rate": 0.1}), (3, {"rate": 0.1})]
    assert caplog.text.count("not finite") == 1
    assert "step 2: not finite and so left out of metrics.jsonl: loss" in caplog.text
    assert not ended
    journal.close()
    assert ended == [True]


def test_a_tracker_that_is_not_installed_is_one_line_and_the_run_goes_on(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(journal, "get_available_trackers", list)
    accelerator, _, _ = nobody()
    accelerator.init_trackers = lambda *names, **options: None
    with caplog.at_level("INFO", "embedsmith"):
        Journal(tmp_path, accelerator, {}, ("tensorboard",), 0).close()
    told = [record.getMessage() for record in caplog.records]
    assert told == ["no curves in tensorboard, which is not installed (pip install tensorboard); metrics.jsonl has all"]
    assert (tmp_path / "metrics.jsonl").exists()


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    with tiny_disk(tmp_path) as disk:
        journal = Journal(disk, nobody()[0], {}, (), 0)
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: no space left"):
            for step in range(100_000):
                journal.write(step, {"loss": 0.5})


def test_a_report_holds_the_means_since_the_last_one_and_what_was_padded():
    meter, notes = Meter(), []
    bar = SimpleNamespace(note=notes.append)
    for values, tokens, padded in (([1.0, 2.0], 6, 10), ([4.0, 5.0], 9, 10)):
        parts = {"a": {"loss": torch.tensor(values, dtype=torch.bfloat16), "count": torch.tensor(3)}}
        meter.add(StepOutput(torch.tensor(0.0), parts, tokens, padded, 0))
    report = meter.report(0.25, 2.0, bar)
    assert {key: report[key] for key in ("loss/a", "count/a", "learning_rate", "gradient_norm")} == {
        "loss/a": 3.0,
        "count/a": 3.0,
        "learning_rate": 0.25,
        "gradient_norm": 2.0,
    }
    assert report["padding_share"] == 0.25
    assert report["tokens_per_second"] > 0
    assert "loss a 3.000 · lr 2.5e-01" in notes[0]
    values = torch.tensor([256.0, 257.0, 258.0]).to(torch.float16).requires_grad_()  # their mean in 16 bits is another
    meter.add(StepOutput(torch.tensor(0.0), {"a": {"loss": values * 100}}, 1, 1, 0))
    report = meter.report(0.25, 2.0, bar)
    assert report["loss/a"] == pytest.approx(float((values * 100).float().mean()), abs=1e-3)
    assert "count/a" not in report
    assert report["padding_share"] == 0
