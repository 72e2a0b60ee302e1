"""What a verb writes: one process at a time, nothing foreign is replaced, a kill at any moment loses nothing."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from embedsmith.core import outputs
from embedsmith.core.errors import CheckpointError
from embedsmith.core.files import atomic_file
from embedsmith.core.outputs import (
    Kind,
    atomic_folder,
    check_claim,
    claimed,
    clear_left,
    discard,
    files_of,
    recover,
    refuse_foreign_file,
    refuse_foreign_records,
)

PAIR = Kind("pair", ("a.txt", "b.txt", "logs/*.json", "more/**"), ("a.txt", "ours"))


class Killed(BaseException):
    """Stands for a signal: no handler of ordinary errors catches it."""


def write_pair(path, text="ours"):
    with atomic_folder(path, PAIR) as folder:
        (folder / "a.txt").write_text(text)


def names(folder):
    return sorted(one.name for one in folder.iterdir())


def test_the_second_writer_is_told_who_the_first_is(tmp_path):
    code = f"from embedsmith.core.outputs import claimed\nwith claimed({str(tmp_path / 'out')!r}, 'encode'): pass"
    with claimed(tmp_path / "out", "train"):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"train, process {os.getpid()} on " in second.stderr
    assert second.returncode == 1
    assert names(tmp_path) == []
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_lock_of_a_killed_process_blocks_nobody(tmp_path):
    imports = "import os\nfrom embedsmith.core.outputs import claimed\n"
    code = f"{imports}with claimed({str(tmp_path / 'out')!r}, 'x'): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert names(tmp_path) == [".out.embedsmith.lock"]
    check_claim(tmp_path / "out", "train")
    with claimed(tmp_path / "out", "train"):
        pass
    assert names(tmp_path) == []


def test_a_child_of_a_killed_process_holds_nothing(tmp_path):
    """Workers outlive their parent for a while."""
    code = f"""import os, time
