"""Writing files so that a reader never sees half of one: temporary name, fsync, rename."""

import errno
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from embedsmith.core.errors import CheckpointError

TEMPORARY = ".tmp"
"""How the hidden name of what is not whole yet ends."""


@contextmanager
def atomic_file(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open `path` for writing; it appears, whole, when the block ends without an error.

    Errors: `CheckpointError` when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            apply_umask(temporary)
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_cache(path: Path, content: bytes) -> None:
    """Write what can be made again, whole or not at all. Where it cannot be written, a warning: the work goes on."""
    try:
        with atomic_file(path, "wb") as file:
            file.write(content)
    except CheckpointError as error:
        logging.getLogger("embedsmith").warning("not kept for the next time: %s", error)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Errors: `CheckpointError` in place of what the system says of a full disk or a place that cannot be written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if _means_full_disk(error):
            raise CheckpointError(
                "no space left on the disk; nothing was written",
                where=path,
                fix="free some space, then run the same command again",
            ) from error
        if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
            raise CheckpointError(
                f"cannot write here ({error.strerror})", where=path, fix="choose a folder you may write to"
            ) from error
        raise


_NOT_WRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EBUSY)


def _means_full_disk(error: BaseException | None) -> bool:
    """The operating system's word for it, in this error or in the one that led to it: safetensors keeps only the text,
    and torch.save (given an open file, not a path) fails once more while it cleans up."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return True
    return "os error 28" in str(error) or _means_full_disk(error.__context__)


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def apply_umask(path: Path) -> None:
    """The mode that a new file or folder of this name would have: temporary ones are for their owner alone."""
    current = os.umask(0)
    os.umask(current)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~current)
