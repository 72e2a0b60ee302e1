"""metrics.jsonl continues where the checkpoint is, not where the process died."""

import json
from types import SimpleNamespace

from embedsmith.train import journal
from embedsmith.train.journal import cut_back


def test_lines_after_the_checkpoint_and_half_lines_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": s / 2}) + "\n" for s in (10, 20, 30)) + '{"step": 40, "lo')
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
