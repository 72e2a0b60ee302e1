"""Mutation operators for cosmic-ray: the mistakes that a general tool does not think of.

Each works on parso's tree. An operator tells the positions in a node that it can change, and changes the n-th.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from cosmic_ray.operators.operator import Example, Operator
from parso.python.tree import Keyword, Name, PythonNode
from parso.tree import BaseNode, Leaf, NodeOrLeaf

Position = tuple[tuple[int, int], tuple[int, int]]


class Semantic(Operator):
    """`places(node)` gives the parts of a node that can be changed; `change(node, part)` gives the changed node."""

    @abstractmethod
    def places(self, node: NodeOrLeaf) -> Iterator[NodeOrLeaf]: ...

    @abstractmethod
    def change(self, node: NodeOrLeaf, part: NodeOrLeaf) -> NodeOrLeaf: ...

    def mutation_positions(self, node: NodeOrLeaf) -> Iterator[Position]:
        for part in self.places(node):
            yield part.start_pos, part.end_pos

    def mutate(self, node: NodeOrLeaf, index: int) -> NodeOrLeaf:
        return self.change(node, list(self.places(node))[index])


class DropArgument(Semantic):
    """A call without one of its keyword arguments: `draw(rows, seed=seed)` becomes `draw(rows)`."""

    words = frozenset(
        """seed rank world_size visit generation epoch step role prompt prompts task weights weight temperature margin
        dim keepdim axis normalize reduction strict stable reverse default exist_ok missing_ok weights_only key mask
        max_length scale batch_size limit where overwrite parents""".split()  # noqa: SIM905
    )

    def places(self, node: NodeOrLeaf) -> Iterator[NodeOrLeaf]:
        if getattr(node, "type", "") == "arglist":
            for part in node.children:
                if part.type == "argument" and part.children[0].type == "name" and part.children[0].value in self.words:
                    yield part

    def change(self, node: NodeOrLeaf, part: NodeOrLeaf) -> NodeOrLeaf:
        at = node.children.index(part)
        from_, to = (at - 1, at + 1) if at else (at, at + 2)  # with the comma before it, or the one after the first
        node.children = [*node.children[:from_], *node.children[to:]]
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("draw(rows, seed=3)", "draw(rows)"), Example("draw(seed=3, n=1)", "draw( n=1)"))


class DropCall(Semantic):
    """A statement that is one call does not happen: a lost fsync, rename, restore, barrier, `model.train()`."""

    def places(self, node: NodeOrLeaf) -> Iterator[NodeOrLeaf]:
        if getattr(node, "type", "") == "simple_stmt" and _is_call(node.children[0]):
            yield node.children[0]

    def change(self, node: NodeOrLeaf, part: NodeOrLeaf) -> NodeOrLeaf:
        node.children[0] = Keyword("pass", part.start_pos, part.get_first_leaf().prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("os.fsync(f)\n", "pass\n"),)


class DropMethod(Semantic):
    """A method in a chain is not called: `x.detach()` becomes `x`, `x.clamp(min=0)` becomes `x`."""

    words = ("detach", "clamp", "clamp_min", "clamp_max", "float", "double", "abs", "copy", "clone", "strip", "lower")
    words += ("sqrt", "eval", "log", "exp")

    def places(self, node: NodeOrLeaf) -> Iterator[NodeOrLeaf]:
        if getattr(node, "type", "") == "atom_expr":
            for name, call in zip(node.children[1:], node.children[2:], strict=False):
                if _opens(name, ".") and name.children[1].value in self.words and _opens(call, "("):
                    yield name

    def change(self, node: NodeOrLeaf, part: NodeOrLeaf) -> NodeOrLeaf:
        at = node.children.index(part)
        node.children = [*node.children[:at], *node.children[at + 2 :]]
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("x.detach().sum()", "x.sum()"),)


class FirstOf(Semantic):
    """A bound is lost: `max(x, floor)` and `min(x, ceiling)` become `x`."""

    def places(self, node: NodeOrLeaf) -> Iterator[NodeOrLeaf]:
        if getattr(node, "type", "") != "atom_expr" or len(node.children) != 2:
            return
        name, call = node.children
        if name.type == "name" and name.value in ("max", "min") and _opens(call, "("):
            arguments = call.children[1]
            if arguments.type == "arglist" and all(part.type != "argument" for part in arguments.children):
                yield name

    def change(self, node: NodeOrLeaf, part: NodeOrLeaf) -> NodeOrLeaf:
        del node.children[0]  # what is left is a pair of brackets
        arguments = node.children[0].children[1]
        arguments.children = arguments.children[:1]
        node.children[0].get_first_leaf().prefix = part.prefix
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("y = max(x, 0)", "y = (x)"),)


class OpenWith(Semantic):
    """A block without its guard: a dropped lock, `no_grad`, `atomic`, restored state."""

    def places(self, node: NodeOrLeaf) -> Iterator[NodeOrLeaf]:
        if getattr(node, "type", "") == "with_stmt" and all(part.type != "with_item" for part in node.children):
            yield node.children[1]

    def change(self, node: NodeOrLeaf, part: NodeOrLeaf) -> NodeOrLeaf:
        colon = next(at for at, child in enumerate(node.children) if isinstance(child, Leaf) and child.value == ":")
        node.children[0] = Keyword("if", node.start_pos, node.get_first_leaf().prefix)
        node.children[1:colon] = [Name("True", part.start_pos, " ")]
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("with lock:\n    pass\n", "if True:\n    pass\n"),)


class SwapRoles(Semantic):
    """The other side: queries for documents, positives for negatives, as attributes and as words in quotes."""

    pairs = (("query", "document"), ("queries", "documents"), ("positives", "negatives"), ("positive", "negative"))
    pairs += (("rows", "columns"), ("mean", "sum"), ("train", "eval"))
    other: ClassVar = {a: b for a, b in pairs} | {b: a for a, b in pairs}

    def places(self, node: NodeOrLeaf) -> Iterator[NodeOrLeaf]:
        quoted = getattr(node, "type", "") == "string" and node.value[1:-1] in self.other
        if quoted or (_opens(node, ".") and node.children[1].value in self.other):
            yield node

    def change(self, node: NodeOrLeaf, part: NodeOrLeaf) -> NodeOrLeaf:
        if isinstance(node, BaseNode):
            node.children[1].value = self.other[node.children[1].value]
        else:
            node.value = f'"{self.other[node.value[1:-1]]}"'
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example('f(role="query")', 'f(role="document")'), Example("x.queries", "x.documents"))


class SwapAxis(Semantic):
    """A reduction over the other axis: `dim=1` becomes `dim=0`, `dim=0` and `dim=-1` become `dim=1` and `dim=0`."""

    other: ClassVar = {"0": "1", "1": "0", "-1": "0"}

    def places(self, node: NodeOrLeaf) -> Iterator[NodeOrLeaf]:
        if getattr(node, "type", "") == "argument" and len(node.children) == 3:
            name, _, value = node.children
            if name.type == "name" and name.value in ("dim", "axis") and value.get_code() in self.other:
                yield value

    def change(self, node: NodeOrLeaf, part: NodeOrLeaf) -> NodeOrLeaf:
        node.children[2] = Name(self.other[part.get_code()], part.start_pos)
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("x.sum(dim=1)", "x.sum(dim=0)"),)


class Provider:
    """What cosmic-ray finds by the entry point."""

    operators: ClassVar = {one.__name__: one for one in Semantic.__subclasses__()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.operators)

    def __getitem__(self, name: str) -> type[Operator]:
        return self.operators[name]


def _opens(node: NodeOrLeaf, sign: str) -> bool:
    """Whether this is a trailer of an expression: `.name` or `(arguments)`."""
    return isinstance(node, PythonNode) and node.type == "trailer" and node.children[0].value == sign


def _is_call(node: NodeOrLeaf) -> bool:
    return getattr(node, "type", "") == "atom_expr" and _opens(node.children[-1], "(")
