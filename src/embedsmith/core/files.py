"""Writing files so that a reader never sees half of one: temporary name, fsync, rename."""

import errno
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from embedsmith.core.errors import CheckpointError

TEMPORARY = ".tmp"
"""How the hidden name of what is not whole yet ends."""


@contextmanager
def atomic_file(path: str | Path, mode: str = "w", *, replace: bool = True) -> Iterator[IO[Any]]:
    """Open `path` for writing; it appears, whole, when the block ends without an error.

    `replace=False`: of several processes that write it the first wins; a file that is there stays as it is.
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
            if replace:
                temporary.replace(path)
            else:
                with suppress(FileExistsError):
                    os.link(temporary, path)
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


def allocate(file: IO[bytes], size: int) -> None:
    """Make a file `size` bytes long and take that room on the disk now; what is not written yet reads as zeros. Where
    the file system cannot take room ahead, the file is only made that long, if there is so much.

    Errors: `OSError` (`ENOSPC`, `EDQUOT`, `EFBIG`) where there is not so much.
    """
    file.flush()
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:  # macOS has no such call
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        disk = os.fstatvfs(file.fileno())
        if disk.f_bavail * disk.f_frsize < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
    os.truncate(file.fileno(), size)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Errors: `CheckpointError` in place of what the system says of a full disk, a used up quota, a file that is too
    large, or a place that cannot be written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if (full := full_disk(error, path)) is not None:
            raise full from error
        if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
            raise CheckpointError(
                f"cannot write here ({error.strerror})", where=path, fix="choose a folder you may write to"
            ) from error
        raise


_NOT_WRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EBUSY)


_FULL = {
    errno.ENOSPC: ("no space left on the disk", "free some space"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or have the quota raised"),
    errno.EFBIG: ("the file is larger than the limit (ulimit -f) or the file system allows", "raise the limit"),
}
_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")  # of numpy, which keeps no reason


def full_disk(error: BaseException | None, path: object = None) -> CheckpointError | None:
    """What to tell of an error that means that a disk took no more; `None` for any other.

    The operating system's word for it is in this error or in the one that led to it: safetensors keeps only the text,
    and torch.save (given an open file, not a path) fails once more while it cleans up.
    """
    if error is None:
        return None
    own = error.errno if isinstance(error, OSError) else None
    known = (code for code in _FULL if own == code or f"(os error {code})" in str(error))
    code = next(known, errno.ENOSPC if isinstance(error, OSError) and _CUT_SHORT.match(str(error)) else None)
    if code is None:
        return full_disk(error.__cause__ or error.__context__, path)
    what, fix = _FULL[code]
    where = getattr(error, "filename", None) if path is None else path
    return CheckpointError(
        f"{what}; what is not whole was not kept", where=where, fix=f"{fix}, then run the same command again"
    )


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
