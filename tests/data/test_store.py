"""Records on disk: the same records, found again by content; sources that change; disks that are full."""

import json
import subprocess
import sys
import threading

import datasets
import numpy as np
import pytest
from tests.core.test_files import tiny_disk

from embedsmith.core.errors import CheckpointError, DataError
from embedsmith.data import Record, Source, read_source, row_facts, store
from embedsmith.data import cache as cache
from embedsmith.data.store import RecordStore, StoreWriter

ROWS = [{"query": f"q{i}", "pos": [f"p{i}", f"r{i}"][: 1 + i % 2], "neg": ["n"] * (i % 4)} for i in range(50)]
SCORED = [{"text1": f"a{i}", "text2": f"b{i}", "score": i % 6} for i in range(30)]
LABELS = [{"text": f"t{i}", "label": ["zebra", "ant", "mule"][i % 3]} for i in range(30)]
GRADED = [{"query": f"q{i}", "positives": ["p", "o"], "positive_scores": [3, i % 2 + 1]} for i in range(20)]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(store, "_ROWS", 7)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def on_disk(path, tmp_path, **more):
    return read_source(Source(path=str(path), cache=str(tmp_path / "cache"), **more))


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (ROWS, {}),
        (ROWS, {"limit": 20}),
        (SCORED, {}),
        (LABELS, {}),
        (GRADED, {"on_error": "skip"}),
        ([{**row, "prompt": "find: "} for row in ROWS], {}),
        ([{**row, "pos_scores": [0.5] * len(row["pos"])} for row in ROWS], {}),
    ],
)
def test_a_store_holds_what_memory_holds(tmp_path, small_blocks, rows, options):
    path = write(tmp_path / "a.jsonl", rows)
    memory, disk = read_source(Source(path=str(path), **options)), on_disk(path, tmp_path, **options)
    again = on_disk(path, tmp_path, **options)
    for found in (disk, again):
        assert isinstance(found.records, RecordStore)
        assert list(found.records) == memory.records
        assert [found.records[i] for i in range(len(found.records))] == memory.records
        assert found.records[-3:] == memory.records[-3:]
        kept = ("name", "task", "fingerprint", "skipped", "format", "labels", "score_range", "scores")
        assert [getattr(found, name) for name in kept] == [getattr(memory, name) for name in kept]
        ours, theirs = row_facts(found.records), row_facts(memory.records)
        for name in ("query_id_N", "positive_id_P", "offset_N1", "length_N"):
            assert getattr(ours, name).tolist() == getattr(theirs, name).tolist(), name
        most = (found.records.counts.most_positives, found.records.most_negatives())
        assert most == (max(len(r.positives) for r in memory.records), max(len(r.negatives) for r in memory.records))


def test_a_store_of_tokens_holds_the_tokens_of_every_text(tmp_path, small_blocks):
    texts = [np.arange(3 * row, 4 * row + 1) for row in range(40)]
    writer = StoreWriter(tmp_path, tokens=True)
    for first, last in ((0, 15), (15, 40)):
        piece = texts[first:last]
        lengths = np.asarray(list(map(len, piece)))
        given = (100 + np.arange(first, last), lengths, np.concatenate(piece), np.arange(first, last) % 3)
        assert writer.add_tokens(*given).tolist() == list(range(first, last))
    rows = [Record(n, (39 - n,), tuple(range(n % 4)), label=n) for n in range(20)]
    for record in rows:
        writer.add(record)
    found, _ = writer.settle()
    for place, (ours, theirs) in enumerate(zip(found, rows, strict=True)):
        assert ours == found[place]
        assert ours.label == theirs.label
        held = ((ours.query, *ours.positives, *ours.negatives), (theirs.query, *theirs.positives, *theirs.negatives))
        for text, row in zip(*held, strict=True):
            assert (text.id, text.ids.tolist(), text.body) == (100 + row, texts[row].tolist(), row % 3)
    assert row_facts(found).length_N.tolist() == [max(n, 39 - n) + 1 for n in range(20)]
    assert row_facts(found).query_id_N.tolist() == [100 + n for n in range(20)]


