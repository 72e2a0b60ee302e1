"""The comparison of `scripts/freeze.py`: what it calls a difference, an addition, and a declared removal."""

import json

import pytest
import torch
from safetensors.torch import save_file
from scripts.freeze_compare import Removed, compare_facts, compare_folders, help_facts, schema_facts, table_facts

NOTHING = Removed()


@pytest.fixture
def sides(tmp_path):
    """Two folders with the same model, metrics and recipe."""
    for side in ("base", "tree"):
        (tmp_path / side).mkdir()
        save_file({"weight": torch.arange(6.0), "bias": torch.zeros(2)}, tmp_path / side / "model.safetensors")
        (tmp_path / side / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n')
        (tmp_path / side / "recipe.yaml").write_text(
            f"train: {{steps: 2, refill: stay}}\noutput: {tmp_path / side}/a\n"
        )
        (tmp_path / side / "state.bin").write_bytes(b"state")
    return tmp_path / "base", tmp_path / "tree"


def compared(sides, removed=NOTHING, unread=()):
    return compare_folders(*sides, removed, unread, {str(side): "<here>" for side in sides})


def test_two_runs_in_two_folders_are_the_same(sides):
    assert compared(sides).word == "same"


def test_a_changed_tensor_is_named(sides):
    save_file({"weight": torch.arange(6.0) + 1e-6, "bias": torch.zeros(2)}, sides[1] / "model.safetensors")
    (line,) = compared(sides).differs
    assert line.startswith("model.safetensors: weight: F32 [6] ")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.jsonl", '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.26}\n', "line 2.loss: 0.25 -> 0.26"),
        ("metrics.jsonl", '{"step": 1, "loss": 0.5}\n{"step": 2}\n', "line 2.loss is gone"),
        ("metrics.jsonl", '{"step": 1, "loss": 0.5, "new": 1}\n{"step": 2, "loss": 0.25}\n', "line 1.new is added"),
        ("state.bin", "stat3", "its bytes"),
        ("more.txt", "", "more.txt is added"),
    ],
)
def test_a_difference_names_the_file_and_the_place(sides, name, content, words):
    (sides[1] / name).write_text(content)
    found = compared(sides)
    assert found.word == "differs"
    assert len(found.differs) == 1
    assert words in found.short
    assert compared(sides, unread=(name,)).word == "same"
    assert compared(sides, Removed(files=(f"base/{name}",))).word == "removed"


def test_a_missing_file_is_a_difference(sides):
    (sides[1] / "state.bin").unlink()
    assert compared(sides).differs == ["state.bin is gone"]


def test_times_are_no_difference(sides):
    for side, seconds in zip(sides, (1.5, 2.5)):
        (side / "report.json").write_text(
            json.dumps({"seconds": seconds, "tokens_per_second": seconds, "at": f"2025-01-0{int(seconds)} 10:00:00"})
        )
    assert compared(sides).word == "same"


def test_a_declared_key_is_missed_by_nobody(sides):
    (sides[1] / "recipe.yaml").write_text(f"train: {{steps: 2}}\noutput: {sides[1]}/a\n")
    assert compared(sides).differs == ["recipe.yaml: train.refill is gone"]
    assert compared(sides, Removed(keys=("train.refill",))).word == "same"


def schema(**properties):
    train = {"properties": properties, "required": ["steps"], "type": "object"}
    return schema_facts({"$defs": {"Any": train}, "properties": {"train": {"$ref": "#/$defs/Any"}}, "type": "object"})


def test_schema_may_gain_words_ranges_and_keys_but_lose_none():
    refill = {"enum": ["stay", "remine"], "default": "stay", "type": "string"}
    base = schema(steps={"type": "integer"}, refill=refill)
    richer = schema(steps={"type": "integer", "minimum": 1, "description": "How many."}, refill=refill, new={})
    assert compare_facts(base, richer, NOTHING, may_add=True).differs == []
    more = schema(steps={"type": "integer"}, refill=refill | {"enum": ["stay", "remine", "drop"]})
    assert compare_facts(base, more, NOTHING, may_add=True).added == ["train.refill: value drop is added"]
    for poorer in (
        schema(refill=refill),
        schema(steps={"type": "number"}, refill=refill),
        schema(steps={"type": "integer"}, refill=refill | {"default": "remine"}),
        schema(steps={"type": "integer"}, refill=refill | {"enum": ["stay"]}),
    ):
        assert compare_facts(base, poorer, NOTHING, may_add=True).word == "differs"
    gone = schema(steps={"type": "integer"})
    assert compare_facts(base, gone, Removed(keys=("train.refill",)), may_add=True).word == "removed"
    one = schema(steps={"type": "integer"}, refill=refill | {"enum": ["stay"]})
    assert compare_facts(base, one, Removed(names=("remine",)), may_add=True).word == "removed"


HELP = """Usage: embedsmith search [OPTIONS] [queries]...

  Search an index.

Arguments:
  queries... <list[str]>  One or more queries.

Options:
  -k <int range>            Hits a query.  [default: 10; x>=1]
  --candidates <int range>  Documents each head proposes.  [default: 100;
                            x>=1]
  --help                    Show this message and exit.
"""


def test_help_is_its_options_and_their_defaults():
    facts = help_facts("search", HELP)
    expected = {"search queries... <list[str]>": "", "search -k <int>": "10", "search --candidates <int>": "100"}
    assert facts == expected | {"search --help": ""}
    assert help_facts("search", HELP.replace("Hits a query.", "How many hits a query gets.")) == facts
    assert compare_facts(facts, help_facts("search", HELP.replace("10;", "9;")), NOTHING, may_add=True).differs
    without = help_facts("search", HELP.replace("  -k <int range>            Hits a query.  [default: 10; x>=1]\n", ""))
    assert compare_facts(facts, without, NOTHING, may_add=True).differs == ["search -k <int> is gone"]
    assert compare_facts(facts, without, Removed(options=("search -k",)), may_add=True).word == "removed"


def test_a_listing_is_its_cells():
    rows = ["┃ name ┃ formula ┃", "│ gor  │ s^2     │", "│ pro  │ -log p  │"]
    facts = table_facts("\n".join(rows))
    assert facts == {"gor: formula": "s^2", "pro: formula": "-log p"}
    assert (
        compare_facts(facts, table_facts("\n".join(rows[:2])), Removed(names=("pro",)), may_add=True).word == "removed"
    )


def test_the_file_of_removals_has_no_other_lists(tmp_path):
    (tmp_path / "removed.yaml").write_text("names: [nan]\n# none\nkeys:\n")
    assert Removed.read(tmp_path / "removed.yaml") == Removed(names=("nan",))
    (tmp_path / "removed.yaml").write_text("nams: [nan]\n")
    with pytest.raises(SystemExit, match="'nams' is no list"):
        Removed.read(tmp_path / "removed.yaml")
