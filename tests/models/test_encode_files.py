"""Files to vectors on disk: the same numbers as `encode`, whatever killed the work in between."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from embedsmith.cli import app
from embedsmith.core.errors import CheckpointError, DataError
from embedsmith.models import load
from embedsmith.models.encode_files import EncodeJob, encode_files
from tests.models import tiny

TEXTS = [f"{tiny.TEXTS[n % len(tiny.TEXTS)]} {'fox ' * (n % 5)}".strip() for n in range(50)]


@pytest.fixture
def model(tmp_path):
    tiny.embedder(tmp_path / "base", prompts={"query": "query: "}).save(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def job(model, *files, out, **options):
    return EncodeJob(model, tuple(files), out, block=8, **options)


def test_the_array_is_what_encode_gives(tmp_path, model, text_file):
    out = tmp_path / "out"
    assert encode_files(job(model, text_file, out=out, role="query")) == 50
    stored = np.load(out / "vectors.npy", mmap_mode="r")
    np.testing.assert_allclose(stored, load(model, device="cpu").encode(TEXTS, role="query"), atol=1e-6)
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["state"], meta["count"], meta["dim"], meta["prompt"]) == ("complete", 50, 16, "query: ")
    assert (out / "ids.txt").read_text().split() == [str(n) for n in range(50)]
    assert sorted(path.name for path in out.iterdir()) == ["ids.txt", "meta.json", "vectors.npy"]


@pytest.mark.parametrize("stored", ["float16", "int8"])
def test_smaller_numbers(tmp_path, model, text_file, stored):
    out = tmp_path / "out"
    encode_files(job(model, text_file, out=out, stored=stored, dim=8))
    array, exact = np.load(out / "vectors.npy"), load(model, device="cpu").encode(TEXTS, dim=8)
    assert (array.dtype, array.shape) == (np.dtype(stored), (50, 8))
    if stored == "int8":
        low, high = np.load(out / "ranges.npy")
        array = (array.astype(np.float32) + 128.5) * (high - low) / 255 + low
    np.testing.assert_allclose(array, exact, atol=0.01)


def test_an_interrupted_job_goes_on_with_the_blocks_that_are_missing(tmp_path, model, text_file, monkeypatch):
    out, real, calls = tmp_path / "out", EncodeJob.vectors, []

    def failing(job, model, texts):
        calls.append(len(texts))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(job, model, texts)

    monkeypatch.setattr(EncodeJob, "vectors", failing)
    with pytest.raises(KeyboardInterrupt):
        encode_files(job(model, text_file, out=out))
    assert json.loads((out / "progress-0.json").read_text()) == [0, 1, 2]
    encode_files(job(model, text_file, out=out))
    assert calls == [8, 8, 8, 8, 8, 8, 8, 2], "three blocks, one lost, then only the four that were missing"
    np.testing.assert_allclose(np.load(out / "vectors.npy"), load(model, device="cpu").encode(TEXTS), atol=1e-6)
    encode_files(job(model, text_file, out=out))
    assert len(calls) == 8, "a finished folder is left as it is"


@pytest.mark.parametrize(
    ("change", "named"),
    [({"role": "query"}, "prompt"), ({"dim": 8}, "dim"), ({"stored": "float16"}, "stored")],
)
def test_another_command_is_refused(tmp_path, model, text_file, change, named):
    out = tmp_path / "out"
    encode_files(job(model, text_file, out=out))
    with pytest.raises(CheckpointError, match=f"made with another {named}"):
        encode_files(job(model, text_file, out=out, **change))


def test_another_model_or_input_is_refused_and_a_copy_of_the_model_is_not(tmp_path, model, text_file):
    out = tmp_path / "out"
    encode_files(job(model, text_file, out=out))
    load(model, device="cpu").save(tmp_path / "copy")
    encode_files(job(str(tmp_path / "copy"), text_file, out=out))
    changed = load(model, device="cpu")
    changed.backbone.embeddings.word_embeddings.weight.data[5] += 1
    changed.save(tmp_path / "changed")
    with pytest.raises(CheckpointError, match="made with another weights"):
        encode_files(job(str(tmp_path / "changed"), text_file, out=out))
    text_file.write_text("other\n")
    with pytest.raises(CheckpointError, match="made with another inputs"):
        encode_files(job(model, text_file, out=out))


def test_a_folder_with_other_things_is_not_touched(tmp_path, model, text_file):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.doc").write_text("")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        encode_files(job(model, text_file, out=tmp_path / "out"))


def test_bad_input_can_be_mended_and_the_command_repeated(tmp_path, model):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fox"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: 'text' is 3"):
        encode_files(job(model, path, out=tmp_path / "out"))
    path.write_text('{"text": "fox"}\n')
    assert encode_files(job(model, path, out=tmp_path / "out")) == 1


@pytest.mark.slow
def test_two_processes_and_a_kill(tmp_path, model, text_file):
    """SIGKILL as soon as the first block is on the disk; the same command on two processes finishes."""
    out = tmp_path / "out"
    program = "from embedsmith.cli import main; main()"
    command = [sys.executable, "-c", program, "encode", str(text_file), str(out), "--model", model, "--block", "8"]
    process = subprocess.Popen([*command, "--processes", "2"], start_new_session=True, stdout=subprocess.DEVNULL)
    while not any(json.loads(path.read_text()) for path in out.glob("progress-*.json")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run([*command, "--processes", "2"], check=True)
    np.testing.assert_allclose(np.load(out / "vectors.npy"), load(model, device="cpu").encode(TEXTS), atol=1e-6)


def test_the_command(tmp_path, model, text_file):
    arguments = ["encode", str(text_file), str(text_file), str(tmp_path / "out"), "--model", model, "--role", "query"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "100 vectors in" in done.output
