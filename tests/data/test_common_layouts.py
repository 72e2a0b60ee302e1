"""The layouts of published datasets are read by the names of their columns, never by their order."""

import json
import re

import pytest

from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.recipe import parse
from embedsmith.core.settings import to_plain
from embedsmith.curate import Input, InputRecords
from embedsmith.data import Record, Source, read_source


def read(rows, **settings):
    return read_source(Source(rows=rows, **settings))


def user(text):
    return [{"role": "user", "content": text}]


PAIR = Record("q", ("p",), source="rows")
HARD = Record("q", ("p",), ("n", "m"), source="rows")
LAYOUTS = {
    "anchors": [
        ({"anchor": "q", "positive": "p"}, PAIR),
        ({"positive": "p", "anchor": "q"}, PAIR),
        ({"anchor": "q", "positive": "p", "negative_10": "m", "negative_2": "n"}, HARD),
        ({"query": "q", "positive": "p", "negative": ["n", "m"]}, HARD),
    ],
    "answers": [
        ({"answer": "p", "question": "q", "id": 3}, PAIR),
        ({"query": "q", "answer": "p", "negative": "n", "negative_1": "m"}, HARD),
        ({"query": "q", "response": "p", "rejected_response": ["n", "m"]}, HARD),
    ],
    "scored": [
        ({"sentence1": "q", "sentence2": "p", "label": 0.5}, 0.5),
        ({"score": 0.25, "label": 1, "sentence_B": "p", "sentence_A": "q"}, 0.25),
        ({"sentence_A": "q", "sentence_B": "p", "label": 1}, 1.0),
        ({"text1": "q", "text2": "p", "label": 0}, 0.0),
    ],
    "nli": [
        ({"premise": "q", "hypothesis": "p", "label": 0}, 1.0),
        ({"premise": "q", "hypothesis": "p", "label": "neutral"}, 0.5),
        ({"premise": "q", "hypothesis": "p", "label": "2"}, 0.0),
    ],
    "tevatron": [
        (
            {
                "query_id": "1",
                "query": "q",
                "positive_passages": [{"docid": "1", "title": "", "text": "p"}],
                "negative_passages": [{"docid": "2", "text": "n"}, {"docid": "3", "title": "", "text": "m"}],
            },
            HARD,
        ),
        (
            {"query": "q", "positive_passages": [{"title": "Paris", "text": "is a city"}]},
            Record("q", ("Paris is a city",), source="rows"),
        ),
    ],
    "swift": [
        ({"messages": user("q"), "positive_messages": [user("p")]}, PAIR),
        (
            {"messages": user("q"), "positive_messages": [user("p")], "negative_messages": [user("n"), user("m")]},
            HARD,
        ),
        ({"messages": user("q"), "positive_messages": [user("p")], "label": 0.8}, 0.8),
        (
            {
                "messages": [{"role": "system", "content": "Find it."}, *user("q")],
                "positive_messages": [[{"role": "system", "content": "Read:"}, *user("p")]],
            },
            Record("q", ("Read: p",), instruction="Find it. ", source="rows"),
        ),
    ],
    "codiemb": [
        (
            {
                "task_type": "ir",
                "query": ["Find the answer:", "", " q\n"],
                "positives": [["", "", "p"]],
                "negatives": [["", "", "n"], ["", "", "m"]],
                "positive_scores": [-1],
                "negative_scores": [-1.0, -1.0],
            },
            Record("q", ("p",), ("n", "m"), instruction="Instruction: Find the answer Query: ", source="rows"),
        ),
        ({"task_type": "sts", "query": ["", "", "q"], "positives": [["", "", "p"]], "positive_scores": [0.4]}, 0.4),
    ],
    "labels": [({"sentence": "q", "label": "x"}, Record("q", task="classification", label=0, source="rows"))],
}


@pytest.mark.parametrize(("name", "place"), [(name, n) for name, rows in LAYOUTS.items() for n in range(len(rows))])
def test_a_layout_is_read_by_its_names(name, place):
    row, right = LAYOUTS[name][place]
    found = read([row])
    if isinstance(right, float):
        right = Record("q", ("p",), task="sts", positive_scores=(right,), source="rows")
    assert (found.format, list(found.records)) == (name, [right])
    turned = dict(reversed(row.items()))
    assert list(read([turned], format=name).records) == [right]