def test_the_highest_token_and_the_longest_text_are_those_of_all_calls(tmp_path):
    def counts(name, *calls):
        writer = StoreWriter(tmp_path / name, tokens=True)
        for ids in calls:
            lengths, flat = np.asarray([len(one) for one in ids]), np.asarray([i for one in ids for i in one], np.int64)
            writer.add_tokens(np.arange(len(ids)), lengths, flat, np.zeros(len(ids), np.int64))
        writer.add(Record(0, (0,)))
        writer.settle()
        found = RecordStore(tmp_path / name).counts
        return found.top_token, found.longest_text

    assert counts("falls", [[7, 9, 2]], [[3], [4, 5]]) == (9, 3)
    assert counts("rises", [[3], [4, 5]], [[7, 9, 2]]) == (9, 3)
    assert counts("least", [[0]]) == (0, 1)


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    with pytest.raises(CheckpointError, match="cache"):
        on_disk(write(tmp_path / "a.jsonl", ROWS), tmp_path)


def test_long_texts_of_whatever_role_end_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_CHARACTERS", 100)
    roles = (
        {"query": "x" * 50, "pos": ["p"]},
        {"query": "q", "pos": ["x" * 50]},
        {"query": "q", "pos": ["p", "x" * 50]},
    )
    for number, row in enumerate((*roles, {"query": "q", "pos": ["p"], "neg": ["x" * 50]})):
        path = write(tmp_path / f"{number}.jsonl", [row] * 8)
        assert len(on_disk(path, tmp_path).records._blocks) == 4


def test_lines_are_those_of_the_file(tmp_path, small_blocks):
    path = tmp_path / "a.jsonl"
    path.write_text("".join("\n" + json.dumps(row) + "\n" for row in SCORED))
    assert on_disk(path, tmp_path).records.lines().tolist() == list(range(2, 62, 2))


