"""What a verb writes: one process at a time, and nothing in its way is lost.

Every verb claims its output before it reads or clears anything (`claimed`). The lock is a file beside the output,
`.NAME.embedsmith.lock`, that says who holds it; the system lets go of it when that process ends, however it ends. A
folder is replaced only where it is recognised as what the same verb made before (`Kind`).
"""

import contextlib
import fcntl
import filecmp
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path

from embedsmith.core.errors import CheckpointError, DataError, EmbedsmithError
from embedsmith.core.files import TEMPORARY, apply_umask, disk_errors, sync_file, sync_folder
from embedsmith.core.inputs import read_json
from embedsmith.core.remote import COMPLETE, STOPPED, Delivery, is_remote, plain_path, url_of

_ASIDE = ".old"
_LEFT = re.compile(rf"\.(?P<name>.+)\.[a-z0-9_]{{8}}({re.escape(TEMPORARY)}|{re.escape(_ASIDE)})")
_LOCK = ".embedsmith.lock"
_ELSEWHERE = "choose another output"
_ENDING = 1.0
"""Seconds that one of several that share an output waits for another that is just letting go of it."""
_held: dict[Path, int] = {}
"""The claimed outputs, each with the descriptor of its lock; -1 in a forked child, which has let go of it."""


def _let_go() -> None:
    for path, descriptor in _held.items():
        if descriptor >= 0:
            os.close(descriptor)
        _held[path] = -1  # its number is free: a child of the child must not close what has it then


os.register_at_fork(after_in_child=_let_go)  # else the children of a killed process would go on holding its outputs


@contextmanager
def claimed(output: str | Path, verb: str, *, shared: bool = False, patient: bool = False) -> Iterator[None]:
    """No other process writes to `output` until the block ends; inside, the same process may claim it again.

    What killed runs left beside it is removed, and a result that had stepped aside comes back. Of several ranks the
    first claims for all. `shared`: others that share it may write too, and nothing is removed.
    `patient`: processes of one verb take turns, so that this one waits while another of them holds it.
    Errors: `CheckpointError` naming who holds it, or where the lock cannot be written.
    """
    if is_remote(output):
        what = f"{verb} does not write to object storage"
        raise CheckpointError(what, where=url_of(output), fix="name a folder of this machine, and copy it there")
    path = Path(os.path.realpath(output))  # two names of one folder are one output
    if path in _held:
        yield
        return
    file = _lock_of(path)
    with disk_errors(Path(output)):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(file, output, shared, verb if patient else None)
    _held[path] = descriptor
    try:
        with disk_errors(Path(output)):
            if shared:  # by name alone: who has signed may end before the others
                os.pwrite(descriptor, json.dumps({"shared": verb}).encode(), 0)
            else:
                sign(descriptor, verb)
                recover(path)
        yield
    finally:
        _held.pop(path, None)
        with contextlib.suppress(OSError):
            if shared:  # only the last may remove it
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()  # while it is held: whoever has opened it sees that it has no name any more
        os.close(descriptor)


@contextmanager
def delivered(output: str | Path, verb: str, *, shared: bool = False) -> Iterator[str]:
    """Where an output is to be made: its own path; for a URL of object storage a path on this machine, whose files are
    sent when the block ends (`core/remote.py`). Where it was sent before, those files are brought here first, so that
    the same command goes on, or sees that it is done; after an error what there is is sent too, as `stopped`.

    Errors: those of `claimed`; `CheckpointError` for a place with files that this program did not send, for `shared`
    work and for ranks on several machines, each of which would make its own copy.
    """
    if not is_remote(output):
        yield plain_path(str(output))
        return
    ranks = os.environ.get("WORLD_SIZE", "1")
    if shared or os.environ.get("LOCAL_WORLD_SIZE", ranks) != ranks:
        what = "shards, and ranks on several machines, cannot make one output in object storage"
        raise CheckpointError(what, where=url_of(output), fix="name a folder that all of them see, and copy it later")
    delivery = Delivery(url_of(output), verb)
    if os.environ.get("RANK", "0") != "0":  # the first rank brings and sends
        yield str(delivery.path)
        return
    with claimed(delivery.path, verb):
        delivery.bring()
        try:
            yield str(delivery.path)
        except BaseException:
            if delivery.files():
                with contextlib.suppress(EmbedsmithError):  # the first error is the one to tell
                    delivery.send(STOPPED)
            raise
        delivery.send(COMPLETE)


