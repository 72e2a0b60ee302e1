"""Texts that are read from a file where they are many: those in memory, in the same places, and the same is mined."""

import json

import numpy as np
import pytest

from embedsmith.core.errors import DataError
from embedsmith.data import Record
from embedsmith.mining import offline
from embedsmith.mining.config import Corpus
from embedsmith.mining.corpus import corpus_texts, stored_texts
from embedsmith.mining.selection import loose_id
from tests.mining.test_mine import run, tree

__all__ = ["tree"]

RECORDS = [
    Record("q", ("red cat", "blue dog\nin two lines"), ("naïve 検索", "red cat")),
    Record("r", ("blue dog", "\ud800 alone"), ()),
]


@pytest.fixture
def more(tmp_path):
    path = tmp_path / "more.txt"
    path.write_text("blue dog\n  \n green tree \nred cat\nRed cat\n", encoding="utf-8")
    return [Corpus(path=str(path))]


def test_stored_texts_are_those_in_memory(tmp_path, more):
    texts, expected = stored_texts(RECORDS, more, tmp_path / "corpus"), corpus_texts(RECORDS, more)
    assert len(expected) == 7, "each once"
    assert list(texts) == expected == texts[:]
    assert texts[2:5] == expected[2:5]
    assert texts[-1] == expected[-1]
    assert texts[len(expected) :] == []
    with pytest.raises(IndexError):
        texts[7]
    assert texts.loose_K.tolist() == [loose_id(text) >> 1 for text in expected]


def test_they_are_written_once_whatever_was_left_of_a_kill(tmp_path, more, monkeypatch):
    folder = tmp_path / "corpus"

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            stored_texts(RECORDS, more, folder)
    assert not folder.exists()
    first = list(stored_texts(RECORDS, more, folder))
    assert list(stored_texts([], [], folder)) == first, "they are there"
    with pytest.raises(DataError, match="no text in this corpus"):
        stored_texts(RECORDS, [Corpus(path=_empty(tmp_path))], tmp_path / "other")
    assert len(stored_texts([], [], tmp_path / "none")) == 0


def _empty(folder):
    (folder / "empty.txt").write_text("\n")
    return str(folder / "empty.txt")


@pytest.mark.parametrize("searcher", [{"type": "embedding", "model": "words"}, {"type": "bm25"}])
def test_the_same_is_mined_from_them(tree, tmp_path, monkeypatch, searcher):
    path = tmp_path / "more.jsonl"
    path.write_text("".join(json.dumps({"text": f"about cats {n % 9} and trees"}) + "\n" for n in range(20)))
    tree |= {"corpus": [{"path": str(path)}], "searchers": [searcher]}
    run(tree)
    monkeypatch.setattr(offline, "MEMORY_BYTES", 10)
    run(tree | {"output": str(tmp_path / "stored.jsonl")})
    assert list((tmp_path / "stored.jsonl.work").glob("corpus-*/texts.utf8"))
    assert (tmp_path / "stored.jsonl").read_bytes() == (tmp_path / "mined.jsonl").read_bytes()
