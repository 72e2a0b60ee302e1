"""Streams: every row once, in an order that depends on the pass alone, with a bounded number of rows in memory."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.plans import plan_from

from embedsmith.core.errors import DataError, RecipeError
from embedsmith.data import Source, part_of, read_source
from embedsmith.data import stream as blocks
from embedsmith.data.stream import HasOrder

ROWS = [{"query": f"q{i}", "pos": [f"p{i}"]} for i in range(500)]


def shards(folder, rows=ROWS, count=3, group=40):
    folder.mkdir()
    each = -(-len(rows) // count)
    for number in range(count):
        table = pa.Table.from_pylist(rows[number * each : (number + 1) * each])
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=group)
    return folder


def json_lines(folder, rows=ROWS, count=3):
    folder.mkdir()
    each = -(-len(rows) // count)
    for number in range(count):
        part = rows[number * each : (number + 1) * each]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def saved(folder):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    return folder


def stream(path, **more):
    return read_source(Source(path=str(path), streaming=True, **{"buffer": 100} | more))


KINDS = {
    "parquet": (shards, {}),
    "dataset": (saved, {}),
    "hub folder": (json_lines, {"limit": len(ROWS)}),
}


@pytest.fixture(params=KINDS)
def found(request, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 60)
    make, options = KINDS[request.param]
    return stream(make(tmp_path / "data"), **options)


def test_a_stream_holds_every_row_and_few_of_them_in_memory(found):
    records = found.records
    assert isinstance(records, HasOrder)
    assert [records[i].query for i in range(len(records))] == [row["query"] for row in ROWS]
    order = records.order(np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(500))
    most = 0
    for row in order:
        assert records[int(row)].positives == (f"p{row}",)
        most = max(most, sum(map(len, records._held.values())))
    assert most <= 100 + 2 * 60


def test_threads_that_want_one_block_read_it_once(found, monkeypatch):
    """Steps are drawn ahead by several threads."""
    records, read, reads = found.records, found.records.blocks.read, []

    def slow(number):
        reads.append(number)
        time.sleep(0.05)
        return read(number)

    monkeypatch.setattr(type(records.blocks), "read", lambda self, number: slow(number))
    with ThreadPoolExecutor(4) as pool:
        assert {record.query for record in pool.map(lambda row: records[row], [0] * 8)} == {ROWS[0]["query"]}
    assert reads == [0]


def test_the_order_is_drawn_for_the_pass_and_mixes(found):
    order = [found.records.order(np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(order[0], order[1])
    assert not np.array_equal(order[0], order[2])
    assert np.mean(np.diff(order[0]) == 1) < 0.1


def plan(found, world=1, at=0):
    return plan_from((500,), (20,), seed=3, world=world, orders=(found.records.order,), apart=(False,))


def test_a_step_is_a_function_of_its_number_and_ranks_are_disjoint(found):
    whole = [plan(found).at(step).rows for step in range(60)]
    for epoch in (0, 1):
        assert sorted(np.concatenate(whole[25 * epoch : 25 * epoch + 25]).tolist()) == list(range(500))
    for step in (0, 7, 24, 25, 59):  # a plan that starts here, as after a resume, and on more ranks
        assert np.array_equal(plan(found).at(step).rows, whole[step])
        parts = [plan(found, world=4).at(step).rows_of(rank, 4) for rank in range(4)]
        assert sorted(np.concatenate(parts).tolist()) == sorted(whole[step].tolist())


def test_a_resumed_stream_reads_one_buffer_not_the_stream(tmp_path, monkeypatch):
    found = stream(shards(tmp_path / "data", count=5, group=20), buffer=60)
    read, reads = blocks.ParquetBlocks.read, []
    monkeypatch.setattr(blocks.ParquetBlocks, "read", lambda self, block: (reads.append(block), read(self, block))[1])
    for row in plan(found).at(12).rows:
        found.records[int(row)]
    assert len(reads) <= 6


def test_the_fingerprint_changes_with_the_content(tmp_path):
    first = stream(shards(tmp_path / "a")).fingerprint
    assert stream(shards(tmp_path / "b")).fingerprint == first
    assert stream(shards(tmp_path / "c", [*ROWS[:-1], {"query": "other", "pos": ["p"]}])).fingerprint != first
    assert stream(shards(tmp_path / "d", ROWS[:-1])).fingerprint != first


def test_a_dataset_read_from_its_start_is_known_by_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    folder = json_lines(tmp_path / "lines")
    before = stream(folder, limit=100).fingerprint
    assert stream(folder, limit=100).fingerprint == before
    file = next(folder.glob("*.jsonl"))
    file.write_bytes(file.read_bytes()[::-1].replace(b"1", b"2", 1)[::-1])  # of the same size
    assert stream(folder, limit=100).fingerprint != before


def test_a_faulty_row_stops_with_its_place_or_the_next_takes_its_place(tmp_path, caplog):
    rows = [dict(row) for row in ROWS]
    rows[170]["pos"] = []
    folder = shards(tmp_path / "data", rows)
    with pytest.raises(DataError, match=r"1.parquet:4: no positives"):
        stream(folder).records[170]
    records = stream(folder, on_error="skip").records
    assert records[170].query == "q171"
    assert records[170].query == "q171"
    assert caplog.text.count("skipped (1 so far)") == 1
    assert "1.parquet:4" in caplog.text


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text1": "a", "text2": "b", "score": 3}], {}, "declare score_range"),
        ([{"text1": "a", "text2": "b", "score": 7}], {"score_range": (0, 5)}, "outside the declared range"),
        ([{"text": "a", "label": "cat"}], {}, "number the classes"),
        ([{"query": "a", "positives": ["b"], "task": "stss"}], {}, "unknown task"),
    ],
)
def test_what_would_take_a_look_at_every_row_must_be_said(tmp_path, rows, options, message):
    with pytest.raises(DataError, match=message):
        stream(shards(tmp_path / "data", rows, count=1), **options).records[0]


def test_scores_are_moved_to_the_unit_range(tmp_path):
    folder = shards(tmp_path / "data", [{"text1": "a", "text2": "b", "score": 3}], count=1)
    assert stream(folder, score_range=(1, 5)).records[0].positive_scores == (0.5,)


def test_negatives_are_counted_without_reading_everything(tmp_path):
    from embedsmith.data import negatives_per_query

    folder = shards(tmp_path / "data", [{**row, "neg": ["n", "m"]} for row in ROWS])
    source = Source(path=str(folder), streaming=True)
    assert negatives_per_query(source, read_source(source).records) == 2


def test_what_cannot_be_streamed_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(DataError, match=r"a .jsonl file cannot be streamed(.|\n)*leave streaming out"):
        stream(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="set limit"):
        stream(json_lines(tmp_path / "lines"))
    with pytest.raises(DataError, match="ended after 500 rows"):
        stream(tmp_path / "lines", limit=501).records[500]
    with pytest.raises(RecipeError, match="it would be read whole"):
        part_of(stream(shards(tmp_path / "data")), (0.0, 0.5))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing: cannot load a dataset of this name"):
        stream(tmp_path / "nothing", limit=5)
    (tmp_path / "data" / "1.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"1.parquet: not a readable Parquet file"):
        stream(tmp_path / "data")


def test_a_dataset_that_cannot_be_loaded_or_breaks_while_it_is_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    lines = json_lines(tmp_path / "lines")
    records = stream(lines, limit=len(ROWS)).records
    for file in lines.iterdir():
        file.write_text(file.read_text()[:-20])
    with pytest.raises(DataError, match="lines: cannot load a dataset of this name"):
        records[len(ROWS) - 1]
    path = saved(tmp_path / "data")
    (path / "state.json").write_text("{")
    with pytest.raises(DataError, match="data: cannot load a dataset of this name"):
        stream(path)


def test_a_pattern_and_one_file_are_streams_too(tmp_path):
    folder = shards(tmp_path / "data")
    assert len(stream(folder / "[01].parquet").records) == 334
    assert len(stream(folder / "2.parquet").records) == 166
    assert len(stream(folder, limit=123).records) == 123
