"""Every letter behind a tensor's name stands in core/shapes.md, for its room or for all."""

import ast
import re
from pathlib import Path

import embedsmith

ROOT = Path(embedsmith.__file__).parent
SUFFIX = re.compile(r"[a-z][a-z0-9_]*_((?:[A-Z]|\d(?=[A-Z]))[A-Zk0-9]{0,4})")
OTHER = re.compile(r"lora_(embedding_)?[AB]|.*_(ID|OK)")


def legend():
    """The letters of every room, and those of one room by its name."""
    general, _, special = ROOT.joinpath("core/shapes.md").read_text().partition("## In one room")
    own = {}
    for room, marked in re.findall(r"^\| (\w+) \| ([^|]*) \|", special, re.MULTILINE):
        own.setdefault(room, set()).update(re.findall(r"`(\w)`", marked))
    return {
        letter for row in re.findall(r"^\| (`[^|]*) \|", general, re.MULTILINE) for letter in row if letter.isalpha()
    }, own


def names_in(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Attribute):
            yield node.attr


def test_every_letter_is_explained():
    everywhere, own = legend()
    assert {"N", "Q", "K", "E"} <= everywhere
    missing = set()
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0]
        for name in names_in(path):
            found = SUFFIX.fullmatch(name)
            if found and not OTHER.fullmatch(name):
                unknown = set(found[1]) - everywhere - own.get(room, set()) - set("0123456789")
                missing |= {f"{room}: {name} ({letter})" for letter in unknown}
    assert not missing, sorted(missing)


def test_no_letter_is_explained_for_a_room_that_is_not_there():
    assert set(legend()[1]) - {"room"} <= {path.name for path in ROOT.iterdir() if path.is_dir()}
