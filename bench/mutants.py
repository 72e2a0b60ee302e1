"""A seeded sample of mutants as JSON lines, by cosmic-ray's operators and our own. Runs in cosmic-ray's environment.

    python -m bench.mutants ROOM=COUNT... --seed S

Each kind of change (numbers, comparisons, lost calls, swapped roles, ...) is drawn alike, so that the numbers, which
are most, do not fill the sample. Within a kind the order is that of a hash of the seed and the changed line: the sample
stays what it was but for lines that were written anew. Annotations are left alone: a change there stops the import and
would count as a bug that was caught.
"""

import argparse
import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from parso.tree import NodeOrLeaf

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "embedsmith"
_ONE_OF_MANY = (
    "Lt_LtE",
    "LtE_Lt",
    "Gt_GtE",
    "GtE_Gt",
    "Eq_NotEq",
    "NotEq_Eq",
    "Lt_Gt",
    "Gt_Lt",
    "Is_IsNot",
    "IsNot_Is",
)
_ONE_OF_MANY += ("In_NotIn", "NotIn_In", "Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Div", "BitAnd_BitOr")
_ONE_OF_MANY += ("BitOr_BitAnd", "Delete_Not", "Delete_USub", "USub_UAdd")
# Taking a decorator off, or naming an exception that does not exist, nearly always stops at import or says nothing.
_LEFT_OUT = ("RemoveDecorator", "ExceptionReplacer", "VariableReplacer", "VariableInserter")


@dataclass(frozen=True)
class Mutant:
    """One change. `key` stays while the changed line and its module's name do; `text` is the whole changed module."""

    key: str
    room: str
    module: str
    line: int
    operator: str
    before: str
    after: str
    text: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rooms", nargs="+", metavar="ROOM=COUNT")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for item in given.rooms:
        room, _, count = item.partition("=")
        for mutant in sample(room, int(count), f"{given.seed} {room}"):
            print(json.dumps(asdict(mutant)))


@dataclass(frozen=True)
class Place:
    """Where an operator can change something. `time`: which of the module's equal lines it is; `position`: of those
    that the operator finds on that line."""

    path: Path
    operator: str
    occurrence: int
    line: int
    text: str
    time: int
    position: int

    @property
    def module(self) -> str:
        return str(self.path.relative_to(PACKAGE))


def sample(room: str, count: int, seed: str) -> Iterator[Mutant]:
    kinds: dict[str, list[Place]] = defaultdict(list)
    for path in sorted((PACKAGE / room).rglob("*.py")):
        for place in _places(path):
            kinds[_kind(place.operator)].append(place)
    for places in kinds.values():
        places.sort(key=lambda one: _hash(seed, one.module, one.operator, one.text, one.time, one.position))
    chance = random.Random(seed)
    while count > 0 and kinds:
        kind = chance.choice(sorted(kinds))
        mutant = _mutant(room, kinds[kind].pop())
        if not kinds[kind]:
            del kinds[kind]
        if mutant is not None:
            yield mutant
            count -= 1


def _places(path: Path) -> Iterator[Place]:
    source = path.read_text(encoding="utf-8")
    tree, lines = get_ast(source), [line.strip() for line in source.splitlines()]
    times = [lines[: at + 1].count(line) for at, line in enumerate(lines)]
    for name in _operators():
        found: Counter[int] = Counter()
        for occurrence, (line, wanted) in enumerate(_positions(tree, name)):
            found[line] += 1
            if wanted:
                yield Place(path, name, occurrence, line, lines[line - 1], times[line - 1], found[line])


def _hash(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()


def _operators() -> list[str]:
    names = [name for name in operator_names() if name.split("/")[1] not in _LEFT_OUT]
    return [name for name in names if "Operator_" not in name or name.split("Operator_")[1] in _ONE_OF_MANY]


def _kind(operator: str) -> str:
    """Comparisons are one kind, whichever sign becomes which; so are the words True, False, and, or."""
    name = operator.split("/")[1].partition("_")[0]
    return "word" if name.startswith(("ReplaceTrue", "ReplaceFalse", "ReplaceAnd", "ReplaceOr")) else name


def _positions(tree: NodeOrLeaf, name: str) -> Iterator[tuple[int, bool]]:
    """The line of every position of an operator, in the order in which it counts them, and whether it may change."""
    operator = get_operator(name)()
    for node in ast_nodes(tree):
        for start, _ in operator.mutation_positions(node):
            yield start[0], not _in_annotation(node)


def _in_annotation(node: NodeOrLeaf | None) -> bool:
    while node is not None and node.parent is not None:
        above = node.parent
        if above.type in ("annassign", "tfpdef") and node is above.children[1 if above.type == "annassign" else -1]:
            return True
        if above.type == "funcdef" and node is above.annotation:
            return True
        node = above
    return False


def _mutant(room: str, place: Place) -> Mutant | None:
    source = place.path.read_text(encoding="utf-8")
    text = mutate_code(source, get_operator(place.operator)(), place.occurrence)
    if text is None or text == source:
        return None
    try:
        compile(text, str(place.path), "exec")
    except SyntaxError:
        return None
    before, after = _changed_lines(source, text)
    key = _hash(place.module, place.operator, before, after, place.time)[:10]
    return Mutant(key, room, place.module, place.line, place.operator.split("/")[1], before, after, text)


def _changed_lines(source: str, text: str) -> tuple[str, str]:
    old, new = source.splitlines(), text.splitlines()
    first = next(
        (i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), min(len(old), len(new))
    )
    return old[first].strip() if first < len(old) else "", new[first].strip() if first < len(new) else ""


if __name__ == "__main__":
    main()
