"""File kinds and column layouts stand on their shelves; those of other packages are tried beside ours."""

import json

import pytest

from embedsmith.core import shelf
from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.recipe import parse
from embedsmith.core.shelf import file_kinds, layouts
from embedsmith.curate import Input, InputRecords
from embedsmith.data import Record, Source, read_source, write_records
from embedsmith.data.formats.columns import COMMON, OWN, Layout, known_layouts
from embedsmith.data.formats.file_kinds import Rows, open_rows


@pytest.fixture
def search_log(monkeypatch):
    """A layout as another package would bring it."""
    monkeypatch.setattr(layouts, "_entries", dict(layouts._entries))

    @layouts.register("search_log")
    def search_log() -> Layout:
        """What was typed, and what was clicked."""
        return Layout({"query": "typed", "positives": "clicked"}, required=("typed", "clicked"), task="retrieval")


def lines(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_ours_are_all_on_the_shelf_and_tried_in_their_order():
    assert sorted(OWN + COMMON) == layouts.names()
    assert [(one.name, one.required[-1]) for one in known_layouts("own")] == [
        ("codiemb", "positives"),
        ("records", "positives"),
        ("records", "label"),
        ("flagembedding", "pos"),
        ("f2llm", "passage"),
        ("pairs", "score"),
        ("pairs", "score"),
        ("labels", "label"),
        ("labels", "label"),
    ]
    assert file_kinds.names() == [".csv", ".json", ".jsonl", ".ndjson", ".parquet", ".tsv", ".txt"]


def test_the_first_of_ours_that_fits_is_taken(tmp_path):
    found = read_source(Source(path=lines(tmp_path / "a.jsonl", {"query": "q", "pos": ["p"], "passage": "x"})))
    assert found.format == "flagembedding"


def test_a_layout_of_another_package(tmp_path, search_log):
    path = lines(tmp_path / "a.jsonl", {"typed": "q", "clicked": "p", "when": 3})
    for source in (Source(path=path), parse(Source, {"path": path, "format": "search_log"}, where="recipe")):
        found = read_source(source)
        assert (found.format, found.task, list(found.records)) == (
            "search_log",
            "retrieval",
            [Record("q", ("p",), source="a")],
        )
    # Where one of ours fits, it is taken, because asking for another package's would import every package each time.
    path = lines(tmp_path / "b.jsonl", {"typed": "q", "clicked": "p", "query": "r", "passage": "s"})
    assert read_source(Source(path=path)).format == "f2llm"
    assert read_source(Source(path=path, format="search_log")).records[0].query == "q"


def test_layouts_of_two_packages_that_both_fit_are_an_error(tmp_path, search_log):
    @layouts.register("typed_texts")
    def typed_texts() -> Layout:
        return Layout({"query": "typed"}, required=("typed",), task="retrieval")

    path = lines(tmp_path / "a.jsonl", {"typed": "q", "clicked": "p"})
    with pytest.raises(DataError, match=r"a\.jsonl:1: the columns fit several formats: search_log, typed_texts"):
        read_source(Source(path=path))


def test_a_package_that_cannot_be_imported_stops_no_file_of_ours(tmp_path, monkeypatch):
    def broken():
        raise RecipeError("the package broken extends embedsmith and cannot be imported")

    monkeypatch.setattr(shelf, "load_plugins", broken)
    path = lines(tmp_path / "a.jsonl", {"query": "q", "pos": ["p"]})
    assert read_source(Source(path=path)).format == "flagembedding"
    assert InputRecords(Input(path=path)).kind == "records"
    with pytest.raises(RecipeError, match="the package broken"):
        read_source(Source(path=lines(tmp_path / "b.jsonl", {"words": "w"})))


def test_an_unknown_format_names_the_nearest(tmp_path):
    for make in (
        lambda: Source(path="a.jsonl", format="flagembeding"),
        lambda: parse(Source, {"path": "a.jsonl", "format": "flagembeding"}, where="recipe"),
    ):
        with pytest.raises(RecipeError, match=r"unknown column layout 'flagembeding'.*did you mean 'flagembedding'"):
            make()


def test_a_layout_with_a_role_that_is_none():
    with pytest.raises(RecipeError, match="unknown role 'answer'"):
        Layout({"query": "typed", "answer": "clicked"}, required=("typed",))


def test_a_kind_of_file_of_another_package(tmp_path, monkeypatch):
    monkeypatch.setattr(file_kinds, "_entries", dict(file_kinds._entries))

    @file_kinds.register(".pairs")
    def pairs_of_lines(path):
        """A query and its answer a line, with an arrow between."""
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            query, _, answer = line.partition(" -> ")
            yield number, {"query": query, "positives": [answer]}

    (tmp_path / "a.pairs").write_text("one -> 1\ntwo -> 2\n")
    assert [record.query for record in read_source(Source(path=str(tmp_path / "a.pairs"))).records] == ["one", "two"]
    assert isinstance(open_rows(tmp_path / "a.pairs"), Rows)


def test_a_plain_text_file_is_a_column_of_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match=r"fit no known format; found: text"):
        read_source(Source(path=str(tmp_path / "a.txt")))
    write_records(tmp_path / "b.jsonl", [Record("q", ("p",))])
    assert read_source(Source(path=str(tmp_path / "b.jsonl"))).format == "records"
