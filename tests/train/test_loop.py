"""Whole runs on a tiny model: what they write, how they stop, continue, refuse and fail."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import embedsmith
from embedsmith.core.errors import CheckpointError, DataError, RecipeError, TrainingError
from embedsmith.core.recipe import parse
from embedsmith.train import Recipe, loop, rehearse, train
from embedsmith.train.checkpoint import Checkpoints
from embedsmith.train.scoring import Development
from tests.core.test_files import tiny_disk
from tests.ranks import on_ranks
from tests.tinybert import tiny_bert


def run(tree, **changes):
    return train(parse(Recipe, tree | changes))


def weights(output):
    return load_file(Path(output) / "model" / "model.safetensors")


def assert_equal_weights(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def metrics(output):
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_trains_and_leaves_a_model_metrics_and_recipe(tree, tmp_path, bert):
    model_folder = run(tree)
    output = tmp_path / "run"
    assert model_folder == output / "model"
    before, after = embedsmith.load(str(bert), pooling="mean"), embedsmith.load(str(model_folder))
    texts = ["the cat sat", "a dog ran"]
    assert abs(before.encode(texts) - after.encode(texts)).max() > 1e-3
    lines = metrics(output)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert {key for line in lines for key in line} >= {
        "loss/pairs",
        "loss/scored",
        "learning_rate",
        "tokens_per_second",
    }
    assert yaml.safe_load((output / "recipe.yaml").read_text())["train"]["steps"] == 12
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["step-10", "step-12"]
    assert list(output.rglob("events.out.tfevents*"))


def test_the_loss_falls(tree):
    run(tree, data=tree["data"][:1], train=tree["train"] | {"steps": 60, "learning_rate": 5e-3, "log_with": []})
    losses = [line["loss/pairs"] for line in metrics(tree["output"])]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


@pytest.mark.parametrize("stop_at", [3, 4, 7])
def test_a_run_that_dies_and_continues_ends_with_the_same_bits(tree, tmp_path, monkeypatch, stop_at):
    """Dropout is on, so random states must be restored; step 3 and 7 die between checkpoints."""
    run(tree, output=str(tmp_path / "whole"))
    update = loop.update

    def dying(run_, parts):
        if run_.state.step == stop_at:
            raise KeyboardInterrupt
        return update(run_, parts)

    monkeypatch.setattr(loop, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tree)
    monkeypatch.setattr(loop, "update", update)
    run(tree)
    assert_equal_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(tmp_path / "whole"), strict=True):
        timed = {"tokens_per_second": 0, "wait": 0}
        assert ours | timed == theirs | timed


def command(recipe, *arguments):
    return [sys.executable, "-c", "from embedsmith.cli import main; main()", "train", str(recipe), *arguments]


def wait_for_step(output, step, process):
    while max(Checkpoints(output, keep=1).steps(), default=0) < step:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)


@pytest.mark.slow  # one kill of every verb is in tests/faults
def test_kill_minus_nine_twice_ends_with_the_same_bits(tree, tmp_path):
    """All runs are commands of their own: bits also depend on the number of threads, which other tests may change."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree | {"train": tree["train"] | {"log_with": [], "steps": 80}}))
    subprocess.run(command(recipe, f"output={tmp_path / 'whole'}"), check=True, capture_output=True)
    for step in (2, 20):
        with subprocess.Popen(command(recipe), stderr=subprocess.DEVNULL) as process:
            wait_for_step(tmp_path / "run", step, process)
            os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "run" / "finished.json").exists()
    last = subprocess.run(command(recipe), capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stderr
    assert_equal_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_ctrl_c_finishes_the_step_and_saves(tree, tmp_path, monkeypatch):
    update, before = loop.update, signal.getsignal(signal.SIGINT)  # ignored in a shell's background jobs

    def interrupting(run_, parts):
        if run_.state.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return update(run_, parts)

    monkeypatch.setattr(loop, "update", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run(tree)
    assert (tmp_path / "run" / "checkpoints" / "step-5").is_dir()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_at_once(tree, tmp_path, monkeypatch):
    def interrupting(run_, parts):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(loop, "update", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run(tree)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_finished_run_is_left_as_it_is_unless_told(tree, tmp_path, caplog):
    model = run(tree)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    (tmp_path / "run" / ".report.html.abcd1234.tmp").touch()  # of a kill while the page was written
    with caplog.at_level("INFO", "embedsmith"):
        assert run(tree) == model
    assert "finished before" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    with pytest.raises(CheckpointError, match=r"train.seed: 0 -> 1"):
        run(tree, train=tree["train"] | {"seed": 1})
    (model / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"(?s)its model is gone.*--overwrite"):
        run(tree)
    train(parse(Recipe, tree), overwrite=True)


def test_a_kill_while_a_checkpoint_is_pruned_leaves_no_half_of_it(tree, tmp_path, monkeypatch):
    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("embedsmith.core.outputs._remove", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tree, train=tree["train"] | {"keep_checkpoints": 1})
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.glob("step-*")] == ["step-4"]
    assert len(list(folder.glob(".step-2.*.tmp"))) == 1
    stranger = tmp_path / "run" / "model" / "notes.md"  # told before the training that would end there
    stranger.parent.mkdir()
    stranger.write_text("mine")
    with pytest.raises(CheckpointError, match="holds no model"):
        run(tree, train=tree["train"] | {"keep_checkpoints": 1})
    stranger.unlink()
    run(tree, train=tree["train"] | {"keep_checkpoints": 1})
    assert [path.name for path in folder.iterdir()] == ["step-12"]


def test_another_recipe_in_the_same_folder_is_refused_with_the_difference(tree, monkeypatch):
    monkeypatch.setattr(loop, "run_steps", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tree)
    with pytest.raises(CheckpointError, match=r"train.learning_rate: 0.001 -> 0.002"):
        run(tree, train=tree["train"] | {"learning_rate": 2e-3})


def test_a_folder_that_holds_something_else_is_never_touched(tree, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="holds no run"):
            train(parse(Recipe, tree), overwrite=overwrite)
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_a_broken_checkpoint_is_named_and_the_one_before_still_works(tree, tmp_path, monkeypatch):
    update = loop.update
    monkeypatch.setattr(loop, "update", lambda r, p: update(r, p) if r.state.step < 5 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tree)
    monkeypatch.setattr(loop, "update", update)
    last = tmp_path / "run" / "checkpoints" / "step-4"
    (last / "training.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"(?s)step-4.*cannot be read"):
        run(tree)
    for path in sorted(last.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    last.rmdir()
    run(tree)


def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on_when_there_is_room(tree, tmp_path, monkeypatch):
    update = loop.update
    settings = tree["train"] | {"log_with": []}
    run(tree, train=settings, output=str(tmp_path / "whole"))
    with tiny_disk(tmp_path) as disk:
        filler = disk / "filler"

        def filling(run_, parts):
            if run_.state.step == 4:
                filler.write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - 20_000))
            return update(run_, parts)

        monkeypatch.setattr(loop, "update", filling)
        with pytest.raises(CheckpointError, match="no space left"):
            run(tree, train=settings, output=str(disk / "run"))
        assert sorted(path.name for path in (disk / "run" / "checkpoints").iterdir()) == ["step-2", "step-4"]
        filler.unlink()
        monkeypatch.setattr(loop, "update", update)
        run(tree, train=settings, output=str(disk / "run"))
        assert_equal_weights(weights(disk / "run"), weights(tmp_path / "whole"))


def test_a_value_that_is_not_finite_stops_with_the_checkpoint_intact(tree, tmp_path, monkeypatch):
    update = loop.update

    def breaking(run_, parts):
        if run_.state.step == 5:
            with torch.no_grad():
                next(run_.model.parameters()).fill_(float("nan"))
        return update(run_, parts)

    monkeypatch.setattr(loop, "update", breaking)
    with pytest.raises(TrainingError, match="step 5"):
        run(tree)
    monkeypatch.setattr(loop, "update", update)
    run(tree)


def test_a_score_that_is_not_finite_is_never_the_best(tree, files, tmp_path, monkeypatch):
    monkeypatch.setattr(Development, "_overall", lambda self, scores: math.nan)
    evaluate = {"tasks": [str(files / "scored.jsonl")], "every": 2}
    run(tree, evaluate=evaluate, train=tree["train"] | {"steps": 4, "final": "best"})
    finished = json.loads((tmp_path / "run" / "finished.json").read_text())
    assert (finished["best_step"], finished["best_score"]) == (None, None)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-4" / "state.json").read_text())
    assert (state["best_score"], state["evaluations_without_gain"]) == (None, 2)


def test_evaluation_validation_best_checkpoint_and_early_stop(tree, files, tmp_path):
    scored = str(files / "scored.jsonl")
    evaluate = {
        "tasks": [scored],
        "every": 2,
        "metric": scored,
        "patience": 2,
        "validation": [{"path": scored, "task": "sts", "name": "held", "batch_size": 8, "score_range": [0, 1]}],
    }
    constant = tree["train"] | {"learning_rate": 1e-12, "weight_decay": 0.0, "steps": 20, "final": "best"}
    run(tree, evaluate=evaluate, train=constant)
    before, *lines = [line for line in metrics(tmp_path / "run") if "score/scored" in line]
    assert (before["step"], lines[0]["step"]) == (0, 2)
    assert lines[-1]["step"] < 20, "weights that do not move cannot improve three times"
    assert all("validation_loss/held" in line for line in lines)
    finished = json.loads((tmp_path / "run" / "finished.json").read_text())
    best = max(lines, key=lambda line: line["score/scored"])
    assert finished["best_score"] == pytest.approx(best["score/scored"])
    checkpoint = load_file(
        tmp_path / "run" / "checkpoints" / f"step-{finished['best_step']}" / "model" / "model.safetensors"
    )
    assert_equal_weights(weights(tmp_path / "run"), checkpoint)
    kept = json.loads((tmp_path / "run" / "evaluation" / "after.json").read_text())
    assert kept["tasks"][0]["main_score"] == pytest.approx(finished["best_score"])
    assert "<h2>Scores</h2>" in (tmp_path / "run" / "report.html").read_text()
    assert "## Scores" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_a_log_has_a_line_every_so_many_steps_and_the_scores_at_the_end(tree, files, tmp_path):
    tree |= {"evaluate": {"tasks": [str(files / "scored.jsonl")]}}
    tree["train"] |= {"steps": 4, "log_every": 2}
    tree["model"]["max_length"] = 8
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tree))
    command = [sys.executable, "-m", "embedsmith", "train", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = [line for line in done.stderr.splitlines() if line.startswith("train ")]
    assert [line.split(" · ")[0] for line in told] == ["train 2/4", "train 4/4"]
    assert re.fullmatch(r"train 2/4 · loss .*\d\.\d{3}.* · lr \S+ · [\d,]+ tokens/s.* · \d+ s left", told[0])
    assert re.search(r"source pairs: [\d.]+% of the texts are longer than the 8 tokens of max_length", done.stderr)
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr
    assert "%|" not in done.stderr
    table = done.stderr[done.stderr.index("┏") :]
    assert [word in table for word in ("scored", "before", "after", "change")] == [True] * 4
    assert str(files) not in table
    assert done.stdout == f"model: {tmp_path / 'run' / 'model'}\n"


def test_scores_at_widths_are_logged_and_leave_the_choice_to_the_whole_vectors(tree, files, tmp_path):
    scored = str(files / "scored.jsonl")
    run(tree, evaluate={"tasks": [scored], "dims": [4, 8]})
    lines = [line for line in metrics(tmp_path / "run") if "score/scored" in line]
    assert len(lines) == 2
    for line in lines:
        values = [line[f"score/scored{end}"] for end in ("", "/8", "/4")]
        assert len(set(values)) == 3
    finished = json.loads((tmp_path / "run" / "finished.json").read_text())
    assert finished["best_score"] == pytest.approx(lines[-1]["score/scored"])


def test_a_dry_run_writes_nothing_and_says_what_would_be_done(tree, tmp_path):
    tree["data"][1]["loss"] = {"type": "cosent", "temperature": 0.1}
    text = rehearse(parse(Recipe, tree))
    assert not (tmp_path / "run").exists()
    patterns = [
        rf"model: {tree['model']['path']}, [\d,]+ parameters, texts of up to 32 tokens",
        r"source pairs: retrieval, 40 rows, 5 steps of 8 an epoch.*",
        r"source scored: sts, 24 rows, 3 steps of 8 an epoch.*",
        r"  loss: infonce",
        r"  loss: cosent, temperature 0\.1",
        r"  no text is longer than the 32 tokens of max_length",
        r"steps: 12, of which 8 are an epoch, at a learning rate of up to 0\.001",
        r"on: 1 process, cpu, fp32",
        r"memory: 2,048 padded tokens are encoded at once; all graphs of a step are kept",
        r"evaluated: nothing: evaluate\.tasks is empty",
        r"a rank holds [\d.]+ kB \(weights [\d.]+ kB, gradients [\d.]+ kB, optimizer [\d.]+ kB, activations .*\)",
        r"  its graphs: [\d,]+ tokens of the first step at once, [\d.]+ kB each, measured here",
        r"  on 8 ranks: train\.shard=false [\d.]+ kB, train\.shard=true [\d.]+ kB, train\.shard=zero2 [\d.]+ kB",
        r"the first step was taken: loss \d\.\d{4}, learning rate 5.00e-04, gradient norm [\d.]+, \d+ tokens",
        rf"nothing was written; a run would write to {tmp_path}/run",
    ]
    lines = text.splitlines()
    for pattern in patterns:
        assert [line for line in lines if re.fullmatch(pattern, line)], pattern


def test_a_learnable_temperature_moves_and_survives_a_stop(tree, tmp_path, monkeypatch):
    data = [tree["data"][0] | {"loss": {"type": "infonce", "learn_temperature": True, "temperature": 0.05}}]
    run(tree, data=data, output=str(tmp_path / "whole"))
    update = loop.update
    monkeypatch.setattr(loop, "update", lambda r, p: update(r, p) if r.state.step < 7 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tree, data=data)
    monkeypatch.setattr(loop, "update", update)
    run(tree, data=data)
    assert_equal_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    saved = [
        torch.load(tmp_path / name / "checkpoints" / "step-12" / "training.pt", weights_only=True)["extras"]
        for name in ("run", "whole")
    ]
    assert_equal_weights(*saved)
    assert next(iter(saved[0].values())).item() != pytest.approx(torch.tensor(0.05).log().item())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"output": None}, RecipeError, "output"),
        ({"trian": {}}, RecipeError, "'train'"),
        ({"data": []}, RecipeError, "at least one source"),
        ({"data": [{"path": "missing.jsonl"}]}, DataError, "missing.jsonl"),
        ({"train": {"final": "best"}}, RecipeError, "evaluate.held_out"),
        ({"evaluate": {"metric": "x"}}, RecipeError, "metric"),
    ],
)
def test_mistakes_in_a_recipe_are_found_before_anything_is_written(tree, tmp_path, change, error, words):
    with pytest.raises(error, match=words):
        run(tree, **change)
    assert not (tmp_path / "run").exists(), "the corrected recipe must be able to start"


