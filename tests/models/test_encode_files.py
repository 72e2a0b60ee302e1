"""Files to vectors on disk: the same numbers as `encode`, whatever killed the work in between."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from embedsmith.cli import app
from embedsmith.core.device import cpu_multiplies_bf16
from embedsmith.core.errors import CheckpointError, DataError, EmbedsmithError, ModelError, RecipeError
from embedsmith.models import encode_files as module
from embedsmith.models import load
from embedsmith.models.encode_files import EncodeJob, encode_files
from tests.disks import SMALL
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


def test_the_folder_says_what_auto_chose_and_goes_on_under_that_name(tmp_path, model, text_file):
    encode_files(job(model, text_file, out=tmp_path / "out", dtype="auto"))
    chosen = json.loads((tmp_path / "out/meta.json").read_text())["dtype"]
    assert chosen == ("bfloat16" if cpu_multiplies_bf16() else "float32")
    assert encode_files(job(model, text_file, out=tmp_path / "out", dtype=chosen)) == 50
    with pytest.raises(CheckpointError, match="made with another dtype"):
        encode_files(job(model, text_file, out=tmp_path / "out", dtype="float16"))


def test_an_interrupted_job_goes_on_with_the_blocks_that_are_missing(tmp_path, model, text_file, monkeypatch):
    out, real, calls = tmp_path / "out", EncodeJob.vectors, []

    def failing(job, model, windows):
        for vectors in real(job, model, windows):
            calls.append(len(vectors))
            if len(calls) == 4:
                raise KeyboardInterrupt
            yield vectors

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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model, a file of texts, and the folder of an undisturbed run of int8."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.embedder(folder / "base", prompts={"query": "query: "}).save(folder / "model")
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    encode_files(job(str(folder / "model"), folder / "texts.txt", out=folder / "out", stored="int8"))
    return folder


@pytest.fixture
def again(whole, monkeypatch):
    """The same command with another output; the model is loaded once."""
    loaded = load(str(whole / "model"), device="cpu")
    monkeypatch.setattr(module, "load", lambda *arguments, **options: loaded)
    return partial(encode_again, whole)


def encode_again(whole, out):
    return encode_files(job(str(whole / "model"), whole / "texts.txt", out=out, stored="int8"))


def padded(content):
    return content + bytes(16)


def lying(content):
    """A header of another shape, in as many bytes."""
    return content.replace(b"(50, 16)", b"(16, 50)")


DAMAGE = [
    *(("vectors.npy", change) for change in (None, lambda content: b"", lambda content: content[:-1], padded, lying)),
    ("vectors.npy", lambda content: content.replace(b"|i1", b"|u1")),
    *(("ids.txt", change) for change in (None, lambda content: b"", lambda content: content[:-3])),
    ("ids.txt", lambda content: content + b"50\n"),
    *(("ranges.npy", change) for change in (None, lambda content: b"", lambda content: content[:-1], padded)),
    ("ranges.npy", lambda content: content[:-4] + np.float32(np.nan).tobytes()),
    *(("meta.json", lambda content, new=new: new) for new in (b"", b"[]", b"3", b"{", b'{"state": "complete"}')),
    *(
        ("meta.json", lambda content, new=new: content.replace(b'"count": 50', new))
        for new in (b'"count": 49', b'"count": "50"', b'"count": true', b'"count": null', b'"counts": 50')
    ),
    ("meta.json", lambda content: content.replace(b'"state": "complete"', b'"state": "done"')),
]


@pytest.mark.parametrize(
    ("state", "name", "change"), [("complete", *each) for each in DAMAGE] + [("encoding", *DAMAGE[0])]
)
def test_what_a_folder_says_is_checked_and_the_fix_works(whole, again, tmp_path, name, change, state):
    out = tmp_path / "out"
    shutil.copytree(whole / "out", out)
    meta = (out / "meta.json").read_text().replace('"complete"', f'"{state}"')
    (out / "meta.json").write_text(meta)
    content = (out / name).read_bytes()
    (out / name).unlink()
    if change is not None:
        (out / name).write_bytes(change(content.replace(b'"encoding"', b'"complete"')))
        if (out / name).read_bytes() == content.replace(b'"encoding"', b'"complete"'):
            pytest.fail("nothing was damaged")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(CheckpointError) as error:
        again(out)
    assert name.split(".")[0] in str(error.value) or name == "meta.json"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before, "nothing is touched"
    if (name, change) == DAMAGE[0]:
        assert f"delete {out}, then give the same command again" in str(error.value)
        shutil.rmtree(out)
        assert again(out) == 50


@pytest.mark.parametrize(
    "said", ["", "[0, 1, 2, 3, 4, 5, 6]", "[0, 1, 99]", "{}", "[null]", '["0"]', "[-1]", "[true]", "[[]]"]
)
def test_state_files_are_not_believed_and_the_bytes_are_those_of_an_undisturbed_run(whole, again, tmp_path, said):
    """Stopped in the third block of seven, behind row 20; then the state is lost or lies."""
    out = tmp_path / "out"
    shutil.copytree(whole / "out", out)
    meta = (out / "meta.json").read_text().replace('"complete"', '"encoding"')
    (out / "meta.json").write_text(meta)
    content = (out / "vectors.npy").read_bytes()
    start = len(content) - 50 * 16
    (out / "vectors.npy").write_bytes(content[: start + 21 * 16] + bytes(29 * 16))
    (out / "progress-0.json").write_text(said)
    assert again(out) == 50
    expected = {path.name: path.read_bytes() for path in (whole / "out").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected


def test_what_a_killed_run_left_of_its_state_goes_with_the_next(whole, again, tmp_path):
    shutil.copytree(whole / "out", tmp_path / "out")
    (tmp_path / "out/progress-1.json").write_text("[0]")
    assert again(tmp_path / "out") == 50
    assert not list((tmp_path / "out").glob("progress-*"))


@pytest.mark.parametrize("stored", ["float32", "int8"])
def test_vectors_that_are_not_finite_are_refused_naming_the_text(tmp_path, model, text_file, monkeypatch, stored):
    real = EncodeJob.vectors

    def broken(job, model, windows):
        read = [list(texts) for texts in windows]
        for texts, vectors in zip(read, real(job, model, iter(read)), strict=True):
            vectors[[n for n, text in enumerate(texts) if text == TEXTS[21]]] = np.inf
            yield vectors

    monkeypatch.setattr(EncodeJob, "vectors", broken)
    first = TEXTS.index(TEXTS[21]) + 1
    with pytest.raises(ModelError, match=rf"texts.txt:{first}: the vector of this text is not finite"):
        encode_files(job(model, text_file, out=tmp_path / "out", stored=stored))


def test_vectors_too_large_for_small_numbers_are_refused_and_zeros_are_kept(tmp_path, model, text_file, monkeypatch):
    filled = lambda value: lambda job, model, windows: (np.full((len(t), 16), value, np.float32) for t in windows)
    monkeypatch.setattr(EncodeJob, "vectors", filled(1e6))
    with pytest.raises(ModelError, match=r"texts.txt:1: .*not finite in float16\n.*give --stored float32"):
        encode_files(job(model, text_file, out=tmp_path / "out", stored="float16"))
    encode_files(job(model, text_file, out=tmp_path / "large", stored="float32"))
    monkeypatch.setattr(EncodeJob, "vectors", filled(0))
    encode_files(job(model, text_file, out=tmp_path / "zeros"))
    assert not np.load(tmp_path / "zeros/vectors.npy").any()


def test_a_file_that_shrinks_meanwhile_leaves_no_zeros(tmp_path, model, text_file, monkeypatch):
    real = EncodeJob.prepare

    def prepare(job, model, replace):
        count = real(job, model, replace)
        text_file.write_text("\n".join(TEXTS[:40]))
        return count

    monkeypatch.setattr(EncodeJob, "prepare", prepare)
    with pytest.raises(DataError, match="40 texts instead of 50: the files changed"):
        encode_files(job(model, text_file, out=tmp_path / "out"))


def test_two_at_once(tmp_path, model, text_file):
    """The second is refused before it reads anything."""
    program = (
        f"from embedsmith.core.outputs import claimed\nwith claimed({str(tmp_path / 'out')!r}, 'encode'): input(1)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as holder:
        assert holder.stdout.read(1) == b"1"
        with pytest.raises(CheckpointError, match=f"encode, process {holder.pid} on"):
            encode_files(job("no model", Path("no file"), out=tmp_path / "out"))
        holder.communicate(b"\n")
    assert encode_files(job(model, text_file, out=tmp_path / "out")) == 50


def test_half_a_launcher_is_refused(tmp_path, model, text_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EmbedsmithError, match=r"no launcher is here.*RANK(.|\n)*unset WORLD_SIZE"):
        encode_files(job(model, text_file, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_link_to_a_folder_is_that_folder(tmp_path, model, text_file):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large disk")
    assert encode_files(job(model, text_file, out=tmp_path / "out")) == 50


def test_what_a_kill_left_in_the_folder_is_removed(whole, again, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.meta.json.abcd1234.tmp").write_text("{")
    assert again(tmp_path / "out") == 50
    (tmp_path / "out/.ids.txt.abcd1234.tmp").write_text("1")
    assert again(tmp_path / "out") == 50
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(os.listdir(whole / "out"))


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_met_before_anything_is_encoded(tmp_path, model, text_file, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full)
    calls = []
    monkeypatch.setattr(EncodeJob, "vectors", lambda *arguments: calls.append(1))
    with pytest.raises(CheckpointError, match=r"vectors.npy: no space left"):
        encode_files(job(model, text_file, out=tmp_path / "out"))
    assert not calls
    assert not (tmp_path / "out/vectors.npy").exists()
    monkeypatch.undo()
    assert encode_files(job(model, text_file, out=tmp_path / "out")) == 50


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_a_file_system_that_cannot_take_room_ahead(tmp_path, model, text_file, monkeypatch, code):
    def refuse(*arguments):
        raise OSError(code, "not here")

    if code is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    encode_files(job(model, text_file, out=tmp_path / "out"))
    np.testing.assert_allclose(
        np.load(tmp_path / "out/vectors.npy"), load(model, device="cpu").encode(TEXTS), atol=1e-6
    )


@pytest.mark.parametrize("room", [4, 12, 32])
def test_a_disk_that_fills_up_ends_in_an_error_and_the_work_goes_on(tmp_path, whole, small_disk, room, monkeypatch):
    """`room` pages of 4 KB are left. The file is not allocated ahead, so that the disk is full in the middle too."""
    monkeypatch.delattr(os, "posix_fallocate")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS * 20))
    one = EncodeJob(str(whole / "model"), (texts,), small_disk / "out", block=256)
    (small_disk / "filler").write_bytes(bytes(SMALL - room * 4096))
    with pytest.raises(CheckpointError, match="no space left") if room < 32 else nullcontext():
        encode_files(one)
    (small_disk / "filler").unlink()
    assert encode_files(one) == 1000
    encode_files(replace(one, out=tmp_path / "beside"))
    assert (small_disk / "out/vectors.npy").read_bytes() == (tmp_path / "beside/vectors.npy").read_bytes()


@pytest.mark.parametrize(
    "change", [{"dim": 0}, {"dim": -1}, {"block": 0}, {"processes": 0}, {"stored": "int4"}, {"role": "title"}]
)
def test_settings_out_of_range_are_refused(tmp_path, change):
    with pytest.raises(RecipeError, match=next(iter(change))):
        EncodeJob("model", (tmp_path / "a.txt",), tmp_path / "out", **change)
    done = CliRunner().invoke(app, ["encode", "a.txt", "out", "--model", "m", f"--{next(iter(change))}", "0"])
    assert done.exit_code != 0
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_a_file_without_a_text_is_refused(tmp_path, model, name):
    (tmp_path / name).write_text("")
    with pytest.raises(DataError, match=name):
        encode_files(job(model, tmp_path / name, out=tmp_path / "out"))


PARTS = ("format", "weights", "tokenizer", "settings", "prompt", "dim", "stored", "dtype", "column", "block", "inputs")


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_what_the_vectors_depend_on_counts(whole, again, tmp_path, part):
    """Each is in the folder's meta.json, and with another value of it the folder is not continued."""
    shutil.copytree(whole / "out", tmp_path / "out")
    path = tmp_path / "out/meta.json"
    meta = json.loads(path.read_text())
    assert {*meta} == {*PARTS, "state", "count"}
    path.write_text(json.dumps(meta | {part: "another"}))
    with pytest.raises(CheckpointError, match="not what encode writes" if part == "format" else f"another {part}"):
        again(tmp_path / "out")


def test_a_folder_of_an_earlier_version_is_complete_without_what_it_did_not_say(whole, again, tmp_path):
    shutil.copytree(whole / "out", tmp_path / "out")
    path = tmp_path / "out/meta.json"
    meta = json.loads(path.read_text())
    del meta["tokenizer"]
    path.write_text(json.dumps(meta))
    assert again(tmp_path / "out") == 50


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
    command[5] = str(tmp_path / "undisturbed")
    subprocess.run([*command, "--processes", "2"], check=True)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "undisturbed").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
    np.testing.assert_allclose(np.load(out / "vectors.npy"), load(model, device="cpu").encode(TEXTS), atol=1e-6)


def test_the_command(tmp_path, model, text_file):
    arguments = ["encode", str(text_file), str(text_file), str(tmp_path / "out"), "--model", model, "--role", "query"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "100 vectors in" in done.output
