"""Who makes which part, what shards agree on, and what is missing when the work is to be ended."""

import json

import pytest

from embedsmith.core.errors import CheckpointError
from embedsmith.core.sharing import Sharing


def shard(path, index=0, count=3):
    return Sharing.asked("encode", path, (index, count))


def test_shards_make_every_part_once_whatever_is_done(tmp_path):
    out = tmp_path / "out"
    for done in (set(), {0, 4, 5}):
        made = [shard(out, index).share(range(8), done) for index in range(3)]
        assert sorted(part for each in made for part in each) == [part for part in range(8) if part not in done]
        assert all(part % 3 == index for index, each in enumerate(made) for part in each)
    assert Sharing.asked("encode", out).share(range(4), {1}) == [0, 2, 3]
    assert Sharing.asked("encode", out, join=True).share(range(4), ()) == []


def test_the_first_shard_leaves_the_note_and_what_differs_is_named(tmp_path):
    out = tmp_path / "out"
    facts = {"model": "a", "recipe": {"part": 7, "select": {"skip": 0}}}
    shard(out).agree(facts)
    note = tmp_path / "out.shards.json"
    assert json.loads(note.read_text())["shards"] == 3
    shard(out, 1).agree(facts)
    Sharing.asked("encode", out, join=True).agree(facts)
    other = {"model": "b", "recipe": {"part": 7, "select": {"skip": 1}}}
    with pytest.raises(CheckpointError, match=r"begun with another model, recipe\.select\.skip\n"):
        shard(out, 1).agree(other)
    with pytest.raises(CheckpointError, match="begun with another model"):
        Sharing.asked("encode", out, join=True).agree(other)
    with pytest.raises(CheckpointError, match=r"in 3 shards, not in 2(.|\n)*--shard I/3; or delete"):
        shard(out, 1, 2).agree(facts)
    Sharing.asked("encode", out).agree(other)  # one process has checks of its own
    shard(out).end()
    shard(out, 1, 2).agree(other)


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", '{"shards": 3}'])
def test_a_note_that_is_none_is_refused_and_stays(tmp_path, content):
    note = tmp_path / "out.shards.json"
    note.write_text(content)
    with pytest.raises(CheckpointError):
        shard(tmp_path / "out").agree({"model": "a"})
    assert note.read_text() == content


def test_missing_parts_are_those_of_their_shards_or_of_another_machine(tmp_path):
    shard(tmp_path / "out").agree({})
    join = Sharing.asked("encode", tmp_path / "out", join=True)
    join.refuse_missing((), 9)
    with pytest.raises(CheckpointError, match=r"3 of 9 parts are not there: those of shard 1/3, 2/3"):
        join.refuse_missing({1, 4, 8}, 9)
    with pytest.raises(CheckpointError, match=r"another rank wrote them elsewhere(.|\n)*disk that all machines share"):
        Sharing("encode", tmp_path / "out", "ranks", 0, 2).refuse_missing({1}, 9)