def is_claimed(output: str | Path) -> bool:
    """Whether a process that is alive has claimed `output`, as far as locks tell."""
    file = _lock_of(Path(os.path.realpath(output)))
    try:
        with file.open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def check_claim(output: str | Path, verb: str) -> None:
    """What `claimed` would refuse, without writing anything. Errors: `CheckpointError`."""
    if is_remote(output):
        return
    path = Path(os.path.realpath(output))
    file = _lock_of(path)
    place = file.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise CheckpointError("cannot write here", where=place, fix="choose an output in a folder you may write to")
    if file.exists():
        with claimed(output, verb):
            pass


def _lock_of(path: Path) -> Path:
    """Beside the output; inside it where it is a folder whose parent is not to be written to (a mounted volume)."""
    if path == path.parent or (path.is_dir() and not os.access(path.parent, os.W_OK)):
        return path / _LOCK
    return path.with_name(f".{path.name}{_LOCK}")


def _locked(file: Path, output: str | Path, shared: bool, patient_with: str | None) -> int:
    """An open descriptor of the lock's file that this process holds; `patient_with`: once no other process of that verb
    does."""
    until = time.monotonic() + (_ENDING if shared else 0)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            told = os.pread(descriptor, 1000, 0).decode(errors="replace")
            os.close(descriptor)
            of_mine = patient_with is not None and (not told or json.dumps({"verb": patient_with})[:-1] in told)
            if of_mine or time.monotonic() < until:
                time.sleep(0.05)
                continue
            raise CheckpointError(
                f"in use by {holder(told)}",
                where=output,
                fix="wait until it ends, or choose another output",
            ) from error
        except OSError as error:
            logging.getLogger("embedsmith").warning("%s: no locks here (%s); see that nobody else writes", file, error)
            return descriptor
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # its holder has just ended and removed it


def sign(descriptor: int, verb: str) -> None:
    """Write into a lock's file who holds it."""
    mine = {"verb": verb, "pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%F %T}"}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(mine).encode(), 0)


def holder(told: str) -> str:
    """In words, who signed a lock's file."""
    try:
        found = json.loads(told)
        return found.get("shared") or "{verb}, process {pid} on {host} since {since}".format(**found)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "another process"


def recover(path: Path) -> None:
    """What killed runs left beside `path`, and for it alone: a result that had stepped aside for one that never came is
    brought back, the rest is removed."""
    beside = list(path.parent.iterdir()) if path.parent.is_dir() else []
    for one in (each for each in beside if (match := _LEFT.fullmatch(each.name)) and match["name"] == path.name):
        if one.suffix == _ASIDE and not os.path.lexists(path) and any(one.iterdir()):
            one.rename(path)
        else:
            _remove(one)


def clear_left(folder: Path) -> None:
    """Remove the temporary files of killed runs anywhere in a folder that is ours and claimed."""
    for one in sorted(folder.rglob(f".*{TEMPORARY}")):
        if _LEFT.fullmatch(one.name):
            _remove(one)


def discard(path: Path) -> None:
    """Remove a folder at once: it first gets a temporary name, so that a kill leaves no half of it."""
    if path.exists():
        with disk_errors(path):
            path.rename(hidden := _hidden(path, TEMPORARY))
        _remove(hidden)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _hidden(path: Path, suffix: str) -> Path:
    """An empty folder beside `path` that a folder can be renamed to."""
    return Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=suffix))


@dataclass(frozen=True)
class Kind:
    """How a folder that a verb wrote is told from any other.

    `name`: in words. `entries`: patterns of its files' paths, a folder at a time; `NAME/**` is all in a folder.
    `mark`: one of its files, which it always has, and a text that stands in it; `None` where it may be half made.
    """

    name: str
    entries: tuple[str, ...]
    mark: tuple[str, str] | None = None

    def marked(self, folder: Path) -> bool:
        if self.mark is None:
            return True
        file, text = folder / self.mark[0], self.mark[1].encode()
        return file.is_file() and text in file.read_bytes()

    def _writes(self, name: str) -> bool:
        return any(
            name.startswith(pattern[:-2])
            if pattern.endswith("/**")
            else fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
            for pattern in self.entries
        )

    def refuse_other(self, path: Path) -> None:
        """Errors: `CheckpointError` where there is something at `path` that is not of this kind."""
        refuse_no_folder(path)
        if files_of(path) and not self.marked(path):
            raise CheckpointError(f"the folder is not empty and holds no {self.name}", where=path, fix=_ELSEWHERE)

    def refuse_foreign(self, path: Path, also: Collection[str] = ()) -> None:
        """Errors: those of `refuse_other`; `CheckpointError` naming the files at `path` that are no part of this kind,
        nor have the name of one of `also`."""
        self.refuse_other(path)
        known = {name for name in files_of(path) if name in also or self._writes(name)}
        if strange := [name for name in files_of(path) if (path / name).is_symlink() or name not in known]:
            more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
            what = f"{', '.join(sorted(strange)[:5])}{more} would be lost: no part of a {self.name}"
            raise CheckpointError(what, where=path, fix="move that away, or choose another output")