@pytest.mark.parametrize(
    ("row", "names", "way_out"),
    [
        (
            {"question": "a", "answer": "b", "query": "c"},
            "answers",
            {"columns": {"query": "question", "positives": "answer"}},
        ),
        ({"question": "a", "answer": "b", "label": 1}, "answers, scored", {"format": "scored"}),
        ({"question": "a", "answer": "b", "label": 1}, "answers, scored", {"format": "answers"}),
        ({"anchor": "a", "positive": "b", "score": 0.5}, "anchors, scored", {"format": "scored"}),
        ({"anchor": "a", "positive": "b", "question": "c", "answer": "d"}, "anchors, answers", {"format": "answers"}),
    ],
)
def test_where_two_layouts_fit_it_is_an_error_with_a_way_out(row, names, way_out):
    with pytest.raises(DataError, match=f"rows:1: the columns fit several formats: {names}\n") as caught:
        read([row])
    key, value = next(iter(way_out.items()))
    assert f"{key}: {value}".replace("'", "") in str(caught.value) or key == "format"
    assert f"data.N.{key}" in str(caught.value)
    assert len(read([row], **way_out).records) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"premise": "a", "hypothesis": "b", "label": -1}, "a label that is no class of premise and hypothesis: -1"),
        ({"query": "a", "positive_passages": ["b"]}, "positive_passages hold text of another form: b"),
        ({"messages": "a", "positive_messages": [user("b")]}, "messages hold text of another form"),
        ({"task_type": "nli", "query": ["", "", "a"], "positives": []}, "unknown task_type 'nli'"),
        (
            {"task_type": "ir", "query": "a", "positives": []},
            r"query hold text of another form.*\n.*\[task instruction",
        ),
        ({"anchor": "a", "positive": "b", "negative": 3}, "the negative is a number, not text: 3"),
    ],
)
def test_a_row_of_another_form_is_named_and_can_be_skipped(row, message):
    layout = {"premise": "nli", "messages": "swift", "task_type": "codiemb", "anchor": "anchors"}.get(next(iter(row)))
    good = LAYOUTS[layout or "tevatron"][0][0]
    with pytest.raises(DataError, match=message):
        read([good, row])
    for order in ([good, row], [row, good]):
        assert len(read(order, on_error="skip").records) == 1


def test_a_csv_cell_without_a_text_is_an_absent_negative(tmp_path):
    (tmp_path / "a.csv").write_text("anchor,positive,negative_1,negative_2\nq,p,,n\n", encoding="utf-8")
    found = read_source(Source(path=str(tmp_path / "a.csv")))
    assert (found.records[0].negatives, found.left_out) == (("n",), {})


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "query;answer\na;b\n", ("semicolons", "python -c")),
        ("a.csv", "query\tanswer\na\tb\n", ("tabs", "a.tsv'")),
        ("a.tsv", "query,answer\na,b\n", ("commas", "a.csv'")),
    ],
)
def test_another_delimiter_is_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_source(Source(path=str(tmp_path / name)))
    assert all(word in str(caught.value) for word in words)


def test_rows_that_curation_makes_pairs_of_are_still_those(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "a", "answer": "b"}), encoding="utf-8")
    assert InputRecords(Input(path=str(path))).kind == "rows"


def test_rows_in_memory_are_a_source_that_a_saved_recipe_only_mentions():
    rows = [{"query": "一只猫", "positive": "猫"}, {"query": "狗", "positive": "一只狗"}]
    found = read(rows, name="mine")
    assert [record.positives for record in found.records] == [("猫",), ("一只狗",)]
    assert (found.name, read(rows).name, rows[0]) == ("mine", "rows", {"query": "一只猫", "positive": "猫"})
    assert len(read_source(parse(Source, {"rows": rows, "limit": 1})).records) == 1
    saved = to_plain(Source(rows=rows))
    assert saved["path"] == "rows"
    assert re.fullmatch(r"2 rows \([0-9a-f]{8}\) in memory", saved["rows"])
    assert to_plain(Source(rows=[*rows[1:], rows[0]]))["rows"] != saved["rows"] == to_plain(Source(rows=rows))["rows"]
    with pytest.raises(DataError, match=r"held 2 rows \(\w+\) in memory, which are not in it"):
        read_source(parse(Source, saved))
    with pytest.raises(DataError, match=r"rows:1: the row is a number, not a dict"):
        read([3])
    with pytest.raises(DataError, match="not streamed"):
        read(rows, streaming=True)


@pytest.mark.parametrize(
    ("given", "fix"),
    [("a.jsonl", "path='a.jsonl'"), ({"query": ["a"]}, "zip"), (iter(()), "list"), (3, "list")],
)
def test_what_is_no_list_of_rows_says_how_to_make_one(given, fix):
    with pytest.raises(RecipeError, match=f"rows: this is a .*\n.*\n  to fix: .*{fix}"):
        Source(rows=given)


def test_a_source_without_a_path():
    with pytest.raises(RecipeError, match="a source has no path"):
        Source()


def test_datasets_in_memory(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra hub")
    rows = datasets.Dataset.from_dict({"answer": ["p", "r"], "question": ["q", "s"]})
    found = read(rows)
    assert (found.format, [record.query for record in found.records]) == ("answers", ["q", "s"])
    both = datasets.DatasetDict(train=rows, test=rows.select([1]))
    assert [len(read(both, split=split).records) for split in (None, "test")] == [2, 1]
    with pytest.raises(DataError, match=r"several splits\n.*: dev, test\n.*split: dev .*data\.N\.split=dev"):
        read(datasets.DatasetDict(dev=rows, test=rows))
    assert read_source(Source(rows=rows, cache=str(tmp_path))).records[1].positives == ("r",)
