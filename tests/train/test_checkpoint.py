"""A checkpoint is checked before a resume: whatever is wrong with it is named, and the fix that is told works."""

import json
import re
import shlex
import shutil
import subprocess

import pytest
import torch
from torch import nn

from embedsmith.cli import main
from embedsmith.core.errors import CheckpointError
from embedsmith.core.recipe import parse, save_recipe
from embedsmith.train import Recipe, loop
from embedsmith.train.checkpoint import FILES, Checkpoints
from tests.train.test_loop import run


@pytest.fixture(scope="module")
def stopped(bert, files, tmp_path_factory):
    """A run of 6 steps that was stopped in step 5: checkpoints after steps 2 and 4."""
    tree = {
        "model": {"path": str(bert), "pooling": "mean"},
        "data": [{"path": str(files / "pairs.jsonl"), "batch_size": 8, "negatives": 1}],
        "train": {"steps": 6, "checkpoint_every": 2, "log_with": [], "precision": "fp32"},
        "output": str(tmp_path_factory.mktemp("stopped") / "run"),
    }
    update = loop.update
    loop.update = lambda run_, draw: update(run_, draw) if run_.state.step < 5 else 1 / 0
    try:
        with pytest.raises(ZeroDivisionError):
            run(tree)
    finally:
        loop.update = update
    return tree


@pytest.fixture
def again(stopped, tmp_path):
    """The stopped run, in a folder of its own."""
    tree = stopped | {"output": str(tmp_path / "run")}
    shutil.copytree(stopped["output"], tree["output"])
    save_recipe(parse(Recipe, tree), tmp_path / "run" / "recipe.yaml")
    return tree


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def turn(path):
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def as_list(path):
    torch.save([1, 2], path) if path.suffix == ".pt" else path.write_text("[1, 2]")


def lie(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 2}))


def wordy(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": "4"}))


DAMAGE = [
    *[(name, how) for name in ("state.json", "training.pt", FILES) for how in (empty, as_list, cut)],
    *[("state.json", lie), ("state.json", wordy)],
    *[("model/model.safetensors", how) for how in (empty, cut, turn)],
    *[("model/config.json", how) for how in (empty, as_list)],
    *[(name, lambda path: path.unlink()) for name in ("model/tokenizer.json", "training.pt")],
]


@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=lambda one: getattr(one, "__name__", one))
def test_every_damage_is_named_before_anything_is_built(again, name, damage):
    checkpoints = Checkpoints(loop.Path(again["output"]), 2)
    damage(checkpoints.path(4) / name)
    with pytest.raises(CheckpointError) as found:
        checkpoints.open(parse(Recipe, again), overwrite=False)
    assert f"step-4/{name}: the checkpoint cannot be read" in str(found.value)
    subprocess.run(shlex.split(re.search(r"to fix: (rm -r .*);", str(found.value))[1]), check=True)
    assert "goes on from step 2" in str(found.value)
    assert checkpoints.open(parse(Recipe, again), overwrite=False) == 2


@pytest.mark.parametrize(("name", "damage"), DAMAGE[:5] + DAMAGE[9:11], ids=lambda one: getattr(one, "__name__", one))
def test_a_checkpoint_without_hashes_is_read_with_the_same_care(again, name, damage):
    """As older versions wrote them, or where someone wrote the hashes anew."""
    checkpoints = Checkpoints(loop.Path(again["output"]), 2)
    (checkpoints.path(4) / FILES).unlink()
    damage(checkpoints.path(4) / name)
    assert checkpoints.open(parse(Recipe, again), overwrite=False) == 4
    with pytest.raises(CheckpointError, match=f"step-4/{name}: the checkpoint cannot be read"):
        checkpoints.load(4, nn.ModuleDict(), torch.optim.AdamW([nn.Parameter(torch.zeros(1))]))


def test_an_empty_file_is_one_error_of_the_command(again, tmp_path, capsys, monkeypatch):
    save_recipe(parse(Recipe, again), tmp_path / "recipe.yaml")
    for step in (2, 4):
        (tmp_path / "run" / "checkpoints" / f"step-{step}" / FILES).unlink()
        empty(tmp_path / "run" / "checkpoints" / f"step-{step}" / "training.pt")
    monkeypatch.setattr("sys.argv", ["embedsmith", "train", str(tmp_path / "recipe.yaml")])
    for begins in ("goes on from step 2", "starts anew"):
        with pytest.raises(SystemExit) as code:
            main()
        message = capsys.readouterr().err
        assert code.value.code == 1
        assert "Aborted" not in message
        assert begins in message
        subprocess.run(shlex.split(re.search(r"to fix: (rm -r .*);", message)[1]), check=True)
    with pytest.raises(SystemExit) as code:
        main()
    assert code.value.code == 0


def test_a_best_checkpoint_that_is_gone_is_chosen_anew(again, tmp_path, caplog):
    state = tmp_path / "run" / "checkpoints" / "step-4" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"best_step": 1, "best_score": 0.5}))
    (state.parent / FILES).unlink()
    run(again)
    assert "the best checkpoint so far, step 1, is gone" in caplog.text
    assert json.loads((tmp_path / "run" / "finished.json").read_text())["best_step"] is None


def test_a_run_goes_on_under_a_version_with_more_keys(again, tmp_path):
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("  max_skipped_steps: 10\n", ""))
    assert "max_skipped_steps" not in recipe.read_text()
    assert Checkpoints(tmp_path / "run", 2).open(parse(Recipe, again), overwrite=False) == 4


def test_what_a_kill_at_the_very_start_left_goes(tmp_path):
    theirs = tmp_path / "run" / ".git" / ".index.abcd1234.tmp"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    (tmp_path / "run" / ".recipe.yaml.abcd1234.tmp").touch()
    assert Checkpoints(tmp_path / "run", 2).open(None, overwrite=False) is None
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".git"]
    assert theirs.exists()


def test_one_checkpoint_an_epoch_is_kept(bert, files, tmp_path):
    tree = {
        "model": {"path": str(bert), "pooling": "mean"},
        "data": [{"path": str(files / "pairs.jsonl"), "batch_size": 8, "negatives": 1}],
        "train": {"epochs": 2, "checkpoint_every": "epoch", "keep_checkpoints": 2, "log_with": []},
        "output": str(tmp_path / "run"),
    }
    run(tree)
    steps = sorted(int(path.name.partition("-")[2]) for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert len(steps) == 2
    assert steps[1] == 2 * steps[0]
