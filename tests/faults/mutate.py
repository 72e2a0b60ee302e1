"""Seeded changes to a valid file, each with what a command that reads it must do.

The verdict follows from how the change is made, and for files from a reading of our own (`meaning`) that knows nothing
of the program: what cannot be read must be refused, what means the same must give the same result.
"""

import copy
import csv
import gzip
import io
import json
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import yaml
from safetensors.numpy import load as load_tensors

Verdict = Literal["refuse", "same", "either"]
ESCAPES = "\x1b]0;owned\x07\x1b[2J[/red][bold]<script>"


@dataclass(frozen=True)
class Mutation:
    """`put` writes the changed file in the place of the good one."""

    name: str
    verdict: Verdict
    put: Callable[[Path], None]


def mutations(path: Path, chance: random.Random) -> Iterator[Mutation]:
    """Every change that fits a file, once, at places drawn by `chance`."""
    data = path.read_bytes()
    yield from _special()
    known = path.suffix in _READERS or path.name.endswith(".jsonl.gz")
    for name, changed in _bytes(data, chance):
        yield _content(path, name, data, changed)
    if known and path.suffix in (".json", ".jsonl", ".yaml", ".csv", ".tsv", ".txt", ".gz"):
        for name, changed in _encodings(path, data):
            yield _content(
                path,
                name,
                data,
                changed,
                "either" if name == "utf-8-sig" or (path.suffix == ".yaml" and name.startswith("utf-")) else None,
            )
    if path.suffix == ".gz":
        yield Mutation("bomb", "refuse", lambda place: _writer(gzip.compress(b"x" * (1 << 29), 1))(place))
    if path.suffix in (".json", ".yaml"):
        yield from _trees(path, data, chance)
    if path.suffix == ".jsonl":
        yield from _rows(path, data, chance)
    if path.suffix == ".safetensors":
        yield from _tensors(path, data, chance)
    if path.suffix == ".npy":
        yield from _arrays(path, data)


def _content(path: Path, name: str, before: bytes, after: bytes, verdict: Verdict | None = None) -> Mutation:
    return Mutation(name, verdict or verdict_of(path.name, before, after), _writer(after))


def _writer(data: bytes) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        path.write_bytes(data)

    return put


def _special() -> Iterator[Mutation]:
    """No plain file at all."""

    def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
        def put(path: Path) -> None:
            path.unlink()
            make(path)

        return put

    yield Mutation("missing", "refuse", instead(lambda path: None))
    yield Mutation("fifo", "refuse", instead(os.mkfifo))
    yield Mutation("folder", "refuse", instead(lambda path: path.mkdir()))
    yield Mutation("dangling link", "refuse", instead(lambda path: path.symlink_to("nowhere")))
    yield Mutation("link to itself", "refuse", instead(lambda path: path.symlink_to(path.name)))
    yield Mutation("endless device", "refuse", instead(lambda path: path.symlink_to("/dev/zero")))


