"""What `freeze.py` compares: two folders that the same command lines wrote, two schemas, two helps, two listings.

Everything ends as *facts*: a mapping of places (a tensor of a model, a key of a JSON file, an option of a verb) to
what stands there. Facts of the base that the tree lacks, or has otherwise, are differences, unless the removal is
declared; facts that only the tree has are differences in files, and mere additions in schema, help and listings.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Facts = dict[str, str]

VOLATILE = re.compile(
    r"(^|[_.])(seconds|second|time|times|started|created|finished_at|date|peak|memory|rss|commit|git|versions?|packages|"
    r"hostname|host|machine|platform|python|cpu|torch|transformers|embedsmith)($|[_.])"
)
"""Keys of JSON, YAML and metrics whose values are times, sizes in memory, or say where and with what something ran."""

WORDS = (
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?"), "<when>"),
    (re.compile(r"\b\d+(\.\d+)?(e-?\d+)? ?(ms|s|seconds?|min|minutes)\b"), "<duration>"),
)
LISTS = ("keys", "options", "names", "files")


@dataclass(frozen=True)
class Removed:
    """What the tree lacks on purpose: patterns (`*` stands for anything) of recipe keys, options of verbs, registered
    names, and files that jobs write in another form."""

    keys: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Removed:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if unknown := sorted(tree.keys() - set(LISTS)):
            raise SystemExit(f"{path}: {unknown[0]!r} is no list of this file; expected: {', '.join(LISTS)}")
        return cls(**{key: tuple(str(entry) for entry in tree.get(key) or ()) for key in LISTS})

    def key(self, place: str) -> bool:
        """Whether a place in a schema or a recipe, such as `train.mining.rule`, is at or below a declared key."""
        return any(fnmatch.fnmatch(place, end) for key in self.keys for end in (key, f"{key}.*", f"{key}: *"))

    def fact(self, place: str) -> bool:
        """Whether a fact of a schema, help or listing is at or below something declared."""
        words = re.split(r"[ ./:=]+", place)
        option = any(fnmatch.fnmatch(place, end) for entry in self.options for end in (entry, f"{entry}: *"))
        return option or self.key(place) or not set(words).isdisjoint(self.names)

    def file(self, name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in self.files)


@dataclass
class Comparison:
    """`differs`: a line each. `removed`: what is gone and declared. `added`: what only the tree has, and may have."""

    differs: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)


def compare_facts(base: Facts, tree: Facts, removed: Removed, *, may_add: bool) -> Comparison:
    found = Comparison()
    for place in sorted(base.keys() | tree.keys()):
        old, new = base.get(place), tree.get(place)
        if old == new:
            continue
        if old is None:
            (found.added if may_add else found.differs).append(f"{place} is added: {shortened(new)}")
        elif new is None and removed.fact(place):
            found.removed.append(place)
        else:
            found.differs.append(f"{place}: {shortened(old)} -> {'gone' if new is None else shortened(new)}")
    return found


def compare_folders(
    base: Path, tree: Path, removed: Removed, unread: Sequence[str], paths: Mapping[str, str]
) -> Comparison:
    """Every file below two folders, but those of the patterns `unread`. `paths`: texts that stand for one another, such
    as the two folders' own names; each is replaced before anything is compared."""
    found = Comparison()
    names = [{str(p.relative_to(at)) for p in at.rglob("*") if p.is_file()} for at in (base, tree)]
    for name in sorted(names[0] | names[1]):
        if any(fnmatch.fnmatch(name, pattern) for pattern in unread):
            continue
        here = [file_facts(at / name, removed, paths) if name in has else None for at, has in zip((base, tree), names)]
        if here[0] == here[1]:
            continue
        if removed.file(name):
            found.removed.append(name)
        elif here[0] is None or here[1] is None:
            found.differs.append(f"{name} is {'added' if here[0] is None else 'gone'}")
        else:
            lines = compare_facts(here[0], here[1], removed, may_add=False).differs
            found.differs.append(f"{name}: {lines[0]}" + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""))
    return found


def file_facts(path: Path, removed: Removed, paths: Mapping[str, str]) -> Facts:
    """The facts of one file by its ending: tensors, keys, lines, or one hash."""
    if path.suffix == ".safetensors":
        return dict(tensors(path))
    if path.suffix in (".json", ".jsonl", ".yaml"):
        text = plain(path.read_text(encoding="utf-8"), paths)
        rows = text.splitlines() if path.suffix == ".jsonl" else [text]
        read = yaml.safe_load if path.suffix == ".yaml" else json.loads
        each = (
            {f"line {n + 1} ": read(row) for n, row in enumerate(rows)} if path.suffix == ".jsonl" else {"": read(text)}
        )
        return {
            f"{line}{k}": v
            for line, t in each.items()
            for k, v in leaves(t)
            if not (VOLATILE.search(k) or removed.key(k))
        }
    if path.suffix in (".md", ".txt", ".csv", ".tsv", ".html", ".py"):
        lines = plain(path.read_text(encoding="utf-8"), paths).splitlines()
        return {f"line {n + 1:05}": line for n, line in enumerate(lines)}
    return {"bytes": hashlib.sha256(path.read_bytes()).hexdigest()}


