"""metrics.jsonl continues where the checkpoint is, not where the process died."""

import json

from embedsmith.train.journal import cut_back


def test_lines_after_the_checkpoint_and_half_lines_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": s / 2}) + "\n" for s in (10, 20, 30)) + '{"step": 40, "lo')
    cut_back(path, 20)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20]


def test_a_missing_file_is_fine(tmp_path):
    cut_back(tmp_path / "metrics.jsonl", 5)
    assert not (tmp_path / "metrics.jsonl").exists()
