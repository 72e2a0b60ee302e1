"""Fixtures of several rooms: a tiny model, two tiny files to train it on, folders of tiny models to merge."""

from __future__ import annotations

import json
import logging
import random

import pytest

import embedsmith.api.evaluating
import embedsmith.index.commands
import embedsmith.index.filling  # noqa: F401  (these know the real `load` before a test puts another in its place)
from embedsmith.cli import main
from tests.disks import read_only, small_disk
from tests.merge.fixtures import folders
from tests.tinybert import WORDS, tiny_bert

__all__ = ["folders", "read_only", "small_disk"]


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """pairs.jsonl (40 retrieval rows with negatives), scored.jsonl (24 sts rows)."""
    folder = tmp_path_factory.mktemp("data")
    chance = random.Random(0)
    text = lambda: " ".join(chance.sample(WORDS, chance.randint(2, 9)))
    pairs = [{"query": text(), "pos": [text()], "neg": [text(), text()]} for _ in range(40)]
    scored = [{"text1": text(), "text2": text(), "score": round(chance.random(), 2)} for _ in range(24)]
    for name, rows in (("pairs", pairs), ("scored", scored)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def tree(bert, files, tmp_path):
    """A recipe as a plain tree: 12 steps of both tasks on the tiny model, checkpoint every 2."""
    return {
        "model": {"path": str(bert), "pooling": "mean"},
        "data": [
            {"path": str(files / "pairs.jsonl"), "batch_size": 8, "negatives": 1},
            {"path": str(files / "scored.jsonl"), "task": "sts", "batch_size": 8, "score_range": [0, 1]},
        ],
        "train": {"steps": 12, "learning_rate": 1e-3, "checkpoint_every": 2, "log_every": 1, "precision": "fp32"},
        "output": str(tmp_path / "run"),
    }


@pytest.fixture
def typed(capsys, monkeypatch):
    """Types a command: what it prints to stdout and stderr, and its exit code."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["embedsmith", *map(str, arguments)])
        root = logging.getLogger()
        kept, root.handlers = root.handlers, []
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            root.handlers = kept
        shown = capsys.readouterr()
        return shown.out, shown.err, ended.value.code

    return run
