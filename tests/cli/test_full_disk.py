"""A disk that takes no more, in every verb that writes: one clear message."""

import errno
import os
import resource
from contextlib import contextmanager

import pytest
import torch
import yaml

from embedsmith.core.errors import CheckpointError
from embedsmith.core.files import atomic_file, full_disk
from embedsmith.models import load
from tests.tinybert import tiny_bert

SAID = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "larger than the limit",
}


@contextmanager
def files_of_at_most(count):
    """Python ignores the signal, so that a longer write is an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def place(tmp_path_factory, files):
    """A model of every head, and a recipe of every verb that has one."""
    folder = tmp_path_factory.mktemp("disk")
    heads = ("dense", "sparse", "multivector")
    load(str(tiny_bert(folder / "bert")), pooling="mean", heads=heads, multivector_dim=8, new_heads=True).save(
        folder / "model"
    )
    (folder / "texts.txt").write_text("".join(f"the cat {n}\n" for n in range(40)))
    model, pairs = str(folder / "model"), str(files / "pairs.jsonl")
    numbers = {"steps": 2, "precision": "fp32", "checkpoint_every": 1, "log_with": ["tensorboard"]}
    data = [{"path": pairs, "batch_size": 8}]
    parents = [{"path": model, "id": name} for name in "ab"]
    stage = {"name": "clean", "verb": "curate", "recipe": {"input": {"path": pairs}, "steps": []}}
    recipes = {
        "train": {"model": {"path": model}, "data": data, "train": numbers, "output": str(folder / "run")},
        "mine": {"data": {"path": pairs}, "searchers": [{"type": "bm25"}], "output": str(folder / "mined.jsonl")},
        "merge": {"parents": parents, "base": model, "method": {"type": "slerp"}, "output": str(folder / "merged")},
        "run": {"output": str(folder / "pipeline"), "stages": [stage]},
    }
    for name, tree in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return folder


COMMANDS = {
    "train": "train {place}/train.yaml",
    "mine": "mine {place}/mine.yaml candidates=4 select.negatives=1",
    "merge": "merge {place}/merge.yaml",
    "run": "run {place}/run.yaml",
    "curate": "curate {files}/pairs.jsonl {place}/clean.jsonl --step exact_duplicates",
    "tokenize": "tokenize {files}/pairs.jsonl -m {place}/model -o {place}/tokens",
    "convert": "convert {place}/bert {place}/converted",
    "export": "export {place}/model {place}/exported --head sparse",
    "encode": "encode {place}/texts.txt {place}/vectors --model {place}/model",
    "evaluate": "evaluate {place}/model {files}/scored.jsonl --json {place}/scores.json --items",
    "compare": "compare {place}/model {place}/model/ -t {files}/scored.jsonl --report {place}/compared.html",
    "geometry": "geometry {place}/model -t {place}/texts.txt --json {place}/shape.json",
}


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_file_that_may_not_grow_is_one_message(place, files, typed, verb):
    arguments = COMMANDS[verb].format(place=place, files=files).split()
    with files_of_at_most(400):
        _, err, code = typed(*arguments)
    assert code == 1
    assert SAID[errno.EFBIG] in err
    assert "ulimit -f" in err


@pytest.mark.parametrize("code", SAID)
def test_every_way_a_disk_refuses_is_named(tmp_path, monkeypatch, typed, code):
    def refuse(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(CheckpointError, match=SAID[code]), atomic_file(tmp_path / "a") as file:
        file.write("a")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("embedsmith.cli.app", lambda: refuse(0))
    _, err, exit_code = typed()
    assert (exit_code, SAID[code] in err) == (1, True)


def test_libraries_that_keep_no_reason_are_understood(tmp_path):
    import numpy as np
    from safetensors.torch import save_file

    writers = (
        lambda path: np.zeros(4000).tofile(path),
        lambda path: np.save(path, np.zeros(4000)),
        lambda path: torch.save(torch.zeros(4000), path.open("wb")),
        lambda path: save_file({"a": torch.zeros(4000)}, path),
    )
    for number, write in enumerate(writers):
        with files_of_at_most(400), pytest.raises(Exception) as caught:
            write(tmp_path / f"{number}")
        assert full_disk(caught.value) is not None, repr(caught.value)
    assert full_disk(OSError(errno.ENOENT, "gone")) is None
