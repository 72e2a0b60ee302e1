"""What `freeze.py` compares: folders that the same command lines wrote, and what they printed.

Everything ends as *facts*: places (a tensor of a model, a key of a JSON file, a line of a text, an option of a verb)
and what stands there. A fact of the base that the tree lacks, or has otherwise, is a difference, unless the removal is
declared. A fact that only the tree has is a difference in a file, and an addition in schema, help and listings.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml

Facts = dict[str, str]
MEASURED = re.compile(r"(^|[._])(seconds|per_second|wait)$|(^|\.)embedsmith$")
"""Keys whose values are times, or embedsmith's own version."""
WHEN = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?")


@dataclass(frozen=True)
class Removed:
    """What the tree lacks on purpose, as `freeze_removed.yaml` declares it; `*` stands for anything."""

    keys: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Removed:
        lists = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        known = [one.name for one in fields(cls)]
        if unknown := sorted(lists.keys() - set(known)):
            raise SystemExit(f"{path}: {unknown[0]!r} is no list of this file; expected: {', '.join(known)}")
        return cls(**{name: tuple(lists.get(name) or ()) for name in known})

    def key(self, place: str) -> bool:
        """Whether a key is declared, or lies below one that is."""
        return any(fnmatch.fnmatch(place, pattern + end) for pattern in self.keys for end in ("", ".*", ": *"))

    def fact(self, place: str) -> bool:
        words = re.split(r"[ ,.:]+", place)  # `merge -s, --sizes <int>` is an option; `data.*.loss: value angle` a name
        options = (pattern.partition(" ") for pattern in self.options)
        option = any(verb == words[0] and name in words[1:] for verb, _, name in options)
        return option or self.key(place) or not set(words).isdisjoint(self.names)


@dataclass
class Comparison:
    """A line for everything found. `removed`: gone, and declared. `added`: only in the tree, where that is allowed."""

    differs: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(self.differs + other.differs, self.removed + other.removed, self.added + other.added)

    @property
    def word(self) -> str:
        return next((one.name for one in fields(self) if getattr(self, one.name)), "same")

    @property
    def short(self) -> str:
        """The first lines of what counts most."""
        lines = self.differs or self.removed or self.added
        return "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")


def compare_facts(base: Facts, tree: Facts, removed: Removed, *, may_add: bool) -> Comparison:
    found = Comparison()
    for place in [*base, *(place for place in tree if place not in base)]:
        old, new = base.get(place), tree.get(place)
        if old is None:
            (found.added if may_add else found.differs).append(f"{place} is added")
        elif new is None:
            (found.removed if removed.fact(place) else found.differs).append(f"{place} is gone")
        elif old != new:
            found.differs.append(f"{place}: {old[:60]} -> {new[:60]}")
    return found


def compare_folders(
    base: Path, tree: Path, removed: Removed, unread: Sequence[str], paths: Mapping[str, str]
) -> Comparison:
    """All files below two folders, but those of the patterns `unread`; a difference names the file and its first place.

    `paths`: texts, such as the names of the two folders, and what is read in their stead.
    """
    found = Comparison()
    files = [{str(path.relative_to(at)) for path in at.rglob("*") if path.is_file()} for at in (base, tree)]
    for name in sorted(files[0] | files[1]):
        if any(fnmatch.fnmatch(name, pattern) for pattern in unread):
            continue
        if name not in files[0] or name not in files[1]:
            lines = [f"{name} is {'gone' if name in files[0] else 'added'}"]
        else:
            old, new = (file_facts(at / name, removed, paths) for at in (base, tree))
            lines = [f"{name}: {line}" for line in compare_facts(old, new, removed, may_add=False).differs]
        declared = any(fnmatch.fnmatch(f"{base.name}/{name}", pattern) for pattern in removed.files)
        (found.removed if declared else found.differs).extend(lines[:1])
    return found


def file_facts(path: Path, removed: Removed, paths: Mapping[str, str]) -> Facts:
    """The tensors, keys or lines of a file, by its ending; else a hash of it."""
    content = path.read_bytes()
    facts: Facts = {}
    if path.suffix == ".safetensors":
        facts = dict(tensors(content))
    elif path.suffix == ".pt":
        facts = dict(leaves(torch.load(path, map_location="cpu", weights_only=True)))
    elif path.suffix in (".json", ".jsonl", ".yaml"):
        facts = text_facts(without_run(content.decode(), paths), path.suffix)
        if path.name == "files.json":  # hashes of files that may name the run's folder, and are compared themselves
            return dict.fromkeys(facts, "is listed")
        return {key: fact for key, fact in facts.items() if not MEASURED.search(key) and not removed.key(key)}
    elif path.suffix == ".md":
        return {
            key: fact for key, fact in page_facts(without_run(content.decode(), paths)).items() if not removed.key(key)
        }
    elif path.suffix in (".txt", ".csv", ".py"):
        return {f"line {n}": line for n, line in enumerate(without_run(content.decode(), paths).splitlines(), 1)}
    return facts | {"its bytes": hashlib.sha256(content).hexdigest()}


