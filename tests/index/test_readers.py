"""One writes or several read, also where nothing can be written; what is damaged or has no room is an error."""

import errno
import json
import os
import subprocess
import sys
import tempfile
from contextlib import closing

import pytest
import torch

from embedsmith.core.errors import CheckpointError, SearchError
from embedsmith.core.reps import Dense
from embedsmith.index import EdgeStore, open_index
from embedsmith.index.commands import Place
from embedsmith.index.filling import run_index
from tests.index.test_index import HEADS, QUERIES, documents
from tests.index.words import Words


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "index"
    store = EdgeStore(folder)
    open_index(Words(), store, heads=HEADS, create=True).add(documents(60), batch=50)
    store.close()
    return folder


@pytest.fixture
def folder(made, tmp_path):
    subprocess.run(["cp", "-r", made, tmp_path / "index"], check=True)  # keeps the holes
    return tmp_path / "index"


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def found(store):
    index = open_index(Words(), store)
    return len(index), [[(hit.id, hit.score) for hit in hits] for hits in index.search(QUERIES)]


def written_to(folder):
    with closing(EdgeStore(folder)) as store:
        return open_index(Words(), store, heads=HEADS, create=True).add(documents(60), batch=30)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_several_search_at_once_and_one_that_would_write_is_refused(folder, temporary):
    stores = [EdgeStore(folder, read_only=True) for _ in range(3)]
    first, *others = [found(store) for store in stores]
    assert first[0] == 60
    assert others == [first, first]
    with pytest.raises(SearchError, match="another process has this index open: a search"):
        EdgeStore(folder)
    stores[0].close()
    assert found(stores[1]) == first
    writer = EdgeStore(folder)  # what the others read is a copy of their own
    open_index(Words(), writer).add(documents(70))
    assert found(stores[2]) == first
    for store in (writer, *stores):
        store.close()
    assert not list(temporary.iterdir())
    store = EdgeStore(folder, read_only=True)
    assert found(store)[0] == 70
    store.close()


def test_an_index_that_cannot_be_written_to_is_searched(folder, read_only, temporary):
    store = EdgeStore(folder, read_only=True)
    expected = found(store)
    store.close()
    copy = read_only(folder)
    before = contents(copy)
    stores = [EdgeStore(copy, read_only=True) for _ in range(2)]
    assert [found(store) for store in stores] == [expected, expected]
    for store in stores:
        store.close()
    assert contents(copy) == before
    assert not list(temporary.iterdir())
    with pytest.raises(CheckpointError, match="cannot write here"):
        EdgeStore(copy)


