"""Shares of a source, sources put together, and what a plan knows of a row."""

import numpy as np
import pytest

from embedsmith.core.errors import DataError, RecipeError
from embedsmith.data import Record, RecordSet, joined, part_of, row_facts, text_id
from embedsmith.data.draw import parts_shuffled
from embedsmith.data.mixture import Selected
from embedsmith.data.plan.separate import estimated_tokens


def records(count, start=0):
    return [Record(f"query {i}", (f"answer {i}", f"other {i}"), (f"wrong {i}",)) for i in range(start, start + count)]


def record_set(rows, name="a"):
    return RecordSet(name, "retrieval", rows, fingerprint=f"print of {name}")


def test_facts_are_ids_and_the_longest_text():
    facts = row_facts([Record("what?", ("yes", "no"), ("x" * 40,)), Record("café", label=1, task="classification")])
    assert facts.query_id_N.tolist() == [text_id("what?"), text_id("café")]
    assert facts.positive_id_P.tolist() == [text_id("yes"), text_id("no")]
    assert facts.offset_N1.tolist() == [0, 2, 2]
    assert facts.length_N.tolist() == [12, 4]
    assert row_facts([]).offset_N1.tolist() == [0]


@pytest.mark.parametrize(("text", "tokens"), [("a", 3), ("abcd", 3), ("abcde", 4), ("中文", 4)])
def test_tokens_are_estimated_from_bytes(text, tokens):
    assert estimated_tokens(text) == tokens


def test_facts_of_chosen_rows_are_those_of_the_rows():
    rows = [Record(f"q{i}", tuple(f"p{i} {j}" for j in range(i % 3))) for i in range(20)]
    chosen = np.asarray([7, 2, 2, 0, 19])
    mine, expected = row_facts(rows).take(chosen), row_facts([rows[place] for place in chosen])
    for name in ("query_id_N", "positive_id_P", "offset_N1", "length_N"):
        assert np.array_equal(getattr(mine, name), getattr(expected, name)), name


def test_parts_are_a_partition_that_keeps_equal_queries_together():
    rows = [*records(500), *records(500)]
    low, high = part_of(record_set(rows), (0, 0.8)), part_of(record_set(rows), (0.8, 1))
    queries = [{record.query for record in half.records} for half in (low, high)]
    assert not queries[0] & queries[1]
    assert len(low.records) + len(high.records) == 1000
    assert 0.74 < len(low.records) / 1000 < 0.86
    assert low.fingerprint != high.fingerprint
    assert list(row_facts(low.records).query_id_N) == [text_id(record.query) for record in low.records]


def test_a_part_does_not_depend_on_the_order_of_the_rows():
    rows = records(100)
    one = part_of(record_set(rows), (0.2, 0.5))
    other = part_of(record_set(rows[::-1]), (0.2, 0.5))
    assert {record.query for record in one.records} == {record.query for record in other.records}


def test_a_part_that_is_none_is_refused():
    with pytest.raises(RecipeError, match="from, to"):
        part_of(record_set(records(3)), (0.5, 0.5))
    with pytest.raises(DataError, match="no row falls into part"):
        part_of(record_set(records(3)), (0.0, 1e-9))


def test_joined_sources_are_one_after_the_other():
    selected = Selected(records(9), np.asarray([8, 1]), row_facts(records(9)).take(np.asarray([8, 1])))
    one = joined([record_set(records(3), "a"), record_set(selected, "b"), record_set(records(2, 50), "c")])
    assert one.name == "a+b+c"
    assert [record.query for record in one.records] == [f"query {i}" for i in (0, 1, 2, 8, 1, 50, 51)]
    assert one.records[-1].query == "query 51"
    assert [record.query for record in one.records[2:4]] == ["query 2", "query 8"]
    assert row_facts(one.records).query_id_N.tolist() == [text_id(record.query) for record in one.records]
    with pytest.raises(IndexError):
        one.records[7]


def test_a_shuffled_text_has_its_thirds_in_another_order():
    text = "".join(chr(ord("a") + place // 50) for place in range(150))
    shuffled = {parts_shuffled(text, 1.0, seed) for seed in range(20)}
    assert 1 < len(shuffled) <= 6
    assert all(sorted(one.replace(" ", "")) == sorted(text) and one.count(" ") == 2 for one in shuffled)
    assert parts_shuffled(text, 0.0, 1) == text
    assert parts_shuffled("short", 1.0, 1) == "short"
    assert parts_shuffled(text, 0.5, 3) == parts_shuffled(text, 0.5, 3)
    assert 20 < sum(parts_shuffled(text, 0.5, seed) != text for seed in range(100)) < 70
