"""What a model's length cuts off the texts of a source."""

import pytest

from embedsmith.data import Source, read_source
from embedsmith.models import cut
from embedsmith.models.cut import cut_of
from tests.models.tiny import embedder

ROWS = [
    {"query": "the fox", "positives": ["the dog " * 6], "negatives": ["a fox jumps " * 9]},
    {"query": "the dog " * 20, "positives": ["a dog"], "negatives": []},
]


@pytest.fixture
def model(tmp_path):
    return embedder(tmp_path, max_length=16)


def test_every_text_counts_with_its_prompt_and_special_tokens(model):
    found = cut_of(model, read_source(Source(rows=ROWS, name="mine")))
    texts = [text for row in ROWS for text in (row["query"], *row["positives"], *row["negatives"])]
    lengths = [len(model.tokenizer(text)["input_ids"]) for text in texts]
    over = [length - 16 for length in lengths if length > 16]
    assert (found.texts, found.cut) == (5, len(over)) == (5, 2)
    assert (found.tokens, found.lost, found.longest) == (sum(lengths), sum(over), max(lengths))


def test_a_first_text_longer_than_what_is_looked_at_counts_alone(model, monkeypatch):
    monkeypatch.setattr(cut, "_CHARACTERS", 3)
    found = cut_of(model, read_source(Source(rows=ROWS, name="mine")))
    assert found.texts == 2  # a query and a document
