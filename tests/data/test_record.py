"""Records and their ids."""

from collections import Counter
from dataclasses import replace

import pytest

from embedsmith.core.errors import DataError
from embedsmith.data.record import Record, text_id, titled, validate, without_empty

GOOD = Record("a question", ("an answer",), ("no answer", "nothing to do with it"))


def test_ids_are_equal_for_the_same_text_in_another_form():
    assert text_id("caf\u00e9  au\tlait ") == text_id("cafe\u0301 au lait")
    assert text_id("a b") != text_id("ab")
    assert text_id("A b") != text_id("a b")


@pytest.mark.parametrize(
    ("title", "text", "whole"),
    [("Paris", "a city", "Paris a city"), ("Paris", "", "Paris"), ("", "a city", "a city"), (None, " a ", " a ")],
)
def test_a_title_is_joined_by_one_space(title, text, whole):
    assert titled(title, text) == whole


def test_ids_are_what_they_were():
    """They are stored beside mined negatives and cached tokens: they must never change. The value is b2sum's."""
    assert text_id("what is late interaction?") == 0xF4667C884E7A09A6 >> 1
    assert all(0 <= text_id(str(number)) < 2**63 for number in range(2000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": ""}, "empty query"),
        ({"query": " \n\t"}, "empty query"),
        ({"query": 12}, "the query is a number, not text: 12"),
        ({"query": "\ud800"}, "broken Unicode"),
        ({"positives": ()}, "no positives"),
        ({"positives": ("",)}, "empty positive"),
        ({"negatives": ("fine", None)}, "the negative is null"),
        ({"positive_scores": (0.5, 0.5)}, "2 positive_scores for 1 texts"),
        ({"positive_scores": (float("nan"),)}, "positive_scores hold nan"),
        ({"positive_scores": ("NaN",)}, "positive_scores hold text, not a number: 'NaN'"),
        ({"positive_scores": (True,)}, "true or false"),
        ({"teacher_negative_scores": (1.0, float("inf"))}, "teacher_negative_scores hold inf"),
        ({"task": "sts"}, "no score for an sts pair"),
        ({"task": "sts", "positive_scores": (None,)}, "no score for an sts pair"),
        ({"task": "ranking"}, "unknown task 'ranking'"),
        ({"task": "clustering", "positives": ()}, "neither a label nor positives"),
        ({"instruction": 3}, "the instruction is a number"),
    ],
)
def test_a_wrong_record_is_named_with_its_place(change, message):
    with pytest.raises(DataError) as caught:
        validate(replace(GOOD, **change), "file.jsonl:7")
    assert str(caught.value).startswith("file.jsonl:7: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "record",
    [
        GOOD,
        replace(GOOD, positive_scores=(None,), negative_scores=(0.0, None), teacher_positive_scores=(17.5,)),
        Record("one text", task="classification", label=0),
        Record("left", ("right",), task="sts", positive_scores=(0.4,)),
    ],
)
def test_a_right_record_passes(record):
    validate(record)


def test_each_role_loses_its_empty_texts_whatever_the_other_has():
    left_out = Counter()
    full = Record("q", ("p",), ("n", "", " "), negative_scores=(0.1, 0.2, 0.3), teacher_negative_scores=(1, 2, 3))
    found = without_empty(full, left_out)
    assert (found.positives, found.negatives) == (("p",), ("n",))
    assert (found.negative_scores, found.teacher_negative_scores) == ((0.1,), (1,))
    found = without_empty(Record("q", ("", "p"), ("n",), positive_scores=(0.4, 0.5)), left_out)
    assert (found.positives, found.positive_scores, found.negatives) == (("p",), (0.5,), ("n",))
    only = Record("q", ("",), ("",))
    assert without_empty(only, left_out) == Record("q", ("",), ()), "an only positive is left for the check"
    assert left_out == {"empty negative": 3, "empty positive": 1}
    odd = Record("q", ("p",), ("n", ""), negative_scores=(0.1,))
    assert without_empty(odd, left_out) is odd, "scores that fit no texts are left for the check"