def tensors(path: Path) -> Iterator[tuple[str, str]]:
    """A hash of every tensor, and one of the header and all."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name, entry in header.items():
        if name == "__metadata__":
            yield name, json.dumps(entry, sort_keys=True)
            continue
        start, stop = entry["data_offsets"]
        digest = hashlib.sha256(content[8 + size + start : 8 + size + stop]).hexdigest()
        yield name, f"{entry['dtype']} {entry['shape']} {digest[:16]}"
    yield "~ order", hashlib.sha256(content).hexdigest()


def plain(text: str, paths: Mapping[str, str]) -> str:
    """A text without what differs from run to run."""
    for name, stands_for in paths.items():
        text = text.replace(name, stands_for)
    for pattern, word in WORDS:
        text = pattern.sub(word, text)
    return text


def leaves(tree: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every number, text and empty list of a JSON tree with its dotted key."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{place}.{key}" if place else str(key))
    elif isinstance(tree, list) and tree:
        for number, value in enumerate(tree):
            yield from leaves(value, f"{place}.{number}")
    else:
        yield place, json.dumps(tree, ensure_ascii=False, default=str)


def schema_facts(text: str) -> Facts:
    """Keys with their types, defaults, enums and whether they are required; descriptions and ranges are left out.

    A definition that is used twice is followed where it stands highest, so that its name is of no account.
    """
    root = json.loads(text)
    facts: Facts = {}
    places: dict[str, str] = {}
    waiting = deque([("", root)])
    while waiting:
        place, node = waiting.popleft()
        if name := node.get("$ref"):
            if name in places:
                facts[f"{place}: as"] = places[name]
                continue
            places[name] = place
            node = root["$defs"][name.rsplit("/", 1)[1]]
        kinds = node["type"] if isinstance(node.get("type"), list) else [node["type"]] if "type" in node else []
        facts |= {f"{place}: type {kind}": "yes" for kind in kinds}
        values = [*node.get("enum", ()), *([node["const"]] if "const" in node else ())]
        facts |= {f"{place}: value {value}": "yes" for value in values}
        facts |= {
            f"{place}: {word}": json.dumps(node[word])
            for word in ("default", "additionalProperties")
            if word in node and not isinstance(node[word], dict)
        }
        facts |= {f"{place}.{key}: required": "yes" for key in node.get("required", ())}
        waiting.extend((f"{place}.{key}".lstrip("."), child) for key, child in node.get("properties", {}).items())
        waiting.extend(
            (f"{place}.*", node[word]) for word in ("items", "additionalProperties") if isinstance(node.get(word), dict)
        )
        waiting.extend((f"{place}.{n}", child) for n, child in enumerate(node.get("prefixItems", ())))
        for child in (*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())):
            kind = child.get("properties", {}).get("type", {}).get("const")
            waiting.append((place if kind is None else f"{place}.{kind}", child))
    return facts


ENTRY = re.compile(r"^  (\S+(?: \S+)*?)(?:  +(\S.*))?$")


def help_facts(verb: str, text: str) -> Facts:
    """The options and arguments of a verb with their defaults; of the first page, the verbs."""
    facts: Facts = {}
    section, last, texts = "", "", {}
    for line in text.splitlines():
        if re.match(r"^\w+:$", line):
            section = line[:-1]
        elif section and (entry := ENTRY.match(line)):
            last = re.sub(r"( range|\bRANGE)\b", "", entry[1]).strip()
            texts[last] = entry[2] or ""
        elif last:
            texts[last] += f" {line.strip()}"
    for entry, about in texts.items():
        default = re.search(r"\[(?:[^\]]*; )?default: ([^;\]]*)", about)
        facts[f"{verb} {entry}".strip()] = (
            " ".join(default[1].split()) if default else "[required]" * ("[required]" in about)
        )
    return facts


def table_facts(text: str) -> Facts:
    """The cells of a table, by the first cell of the row and the column's title."""
    facts: Facts = {}
    titles: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split("[┃│]", line)[1:-1]]
        if line.startswith("┃"):
            titles = cells
        elif line.startswith("│"):
            facts |= {f"{cells[0]}: {title}": cell for title, cell in zip(titles[1:], cells[1:], strict=True)}
    return facts


def shortened(text: str | None, length: int = 60) -> str:
    text = text or ""
    return text if len(text) <= length else f"{text[: length - 1]}…"