def _bytes(data: bytes, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    at = chance.randrange(max(1, len(data)))
    end = at + chance.randint(1, 64)
    yield "empty", b""
    yield "cut", data[:at]
    yield "last byte cut", data[:-1]
    yield "first half lost", data[len(data) // 2 :]
    yield "zeroed", bytes(len(data))
    yield "hole", data[:at] + bytes(end - at) + data[end:]
    yield "noise", data[:at] + chance.randbytes(end - at) + data[end:]
    yield "bit flipped", data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :] if data else b"\1"
    yield "piece twice", data[:end] + data[at:]
    yield "twice", data + data
    yield "padded", data + bytes(512)
    yield "nul", data[:at] + b"\0" + data[at:]
    yield "lone surrogate", data[:at] + b"\xed\xa0\x80" + data[at:]


def _encodings(path: Path, data: bytes) -> Iterator[tuple[str, bytes]]:
    packed = path.suffix == ".gz"
    text = (gzip.decompress(data) if packed else data).decode("utf-8")
    wrap = (lambda raw: gzip.compress(raw, mtime=0)) if packed else (lambda raw: raw)
    yield "utf-16", wrap(text.encode("utf-16"))
    yield "utf-32", wrap(text.encode("utf-32"))
    yield "utf-8-sig", wrap(text.encode("utf-8-sig"))
    yield "latin-1", wrap(text.replace("e", "é", 3).encode("latin-1"))
    yield "carriage returns", wrap(text.replace("\n", "\r\n").encode())
    if ".txt" not in path.suffixes:  # where every line is a text
        yield "blank lines behind", wrap(text.encode() + b"\n\n")
    yield "one long line", wrap(text.encode() + b'{"query": "' + b"x" * 2_000_000)
    if packed:
        yield "not packed", text.encode()
        yield "packed twice", gzip.compress(data, mtime=0)


SWAPS: tuple[Any, ...] = (
    [], {}, "", "x", 3, None, True, -1, 0, [[]], {"nonsense": 1}, "../../../etc/passwd", ESCAPES, "x" * 5000,
    math.nan, math.inf, -math.inf, 1e308, 10**30, [None], "\ud800", 0.5,
)  # fmt: skip


def _dump(path: Path, tree: Any) -> bytes:
    if path.suffix == ".yaml":
        return yaml.safe_dump(tree, sort_keys=False).encode("utf-8", "replace")
    return json.dumps(tree).encode()


def _trees(path: Path, data: bytes, chance: random.Random) -> Iterator[Mutation]:
    """Values of another type, at any depth. A recipe knows all its keys, and all its numbers are finite."""
    recipe = path.suffix == ".yaml"
    tree = meaning(path.name, data)
    for value in SWAPS:
        kind: Verdict = "either" if isinstance(value, dict) and isinstance(tree, dict) else "refuse"
        if type(value) is not type(tree):
            yield Mutation(
                f"root is {_short(value)}",
                "refuse" if not isinstance(tree, list) else kind,
                _writer(_dump(path, value)),
            )
    places = list(_places(tree))
    for value in SWAPS:
        where = chance.choice(places)
        scalar = not isinstance(_at(tree, where), dict | list)
        never = (value == {"nonsense": 1} and scalar) or (isinstance(value, float) and not math.isfinite(value))
        yield Mutation(
            f"{'.'.join(map(str, where))} is {_short(value)}",
            "refuse" if recipe and never else "either",
            _writer(_dump(path, _with(tree, where, value))),
        )
    objects = [where for where in [(), *places] if isinstance(_at(tree, where), dict)]
    if objects:
        where = chance.choice(objects)
        changed = _with(tree, (*where, "nonsense"), 1)
        yield Mutation(
            f"{'.'.join(map(str, where))} knows nonsense",
            "refuse" if recipe else "either",
            _writer(_dump(path, changed)),
        )
        lost = chance.choice(places)
        yield Mutation(f"{'.'.join(map(str, lost))} is lost", "either", _writer(_dump(path, _with(tree, lost, ...))))
    deep = b"[" * 100_000 + b"]" * 100_000
    yield Mutation("deep", "refuse", _writer(deep))
    if isinstance(tree, dict) and tree:
        key = json.dumps(chance.choice(list(tree))).encode()
        inner = b"{" + key + b": " + b"[" * 3000 + b"]" * 3000 + b"}"
        yield Mutation(f"{key.decode()} is deep", "refuse" if recipe else "either", _writer(inner))
    if recipe:
        yield Mutation("aliases", "refuse", _writer(_billion()))
        yield Mutation("alias of itself", "refuse", _writer(b"data: &a [*a]\noutput: x\n"))
        yield Mutation("python object", "refuse", _writer(b"data: !!python/object/apply:os.system ['touch owned']\n"))
        yield Mutation("key twice", "either", _writer(data + b"output: elsewhere\n"))


def _billion() -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return ("\n".join(lines) + "\ndata: *a9\n").encode()


def _rows(path: Path, data: bytes, chance: random.Random) -> Iterator[Mutation]:
    lines = data.decode().splitlines()
    rows = [json.loads(line) for line in lines]

    def written(at: int, row: Any) -> Callable[[Path], None]:
        line = row if isinstance(row, str) else json.dumps(row)
        return _writer("\n".join([*lines[:at], line, *lines[at + 1 :], ""]).encode("utf-8", "surrogatepass"))

    for value in SWAPS:
        at = chance.randrange(len(rows))
        key = chance.choice(list(rows[at]))
        never = key in ("score", "query", "text", "text1", "text2") and isinstance(value, dict | list)
        never |= (
            key == "score" and (not isinstance(value, int | float) or not math.isfinite(value)) and value is not None
        )
        yield Mutation(
            f"{key} is {_short(value)}", "refuse" if never else "either", written(at, rows[at] | {key: value})
        )
    at = chance.randrange(len(rows))
    yield Mutation("row is a list", "refuse", written(at, "[1, 2]"))
    yield Mutation("row is a number", "refuse", written(at, "7"))
    yield Mutation("row is null", "refuse", written(at, "null"))
    yield Mutation("row is deep", "refuse", written(at, "[" * 100_000 + "]" * 100_000))
    yield Mutation("row is empty", "refuse", written(at, "{}"))
    yield Mutation("number of 10,000 digits", "refuse", written(at, '{"query": ' + "9" * 10_000 + "}"))
    yield Mutation("keys twice", "either", written(at, lines[at][:-1] + ", " + lines[at][1:]))
    yield Mutation("rows turned round", "either", _writer("\n".join([*lines[::-1], ""]).encode()))


def _tensors(path: Path, data: bytes, chance: random.Random) -> Iterator[Mutation]:
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = chance.choice([key for key in header if key != "__metadata__" and 0 not in header[key]["shape"]])

    def packed(changed: Any, rest: bytes = body) -> bytes:
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + rest

    def entry(**changes: Any) -> bytes:
        return packed(header | {name: header[name] | changes})

    begin, end = header[name]["data_offsets"]
    for label, bits in (("nan", b"\0\0\xc0\x7f"), ("inf", b"\0\0\x80\x7f")):
        filled = body[:begin] + bits * ((end - begin) // 4) + body[end:]
        yield Mutation(f"{name} is {label}", "either", _writer(packed(header, filled)))
    huge = body[:begin] + b"\0\0\x7f\x7f" * ((end - begin) // 4) + body[end:]
    yield Mutation(f"{name} is huge", "either", _writer(packed(header, huge)))
    for label, changed in (
        ("header of 2^60 bytes", (1 << 60).to_bytes(8, "little") + data[8:]),
        ("header a list", packed([1])),
        ("header deep", packed(b"[" * 50_000)),
        ("shape negative", entry(shape=[-1])),
        ("shape huge", entry(shape=[10**12])),
        ("offsets beyond", entry(data_offsets=[begin, end + 10**9])),
        ("offsets turned", entry(data_offsets=[end, begin])),
        ("dtype unknown", entry(dtype="F7")),
    ):
        yield _content(path, label, data, changed)
    lost = {key: value for key, value in header.items() if key != name}
    shaped = [(key, value) for key, value in header.items() if key != "__metadata__"]
    yield Mutation(f"{name} is renamed", "either", _writer(packed(lost | {f"x.{name}": header[name]})))
    yield Mutation("no tensors", "refuse", _writer(packed({}, b"")))
    turned = header | {name: header[name] | {"shape": [*header[name]["shape"], 1]}}
    yield Mutation(f"{name} has another shape", "either", _writer(packed(turned)))
    assert shaped


def _arrays(path: Path, data: bytes) -> Iterator[Mutation]:
    array = np.load(io.BytesIO(data))

    def saved(changed: Any) -> bytes:
        target = io.BytesIO()
        np.save(target, changed, allow_pickle=True)
        return target.getvalue()

    yield Mutation("fewer rows", "refuse", _writer(saved(array[:-1])))
    yield Mutation("more rows", "refuse", _writer(saved(np.concatenate([array, array]))))
    yield Mutation("another type", "refuse", _writer(saved(array.astype("float64"))))
    yield Mutation("pickled", "refuse", _writer(saved(np.array([{}], dtype=object))))
    yield Mutation("flat", "refuse", _writer(saved(array.reshape(-1))))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 30 else f"{text[:20]}… ({len(text)})"


def _places(tree: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items)[:60]:
        yield (*here, key)
        yield from _places(value, (*here, key))


def _at(tree: Any, where: tuple[Any, ...]) -> Any:
    for key in where:
        tree = tree[key]
    return tree


def _with(tree: Any, where: tuple[Any, ...], value: Any) -> Any:
    """The tree with a value in a place; `...` takes what is there away."""
    changed = copy.deepcopy(tree)
    holder = _at(changed, where[:-1])
    if value is ...:
        del holder[where[-1]]
    else:
        holder[where[-1]] = value
    return changed


def verdict_of(name: str, before: bytes, after: bytes) -> Verdict:
    """What must become of content, by a reading of our own."""
    if name.endswith(".jsonl.gz"):
        reader: Callable[[bytes], Any] | None = lambda data: _jsonl(gzip.decompress(data))
    else:
        reader = _READERS.get(Path(name).suffix)
    if reader is None:
        return "either"
    try:
        found = reader(after)
    except Exception:  # noqa: BLE001 (whatever the reader does not take)
        return "refuse"
    return "same" if _equal(found, reader(before)) else "either"


def meaning(name: str, data: bytes) -> Any:
    return _READERS[Path(name).suffix](data)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray):
        return bool(one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes())
    return bool(one == other)


def _jsonl(data: bytes) -> Any:
    rows = [json.loads(line) for line in data.decode("utf-8").split("\n") if line.strip()]
    if not rows:
        raise ValueError("no rows")
    return rows


def _yaml(data: bytes) -> Any:
    _refuse_twice(yaml.compose(data.decode("utf-8")))
    return yaml.safe_load(data)


def _refuse_twice(node: Any) -> None:
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        if len(set(keys)) < len(keys):
            raise ValueError("a key is there twice")
    if isinstance(node, yaml.CollectionNode):
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                _refuse_twice(part)


def _csv(data: bytes, mark: str = ",") -> Any:
    csv.field_size_limit(2**27)  # what a line may have
    rows = list(csv.reader(io.StringIO(data.decode("utf-8"), newline=""), delimiter=mark, strict=True))
    if "\0" in data.decode("utf-8") or len([row for row in rows if row]) < 2:
        raise ValueError("no rows")
    return [row for row in rows if row]


def _txt(data: bytes) -> Any:
    lines = data.decode("utf-8").split("\n")
    return [line.rstrip("\r") for line in lines if line.strip()]


_READERS: dict[str, Callable[[bytes], Any]] = {
    ".json": lambda data: json.loads(data.decode("utf-8")),
    ".jsonl": _jsonl,
    ".yaml": _yaml,
    ".csv": _csv,
    ".tsv": lambda data: _csv(data, "\t"),
    ".txt": _txt,
    ".parquet": lambda data: pq.read_table(io.BytesIO(data)).to_pylist(),
    ".safetensors": load_tensors,
    ".npy": lambda data: np.load(io.BytesIO(data)),
}
