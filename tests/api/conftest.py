"""What the examples of the Python API name, in a folder."""

import pytest

import embedsmith


@pytest.fixture
def workplace(bert, files, tmp_path, monkeypatch):
    """A folder with what the examples name, as the current one."""
    for name in ("pairs.jsonl", "scored.jsonl"):
        (tmp_path / name).write_text((files / name).read_text())
    model = embedsmith.load(str(bert), pooling="mean")
    model.save(tmp_path / "my-model")
    for parameter in model.parameters():  # a child: a little away
        parameter.data.mul_(1.01)
    model.save(tmp_path / "other-model")
    monkeypatch.chdir(tmp_path)
    return tmp_path
