"""The one reader of texts with ids: kinds of files, where titles go, and what is wrong by file and line."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from embedsmith.core.errors import DataError
from embedsmith.data.formats.file_kinds import open_rows
from embedsmith.data.formats.texts import FileText, read_texts
from embedsmith.models.encode_files import EncodeJob


def pairs(path, **options):
    return [(one.id, one.text) for one in read_texts(path, **options)]


def test_kinds_of_files(tmp_path):
    rows = [{"_id": "d1", "title": "Foxes", "text": "jump"}, {"_id": "d2", "title": "", "text": "sleep"}]
    with gzip.open(tmp_path / "corpus.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    assert pairs(tmp_path / "corpus.jsonl.gz") == [("d1", "Foxes jump"), ("d2", "sleep")]
    assert pairs(tmp_path / "corpus.jsonl.gz", titles=False) == [("d1", "jump"), ("d2", "sleep")]
    assert pairs(tmp_path / "corpus.jsonl.gz", column="title")[0] == ("d1", "Foxes")
    (tmp_path / "a.csv").write_text('id,body\n7,"two\nlines"\n')
    assert pairs(tmp_path / "a.csv", column="body") == [("7", "two\nlines")]
    (tmp_path / "a.tsv").write_text("id\ttext\n7\tone\n")
    assert pairs(tmp_path / "a.tsv") == [("7", "one")]
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "body": ["a", "b"]}), tmp_path / "a.parquet")
    assert pairs(tmp_path / "a.parquet", column="body") == [("1", "a"), ("2", "b")]
    (tmp_path / "a.txt").write_text("one\n\nthree")
    assert pairs(tmp_path / "a.txt") == [(None, "one"), (None, ""), (None, "three")]


def test_a_folder_and_what_else_a_row_holds(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"id": 3, "text": "dogs", "lang": "en"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "barks?"}\n')
    assert list(read_texts(tmp_path, metadata=True)) == [
        FileText("3", "dogs", f"{tmp_path / 'corpus.jsonl'}:1", {"lang": "en"})
    ]
    assert pairs(tmp_path, part="queries") == [("q", "barks?")]


def test_titles_of_tables_are_not_encoded(tmp_path):
    (tmp_path / "a.csv").write_text("title,text\nFoxes,jump\n")
    (tmp_path / "a.jsonl").write_text('{"title": "Foxes", "text": "jump"}\n')
    job = EncodeJob("model", (tmp_path / "a.csv", tmp_path / "a.jsonl"), tmp_path)
    assert [one.text for one in job.texts()] == ["jump", "Foxes jump"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", b"id,body\n7,x\n", r"a\.csv:2: the column 'text' is missing(.|\n)*id, body(.|\n)*name the column"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a\.jsonl:2: the row is a list, not an object"),
        ("a.jsonl", b'{"text": "x"}\n{"te', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1: the column 'text' is missing"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y", "title": 3}\n', r"a\.jsonl:2: 'title' is 3"),
        ("a.txt.gz", gzip.compress(b"many words " * 99, mtime=0)[:-9], r"a\.txt\.gz:\d: the gzip file ends"),
        ("a.txt", b"\xff\xfe", r"a\.txt: the file is UTF-16"),
        ("a.txt", b"one\n\xe9\n", r"a\.txt:2: not UTF-8"),
        ("a.txt", b"one\ntw\0o\n", r"a\.txt:2: a zero byte"),
        ("a.csv", "text\nx\n".encode("utf-16-le"), r"a\.csv:1: a zero byte(.|\n)*UTF-8"),
        ("a.parquet", b"not parquet", r"a\.parquet:1: not a readable Parquet file"),
        ("a.docx", b"", r"unknown kind of file '\.docx'"),
        ("absent.txt", None, r"absent\.txt: no such file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, match):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=match):
        list(read_texts(tmp_path / name))


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(DataError, match=r"a\.jsonl: this is a folder, not a file"):
        open_rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ('{"text": "a"}', r"a\.jsonl:1: the id is None"),
        ('{"id": true, "text": "a"}', r"a\.jsonl:1: the id is True"),
        ('{"id": 1, "text": "a"}\n{"_id": "1", "text": "b"}', r"a\.jsonl:2: the id '1' appears twice, first in line 1"),
    ],
)
def test_ids_that_are_needed(tmp_path, rows, match):
    (tmp_path / "a.jsonl").write_text(rows)
    assert len(pairs(tmp_path / "a.jsonl")) == len(rows.splitlines())
    with pytest.raises(DataError, match=match):
        pairs(tmp_path / "a.jsonl", ids="unique")
