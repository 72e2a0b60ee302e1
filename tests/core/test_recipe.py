"""Recipes: what is accepted, what is refused and in which words."""

import json
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from embedsmith.core.errors import RecipeError
from embedsmith.core.recipe import apply_override, load_recipe, parse, read_tree, save_recipe, schema_json
from embedsmith.core.settings import Count, NotNegative, Positive, Share, descriptions, section, to_plain
from embedsmith.core.shelf import Shelf

shapes = Shelf("shape", "tests.core.test_recipe")


@shapes.register("circle", formula="r", source="Euclid")
@dataclass(frozen=True)
class Circle:
    """A round one."""

    radius: float = 1.0

    def __post_init__(self):
        if self.radius <= 0:
            raise RecipeError(f"radius is {self.radius}", expected="a number above 0")


@shapes.register("pair")
@dataclass(frozen=True)
class Pair:
    """Two of them."""

    first: Annotated[object, shapes]
    second: Annotated[object, shapes] = Circle()


@section
@dataclass(frozen=True)
class Inner:
    learning_rate: float = 1e-5
    widths: tuple[int, ...] = ()


@section
@dataclass(frozen=True)
class Middle:
    inner: Inner = Inner()


@section
@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = Inner()
    shape: Annotated[object, shapes] | None = None
    many: tuple[Inner, ...] = ()
    table: dict[str, float] = field(default_factory=dict)
    either: Middle | str = ""


def test_round_trip_through_a_file(tmp_path):
    recipe = Outer("a", Inner(3e-4, (8, 4)), Pair(Circle(2.0)), (Inner(), Inner(1.0)), {"x": 1.5})
    save_recipe(recipe, tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml", Outer) == recipe


def test_overrides_reach_into_mappings_and_lists(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: a\nmany: [{}, {}]\n")
    overrides = ["inner.learning_rate=1e-3", "many.1.widths=[4, 2]", "shape.type=circle", "shape.radius=3"]
    recipe = load_recipe(path, Outer, overrides)
    assert recipe == Outer("a", Inner(1e-3), Circle(3.0), (Inner(), Inner(widths=(4, 2))))


def test_an_override_does_not_replace_what_stands_there_by_a_section():
    tree = {"stages": [{"recipe": "joint", "set": None}]}
    with pytest.raises(
        RecipeError, match=r"'stages.0.recipe.train.steps=5' would replace stages.0.recipe='joint'(.|\n)*`set`"
    ):
        apply_override(tree, "stages.0.recipe.train.steps=5")
    assert tree == {"stages": [{"recipe": "joint", "set": None}]}
    apply_override(tree, "stages.0.set.a=5")
    assert tree["stages"][0]["set"] == {"a": 5}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"name": "a", "inner": {"learning_rat": 1}}, ["inner.learning_rat", "unknown key", "'learning_rate'"]),
        ({"name": "a", "many": [{}, {"widthz": 1}]}, ["many.1.widthz", "'widths'"]),
        ({"name": "a", "inner": {"learning_rate": "fast"}}, ["inner.learning_rate", "'fast'"]),
        ({"nam": "a"}, ["nam: unknown key", "'name'", "name: this key is required"]),
        ({"name": "a", "shape": {"type": "circel"}}, ["shape", "unknown shape 'circel'", "'circle'"]),
        ({"name": "a", "shape": {"type": "circle", "radios": 2}}, ["shape.radios", "unknown key"]),
        ({"name": "a", "shape": {"type": "circle", "radius": 0}}, ["shape", "radius is 0", "above 0"]),
        ({"name": "a", "shape": {"type": "pair", "first": {"type": "circle", "radius": "x"}}}, ["shape.first.radius"]),
        ({"name": "a", "shape": 3}, ["shape", "3 is not a shape", "`type`"]),
        ({"name": "a", "inner": None}, ["inner: this wants keys with their values (got None)"]),
        ({"name": "a", "either": {"inner": {"learning_rate": "x"}}}, ["either.inner.learning_rate"]),
        ([1], ["recipe"]),
    ],
)
def test_mistakes_are_named(tree, words):
    with pytest.raises(RecipeError) as error:
        parse(Outer, tree)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [", "not valid YAML"), ("name: a\nname: b", "appears twice"), ("- 1", "not a list")],
)
def test_broken_files_are_named(tmp_path, text, words):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words) as error:
        read_tree(path)
    assert "broken.yaml" in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(RecipeError, match=r"nowhere.yaml.*cannot read"):
        read_tree("nowhere.yaml")


@pytest.mark.parametrize("override", ["train.steps", "=3", "many.7.x=1", "many.x=1"])
def test_overrides_that_make_no_sense(override):
    with pytest.raises(RecipeError):
        apply_override({"many": [1]}, override)


def test_the_schema_lists_fields_and_components():
    text = schema_json(Outer)
    for word in ("learning_rate", "circle", "A round one.", "radius"):
        assert word in text


def test_plain_trees_hold_only_yaml_values():
    assert to_plain(Pair(Circle(2.0))) == {
        "type": "pair",
        "first": {"type": "circle", "radius": 2.0},
        "second": {"type": "circle", "radius": 1.0},
    }


@section
@dataclass(frozen=True)
class Ranged:
    """Settings with ranges.

    rate: how fast it goes;
        in two lines.
    `words`: which one. `shares`, `rest`: parts of the whole, (0 to 1).
    """

    rate: Positive = 1.0
    words: Literal["a", "b"] = "a"
    shares: tuple[Share, ...] | None = None
    rest: NotNegative | None = None
    count: Count = 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rate": 0.0}, "Ranged: rate is 0.0\n  expected: greater than 0"),
        ({"rate": float("nan")}, "rate is nan\n  expected: a finite number"),
        ({"words": "c"}, "words is 'c'\n  expected: 'a' or 'b'"),
        ({"shares": (0.5, 1.5)}, "shares is \\(0.5, 1.5\\)\n  expected: less than or equal to 1"),
        ({"rest": -1.0}, "rest is -1.0\n  expected: greater than or equal to 0"),
        ({"count": 0}, "count is 0\n  expected: greater than 0"),
    ],
)
def test_ranges_hold_for_python_callers_and_for_recipes(wrong, message):
    with pytest.raises(RecipeError, match=message):
        Ranged(**wrong)
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        parse(Ranged, wrong)
    assert Ranged(shares=(0.0, 1.0), rest=None).rate == 1.0


def test_descriptions_come_from_the_docstring():
    assert descriptions(Ranged) == {
        "rate": "How fast it goes; in two lines.",
        "words": "Which one.",
        "shares": "Parts of the whole, (0 to 1).",
        "rest": "Parts of the whole, (0 to 1).",
    }
    assert json.loads(schema_json(Ranged))["properties"]["words"]["description"] == "Which one."


def test_two_things_of_one_name_are_refused():
    def circle(): ...

    with pytest.raises(RecipeError, match="two things are called 'circle'"):
        shapes.register("circle")(circle)


def test_a_text_that_ends_in_a_colon_is_a_text():
    """YAML has it for a key without a value; a prompt or a separator is typed like that."""
    tree: dict = {}
    for override in ("a.separator=Query:", "a.prompt=query: ", "a.real={b: }"):
        apply_override(tree, override)
    assert tree["a"] == {"separator": "Query:", "prompt": "query: ", "real": {"b": None}}