def test_who_writes_is_named_to_those_who_would_read_or_write(folder):
    program = (
        "import fcntl; from embedsmith.core.outputs import sign; "
        f"file = open({str(folder / 'lock')!r}, 'r+b'); fcntl.flock(file, fcntl.LOCK_EX); "
        "sign(file.fileno(), 'index'); input(1)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as writer:
        assert writer.stdout.read(1) == b"1"
        for read_only in (True, False):
            with pytest.raises(SearchError, match=f"open: index, process {writer.pid} on"):
                EdgeStore(folder, read_only=read_only)
        writer.kill()
    store = EdgeStore(folder, read_only=True)
    assert found(store)[0] == 60
    store.close()


def test_on_a_full_disk_nothing_is_lost_and_what_is_there_is_found(folder, tmp_path, monkeypatch, temporary):
    """Every time that room is taken, the disk is full."""
    store = EdgeStore(folder, read_only=True)
    expected = found(store)
    store.close()
    real = os.posix_fallocate
    for full_at in range(3):
        left = iter([real] * full_at)

        def fallocate(*arguments, left=left):
            if (take := next(left, None)) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            take(*arguments)

        monkeypatch.setattr(os, "posix_fallocate", fallocate)
        with pytest.raises(CheckpointError, match="no space left"):
            written_to(tmp_path / "new")
        store = EdgeStore(folder, read_only=True)
        assert found(store) == expected
        store.close()
        monkeypatch.undo()
    written = written_to(tmp_path / "new")
    assert written.new + written.unchanged == 60


def test_a_small_disk_is_told_and_the_process_lives(small_disk):
    with pytest.raises(CheckpointError, match="no space left"):
        open_index(Words(), EdgeStore(small_disk / "index"), heads=HEADS, create=True)


@pytest.mark.parametrize("content", ["", "[]", "3", "null", "{}", "[" * 100_000, '{"format": 1}', "\udcff"])
def test_settings_that_are_not_ours(folder, content):
    (folder / "embedsmith_index.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    for read_only in (True, False):
        with pytest.raises(SearchError, match=r"embedsmith_index\.json: .*\n.*delete"):
            EdgeStore(folder, read_only=read_only)


@pytest.mark.parametrize(
    ("key", "value"),
    [("format", 2), ("model", None), ("fingerprint", 3), ("heads", []), ("heads", [True]), ("heads", "dense")],
)
def test_settings_of_another_type(folder, key, value):
    path = folder / "embedsmith_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(SearchError, match="not what embedsmith writes"):
        EdgeStore(folder)


@pytest.mark.parametrize(
    "name", ["status.dat", "chunk_0.mmap", "mutable_id_tracker.mappings", "segment.json", "files.json"]
)
@pytest.mark.parametrize("damage", [None, 0, 0.5, 2])
def test_files_that_are_missing_empty_cut_or_padded_are_found_before_they_are_read(folder, name, damage):
    """The engine would find other hits, or end the process."""
    for path in [*folder.rglob(name)]:
        if damage is None:
            path.unlink()
        else:
            os.truncate(path, int(path.stat().st_size * damage))
    for read_only in (True, False):
        if (name, damage) == ("files.json", None):
            continue  # a writer was killed: its log is there
        with pytest.raises(SearchError, match=r"is not as it was left|the index engine says"):
            EdgeStore(folder, read_only=read_only)


def test_what_a_killed_writer_left_goes_with_the_next_one(folder):
    left = folder / ".files.json.abcd1234.tmp"
    left.touch()
    EdgeStore(folder, read_only=True).close()
    assert left.exists()
    EdgeStore(folder).close()
    assert not left.exists()


@pytest.mark.parametrize("read_only", [True, False])
def test_a_panic_of_the_engine_is_an_error(folder, read_only):
    (folder / "files.json").unlink()
    for path in folder.rglob("status.dat"):
        os.truncate(path, 0)
    with pytest.raises(SearchError, match="the index engine says: index out of bounds"):
        EdgeStore(folder, read_only=read_only)


class Broken(Words):
    def represent(self, texts, *, role, task=None, outputs=("dense",)):
        reps = super().represent(texts, role=role, task=task, outputs=outputs)
        if "dense" in reps:
            wrong = torch.tensor([["moon" in text] for text in texts])
            reps["dense"] = Dense(reps["dense"].vector_ND.masked_fill(wrong, float("inf")))
        return reps


@pytest.mark.parametrize("read_only", [False, True])
def test_a_pipe_or_a_loop_of_links_among_the_files_is_an_error(folder, read_only):
    piece = next(path for path in (folder / "shard").rglob("*.dat"))
    piece.unlink()
    os.mkfifo(piece)
    with pytest.raises(SearchError, match=f"{piece.name}: this is a pipe"):
        EdgeStore(folder, read_only=read_only)
    piece.unlink()
    (folder / "lock").unlink()
    (folder / "lock").symlink_to("lock")
    with pytest.raises(SearchError, match="lock: cannot read from this path"):
        EdgeStore(folder, read_only=read_only)


def test_vectors_that_are_not_finite_are_refused_by_name(tmp_path):
    index = open_index(Broken(), EdgeStore(tmp_path / "index"), heads=HEADS, create=True)
    first = next(document for document in documents() if "moon" in document.text)
    with pytest.raises(SearchError, match=f"the dense vector of the document '{first.id}' is not finite"):
        index.add(documents())
    with pytest.raises(SearchError, match="the dense vector of the query 'full moon' is not finite"):
        index.search(["cat", "full moon"])


def test_a_second_index_is_refused_before_it_reads(tmp_path):
    program = f"from embedsmith.core.outputs import claimed\nwith claimed({str(tmp_path / 'out')!r}, 'index'): input(1)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as holder:
        assert holder.stdout.read(1) == b"1"
        with pytest.raises(CheckpointError, match=f"index, process {holder.pid} on"):
            run_index("no model", "no file", Place(tmp_path / "out"), None, 256)
        holder.communicate(b"\n")
