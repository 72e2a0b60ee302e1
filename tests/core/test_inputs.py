"""Reading what others wrote: whole, or one error that names the file."""

import os
from dataclasses import dataclass

import pytest

from embedsmith.core.errors import CheckpointError, DataError
from embedsmith.core.inputs import kind_of, local_path, read_json, read_text, read_typed, typed


@dataclass
class Facts:
    count: int
    name: str = "x"


def test_text_is_read_with_and_without_a_mark(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b").write_text("héllo", encoding="utf-8")
    assert (read_text(tmp_path / "a"), read_text(tmp_path / "b")) == ("hello", "héllo")
    assert read_text(tmp_path / "a", most=8) == "hello"
    with pytest.raises(CheckpointError, match=r"a: the file is longer than 7 bytes\n.*to fix: make it anew"):
        read_text(tmp_path / "a", CheckpointError, fix="make it anew", most=7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\ntwo\n\xff", "not UTF-8 (byte 0xff in line 3)"),
        ("x".encode("utf-16"), "the file is UTF-16"),
        ("x".encode("utf-32"), "the file is UTF-32"),
    ],
)
def test_other_encodings_are_named_with_a_command(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError) as raised:
        read_text(tmp_path / "a")
    assert message in str(raised.value)
    assert raised.value.where == tmp_path / "a"
    assert "iconv -f" in raised.value.fix
    assert f"> '{tmp_path / 'utf8-a'}'" in raised.value.fix


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "the file holds a list, not an object"),
        ("3", "the file holds a number, not an object"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_only_an_object_is_an_object(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    for read in (read_json, lambda *a, **k: read_typed(a[0], Facts, *a[1:], **k)):
        with pytest.raises(CheckpointError, match=message) as raised:
            read(tmp_path / "a.json", CheckpointError, fix="make it anew")
        assert (raised.value.where, raised.value.fix) == (tmp_path / "a.json", "make it anew")
        with pytest.raises(DataError) as plain:
            read(tmp_path / "a.json")
        assert plain.value.fix == "correct the file"


def test_a_file_becomes_a_dataclass(tmp_path):
    (tmp_path / "a.json").write_text('{"count": 3, "other": []}')
    assert read_json(tmp_path / "a.json") == {"count": 3, "other": []}
    assert read_typed(tmp_path / "a.json", Facts) == Facts(3)
    (tmp_path / "a.json").write_text('{"count": "3"}')
    assert read_typed(tmp_path / "a.json", Facts) == Facts(3)
    with pytest.raises(DataError, match=r"a\.json: count: .*got '3'"):
        read_typed(tmp_path / "a.json", Facts, strict=True)
    (tmp_path / "a.json").write_text('{"name": "y"}')
    with pytest.raises(CheckpointError, match="count") as raised:
        read_typed(tmp_path / "a.json", Facts, CheckpointError)
    assert "got" not in str(raised.value), "what is missing did not come"
    with pytest.raises(DataError, match="there: count: "):
        typed(Facts, {"count": []}, "there")


@pytest.mark.parametrize("given", ["", "  ", "a\0b", "~nobody-here/x", "x" * 5000])
def test_what_can_be_no_path(given):
    with pytest.raises(CheckpointError) as raised:
        local_path(given, CheckpointError)
    assert len(str(raised.value)) < 600
    assert "\0" not in str(raised.value)


def test_paths_that_may_be(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").write_text("")
    for path in ("a", "absent", "a/below a file"):
        assert local_path(f"~/{path}") == tmp_path / path
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in {"pipe": "a pipe, socket or device", "loop": "cannot read from this path"}.items():
        with pytest.raises(DataError, match=message):
            local_path(tmp_path / name)


def test_kinds_in_the_words_of_json():
    values = (None, True, 1, 1.5, "x", [], {}, b"")
    names = ["null", "true or false", "a number", "a number", "text", "a list", "an object", "bytes"]
    assert [kind_of(value) for value in values] == names
