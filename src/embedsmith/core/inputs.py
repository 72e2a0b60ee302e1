"""Reading what others wrote: paths, texts and JSON files. Whatever stands there is read whole, or is an error of ours
that names the file and what to do."""

import codecs
import functools
import json
import stat
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from embedsmith.core.errors import DataError, EmbedsmithError
from embedsmith.core.remote import fetched, is_remote, plain_path

T = TypeVar("T")
Fault = type[EmbedsmithError]

JSON_BYTES = 2**28
"""The longest file that is read at once: 256 MiB."""

MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte order marks of encodings that are not read, the longer ones first."""


def local_path(given: str | Path, error: Fault = DataError) -> Path:
    """The path of a file or folder to read, with `~` as the home folder; of what lies in object storage, a copy on this
    machine (`core/remote.py`). Whether it exists is left open, but for object storage.

    Errors: `error` for an empty path (which the system would take as the current folder), one that cannot be (too long,
    a loop of links, an unknown home, a NUL in it), and for a pipe or device, which may never end.
    """
    text = str(given)
    if not text.strip():
        raise error("the path is empty", where=repr(text), fix="name a file or folder; the current folder is .")
    if is_remote(text):
        return fetched(text, error)
    text = plain_path(text)
    shown = text if text.isprintable() else repr(text)
    shown = shown if len(shown) <= 300 else f"{shown[:300]}..."
    try:
        path = Path(text).expanduser()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError, RuntimeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else problem
        raise error(f"cannot read from this path ({reason})", where=shown, fix="check the path") from problem
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise error("this is a pipe, socket or device, not a file", where=shown, fix="copy what it gives into a file")
    return path


def read_text(path: str | Path, error: Fault = DataError, *, fix: str | None = None, most: int | None = None) -> str:
    """The text of a UTF-8 file of at most `most` bytes (`JSON_BYTES`), with or without a byte order mark.

    Errors: `error` naming the file, and with `fix` what to do about a file of ours that is damaged.
    """
    path, most = local_path(path, error), most or JSON_BYTES
    try:
        with path.open("rb") as file:
            raw = file.read(most + 1)
    except OSError as problem:
        raise error(f"cannot read the file ({problem.strerror})", where=path, fix="check the path") from problem
    if len(raw) > most:
        raise error(f"the file is longer than {most:,} bytes", where=path, fix=fix or "check that it is the right file")
    refuse_other_encoding(raw, path, error, fix)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = raw.count(b"\n", 0, problem.start) + 1
        what = f"not UTF-8 (byte 0x{raw[problem.start]:02x} in line {line})"
        raise error(
            what, where=path, fix=fix or f"save it as UTF-8, for example: {_iconv('LATIN1', path)}"
        ) from problem


def refuse_other_encoding(start: bytes, path: Path, error: Fault = DataError, fix: str | None = None) -> None:
    """Errors: `error` for a file that starts with the mark of another encoding than UTF-8."""
    for mark, name in MARKS.items():
        if start.startswith(mark):
            fix = fix or f"convert it, for example: {_iconv(name, path)}"
            raise error(f"the file is {name}, by its byte order mark", where=path, fix=fix)


def _iconv(encoding: str, path: Path) -> str:
    return f"iconv -f {encoding} -t UTF-8 '{path}' > '{path.with_name('utf8-' + path.name)}'"


def read_json(path: str | Path, error: Fault = DataError, *, fix: str | None = None) -> dict[str, Any]:
    """The JSON object in a file. Errors: `error` naming the file, also for what is JSON and no object."""
    text = read_text(path, error, fix=fix)
    try:
        value = json.loads(text)
    except ValueError as problem:
        raise error(f"not valid JSON ({problem})", where=path, fix=fix or "correct the file") from problem
    except RecursionError as problem:
        raise error("not valid JSON: nested too deeply", where=path, fix=fix or "correct the file") from problem
    if not isinstance(value, dict):
        raise error(f"the file holds {kind_of(value)}, not an object", where=path, fix=fix or "correct the file")
    return value


def read_typed(
    path: str | Path, schema: type[T], error: Fault = DataError, *, fix: str | None = None, strict: bool = False
) -> T:
    """A dataclass from the JSON object in a file; keys that it does not have are left alone. `strict`: text that looks
    like a number is none, and the like; the schema may then be another type, too.

    Errors: `error` naming the file and the key that is missing or of another type.
    """
    if not strict:
        return typed(schema, read_json(path, error, fix=fix), path, error, fix=fix)
    text = read_text(path, error, fix=fix)
    check: Callable[[], T] = lambda: _adapter(typing.cast(Any, schema)).validate_json(text, strict=True)
    return _checked(check, path, error, fix)


def typed(schema: type[T], tree: Any, where: object, error: Fault = DataError, *, fix: str | None = None) -> T:
    """Plain values as a dataclass (or another type). Errors: `error` naming the key."""
    check: Callable[[], T] = lambda: _adapter(typing.cast(Any, schema)).validate_python(tree)
    return _checked(check, where, error, fix)


def _checked(check: Callable[[], T], where: object, error: Fault, fix: str | None) -> T:
    from pydantic import ValidationError

    try:
        return check()
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        got = f" (got {str(first['input'])[:60]!r})" if first["type"] not in ("missing", "json_invalid") else ""
        raise error(f"{key}: {first['msg']}{got}", where=where, fix=fix or "correct the file") from problem


@functools.cache
def _adapter(schema: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def kind_of(value: object) -> str:
    """A value's type in the words of JSON."""
    names = ((bool, "true or false"), (int | float, "a number"), (str, "text"), (list, "a list"), (dict, "an object"))
    if value is None:
        return "null"
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)
