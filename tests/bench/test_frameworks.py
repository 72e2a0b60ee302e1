"""The page on other libraries: what the bench runs is what a reader sees, and each example is short."""

import ast

import numpy as np
import pytest
from bench.frameworks import ADDRESS, FOLDER, LIMIT, PAGE, PROMPTS, apart

from tests.docs.blocks import blocks_of, unread

EXAMPLES = [block for block in blocks_of(PAGE) if block.file != "texts.py"]


def test_every_example_is_short_and_leaves_what_is_compared():
    assert [block.file for block in blocks_of(PAGE) if block.file == "texts.py"] == ["texts.py"]
    assert {block.file for block in EXAMPLES} == {"langchain", "llama-index", "haystack", "openai", "langchain-openai"}
    for block in EXAMPLES:
        names = {node.id for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Name)}
        assert {"query", "documents", "question", "passages"} <= names
        assert len(block.bare.splitlines()) <= 11, block.file
        assert (FOLDER in block.text) != (ADDRESS in block.text), block.file
        assert block.reason
    assert unread(PAGE) == []


def test_the_prompts_of_the_page_are_those_of_the_bench():
    (block,) = (block for block in EXAMPLES if block.file == "llama-index")
    assert all(f'"{prompt}"' in block.text for prompt in PROMPTS.values())


@pytest.mark.parametrize("side", ["query", "documents"])
def test_other_vectors_are_seen(side):
    expected = {"query": np.ones(4), "documents": np.ones((2, 4))}
    found = {name: value.copy() for name, value in expected.items()}
    assert max(apart(found, expected).values()) == 0
    found[side][..., 1] += 2 * LIMIT
    assert [name for name, value in apart(found, expected).items() if value > LIMIT] == [side]
    with pytest.raises(SystemExit, match="shape"):
        apart({**found, side: found[side][..., :3]}, expected)
