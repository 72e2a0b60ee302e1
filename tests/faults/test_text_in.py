"""Whatever stands where a text, a table or a recipe should: one error that names the file and what to do, in every
verb that reads it. No traceback, no hang, no wrong acceptance."""

import gzip
import json
import os
import signal
from decimal import Decimal
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedsmith.api.curating import run_curate
from embedsmith.api.tokenizing import TokenizeJob, tokenize
from embedsmith.cli.stages import PipelineRecipe
from embedsmith.compat.config import read_recipe, read_reference
from embedsmith.core.errors import EmbedsmithError
from embedsmith.core.inputs import local_path, read_json
from embedsmith.core.recipe import apply_override, load_recipe, parse, read_tree
from embedsmith.data import Source, read_source, stream
from embedsmith.data.formats import file_kinds as file_rows
from embedsmith.data.formats.texts import read_texts
from embedsmith.data.inspect import inspect_source
from embedsmith.data.token_cache import Manifest
from embedsmith.evaluate import Results, load_task
from embedsmith.index import read_documents
from embedsmith.merge.recipe import MergeRecipe
from embedsmith.mining.config import Corpus, MineRecipe
from embedsmith.mining.corpus import corpus_texts
from embedsmith.models import load
from embedsmith.report.run_folder import folder_page
from embedsmith.train import Recipe
from embedsmith.train.build import check_tokens, tokenizer_facts

ROW = {"query": "a cat", "positives": ["the cat"]}