_NONE = Kind("result of this verb", (), ("", ""))
"""Of what is never replaced."""


def refuse_no_folder(path: Path) -> None:
    """Errors: `CheckpointError` for a link, a file and anything else that is neither absent nor a folder."""
    if path.is_symlink():
        what = f"this is a link (to {os.readlink(path)})"
        raise CheckpointError(what, where=path, expected="a folder, or nothing", fix=_ELSEWHERE)
    if path.exists() and not path.is_dir():
        raise CheckpointError("this is a file", where=path, expected="a folder, or nothing", fix=_ELSEWHERE)


def refuse_foreign_file(path: Path, ours: str | bool) -> None:
    """Errors: `CheckpointError` for a link, a folder or a device, and for a file that is not ours. `ours`: whether it
    is, or a text that stands in the first million characters of each file that would be written there."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        what = f"this is a link (to {os.readlink(path)})" if path.is_symlink() else "this is no file"
        raise CheckpointError(what, where=path, expected="a file to write to", fix=_ELSEWHERE)
    if not path.exists() or not path.stat().st_size:
        return
    if isinstance(ours, str):
        with path.open("rb") as file:
            ours = ours.encode() in file.read(1_000_000)
    if not ours:
        raise CheckpointError("the file is there already and was not made by this verb", where=path, fix=_ELSEWHERE)


def refuse_foreign_records(output: Path, report: Path, key: str, work: Path, under_way: bool, overwrite: bool) -> None:
    """For a file of records with a report beside it that has the keys `output_bytes` and `key`, and the work folder of
    a run that may be `under_way`. Errors: `CheckpointError` for files that the verb did not write, or that were changed
    since, but for `overwrite`."""
    try:
        found = read_json(report)
        known = found if {"output_bytes", key} <= found.keys() else None
    except DataError:
        known = None
    refuse_foreign_file(report, known is not None)
    refuse_foreign_file(output, known is not None or (work.name == f"{output.name}.work" and work.is_dir()))
    if known is None or under_way or overwrite or not output.exists():
        return
    if known["output_bytes"] != output.stat().st_size:
        fix = "move it away, or replace it with --overwrite"
        raise CheckpointError("the file was changed since it was written", where=output, fix=fix)


def files_of(folder: Path) -> list[str]:
    """Paths of all files below a folder, but for locks and what killed runs left."""
    if not folder.is_dir():
        return []
    files = (one for one in folder.rglob("*") if one.is_symlink() or not one.is_dir())
    names = (one.relative_to(folder) for one in files)
    return [n.as_posix() for n in names if n.name != _LOCK and not any(map(_LEFT.fullmatch, n.parts))]


@contextmanager
def atomic_folder(path: str | Path, kind: Kind = _NONE, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes the name `path` when the block ends without an error.

    A folder of the same `kind` is replaced, and is still there if anything fails before that. Without `overwrite` it
    stays, and must be equal to the new one: the same command was given again.
    Errors: `CheckpointError` for anything else that stands there, when the disk is full or the place cannot be written.
    """
    path = Path(path)
    with disk_errors(path):
        kind.refuse_other(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _hidden(path, TEMPORARY)
        try:
            apply_umask(temporary)
            yield temporary
            kind.refuse_foreign(path, files_of(temporary))
            if overwrite or not files_of(path):
                _move_into_place(temporary, path)
            elif not _equal(temporary, path):
                fix = "choose another output, or replace it with --overwrite"
                raise CheckpointError("another result is here already", where=path, fix=fix)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _equal(left: Path, right: Path) -> bool:
    names = files_of(left)
    return sorted(names) == sorted(files_of(right)) and all(
        filecmp.cmp(left / name, right / name, shallow=False) for name in names
    )


def _move_into_place(new: Path, path: Path) -> None:
    """Make a filled folder durable and give it the name `path`, in place of a folder that is there."""
    for file in new.rglob("*"):
        if file.is_dir():
            sync_folder(file)
        else:
            apply_umask(file)  # safetensors writes for the owner alone
            sync_file(file)
    sync_folder(new)
    if not path.exists():
        new.rename(path)
        sync_folder(path.parent)
        return
    path.rename(aside := _hidden(path, _ASIDE))  # a rename cannot replace a folder that holds files
    try:
        new.rename(path)
    except OSError:
        aside.rename(path)
        raise
    sync_folder(path.parent)
    shutil.rmtree(aside, ignore_errors=True)
