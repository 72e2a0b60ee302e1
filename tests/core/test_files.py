"""Writes are whole or absent, whatever stops them."""

import errno
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from embedsmith.core.errors import CheckpointError
from embedsmith.core.files import allocate, atomic_file, disk_errors, full_disk, write_cache
from embedsmith.core.outputs import Kind, atomic_folder


def test_a_file_appears_when_the_block_ends(tmp_path):
    with atomic_file(tmp_path / "sub" / "a.txt") as file:
        file.write("hello")
        assert not (tmp_path / "sub" / "a.txt").exists()
    assert (tmp_path / "sub" / "a.txt").read_text() == "hello"


def test_an_error_leaves_the_old_content_and_no_rest(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "a.txt") as file:
        file.write("new")
        raise ZeroDivisionError
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_replaces_an_older_one_only_when_whole(tmp_path):
    target = tmp_path / "model"
    kind = Kind("letter", ("mark", "a", "b"), ("mark", ""))
    for name in ("a", "b"):
        with pytest.raises(ZeroDivisionError), atomic_folder(target, kind) as folder:
            (folder / "b").write_text("2")
            raise ZeroDivisionError
        assert sorted(p.name for p in target.glob("*")) == ([] if name == "a" else ["a", "mark"])
        with atomic_folder(target, kind) as folder:
            (folder / "mark").write_text("")
            (folder / name).write_text("1")
    assert sorted(p.name for p in target.iterdir()) == ["b", "mark"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@contextmanager
def tiny_disk(tmp_path):
    """A file system of 2 MiB."""
    mount = tmp_path / "tiny"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)]
    try:
        allowed = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


BIG = torch.zeros(2**21)


def save_with_torch(folder):
    with (folder / "x").open("wb") as file:
        torch.save(BIG, file)


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: (folder / "x").write_bytes(bytes(2**22)),
        save_with_torch,
        lambda folder: save_file({"x": BIG}, folder / "x"),
    ],
    ids=["bytes", "torch", "safetensors"],
)
def test_a_full_disk_is_one_clear_error_and_the_old_folder_stays(tmp_path, write):
    with tiny_disk(tmp_path) as disk:
        kind = Kind("letter", ("a",), ("a", "old"))
        with atomic_folder(disk / "model", kind) as folder:
            (folder / "a").write_text("old")
        with pytest.raises(CheckpointError, match="no space left"), atomic_folder(disk / "model", kind) as folder:
            write(folder)
        assert (disk / "model" / "a").read_text() == "old"
        assert [p.name for p in disk.iterdir()] == ["model"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below", tmp_path / "folder"):
        with pytest.raises(CheckpointError, match="cannot write here"), atomic_file(path):
            pass


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """A power cut after the rename finds the content, not only the name."""
    done = []
    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (done.append(os.readlink(f"/proc/self/fd/{descriptor}")), sync(descriptor))
    )
    for name in ("rename", "replace"):
        move = getattr(Path, name)
        monkeypatch.setattr(Path, name, lambda self, to, move=move: (done.append(f"{self} -> {to}"), move(self, to))[1])
    with atomic_file(tmp_path / "a.txt") as file:
        file.write("hello")
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "b").write_text("b")
    moves = [place for place, line in enumerate(done) if " -> " in line]
    file_move, folder_move = moves[0], moves[-1]
    assert done[file_move - 1] == done[file_move].split(" -> ")[0]
    assert done[file_move + 1] == str(tmp_path)
    made = done[folder_move].split(" -> ")[0]
    assert {made, f"{made}/deep", f"{made}/deep/b"} <= set(done[file_move:folder_move])
    assert str(tmp_path) in done[folder_move:]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_way_in_which_a_disk_takes_no_more_is_named(tmp_path, code):
    words = {errno.ENOSPC: "no space left", errno.EDQUOT: "quota", errno.EFBIG: "ulimit -f"}[code]
    own, kept = OSError(code, "x", "the-file"), RuntimeError(f"I/O error (os error {code})")
    wrapped, cleaning = RuntimeError("x"), RuntimeError("y")
    wrapped.__cause__, cleaning.__context__ = own, kept
    for error in (own, kept, wrapped, cleaning):
        with pytest.raises(CheckpointError, match=words) as raised, disk_errors(tmp_path):
            raise error
        assert raised.value.where == tmp_path
        assert "run the same command again" in raised.value.fix
    assert full_disk(own).where == "the-file"
    assert full_disk(OSError("10 requested and 3 written")) is not None
    for other in (None, OSError(errno.ENOENT, "x"), RuntimeError("10 requested and 3 written")):
        assert full_disk(other) is None


def test_other_errors_of_a_place_keep_their_names(tmp_path):
    for code in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EBUSY):
        with pytest.raises(CheckpointError, match="cannot write here"), disk_errors(tmp_path):
            raise OSError(code, os.strerror(code))
    for error in (FileNotFoundError(errno.ENOENT, "x"), RuntimeError("x"), SafetensorError("x")):
        with pytest.raises(type(error)), disk_errors(tmp_path):
            raise error


def test_room_is_taken_before_it_is_used(tmp_path, monkeypatch):
    with (tmp_path / "a").open("wb") as file:
        file.write(b"abc")
        allocate(file, 10_000)
        assert os.fstat(file.fileno()).st_size == 10_000
        assert os.fstat(file.fileno()).st_blocks * 512 >= 10_000
        allocate(file, 5)
    assert (tmp_path / "a").read_bytes() == b"abc\0\0"


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_where_no_room_can_be_taken_ahead_it_is_measured(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, "x")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with (tmp_path / "a").open("wb") as file:
        allocate(file, 10_000)
        assert os.fstat(file.fileno()).st_size == 10_000
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            allocate(file, 2**60)
        assert os.fstat(file.fileno()).st_size == 10_000
        code = errno.EIO
        with pytest.raises(OSError, match="x"):
            allocate(file, 10)


def test_what_can_be_made_again_is_kept_if_it_can_be(tmp_path, caplog):
    write_cache(tmp_path / "a" / "b", b"1")
    assert (tmp_path / "a" / "b").read_bytes() == b"1"
    write_cache(tmp_path / "a" / "b" / "c", b"1")
    assert "not kept for the next time" in caplog.text


def test_bytes_and_words_are_written_as_they_are(tmp_path):
    with atomic_file(tmp_path / "a", "wb") as file:
        file.write(b"\xff")
    with atomic_file(tmp_path / "b") as file:
        file.write("中")
    assert (tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes() == b"\xff" + "中".encode()
