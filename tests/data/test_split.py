"""`split`: two parts that share no text, the same in every run whatever the order of the rows."""

import json
import random
from pathlib import Path

import pytest
from tests.claims import watch_claims

from embedsmith.core.errors import CheckpointError, DataError
from embedsmith.data import Source, read_source, text_id
from embedsmith.data import split as module
from embedsmith.data.split import split_source
from embedsmith.evaluate import load_task


def made(folder, rows, seed=0, test=0.2, overwrite=True):
    return split_source(Source(rows=rows, name="faq"), folder, test=test, seed=seed, overwrite=overwrite)


def texts(path):
    task = load_task(path)
    return {*task.queries.values(), *task.corpus.values()}


PAIRS = [
    {
        "query": f"第{n - n % 7 // 6}个问题",  # one in seven has two rows
        "positive": f"answer {n // 3 if n % 3 == 0 else n + 1000}",  # and an answer two questions now and then
        "negative": f"answer {n + 1001}",
    }
    for n in range(60)
]


def test_no_text_is_in_both_parts_and_nothing_is_lost(tmp_path):
    split = made(tmp_path / "out", PAIRS)
    trained = read_source(Source(path=split.train))
    held = texts(split.test)
    both = {text_id(text) for r in trained.records for text in (r.query, *r.positives, *r.negatives)} & set(
        map(text_id, held)
    )
    assert not both
    assert (split.train_rows, split.test_rows) == (len(trained.records), len(PAIRS) - len(trained.records))
    assert 10 <= split.test_rows <= 12
    every = {row["query"] for row in PAIRS} | {row["positive"] for row in PAIRS}
    assert every <= held | {text for r in trained.records for text in (r.query, *r.positives)}
    lost = len(PAIRS) - sum(len(r.negatives) for r in trained.records)
    assert 0 < split.negatives_left_out <= lost
    assert all(name in split.lines() for name in (split.train, split.test, f"other part: {split.negatives_left_out}"))


def test_the_order_of_rows_does_not_matter_and_the_seed_does(tmp_path):
    turned = random.Random(0).sample(PAIRS, len(PAIRS))
    parts = [
        texts(made(tmp_path / f"{n}", rows, seed).test)
        for n, (rows, seed) in enumerate([(PAIRS, 0), (turned, 0), (PAIRS, 1)])
    ]
    assert parts[0] == parts[1] != parts[2]
    first = {f.name: f.read_bytes() for f in (tmp_path / "0").rglob("*.*") if f.is_file()}
    made(tmp_path / "0", PAIRS)
    assert {f.name: f.read_bytes() for f in (tmp_path / "0").rglob("*.*") if f.is_file()} == first


def test_the_folder_is_claimed_while_it_is_written(tmp_path, monkeypatch):
    claims = watch_claims(monkeypatch, module, tmp_path / "out", "atomic_folder")
    made(tmp_path / "out", PAIRS)
    assert claims == [True]


def test_scored_pairs_and_labels_are_files_that_evaluate_reads(tmp_path):
    scored = [{"sentence1": f"猫 {n}", "sentence2": f"狗 {n}", "label": n % 6} for n in range(30)]
    split = made(tmp_path / "scored", scored, test=6)
    assert (split.test_rows, split.train_rows) == (6, 24)
    task = load_task(split.test)
    assert (task.kind, len(task.text1), {score * 5 for score in task.score} <= set(range(6))) == ("sts", 6, True)
    labels = [{"sentence": f"text {n}", "label": "ab"[n % 2]} for n in range(30)]
    split = made(tmp_path / "labels", labels)
    rows = [json.loads(line) for line in Path(split.test).read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 6
    assert rows[0]["label"] in ("a", "b")
    assert read_source(Source(path=split.train)).labels == ("a", "b")


def test_of_every_label_a_row_is_left_to_train_on(tmp_path):
    rows = [{"sentence": f"text {n}", "label": f"label {n // 2}"} for n in range(40)]
    split = made(tmp_path / "out", [*rows, {"sentence": "alone", "label": "rare"}], test=18)
    assert split.test_rows == 18
    assert len(read_source(Source(path=split.train)).labels) == 21
    assert load_task(f"classification:{split.test}").kind == "classification"
    with pytest.raises(DataError, match="each of 20 labels would lose its last one"):
        made(tmp_path / "other", rows[::2])


def test_what_cannot_be_split_says_why(tmp_path):
    same = [{"query": f"q{n}", "positive": "one answer"} for n in range(9)]
    with pytest.raises(DataError, match=r"rows hang together.*9 to 9 of 9"):
        made(tmp_path / "a", same)
    two = [{"query": f"q{n}", "positive": f"answer {n % 2}"} for n in range(20)]
    with pytest.raises(DataError, match="--test 10") as caught:
        made(tmp_path / "a", two)
    assert not (tmp_path / "a").exists()
    assert made(tmp_path / "a", two, test=10).test_rows == 10, caught.value


def test_another_result_and_foreign_files_stay(tmp_path):
    made(tmp_path / "a", PAIRS)
    with pytest.raises(CheckpointError, match="another result is here already"):
        made(tmp_path / "a", PAIRS, seed=1, overwrite=False)
    made(tmp_path / "a", PAIRS, overwrite=False)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds no split"):
        made(tmp_path / "b", PAIRS)