def tensors(content: bytes) -> Iterator[tuple[str, str]]:
    """A hash of every tensor of a safetensors file."""
    start = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            own = content[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
            yield name, f"{entry['dtype']} {entry['shape']} {hashlib.sha256(own).hexdigest()[:12]}"


def without_run(text: str, paths: Mapping[str, str]) -> str:
    """A text without what differs from run to run."""
    for name, stands_for in paths.items():
        text = text.replace(name, stands_for)
    return WHEN.sub("<when>", text)


def text_facts(text: str, ending: str) -> Facts:
    """The keys of a JSON or YAML file, or of the lines of a JSONL file."""
    if ending != ".jsonl":
        return dict(leaves(yaml.safe_load(text) if ending == ".yaml" else json.loads(text)))
    rows = [dict(leaves(json.loads(line))) for line in text.splitlines()]
    return {f"line {n}.{key}": value for n, row in enumerate(rows, 1) for key, value in row.items()}


def page_facts(page: str) -> Facts:
    """The lines of a page, and in the place of its YAML blocks their keys."""
    facts: Facts = {}
    for number, part in enumerate(re.split(r"^```(?=yaml$)|^```$", page, flags=re.MULTILINE)):
        if part.startswith("yaml\n"):
            facts |= text_facts(part.removeprefix("yaml\n"), ".yaml")
        else:
            facts |= {f"part {number} line {n}": line for n, line in enumerate(part.splitlines(), 1)}
    return facts


def leaves(tree: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every value that is no mapping or list, and every empty one, with its dotted key; of a tensor a hash."""
    if isinstance(tree, torch.Tensor):
        yield place, f"{tree.dtype} {list(tree.shape)} {hashlib.sha256(tree.numpy().tobytes()).hexdigest()[:12]}"
    elif isinstance(tree, dict | list | tuple) and tree:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{place}.{key}" if place else str(key))
    else:
        yield place, json.dumps(tree, ensure_ascii=False, default=str)


def printed_facts(kind: str, commands: Sequence[Sequence[str]], said: Path, paths: Mapping[str, str]) -> Facts:
    """What the commands of a job printed. `kind`: json, schema, help or table."""
    facts: Facts = {}
    for number, words in enumerate(commands):
        text = without_run((said / f"{number}.out").read_text(encoding="utf-8"), paths)
        if kind == "json" and text.startswith("{"):
            found = text_facts(text, ".json" if text.startswith("{\n") else ".jsonl")
            facts |= {f"{words[0]} {number}: {key}": fact for key, fact in found.items() if not MEASURED.search(key)}
        elif kind == "help":
            facts |= help_facts(" ".join(words[:-1]), text)
        elif kind in ("schema", "table"):
            facts |= schema_facts(json.loads(text)) if kind == "schema" else table_facts(text)
    return facts


def schema_facts(root: dict[str, Any]) -> Facts:
    """Keys with their types, values, defaults and whether they are required; no descriptions, no ranges.

    A definition is followed where it stands highest, so that the names of classes are of no account.
    """
    facts: Facts = {}
    places: dict[str, str] = {}
    waiting = deque([("", root)])
    while waiting:
        place, node = waiting.popleft()
        if "$ref" in node and node["$ref"] in places:
            facts[f"{place}: as"] = places[node["$ref"]]
            continue
        if "$ref" in node:
            places[node["$ref"]] = place
            node = root["$defs"][node["$ref"].rsplit("/", 1)[1]]
        values = [*node.get("enum", ()), *([node["const"]] if "const" in node else ())]
        facts |= {f"{place}: type {node['type']}": ""} if "type" in node else {}
        facts |= {f"{place}: value {value}": "" for value in values}
        facts |= {f"{place}: default": json.dumps(node["default"])} if "default" in node else {}
        facts |= {f"{place}.{key}: required".lstrip("."): "" for key in node.get("required", ())}
        waiting.extend((f"{place}.{key}".lstrip("."), child) for key, child in node.get("properties", {}).items())
        for child in (node.get("items"), node.get("additionalProperties"), *node.get("prefixItems", ())):
            waiting.extend([(f"{place}.*", child)] if isinstance(child, dict) else [])
        for child in (*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())):
            kind = child.get("properties", {}).get("type", {}).get("const")
            waiting.append((f"{place}.{kind}" if kind else place, child))
    return facts


def help_facts(verb: str, page: str) -> Facts:
    """The options and arguments of a verb with their defaults; of the first page the verbs. No descriptions, no
    ranges."""
    about: dict[str, str] = {}
    last = ""
    for line in page.partition("Arguments:" if "Arguments:" in page else "Options:")[2].splitlines():
        if entry := re.match(r"  (\S+(?: \S+)*)(?:  +(.*))?$", line):
            last = f"{verb} {entry[1].replace(' range>', '>')}".strip()
            about[last] = entry[2] or ""
        elif last:
            about[last] += f" {line.strip()}"
    facts = {entry: re.search(r"\[default: ([^;\]]*)", text) for entry, text in about.items()}
    required = {entry: "required" if "[required]" in text else "" for entry, text in about.items()}
    return {entry: " ".join(default[1].split()) if default else required[entry] for entry, default in facts.items()}


def table_facts(text: str) -> Facts:
    """The cells of a table that was printed wide, by the first cell of the row and the title of the column."""
    facts: Facts = {}
    titles: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split("[┃│]", line)[1:-1]]
        if line.startswith("┃"):
            titles = cells
        elif line.startswith("│"):
            facts |= {f"{cells[0]}: {title}": cell for title, cell in zip(titles[1:], cells[1:], strict=True)}
    return facts
