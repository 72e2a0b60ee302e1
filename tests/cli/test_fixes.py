"""What an error says to type exists: every key, option, verb and extra that a fix in the source names."""

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import metadata
from pathlib import Path

import pytest
import typer

import embedsmith
from embedsmith.cli import app
from embedsmith.cli.stages import recipe_class
from embedsmith.core.recipe import schema_json

ROOT = Path(embedsmith.__file__).parent


def texts_of(node: ast.expr) -> Iterator[str]:
    """The texts that an expression can be; what is filled in is `_`."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr():
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "_" for part in node.values)
        case ast.IfExp():
            yield from (*texts_of(node.body), *texts_of(node.orelse))
        case ast.BinOp():
            yield "".join((*texts_of(node.left), *texts_of(node.right)))
        case ast.BoolOp():
            for value in node.values:
                yield from texts_of(value)


@cache
def fixes() -> list[tuple[str, str]]:
    """Every text that a call gets as `fix`, itself or by a name of its file; with its place."""
    found = set()
    for path in ROOT.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        nodes = list(ast.walk(ast.parse(text))) if "fix=" in text else []
        given = [
            word.value for call in nodes if isinstance(call, ast.Call) for word in call.keywords if word.arg == "fix"
        ]
        names = {value.id for value in given if isinstance(value, ast.Name)}
        for node in nodes:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in names:
                given.append(node.value)
        found |= {(f"{path.relative_to(ROOT)}:{value.lineno}", text) for value in given for text in texts_of(value)}
    return sorted(found)


@cache
def keys() -> set[str]:
    """The dotted keys of every verb's recipe, places in lists as N and names of one's own as _."""
    found: set[str] = set()

    def walk(part, path, schema):
        if len(path) > 4:
            return
        if "$ref" in part:
            walk(schema["$defs"][part["$ref"].rpartition("/")[2]], path, schema)
        for name, inner in part.get("properties", {}).items():
            found.add(".".join((*path, name)))
            walk(inner, (*path, name), schema)
        for kind in ("anyOf", "oneOf", "allOf", "prefixItems"):
            for inner in part.get(kind, ()):
                walk(inner, path, schema)
        if isinstance(part.get("additionalProperties"), dict):
            found.add(".".join((*path, "_")))
        if isinstance(part.get("items"), dict):
            walk(part["items"], (*path, "N"), schema)

    for verb in ("train", "mine", "merge", "curate", "tokenize", "run"):
        schema = json.loads(schema_json(recipe_class(verb)))
        walk(schema, (), schema)
    return found


def is_key(key: str) -> bool:
    key = re.sub(r"\.\d+(?=\.|$)", ".N", key)
    return bool({key, f"{key.rpartition('.')[0]}._"} & keys())


@cache
def options() -> dict[str, set[str]]:
    verbs = typer.main.get_command(app).commands
    return {
        name: {option for p in verb.params for option in (*p.opts, *p.secondary_opts)} for name, verb in verbs.items()
    }


FILES = r"\.(?:json|jsonl|yaml|py|gz|md|tsv|parquet|gguf|npy|txt)\b"
CALLS = re.compile(r"\b[A-Za-z_.]+\([^()]*(?:\([^()]*\)[^()]*)*\)")
SCRIPTS = set(re.findall(r'"(--\w+)"', (ROOT / "compat" / "scripts.py").read_text(encoding="utf-8")))
OTHERS = {"both", "it", "another", "no", "tie_word_embeddings"}
"""What stands behind `set` or `declare` and is no key of ours."""


def unknown(text: str) -> Iterator[str]:
    """What a fix says to type that nothing knows."""
    plain = re.sub(r"pip install \S+( \S*==\S*)?|https?://\S+|HF_\w+|export \S+", "", CALLS.sub("", text))
    typed = re.findall(r"(?<![-\w.{\[])([A-Za-z_][\w.]*)=(?=[^=])", plain)
    typed += re.findall(r"(?<![-\w./`])[a-z_]+(?:\.[a-zN_][a-zN_\d]*)+", re.sub(r"\S+" + FILES, "", plain))
    yield from (key for key in typed if not is_key(key) and key != "NAME")  # that is for the reader to choose
    names = {key.rpartition(".")[2] for key in keys()} | OTHERS
    yield from (key for key in re.findall(r"\b(?:set|declare) `?([a-z_]+)\b(?![.=])", plain) if key not in names)
    verb = re.search(r"\bembedsmith ([a-z]+)", plain)
    if verb and verb[1] not in options():
        yield verb[0]
    for option in set(re.findall(r"(?<![-\w])--[a-z][a-z_-]*", plain)) - SCRIPTS:
        takers = [options().get(verb[1], set())] if verb and verb.end() < plain.index(option) else options().values()
        if not any(option in each for each in takers):
            yield option


def test_what_fixes_name_exists():
    assert len(fixes()) > 250
    assert {where: found for where, text in fixes() if (found := list(unknown(text)))} == {}


@pytest.mark.parametrize(
    "text",
    [
        "set plan.small=shrink",
        "use pooling=last",
        "add --poolling",
        "set smal",
        "embedsmith trian",
        "embedsmith mine --to X",
    ],
)
def test_what_does_not_exist_is_found(text):
    assert list(unknown(text))


def test_extras_that_are_named_exist():
    known = set(metadata("embedsmith").get_all("Provides-Extra"))
    named = set()
    for path in ROOT.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        named |= set(re.findall(r"embedsmith\[([a-z]+)\]", text))
        named |= set(re.findall(r"MissingExtraError\([^)]*?, \"([a-z]+)\"\)", text))
    assert named
    assert named <= known