def test_a_source_is_read_once(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", ROWS)
    on_disk(path, tmp_path)
    converted = []
    monkeypatch.setattr(cache, "_convert", lambda entry, *rest: converted.append(entry))
    monkeypatch.setattr(cache, "_content", lambda name: pytest.fail("an unchanged file is not even hashed"))
    on_disk(path, tmp_path)
    assert not converted


def test_a_file_that_was_only_touched_or_copied_is_not_converted_again(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", ROWS)
    on_disk(path, tmp_path)
    converted = []
    monkeypatch.setattr(cache, "_convert", lambda entry, *rest: converted.append(entry))
    path.write_text(path.read_text())
    on_disk(path, tmp_path)
    (tmp_path / "other").mkdir()
    on_disk(write(tmp_path / "other" / "a.jsonl", ROWS), tmp_path)
    assert not converted


@pytest.mark.parametrize("options", [{"limit": 3}, {"instruction": "find: "}, {"name": "other"}])
def test_options_that_decide_how_a_file_is_read_are_part_of_the_key(tmp_path, options):
    path = write(tmp_path / "a.jsonl", ROWS)
    whole = on_disk(path, tmp_path)
    assert list(on_disk(path, tmp_path, **options).records) == read_source(Source(path=str(path), **options)).records
    assert len(on_disk(path, tmp_path).records) == len(whole.records)


def test_a_file_that_grew_is_named_and_read_again(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", ROWS[:10])
    before = on_disk(path, tmp_path)
    write(path, ROWS)
    after = on_disk(path, tmp_path)
    assert (len(before.records), len(after.records)) == (10, 50)
    assert f"{path} grew since it was read" in caplog.text
    assert len(list(before.records)) == 10  # what is in use is not replaced


@pytest.mark.parametrize(("rows", "how"), [(ROWS[:3], "shrank"), ([ROWS[1], ROWS[0], *ROWS[2:10]], "changed")])
def test_what_became_of_a_file_is_said_with_its_sizes(tmp_path, caplog, rows, how):
    path = write(tmp_path / "a.jsonl", ROWS[:10])
    on_disk(path, tmp_path)
    before = path.stat().st_size
    after = write(path, rows).stat().st_size
    assert (after == before) == (how == "changed")
    caplog.set_level("INFO", "embedsmith")
    assert len(on_disk(path, tmp_path).records) == len(rows)
    assert f"{path} {how} since it was read on 20" in caplog.text
    assert f"({before:,} to {after:,} bytes): reading it again" in caplog.text


def test_a_file_that_is_gone_is_named_with_when_it_was_there(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    on_disk(path, tmp_path)
    size = path.stat().st_size
    path.unlink()
    with pytest.raises(DataError, match=rf"a.jsonl: the source is gone; on .* it was here, with {size:,} bytes"):
        on_disk(path, tmp_path)


def test_a_file_that_grows_while_it_is_read_is_refused_and_nothing_is_kept(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", ROWS)
    settle = StoreWriter.settle

    def growing(shelf, change):
        with path.open("a") as file:
            file.write(json.dumps(ROWS[0]) + "\n")
        return settle(shelf, change)

    monkeypatch.setattr(StoreWriter, "settle", growing)
    with pytest.raises(DataError, match="changed while it was read"):
        on_disk(path, tmp_path)
    assert not [path for path in (tmp_path / "cache" / "records").iterdir() if path.is_dir()]


def test_several_processes_convert_once(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS * 40)
    calls, stored = [], cache._convert

    def counting(*arguments):
        calls.append(1)
        stored(*arguments)

    cache._convert = counting
    try:
        threads = [threading.Thread(target=on_disk, args=(path, tmp_path)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        cache._convert = stored
    assert calls == [1]


def test_what_a_killed_process_left_is_swept(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    code = f"""
import os
from embedsmith.data import Source, read_source, store
store.StoreWriter.settle = lambda *_: os._exit(9)
read_source(Source(path={str(path)!r}, cache={str(tmp_path / "cache")!r}))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 9
    records = tmp_path / "cache" / "records"
    assert [left for left in records.iterdir() if left.is_dir()]
    on_disk(path, tmp_path)
    assert len([left for left in records.iterdir() if left.is_dir()]) == 1


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"query": f"{i} " + "x" * 400, "positives": ["p"]} for i in range(8000)])
    with tiny_disk(tmp_path) as disk:
        with pytest.raises(CheckpointError, match="no space left on the disk"):
            read_source(Source(path=str(path), cache=str(disk)))
        assert not [left for left in (disk / "records").iterdir() if left.is_dir()]


def test_large_sources_go_to_disk_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = write(tmp_path / "a.jsonl", ROWS)
    assert isinstance(read_source(Source(path=str(path))).records, list)
    monkeypatch.setattr(cache, "MEMORY_BYTES", 100)
    assert isinstance(read_source(Source(path=str(path))).records, RecordStore)
    assert (tmp_path / "embedsmith" / "records").is_dir()


def test_rows_left_out_are_named_in_every_run(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", [*ROWS, {"query": "q"}, *ROWS])
    on_disk(path, tmp_path, on_error="skip")
    caplog.clear()
    on_disk(path, tmp_path, on_error="skip")
    assert "1 rows are left out" in caplog.text
    assert "(lines 51)" in caplog.text


def test_a_saved_dataset_is_stored(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    path = write(tmp_path / "a.jsonl", ROWS)
    found = on_disk(tmp_path / "saved", tmp_path)
    assert found.fingerprint == read_source(Source(path=str(path))).fingerprint


def test_a_damaged_store_is_named(tmp_path):
    writer = StoreWriter(tmp_path)
    writer.add(Record("q", ("p",)))
    writer.close()
    (tmp_path / "records.arrow").write_bytes(b"not Arrow")
    with pytest.raises(DataError, match="not a readable store"):
        RecordStore(tmp_path)