from embedsmith.core.outputs import claimed
with claimed({str(tmp_path / "out")!r}, "x"):
    child = os.fork()
    if child == 0:
        os.close(1)
        time.sleep(60)
    print(child, flush=True)
    os._exit(9)"""
    done = subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.PIPE, text=True)
    try:
        with claimed(tmp_path / "out", "train"):
            pass
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


def test_a_verb_inside_a_verb_may_claim_again_and_a_link_is_the_same_output(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with claimed(tmp_path / "real", "run"), claimed(tmp_path / "link", "train"):
        assert ".real.embedsmith.lock" in names(tmp_path)
    assert names(tmp_path) == ["link", "real"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for check in (lambda path: claimed(path, "x").__enter__(), lambda path: check_claim(path, "x")):
        with pytest.raises(CheckpointError, match="cannot write here"):
            check(tmp_path / "file" / "out")


@pytest.mark.parametrize("what", ["file", "link", "other", "stranger", "below", "inner link"])
def test_what_is_not_of_the_kind_is_refused_and_stays(tmp_path, what):
    out = tmp_path / "out"
    write_pair(tmp_path / "mine")
    if what == "file":
        out.write_text("mine")
    elif what == "link":
        out.symlink_to("mine")
    else:
        write_pair(out, "theirs" if what == "other" else "ours")
        stranger = out / {"below": "logs/deep/x.json"}.get(what, "notes.md")
        stranger.parent.mkdir(parents=True, exist_ok=True)
        stranger.write_text("mine") if what != "inner link" else (out / "b.txt").symlink_to("a.txt")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=str(out)) as raised:
        write_pair(out)
    assert sorted(tmp_path.rglob("*")) == before
    if what in ("stranger", "below"):
        assert stranger.relative_to(out).as_posix() in str(raised.value)


def test_a_folder_of_the_kind_is_replaced_and_any_folder_with_files_is_not(tmp_path):
    write_pair(tmp_path / "out")
    (tmp_path / "out" / "more" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "more" / "deep" / "x").write_text("")
    write_pair(tmp_path / "out", "ours, again")
    assert names(tmp_path / "out") == ["a.txt"]
    assert (tmp_path / "out" / "a.txt").read_text() == "ours, again"
    with pytest.raises(CheckpointError, match="not empty"), atomic_folder(tmp_path / "out"):
        pass


def test_a_file_that_the_new_result_has_too_is_no_stranger(tmp_path):
    for _ in range(2):
        with atomic_folder(tmp_path / "out", PAIR) as folder:
            (folder / "a.txt").write_text("ours")
            (folder / "of-a-tokenizer.spm").write_text("")
    assert names(tmp_path / "out") == ["a.txt", "of-a-tokenizer.spm"]


def test_without_overwriting_only_the_same_again_is_accepted(tmp_path):
    write_pair(tmp_path / "out")
    with atomic_folder(tmp_path / "out", PAIR, overwrite=False) as folder:
        (folder / "a.txt").write_text("ours")
    with (
        pytest.raises(CheckpointError, match="--overwrite"),
        atomic_folder(tmp_path / "out", PAIR, overwrite=False) as folder,
    ):
        (folder / "a.txt").write_text("ours, another")
    assert (tmp_path / "out" / "a.txt").read_text() == "ours"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("moment", [1, 2])
def test_a_kill_between_the_renames_of_a_replacement_loses_nothing(tmp_path, monkeypatch, moment):
    write_pair(tmp_path / "out")
    calls, rename = [], Path.rename

    def killed(path, target):
        calls.append(path)
        if len(calls) >= moment:
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    monkeypatch.setattr(outputs.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(Killed):
        write_pair(tmp_path / "out", "ours, again")
    monkeypatch.undo()
    with claimed(tmp_path / "out", "next"):
        assert (tmp_path / "out" / "a.txt").read_text() == "ours"
    assert names(tmp_path) == ["out"]


def test_a_kill_while_a_folder_is_removed_leaves_all_of_it_or_none(tmp_path, monkeypatch):
    write_pair(tmp_path / "out")

    def killed(path, **_):
        raise Killed

    monkeypatch.setattr(outputs.shutil, "rmtree", killed)
    with pytest.raises(Killed):
        discard(tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert len(names(tmp_path)) == 1
    with claimed(tmp_path / "out", "next"):
        assert [one for one in names(tmp_path) if one.endswith(".tmp")] == []


def test_left_over_temporary_files_go_and_nothing_else_does(tmp_path):
    folder = tmp_path / "run" / "deep"
    folder.mkdir(parents=True)
    kept = [".notes", ".a.settings", "x.abcdefgh.tmp", ".tmp", ".a.short.tmp"]
    for name in [*kept, ".a.json.abcd_f12.tmp"]:
        (folder / name).write_text("")
    clear_left(tmp_path / "run")
    assert names(folder) == sorted(kept)


def test_modes_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "out") as folder:
            os.close(os.open(folder / "weights", os.O_CREAT, 0o600))
        with atomic_file(tmp_path / "file") as file:
            file.write("")
    finally:
        os.umask(before)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("out", "out/weights", "file")}
    assert modes == {"out": 0o750, "out/weights": 0o640, "file": 0o640}


def test_a_file_is_replaced_only_where_it_is_ours(tmp_path):
    file, folder, link = tmp_path / "a", tmp_path / "folder", tmp_path / "link"
    refuse_foreign_file(file, False)
    file.write_text("")
    refuse_foreign_file(file, False)
    file.write_text("x" * 999_996 + "ours")
    refuse_foreign_file(file, "ours")
    refuse_foreign_file(file, True)
    folder.mkdir()
    link.symlink_to("a")
    for path, ours, message in (
        (file, "theirs", "was not made by this verb"),
        (file, False, "was not made by this verb"),
        (folder, True, "this is no file"),
        (link, True, "this is a link (to a)"),
    ):
        with pytest.raises(CheckpointError) as raised:
            refuse_foreign_file(path, ours)
        assert message in str(raised.value)
        assert raised.value.where == path
    file.write_text("x" * 999_997 + "ours")
    with pytest.raises(CheckpointError, match="was not made by this verb"):
        refuse_foreign_file(file, "ours")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("working", [None, "out.jsonl.work", "other.work", "file"])
def test_records_are_replaced_where_their_report_or_their_work_says_so(tmp_path, known, working):
    output, report = tmp_path / "out.jsonl", tmp_path / "out.report.json"
    work = tmp_path / ("out.jsonl.work" if working in (None, "file") else working)
    output.write_text("1234")
    if known:
        report.write_text('{"output_bytes": 4, "steps": []}')
    if working == "file":
        work.write_text("")
    elif working:
        work.mkdir()

    def check(under_way=False, overwrite=False):
        refuse_foreign_records(output, report, "steps", work, under_way, overwrite)

    if not known and working != "out.jsonl.work":
        with pytest.raises(CheckpointError, match="was not made by this verb"):
            check()
        return
    check()
    output.write_text("12345")
    if known:
        with pytest.raises(CheckpointError, match="changed since it was written") as raised:
            check()
        assert raised.value.where == output
        assert "--overwrite" in raised.value.fix
        output.unlink()
        check()
        output.write_text("12345")
    check(under_way=True)
    check(overwrite=True)


@pytest.mark.parametrize("report", ['{"output_bytes": 4}', '{"steps": 1}', "[]", "{"])
def test_another_report_makes_no_file_ours(tmp_path, report):
    output = tmp_path / "out.jsonl"
    (tmp_path / "report").write_text(report)
    for present in (False, True):
        if present:
            output.write_text("1234")
        with pytest.raises(CheckpointError, match="was not made by this verb") as raised:
            refuse_foreign_records(output, tmp_path / "report", "steps", tmp_path / "w", False, False)
        assert raised.value.where == tmp_path / "report"


def test_no_folder_and_only_some_files_are_named(tmp_path):
    assert files_of(tmp_path / "absent") == []
    write_pair(tmp_path / "out")
    for number in range(7):
        (tmp_path / "out" / f"x{number}").write_text("")
    (tmp_path / "out" / ".embedsmith.lock").write_text("")
    (tmp_path / "out" / ".a.abcdefgh.tmp").mkdir()
    (tmp_path / "out" / ".a.abcdefgh.tmp" / "b").write_text("")
    assert sorted(files_of(tmp_path / "out")) == ["a.txt", *(f"x{number}" for number in range(7))]
    with pytest.raises(CheckpointError, match=r"x0, x1, x2, x3, x4 and 2 more would be lost"):
        PAIR.refuse_foreign(tmp_path / "out")
    PAIR.refuse_foreign(tmp_path / "out", [f"x{number}" for number in range(7)])


@pytest.mark.parametrize("change", ["content", "more", "fewer"])
def test_the_same_again_has_the_same_files_with_the_same_content(tmp_path, change):
    def write(changed):
        with atomic_folder(tmp_path / "out", PAIR, overwrite=False) as folder:
            (folder / "a.txt").write_text("ours 1" if change == "content" and changed else "ours 0")
            if change != "content" and (change == "more") == changed:
                (folder / "b.txt").write_text("")

    write(False)
    write(False)
    with pytest.raises(CheckpointError, match="another result is here already"):
        write(True)


def test_who_holds_a_lock_and_where_it_stands(tmp_path, monkeypatch):
    for told in ("", "[]", "{}", "{", '{"verb": "x"}'):
        assert outputs.holder(told) == "another process"
    told = '{"verb": "train", "pid": 3, "host": "h", "since": "now"}'
    assert outputs.holder(told) == "train, process 3 on h since now"
    (tmp_path / "volume").mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and real(path, mode))
    with claimed(tmp_path / "volume", "encode"):
        assert names(tmp_path / "volume") == [".embedsmith.lock"]
        with pytest.raises(CheckpointError, match="cannot write here"):
            check_claim(tmp_path / "absent", "encode")
        check_claim(tmp_path / "volume" / "out", "encode")
    assert names(tmp_path / "volume") == []


def test_where_there_are_no_locks_it_is_said_and_the_work_goes_on(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(95, "not supported")

    monkeypatch.setattr(outputs.fcntl, "flock", refuse)
    with claimed(tmp_path / "out", "encode"):
        pass
    assert "not supported); see that nobody else writes" in caplog.text
    assert names(tmp_path) == []


def test_a_lock_whose_holder_has_just_ended_is_taken_anew(tmp_path, monkeypatch):
    lock, flock, calls = tmp_path / ".out.embedsmith.lock", outputs.fcntl.flock, []

    def late(descriptor, how):
        if not calls:
            lock.unlink()  # the holder removes it between our opening and our locking
        calls.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(outputs.fcntl, "flock", late)
    with claimed(tmp_path / "out", "encode"):
        assert len(calls) == 2
        assert lock.exists()


@pytest.mark.parametrize("whole", [True, False])
def test_what_had_stepped_aside_comes_back_only_where_nothing_took_its_place(tmp_path, whole):
    aside, left, other = (tmp_path / f".{name}" for name in ("out.abcdefgh.old", "out.abcdefgh.tmp", "o.abcdefgh.tmp"))
    for folder in (aside, left, other):
        folder.mkdir()
    if whole:
        (aside / "a").write_text("")
    recover(tmp_path / "out")
    assert names(tmp_path) == [".o.abcdefgh.tmp", *(["out"] if whole else [])]
    recover(tmp_path / "absent" / "out")
    if whole:
        aside.mkdir()
        (aside / "b").write_text("")
        recover(tmp_path / "out")
        assert names(tmp_path / "out") == ["a"]
        assert not aside.exists()


def test_a_child_of_a_child_closes_nothing_of_its_own(tmp_path):
    """The number of the lock's descriptor may be another file's by then."""
    done = textwrap.dedent("""
        import os, sys
        from embedsmith.core.outputs import claimed
        with claimed(sys.argv[1], "train"):
            if (child := os.fork()) == 0:
                files = [open(os.devnull) for _ in range(3)]
                if (inner := os.fork()) == 0:
                    os._exit(len([os.fstat(file.fileno()) for file in files]) - 3)
                os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.exit(code)
    """)
    ended = subprocess.run([sys.executable, "-c", done, tmp_path / "run"], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