@pytest.fixture(autouse=True)
def no_hang(tmp_path, monkeypatch):
    """Twenty seconds a case, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    signal.alarm(20)
    yield
    signal.alarm(0)


def refused(read, path, *, names=None):
    """The message of the error that `read(path)` ends in; it names the file."""
    with pytest.raises(EmbedsmithError) as caught:
        read(path)
    message = str(caught.value)
    assert (names or path.name) in message
    return message


# Recipes.

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
RECIPES = {
    "utf-16": "model: {path: m}\n".encode("utf-16"),
    "utf-16 without mark": "model: {path: m}\n".encode("utf-16-le"),
    "utf-32": "model: {path: m}\n".encode("utf-32"),
    "latin-1": "output: é\n".encode("latin-1"),
    "binary": bytes(range(256)),
    "zeros": bytes(1000),
    "empty": b"",
    "null": b"null\n",
    "a list": b"- model\n",
    "a number": b"12\n",
    "two documents": b"a: 1\n---\nb: 2\n",
    "a billion aliases": BOMB.encode(),
    "itself": b"a: &a [*a]\n",
    "deep": b"a: " + b"[" * 500 + b"]" * 500,
    "deep mappings": b'{"a": ' * 5000 + b"1" + b"}" * 5000,
    "a key twice": b"output: a\noutput: b\n",
    "a list as a key": b"? [1]\n: 2\n",
    "numbers as keys": b"1: 2\n",
    "no such day": b"output: 2024-13-45\n",
    "a number of 5000 digits": b"output: " + b"9" * 5000,
    "no number": b"output: !!int x\n",
    "no word": b"output: !!bool x\n",
    "an object": b"output: !!python/object/apply:os.system [ls]\n",
    "a NUL in a path": b'output: "a\\0b"\n',
    "half a pair": b'output: "\\ud800"\n',
    "too long": b"output: " + b"x" * 2**20,
    "half": b'{"output": "a", "model": {"pa',
}
SCHEMAS = {
    "train": lambda path: load_recipe(path, Recipe),
    "flat": read_recipe,
    "mine": lambda path: load_recipe(path, MineRecipe),
    "curate": lambda path: run_curate(str(path), [], []),
    "merge": lambda path: load_recipe(path, MergeRecipe),
    "run": lambda path: load_recipe(path, PipelineRecipe),
}


@pytest.mark.parametrize("content", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("ending", [".yaml", ".json"])
def test_a_malformed_recipe_is_one_error(tmp_path, content, ending):
    path = tmp_path / f"recipe{ending}"
    path.write_bytes(content)
    for verb, read in SCHEMAS.items():
        if (verb, ending) != ("curate", ".json"):  # a file of records there
            refused(read, path)


def test_a_recipe_with_a_mark_is_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes("output: é\n".encode("utf-8-sig"))
    assert read_tree(path) == {"output": "é"}


def test_values_of_overrides_are_held_to_the_same(tmp_path):
    for override in (
        "a=[",
        "a=2024-13-45",
        "a=" + "[" * 500,
        'a="\\0"',
        "betas.9999999999999=1",
        "betas.x=1",
        "betas.0.x=1",
        "=1",
        "a",
    ):
        with pytest.raises(EmbedsmithError):
            apply_override({"betas": [0.9]}, override)
    apply_override(tree := {"betas": [None]}, "betas.0.x=1")
    assert tree == {"betas": [{"x": 1}]}


# Places that are no file.


def places(folder):
    """What may stand in the place of a file, by name."""
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    (folder / "folder.jsonl").mkdir()
    (folder / "closed.jsonl").symlink_to("nowhere.jsonl")
    return {
        "pipe": folder / "pipe.jsonl",
        "loop": folder / "loop.jsonl",
        "folder": folder / "folder.jsonl",
        "a link to nothing": folder / "closed.jsonl",
        "device": "/dev/zero",
        "too long": folder / ("x" * 300 + ".jsonl"),
        "too deep": folder / ("x/" * 3000 + "a.jsonl"),
        "no such home": "~no-such-user/a.jsonl",
        "nul": "a\0b.jsonl",
        "empty": "",
        "space": " ",
        "missing": folder / "missing.jsonl",
    }


READERS = {
    "train": lambda path: read_source(Source(path=str(path))),
    "stream": lambda path: list(read_source(Source(path=str(path), streaming=True, score_range=(0, 1))).records),
    "inspect": lambda path: inspect_source(Source(path=str(path))),
    "curate": lambda path: run_curate(str(path), ["out.jsonl"], ["exact_duplicates"]),
    "mine": lambda path: corpus_texts([], [Corpus(path=str(path))]),
    "encode": lambda path: list(read_texts(str(path))),
    "index": lambda path: list(read_documents(str(path))),
    "evaluate": lambda path: load_task(str(path)),
}


@pytest.mark.parametrize("verb", READERS)
def test_what_is_no_file_is_one_error(tmp_path, verb):
    for name, place in places(tmp_path).items():
        if (verb, name) in (("mine", "empty"),):
            place = " "  # an empty one is refused by the settings
        with pytest.raises(EmbedsmithError) as caught:
            READERS[verb](place)
        assert str(caught.value), name


def flat_config(path):
    """As `evaluate_extractor_mteb.py --config` reads it."""
    return read_reference(read_tree(path), (), path)


def test_what_is_no_file_is_no_recipe_and_no_json(tmp_path):
    for name, place in places(tmp_path).items():
        for read in (read_tree, read_json, Results.load, flat_config, lambda path: read_recipe(str(path))):
            with pytest.raises(EmbedsmithError) as caught:
                read(place)
            assert str(caught.value), name


# Data files.


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def deep(levels=100_000):
    return '{"query": ' + "[" * levels + "]" * levels + "}"


RECORDS = {
    "deep row": lines(ROW, deep()),
    "list row": lines(ROW, "[1, 2]"),
    "number row": lines(ROW, "12"),
    "text row": lines(ROW, '"text"'),
    "null row": lines(ROW, "null"),
    "5000 digits": lines(ROW, '{"query": ' + "9" * 5000 + "}"),
    "half a pair": lines(ROW, '{"query": "\\ud800", "positives": ["p"], "text": "\\udfff"}'),
    "half a pair in a key": lines(ROW, '{"query": "q", "positives": ["p"], "\\ud800": "p"}'),
    "half a pair as a label": lines(ROW, '{"query": "q", "label": "\\ud800", "task": "classification"}'),
    "half a pair deep inside": lines(ROW, '{"query": "q", "positives": ["p"], "source": "\\ud83d"}'),
    "utf-16": (json.dumps(ROW) + "\n").encode("utf-16"),
    "latin-1": lines(ROW) + '{"query": "é", "positives": ["p"], "text": "é"}\n'.encode("latin-1"),
    "binary": bytes(range(256)) * 10,
    "zeros": bytes(1000),
    "nothing": b"",
    "half a row": lines(ROW) + b'{"query": "a',
    "NaN as a score": lines('{"query": "q", "positives": ["p"], "positive_scores": [NaN]}'),
    "infinity as a score": lines('{"query": "q", "positives": ["p"], "positive_scores": [-Infinity]}'),
    "1e999 as a score": lines('{"query": "q", "positives": ["p"], "teacher_scores": [1e999]}'),
    "400 digits as a score": lines('{"query": "q", "positives": ["p"], "positive_scores": [' + "9" * 400 + "]}"),
    "text as a score": lines('{"query": "q", "positives": ["p"], "positive_scores": ["0.5"]}'),
    "fewer scores": lines({**ROW, "negatives": ["a", "b"], "teacher_scores": [0.5]}),
    "more scores": lines({**ROW, "negatives": ["a", "b"], "teacher_scores": [0.5] * 4}),
    "scores of positives only": lines({**ROW, "negatives": ["a", "b"], "negative_scores": [0.5]}),
    "no score for a text": lines({**ROW, "positive_scores": []}),
    "a label of 200 bits": lines({"query": "q", "label": 2**200, "task": "classification"}),
    "an object as text": lines({"query": {"a": 1}, "positives": ["p"]}),
    "a list of lists": lines({"query": "q", "positives": [["p"]]}),
    "a number as positives": lines({"query": "q", "positives": 1}),
    "a list as task": lines({**ROW, "task": ["retrieval"]}),
    "a number as instruction": lines({**ROW, "instruction": 3}),
    "a number as source": lines({**ROW, "source": 3}),
}


@pytest.mark.parametrize("content", RECORDS.values(), ids=RECORDS)
def test_malformed_records_are_one_error(tmp_path, content):
    path = tmp_path / "records.jsonl"
    path.write_bytes(content)
    for verb in ("train", "inspect", "curate"):
        refused(READERS[verb], path)
    refused(lambda path: read_source(Source(path=str(path), cache=str(tmp_path / "kept"))), path)
    array = tmp_path / "records.json"
    array.write_bytes(content)
    refused(READERS["train"], array)
    zipped = tmp_path / "records.jsonl.gz"
    zipped.write_bytes(gzip.compress(content))
    refused(READERS["train"], zipped)


TEXTS = {
    "deep row": lines('{"_id": "1", "text": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "list row": lines({"_id": "1", "text": "a"}, "[1]"),
    "a list as text": lines({"_id": "1", "text": ["a"]}),
    "no text": lines({"_id": "1", "body": "a"}),
    "a number as title": lines({"_id": "1", "text": "a", "title": 5}),
    "half a pair": lines('{"_id": "1", "text": "\\ud800"}'),
    "half a pair as id": lines('{"_id": "\\ud800", "text": "a"}'),
    "half a pair as metadata": lines('{"_id": "1", "text": "a", "lang": ["\\ud800"]}'),
    "5000 digits": lines('{"_id": ' + "9" * 5000 + ', "text": "a"}'),
    "utf-16": b'{"_id": "1", "text": "a"}\n'.decode().encode("utf-16"),
    "latin-1": '{"_id": "1", "text": "é"}\n'.encode("latin-1"),
    "binary": bytes(range(256)) * 10,
    "zeros": bytes(1000),
    "half a row": b'{"_id": "1", "te',
}


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_malformed_texts_are_one_error(tmp_path, content):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(content)
    for verb in ("mine", "encode", "index", "evaluate"):
        refused(READERS[verb], path)
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_bytes(content)
    (folder / "queries.jsonl").write_bytes(lines({"_id": "q", "text": "a"}))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t1\t1\n")
    for verb in ("train", "inspect", "curate", "mine", "encode", "index", "evaluate"):
        refused(READERS[verb], folder, names="corpus.jsonl")


TABLES = {
    "unbalanced": b'query,positives\n"a,b\nc,d\n',
    "text behind a quote": b'query,positives\n"a"b,c\n',
    "cells": b"query,positives\na,b,c\n",
    "a name twice": b"query,positives,query\na,b,c\n",
    "no header": b"\n\n",
    "many columns": ",".join(f"c{n}" for n in range(50_000)).encode() + b"\n",
    "zeros": bytes(2000),
    "latin-1": b"query,positives\na,\xe9\n",
    "a bare return": b"query,positives\na\rb,c\n",
}


@pytest.mark.parametrize("content", TABLES.values(), ids=TABLES)
def test_malformed_tables_are_one_error(tmp_path, content):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    for verb in ("train", "inspect", "curate", "evaluate"):
        refused(READERS[verb], path)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".txt", ".csv", ".tsv", ".json"])
def test_a_line_longer_than_memory_is_refused_with_its_number(tmp_path, monkeypatch, ending):
    """A gzip of a few megabytes may hold a line of gigabytes; it is read no further than the limit."""
    monkeypatch.setattr(file_rows, "LINE_BYTES", 2**16)
    monkeypatch.setattr(file_rows, "ARRAY_BYTES", 2**16)
    path = tmp_path / f"bomb{ending}"
    head = {".csv": "query,positives\n", ".tsv": "query\tpositives\n", ".json": "[\n"}.get(
        ending, json.dumps(ROW) + "\n"
    )
    content = head.encode() + b"x" * 2**24
    path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    message = refused(READERS["encode"] if ending == ".txt" else READERS["train"], path)
    assert f"{path}:2: the line is longer than 65,536 bytes" in message


def test_a_quoted_cell_and_an_array_have_a_limit_too(tmp_path, monkeypatch):
    monkeypatch.setattr(file_rows, "LINE_BYTES", 2**16)
    monkeypatch.setattr(file_rows, "ARRAY_BYTES", 2**16)
    path = tmp_path / "cell.csv"
    path.write_bytes(b'query,positives\n"' + b"text\n" * 2**16)
    assert "field larger than field limit" in refused(READERS["train"], path)
    array = tmp_path / "array.json"
    array.write_bytes(b"[\n" + b"1,\n" * 2**16)
    assert "the array is longer than 65,536" in refused(READERS["train"], array)


def test_broken_archives_are_one_error(tmp_path):
    whole = gzip.compress(lines(*[{**ROW, "text": str(n)} for n in range(300)]))
    for name, content in {
        "cut": whole[:-100],
        "changed": whole[:200] + bytes(50) + whole[250:],
        "no gzip": b"text\n",
        "header only": whole[:10],
        "rubbish behind": whole + b"rubbish",
    }.items():
        path = tmp_path / f"{name.replace(' ', '-')}.jsonl.gz"
        path.write_bytes(content)
        for verb in ("train", "inspect", "curate", "mine", "encode", "index", "evaluate"):
            refused(READERS[verb], path)


# Parquet.


def with_bytes(*texts):
    """A column of text whose bytes need not be UTF-8."""
    ends = [0]
    for text in texts:
        ends.append(ends[-1] + len(text))
    offsets = pa.array(ends, pa.int32()).buffers()[1]
    return pa.StringArray.from_buffers(len(texts), offsets, pa.py_buffer(b"".join(texts)))


PARQUET = {
    "not utf-8": {"query": with_bytes(b"a", b"\xff\xfe"), "positives": ["p", "p"], "text": with_bytes(b"a", b"\xff")},
    "dates": {
        "query": pa.array([0, 1], pa.timestamp("us")),
        "positives": ["p", "p"],
        "text": pa.array([0, 1], pa.date32()),
    },
    "the year 300,000": {
        "query": pa.array([0, 2**62], pa.timestamp("us")),
        "positives": ["p", "p"],
        "text": pa.array([0, 10**9 * 2], pa.date32()),
    },
    "an unknown zone": {
        "query": pa.array([0, 1], pa.timestamp("us", "Mars/Olympus")),
        "positives": ["p", "p"],
        "text": pa.array([0, 1], pa.timestamp("us", "Mars/Olympus")),
    },
    "structures": {"query": [{"a": 1}], "positives": [[["p"]]], "text": [[{"a": "b"}]]},
    "bytes": {"query": [b"a"], "positives": ["p"], "text": [b"a"]},
    "numbers": {"query": [1.5], "positives": [2], "text": [3]},
    "decimals as scores": {"query": ["q"], "positives": ["p"], "positive_scores": pa.array([Decimal("0.5")])},
    "no rows": {"query": pa.array([], pa.string()), "positives": pa.array([], pa.string())},
    "no columns": {},
}


@pytest.mark.parametrize("columns", PARQUET.values(), ids=PARQUET)
def test_malformed_parquet_is_one_error(tmp_path, columns):
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table(columns), path)
    for verb in ("train", "stream", "inspect", "curate"):
        refused(READERS[verb], path)
    if "text" in columns:
        for verb in ("mine", "encode", "index", "evaluate"):
            refused(READERS[verb], path)


def test_a_damaged_parquet_file_is_one_error(tmp_path):
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"query": [str(n) for n in range(500)], "positives": ["p"] * 500}), path)
    whole = path.read_bytes()
    names = whole.replace(b"positives", b"\xffositives")  # a column's name that is no text
    for content in (b"", whole[:-1], whole[:100], whole[4:], b"PAR1" + bytes(100) + b"PAR1", bytes(500), names):
        path.write_bytes(content)
        for verb in READERS:
            refused(READERS[verb], path)
        for verb in ("train", "stream", "inspect"):  # in a folder too
            refused(READERS[verb], path.parent)


def test_a_footer_at_odds_with_itself_is_refused_before_its_statistics_end_the_process(monkeypatch):
    column = SimpleNamespace(physical_type="BYTE_ARRAY")
    group = SimpleNamespace(num_columns=1, column=lambda place: SimpleNamespace(physical_type="UNKNOWN"))
    schema = SimpleNamespace(column=lambda place: column)
    footer = SimpleNamespace(schema=schema, num_columns=1, num_row_groups=1, row_group=lambda place: group)
    monkeypatch.setattr(stream.pq, "read_metadata", lambda file: footer)
    with pytest.raises(EmbedsmithError, match=r"test_text_in\.py: .*footer is damaged"):
        stream.ParquetBlocks((__file__,))


def test_a_date_beside_the_text_is_metadata(tmp_path):
    path = tmp_path / "corpus.parquet"
    day = pa.array([19000], pa.date32())
    pq.write_table(pa.table({"_id": ["1"], "text": ["a"], "day": day, "raw": pa.array([None], pa.binary())}), path)
    (document,) = read_documents(path)
    assert document.metadata == {"day": "2022-01-08", "raw": None}
    assert len(document.hash) == 32
    pq.write_table(pa.table({"_id": ["1"], "text": ["a"], "raw": [b"\xff"]}), path)
    assert "'raw'" in refused(lambda path: list(read_documents(path)), path)


# Empty slots (the case of a negative "").


def test_an_empty_optional_slot_is_left_out_and_counted(tmp_path, caplog):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"query": "cat", "pos": ["the cat"], "neg": [""]},
        {
            "query": "dog",
            "pos": ["", "the dog"],
            "neg": ["", "tree", " "],
            "pos_scores": [1, 2],
            "neg_scores": [3, 4, 5],
        },
        {"query": "red", "pos": ["red mat"], "neg": []},
        {"query": "x", "pos": ["y"], "neg": None},
    ]
    path.write_bytes(lines(*rows))
    for source in (Source(path=str(path)), Source(path=str(path), cache=str(tmp_path / "kept"))):
        for _ in range(2):  # read, and found in the cache
            found = read_source(source)
            assert [(r.positives, r.negatives) for r in found.records] == [
                (("the cat",), ()),
                (("the dog",), ("tree",)),
                (("red mat",), ()),
                (("y",), ()),
            ]
            assert (found.records[1].teacher_positive_scores, found.records[1].teacher_negative_scores) == (
                (2.0,),
                (4.0,),
            )
            assert found.left_out == {"empty negative": 3, "empty positive": 1}
            assert found.skipped == ()
            assert "3 (empty negative)" in caplog.text
            caplog.clear()
    assert inspect_source(Source(path=str(path))).left_out == {"empty negative": 3, "empty positive": 1}
    report = run_curate(str(path), ["out.jsonl"], ["exact_duplicates"])
    assert report.steps[0].notes == {"slots left out": {"empty negative": 3, "empty positive": 1}}
    assert report.records == 4


@pytest.mark.parametrize(
    "row", [{"query": " ", "pos": ["a"], "neg": ["b"]}, {"query": "a", "pos": ["", " "], "neg": []}]
)
def test_an_empty_query_or_no_positive_is_the_rows_fault(tmp_path, row):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(lines({"query": "cat", "pos": ["the cat"]}, row))
    assert f"{path}:2: empty" in refused(READERS["train"], path)
    found = read_source(Source(path=str(path), on_error="skip"))
    assert [fault.count for fault in found.skipped] == [1]


# JSON of ours.

JSON = {
    "nothing": b"",
    "half": b'{"a": ',
    "list": b"[]",
    "number": b"12",
    "deep": b'{"a": ' * 100_000 + b"1" + b"}" * 100_000,
    "5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "zeros": bytes(100),
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "latin-1": '{"a": "é"}'.encode("latin-1"),
    "another": b'{"tasks": [[]], "tokenizer": 1, "datasets": [], "version": "x", "max_seq_length": "long"}',
    "others inside": b'{"tasks": [{"task": 1}], "tokenizer": {}, "datasets": {"a": {}}, "pooling_mode": ["mean"]}',
}


@pytest.mark.parametrize("content", JSON.values(), ids=JSON)
def test_damaged_json_of_ours_is_one_error(tmp_path, content):
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    refused(Results.load, path)
    refused(lambda path: Manifest.load(path.parent), path)
    refused(flat_config, path)
    refused(lambda path: read_source(Source(path=str(path.parent))), path)


@pytest.mark.parametrize("content", [*JSON.values(), b'{"sources": {"a": 5}, "best_step": [], "step": NaN}'])
def test_a_report_is_made_of_what_can_be_read(tmp_path, content):
    """Of anything but the recipe: what is damaged is left out and named."""
    for name in ("metrics.jsonl", "manifest.json", "finished.json", "environment.json", "merge.json", "before.json"):
        folder = tmp_path / name
        (folder / "evaluation").mkdir(parents=True)
        (folder / "recipe.yaml").write_text("output: a\n")
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss/a": 1.0}\n')
        (folder / ("evaluation" if name == "before.json" else "") / name).write_bytes(content)
        (folder / "evaluation" / "geometry-before.json").write_bytes(content)
        assert "Recipe" in folder_page(folder)


def test_a_damaged_store_is_named_with_the_way_out(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(lines(ROW, ROW))
    source = Source(path=str(path), cache=str(tmp_path / "kept"))
    read_source(source)
    for name in ("set.json", "store.json"):
        (kept,) = (tmp_path / "kept").glob(f"records/*/{name}")
        whole = kept.read_bytes()
        for content in (*JSON.values(), whole[:-1], whole.replace(b'"name"', b'"x"').replace(b'"rows"', b'"x"')):
            kept.write_bytes(content)
            assert "delete" in refused(lambda path: read_source(source), path, names=str(kept.parent))
        kept.write_bytes(whole)
    (note,) = (tmp_path / "kept").glob("sources/*.json")
    for content in JSON.values():  # what only says that nothing has changed is made again
        note.write_bytes(content)
        assert len(read_source(source).records) == 2


# Token caches.

MANIFEST = {
    "tokenizer": {"name": "t", "sha256": "x", "max_length": 32, "end_id": None},
    "version": 1,
    "datasets": {
        "a": {"name": "a", "task": "retrieval", "layout": "corpus", "rows": 1, "documents": 1, "prompts": {}}
        | {"document_role": "document", "ids": "name"}
    },
}
NAMED = ("a_query.parquet", "a_corpus.parquet")


def token_cache(folder, *, query=None, corpus=None, **facts):
    folder.mkdir()
    manifest = MANIFEST | {"datasets": {"a": MANIFEST["datasets"]["a"] | facts}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    pq.write_table(
        pa.table({"query_input_ids": [[1, 2]], "passage_input_ids": ["d"]} | (query or {})), folder / NAMED[0]
    )
    pq.write_table(pa.table({"doc_id": ["d"], "input_ids": [[3, 70]]} | (corpus or {})), folder / NAMED[1])
    return folder


ID_FAULTS = {
    "below zero": {"query": {"query_input_ids": [[-1]]}},
    "a document below zero": {"corpus": {"input_ids": [[-5]]}},
    "beyond 32 bits": {"query": {"query_input_ids": [[2**40]]}},
    "fractions": {"query": {"query_input_ids": [[1.5]]}},
    "texts": {"query": {"query_input_ids": [["a"]]}},
    "a text": {"query": {"query_input_ids": ["a"]}},
    "a null among them": {"query": {"query_input_ids": [[None, 1]]}},
    "none": {"query": {"query_input_ids": pa.array([[]], pa.list_(pa.int32()))}},
    "no list": {"query": {"query_input_ids": pa.array([None], pa.list_(pa.int32()))}},
    "no such document": {"query": {"passage_input_ids": ["x"]}},
    "a number as document": {"query": {"passage_input_ids": [3]}},
    "no document": {"query": {"passage_input_ids": pa.array([None], pa.string())}},
    "a body beyond the text": {"query": {"query_body_start": [7]}},
    "a body below zero": {"corpus": {"body_start": [-1]}},
    "an id that is text": {"query": {"query_id": ["x"]}},
    "more scores": {"query": {"positive_scores": [[0.1, 0.2]]}},
    "NaN as a score": {"query": {"positive_scores": [[float("nan")]]}},
    "a text as a score": {"query": {"positive_scores": [["x"]]}},
    "a text as a label": {"query": {"label": ["x"]}},
    "a name that should be an id": {"ids": "text"},
    "an unknown task": {"task": "x"},
    "an unknown layout": {"layout": "x"},
    "another folder": {"name": "../a"},
    "the other layout": {"layout": "inline"},
}


@pytest.mark.parametrize("changes", ID_FAULTS.values(), ids=ID_FAULTS)
def test_malformed_token_caches_are_one_error(tmp_path, changes):
    folder = token_cache(tmp_path / "tokens", **changes)
    refused(READERS["train"], folder)
    refused(READERS["inspect"], folder)


def test_a_manifest_cannot_name_another_folder(tmp_path):
    folder = token_cache(tmp_path / "tokens")
    facts = MANIFEST["datasets"]["a"] | {"name": "../tokens/a"}
    (folder / "manifest.json").write_text(json.dumps(MANIFEST | {"datasets": {"../tokens/a": facts}}))
    assert "cannot be that of a file in the cache" in refused(READERS["train"], folder)


def test_a_source_cannot_be_tokenized_into_another_folder(tmp_path, bert):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(lines(ROW))
    job = {"model": {"path": str(bert)}, "data": [{"path": str(path), "name": "../a"}], "out": str(tmp_path / "out")}
    assert "'../a' cannot be that of a file" in refused(lambda path: tokenize(parse(TokenizeJob, job)), path)


def test_pieces_of_a_token_cache_that_are_no_files(tmp_path):
    for number, name in enumerate(NAMED):
        folder = token_cache(tmp_path / f"tokens{number}")
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refused(READERS["train"], folder, names=name)
        (folder / name).unlink()
        (folder / name).mkdir()
        refused(READERS["train"], folder, names=name)
        (folder / name).rmdir()
        refused(READERS["train"], folder, names=name)


def test_tokens_beyond_the_models_table_are_refused_before_the_first_step(tmp_path, bert):
    model = load(str(bert), pooling="mean")
    table = len(model.backbone.get_input_embeddings().weight)
    facts = {"tokenizer": tokenizer_facts(model, "t").__dict__}
    for ids, what in (([3, table], f"token is {table}"), ([3] * 40, "place in a text is 40")):
        folder = token_cache(tmp_path / f"tokens{len(ids)}", corpus={"input_ids": [ids]})
        (folder / "manifest.json").write_text(json.dumps(MANIFEST | facts))
        found = read_source(Source(path=str(folder)))
        with pytest.raises(EmbedsmithError, match=what):
            check_tokens(found, model, in_pairs=False)


# Tasks.

TASKS = {
    "a number as candidates": {"query": "a", "positive": 3, "negative": ["c"]},
    "an object as candidates": {"query": "a", "positive": ["b"], "negative": {"a": 1}},
    "a number among candidates": {"query": "a", "positive": [1], "negative": ["c"]},
    "a score of 400 digits": {"text1": "a", "text2": "b", "score": 10**400},
    "NaN as a score": {"text1": "a", "text2": "b", "score": float("nan")},
    "a list as a score": {"text1": "a", "text2": "b", "score": [1]},
    "a label of two": {"text1": "a", "text2": "b", "label": 2},
    "no text": {"text1": "", "text2": "b", "score": 1},
}


@pytest.mark.parametrize("row", TASKS.values(), ids=TASKS)
def test_malformed_tasks_are_one_error(tmp_path, row):
    path = tmp_path / "task.jsonl"
    path.write_bytes(lines(row))
    refused(READERS["evaluate"], path)


@pytest.mark.parametrize("grade", ["x", "nan", "1e999", "9" * 400, "1e300", "", "0.5"])
def test_malformed_judgements_are_one_error(tmp_path, grade):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_bytes(lines({"_id": "1", "text": "a"}))
    (folder / "queries.jsonl").write_bytes(lines({"_id": "q", "text": "a"}))
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\nq\t1\t{grade}\n")
    refused(READERS["evaluate"], folder, names="test.tsv")


# Datasets of Hugging Face.

SETS = {
    "half a row": {"data.json": b"{"},
    "a list": {"data.jsonl": b"[1]\n"},
    "a cell": {"data.csv": b'"a\n'},
    "nothing": {},
    "a card": {"README.md": b"---\nconfigs: [\n---\n", "data.jsonl": lines(ROW)},
    "state": {"state.json": b"{}"},
    "a list as state": {"state.json": b"[]"},
    "splits": {"dataset_dict.json": b'{"splits": 5}'},
}


@pytest.mark.parametrize("files", SETS.values(), ids=SETS)
def test_malformed_datasets_are_one_error(tmp_path, files):
    pytest.importorskip("datasets")
    folder = tmp_path / "dataset"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for verb in ("train", "stream"):
        refused(READERS[verb], folder)


def test_a_path_is_shown_short_and_readable(tmp_path):
    with pytest.raises(EmbedsmithError) as caught:
        local_path("x" * 5000)
    assert len(str(caught.value)) < 500
    with pytest.raises(EmbedsmithError, match=r"'a\\x00b'"):
        local_path("a\0b")
