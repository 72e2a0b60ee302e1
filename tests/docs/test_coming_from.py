"""docs/coming-from.md: what it says of sentence-transformers and of us is there under that name."""

import re
from dataclasses import fields
from typing import Any

import pytest

from embedsmith.core.shelf import losses, merge_methods
from embedsmith.data.plan.config import PlanConfig
from embedsmith.merge import Packaging
from embedsmith.models import ModelConfig
from embedsmith.train import EvaluateConfig, TrainConfig
from tests.docs.blocks import ROOT

PAGE = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "plan": PlanConfig,
    "packaging": Packaging,
}


def rows(head: str) -> list[tuple[str, str]]:
    """Left and right cells of the table with this head on its left."""
    table = PAGE.split(f"| {head} |", 1)[1].split("\n\n", 1)[0]
    cells = [re.split(r"(?<!\\)\|", line)[1:3] for line in table.splitlines()[2:]]
    return [(left.strip(), right.strip()) for left, right in cells]


def named(cell: str) -> str:
    """The first word in code marks."""
    return re.findall(r"`(\w+)", cell)[0]


@pytest.mark.parametrize(("head", "shelf"), [("loss there", losses), ("method there", merge_methods)])
def test_our_names_stand_on_their_shelf(head, shelf):
    assert rows(head)
    wrong = [right for _, right in rows(head) if not right.startswith("not here") and named(right) not in shelf.names()]
    assert not wrong


def test_keys_of_recipes_are_there():
    keys = re.findall(r"`(?:train\.)?(model|train|evaluate|plan|packaging)\.(\w+)(?!\w*\()", PAGE)
    assert len(keys) > 12
    known = {(room, field.name) for room, section in SECTIONS.items() for field in fields(section)}
    wrong = set(keys) - known
    assert not wrong


@pytest.mark.parametrize(("head", "module"), [("loss there", "losses"), ("evaluator there", "evaluation")])
def test_names_of_sentence_transformers_are_there(head, module):
    there = pytest.importorskip(f"sentence_transformers.sentence_transformer.{module}")
    names = [name for left, _ in rows(head) for name in re.findall(r"`(\w+)", left)]
    assert [name for name in names if not hasattr(there, name)] == []