def test_a_pair_loss_on_rows_without_scores_is_refused(tree):
    with pytest.raises(RecipeError, match="needs a score"):
        run(tree, data=[tree["data"][0] | {"loss": "cosent"}])


def test_a_head_the_model_lacks_is_named_before_the_first_step(tree, tmp_path):
    data = [tree["data"][0] | {"loss": {"type": "infonce", "head": "sparse"}}]
    with pytest.raises(RecipeError, match=r"(?s)'sparse'.*model.heads=\[dense, sparse\]"):
        run(tree, data=data)
    assert not (tmp_path / "run").exists()


def losses(output):
    return [{k: v for k, v in line.items() if k.startswith("loss/")} for line in metrics(output)]


def assert_same_losses(left, right):
    for one, other in zip(losses(left), losses(right), strict=True):
        assert one == pytest.approx(other, abs=2e-5)


@pytest.fixture
def plain(tree, tmp_path):
    """The recipe without dropout, 8 rows a step, for 6 steps."""
    bert = tiny_bert(tmp_path / "plain", dropout=0.0)
    settings = tree["train"] | {"steps": 6, "log_with": []}
    return tree | {"model": {"path": str(bert), "pooling": "mean"}, "train": settings}


def test_gradient_checkpointing_changes_no_loss(plain, tmp_path):
    run(plain, output=str(tmp_path / "whole"))
    run(plain, model=plain["model"] | {"gradient_checkpointing": True})
    assert_same_losses(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("memory", [{"micro_batch": 1}, {"micro_batch": 7}, {"micro_batch": 64}, {"token_budget": 20}])
def test_the_losses_of_a_run_do_not_depend_on_the_memory(plain, tmp_path, memory):
    run(plain, output=str(tmp_path / "whole"))
    run(plain, train=plain["train"] | memory)
    assert_same_losses(tmp_path / "run", tmp_path / "whole")


def on_cpu(tree):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    train(parse(Recipe, tree))


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_equal_one(plain, tmp_path, world):
    """1 x 8, 2 x 4 and 4 x 2 rows: the same losses at every step and the same weights, to rounding."""
    run(plain, output=str(tmp_path / "one"))
    on_ranks(world, on_cpu, tmp_path, plain | {"output": str(tmp_path / "several")})
    assert_same_losses(tmp_path / "several", tmp_path / "one")
    one, several = weights(tmp_path / "one"), weights(tmp_path / "several")
    for name, tensor in one.items():
        torch.testing.assert_close(several[name], tensor, rtol=0, atol=2e-5)


def test_a_run_with_evaluations_ends_with_the_weights_of_one_without(tree, files, tmp_path):
    """With dropout: whatever measures leaves the model in train mode and draws nothing."""
    scored = str(files / "scored.jsonl")
    held = {"path": scored, "task": "sts", "name": "held", "batch_size": 8, "score_range": [0, 1]}
    short = tree["train"] | {"steps": 6, "log_with": []}
    run(tree, train=short, output=str(tmp_path / "without"))
    run(tree, train=short, evaluate={"tasks": [scored], "every": 2, "geometry": 10, "dims": [4], "validation": [held]})
    assert_equal_weights(weights(tmp_path / "run"), weights(tmp_path / "without"))
    run(tree, train=short, evaluate={"every": 2, "validation": [held]}, output=str(tmp_path / "losses"))
    assert_equal_weights(weights(tmp_path / "losses"), weights(tmp_path / "without"))


def test_the_negatives_of_a_query_change_from_epoch_to_epoch(tree):
    recipe = parse(Recipe, tree | {"data": tree["data"][:1]})
    feed = loop.build(recipe, loop.make_accelerator(recipe)).feed
    drawn = {}
    for step in range(3 * feed.steps_per_epoch):
        ids = feed.draw(step)[1][0].ids
        for query, negative in zip(ids.query_id_Q.tolist(), ids.negative_id_QM[:, 0].tolist()):
            drawn.setdefault(query, []).append(negative)
    assert {len(negatives) for negatives in drawn.values()} == {3}
    changed = sum(len(set(negatives)) > 1 for negatives in drawn.values())
    assert 20 < changed < 40, "one of two negatives each, three times: three of four queries see both"
