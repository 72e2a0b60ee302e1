"""Every format read, by name and never by order."""

import csv
import gzip
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedsmith.core.errors import RecipeError
from embedsmith.core.recipe import parse
from embedsmith.data import Record, Source, negatives_per_query, read_source, write_records


def lines(path, *rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def read(path, **more):
    return read_source(Source(path=str(path), **more))


def test_our_own_lines(tmp_path):
    row = {
        "query": "q",
        "positives": ["p", "p2"],
        "negatives": ["n"],
        "positive_scores": [1, None],
        "teacher_scores": [9.5, 3, -2],
        "instruction": "find",
        "source": "wiki",
    }
    found = read(lines(tmp_path / "a.jsonl", row, "", {"query": "r", "positives": "one"}))
    assert (found.name, found.task, found.format) == ("a", "retrieval", "records")
    assert found.records[0] == Record(
        "q", ("p", "p2"), ("n",), "retrieval", (1, None), None, (9.5, 3), (-2,), None, "find", "wiki"
    )
    assert found.records[1] == Record("r", ("one",), source="a")


def test_what_is_written_is_read_back(tmp_path):
    records = [
        Record("q", ("p", "ü"), ("n",), "retrieval", (1.0, None), (0.0,), (2.0, 1.0), (None,), 3, "find", "x"),
        Record("r", ("p",), source="x"),
    ]
    for name in ("x.jsonl", "x.jsonl.gz"):
        assert write_records(tmp_path / name, records) == 2
        assert list(read(tmp_path / name).records) == records
    first = (tmp_path / "x.jsonl.gz").read_bytes()
    assert first[4:8] == bytes(4)  # no time of writing in the gzip header
    write_records(tmp_path / "x.jsonl.gz", records)
    assert (tmp_path / "x.jsonl.gz").read_bytes() == first


def test_a_failed_write_leaves_what_was_there(tmp_path):
    write_records(tmp_path / "x.jsonl", [Record("q", ("p",))])

    def failing():
        yield Record("r", ("s",))
        raise KeyError("stop")

    with pytest.raises(KeyError):
        write_records(tmp_path / "x.jsonl", failing())
    assert [record.query for record in read(tmp_path / "x.jsonl").records] == ["q"]
    assert len(list(tmp_path.iterdir())) == 1


def test_flagembedding_lines(tmp_path):
    row = {
        "query": "q",
        "pos": ["p"],
        "neg": ["n", "m"],
        "pos_scores": [8],
        "neg_scores": [1, 2],
        "prompt": "x",
        "id": 4,
    }
    found = read(lines(tmp_path / "b.jsonl.gz", row))
    assert (found.format, found.task, found.name) == ("flagembedding", "retrieval", "b")
    assert found.records[0] == Record("q", ("p",), ("n", "m"), "retrieval", None, None, (8,), (1, 2), None, "x", "b")


def test_sts_pairs_by_name_in_any_order(tmp_path):
    expected = Record("l", ("r",), task="sts", positive_scores=(0.5,), source="c")
    top = {"score": 5, "text2": "y", "text1": "x"}
    bottom = {"text1": "z", "score": 0.0, "text2": "w"}
    found = read(lines(tmp_path / "c.jsonl", {"score": 2.5, "text2": "r", "text1": "l"}, top, bottom))
    assert (found.task, found.score_range) == ("sts", (0, 5))
    assert found.records[0] == expected
    other = read(lines(tmp_path / "c.jsonl", {"sentence2": "r", "score": 0.5, "sentence1": "l"}))
    assert other.records[0] == expected


def test_pairs_without_a_score_only_as_retrieval(tmp_path):
    path = lines(tmp_path / "c.jsonl", {"text1": "l", "text2": "r"})
    found = read(path, columns={"query": "text1", "positives": "text2"})
    assert found.task == "retrieval"
    assert found.records[0].positives == ("r",)


@pytest.mark.parametrize("separator", [",", "\t"])
def test_csv_with_declared_columns(tmp_path, separator):
    path = tmp_path / ("d.csv" if separator == "," else "d.tsv")
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(["bad2", "body", "title", "bad1", "other"])
        writer.writerow(["", 'said "yes, no"' if separator == "," else "said yes", "über", "n1", "z"])
        writer.writerow(["n3", "p", "q", "n2", "z"])
    columns = {"query": "title", "positives": "body", "negatives": ["bad1", "bad2"]}
    found = read(path, columns=columns)
    assert [record.query for record in found.records] == ["über", "q"]
    assert found.records[0].positives[0].startswith("said")
    assert [record.negatives for record in found.records] == [("n1",), ("n2", "n3")]


def test_a_csv_cell_of_blanks_is_no_score(tmp_path):
    path = tmp_path / "e.csv"
    path.write_text("query,positives,positive_scores\na,b, \nc,d,0.5\n", encoding="utf-8")
    assert [record.positive_scores for record in read(path, task="retrieval").records] == [None, (0.5,)]


def test_csv_cells_with_line_breaks_and_scores(tmp_path):
    path = tmp_path / "e.csv"
    path.write_text('text1,text2,score\r\n"two\nlines",b,3\r\n"x, y",z,0\r\n', encoding="utf-8", newline="")
    found = read(path, score_range=(0, 4))
    assert [record.query for record in found.records] == ["two\nlines", "x, y"]
    assert [record.positive_scores for record in found.records] == [(0.75,), (0.0,)]


def test_parquet_with_its_own_and_with_declared_columns(tmp_path):
    pq.write_table(pa.table({"query": ["q"], "positives": [["a", "b"]], "negatives": [[]]}), tmp_path / "f.parquet")
    assert read(tmp_path / "f.parquet").records[0] == Record("q", ("a", "b"), source="f")
    pq.write_table(
        pa.table({"query": ["q"], "passage": ["p"], "negative_1": ["n"], "negative_2": [None]}), tmp_path / "g.parquet"
    )
    columns = {"query": "query", "positives": "passage", "negatives": ["negative_1", "negative_2"]}
    assert read(tmp_path / "g.parquet", columns=columns).records[0].negatives == ("n",)


def test_a_json_array(tmp_path):
    path = tmp_path / "h.json"
    path.write_text(json.dumps([{"query": "q", "positives": ["p"]}] * 2, indent=1))
    assert len(read(path).records) == 2
    assert len(read(lines(tmp_path / "i.json", {"query": "q", "positives": ["p"]})).records) == 1


def test_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra hub")
    rows = datasets.Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"], "score": [0.5]})
    datasets.DatasetDict(validation=rows, test=rows).save_to_disk(str(tmp_path / "saved"))
    found = read(tmp_path / "saved", split="test")
    assert (found.name, found.task) == ("saved", "sts")
    assert found.records[0].positive_scores == (0.5,)
    with pytest.raises(Exception, match=r"several splits\n.*validation, test"):
        read(tmp_path / "saved")


def beir(folder, splits=("test",)):
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": "d1", "title": "T", "text": "one"}, {"_id": "d2", "title": "", "text": "two"}]
    lines(folder / "corpus.jsonl", *corpus, {"_id": "d3", "text": "three"})
    lines(folder / "queries.jsonl", {"_id": "q0", "text": "unjudged"}, {"_id": "q1", "text": "judged"})
    for split in splits:
        rows = ["query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\td2\t0", "q1\td3\t1"]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return folder


def test_a_beir_folder(tmp_path):
    found = read(beir(tmp_path / "set"))
    assert (found.name, found.task, found.format) == ("set", "retrieval", "beir")
    assert list(found.records) == [
        Record("judged", ("T one", "three"), ("two",), "retrieval", (1.0, 0.5), source="set")
    ]


def test_a_beir_folder_prefers_train_and_asks_where_it_cannot_know(tmp_path):
    assert len(read(beir(tmp_path / "a", ("test", "train"))).records) == 1
    with pytest.raises(Exception, match=r"several splits\n.*dev, test"):
        read(beir(tmp_path / "b", ("test", "dev")))
    with pytest.raises(Exception, match="no split 'tset'"):
        read(tmp_path / "b", split="tset")


def test_labels_are_numbered_by_name_whatever_the_order(tmp_path):
    rows = [{"text": "x", "label": "pear"}, {"text": "y", "label": "apple"}]
    found = read(lines(tmp_path / "l.jsonl", *rows))
    assert (found.task, found.labels) == ("classification", ("apple", "pear"))
    assert [record.label for record in found.records] == [1, 0]
    numbers = read(lines(tmp_path / "m.jsonl", {"text": "x", "label": 7}), task="clustering")
    assert (numbers.task, numbers.labels, numbers.records[0].label) == ("clustering", (), 7)


@pytest.mark.parametrize(
    ("scores", "expected", "first"),
    [
        ((0.2, 1.0), (0, 1), 0.2),
        ((1, 0), (0, 1), 1.0),
        ((-0.5, 1), (-1, 1), 0.25),
        ((1, 5, 3), (1, 5), 0.0),
        ((1.5, 5), (0, 5), 0.3),
        ((0, 4), (0, 5), 0.0),
    ],
)
def test_score_ranges_are_inferred_rescaled_and_said(tmp_path, scores, expected, first, caplog):
    caplog.set_level("INFO")
    found = read(lines(tmp_path / "s.jsonl", *({"text1": "a", "text2": "b", "score": score} for score in scores)))
    assert found.score_range == expected
    assert found.records[0].positive_scores[0] == pytest.approx(first)
    assert "inferred" in found.scores
    assert "scores taken as {:g} to {:g} (found ".format(*expected) in caplog.text


def test_a_limit_does_not_change_the_inferred_range(tmp_path):
    rows = [{"text1": "a", "text2": "b", "score": score} for score in (0.5, 1.0, 5.0)]
    found = read(lines(tmp_path / "s.jsonl", *rows), limit=2)
    assert [record.positive_scores for record in found.records] == [(0.1,), (0.2,)]


def test_a_limit_stops_reading(tmp_path):
    path = lines(tmp_path / "t.jsonl", {"query": "q", "positives": ["p"]}, "not json")
    assert len(read(path, limit=1).records) == 1


def test_an_instruction_of_the_source_does_not_replace_a_row_s_own(tmp_path):
    rows = [{"query": "q", "positives": ["p"], "instruction": "mine"}, {"query": "r", "positives": ["p"]}]
    found = read(lines(tmp_path / "t.jsonl", *rows), instruction="ours")
    assert [record.instruction for record in found.records] == ["mine", "ours"]


def test_the_fingerprint_is_of_the_content(tmp_path):
    row, other = {"query": "q", "positives": ["p"]}, {"query": "q", "positives": ["P"]}
    one = read(lines(tmp_path / "a.jsonl", row)).fingerprint
    assert read(lines(tmp_path / "b.jsonl.gz", row)).fingerprint == one
    assert read(lines(tmp_path / "c.jsonl", other)).fingerprint != one


def test_the_negatives_drawn_are_derived(tmp_path):
    records = [Record("q", ("p",), ("n",) * count) for count in (0, 3, 9)]
    source = Source(path="x")
    assert [negatives_per_query(source, records[:end]) for end in (1, 2, 3)] == [0, 3, 4]
    assert negatives_per_query(replace(source, negatives=7), records) == 7
    assert negatives_per_query(source, []) == 0


def test_a_source_is_a_recipe_section():
    source = parse(Source, {"path": "a.jsonl", "task": "sts", "columns": {"text1": "a"}, "score_range": [0, 5]})
    assert source.score_range == (0, 5)
    for wrong, message in (
        ({"tsak": "sts"}, "did you mean 'task'"),
        ({"task": "st"}, "task: "),
        ({"batch_size": 0}, "batch_size: "),
        ({"weight": -1}, "weight: "),
        ({"loss": "no-such-loss"}, "loss: "),
    ):
        with pytest.raises(RecipeError, match=message):
            parse(Source, {"path": "a.jsonl"} | wrong)


def test_the_raw_files_of_f2llm_are_written_and_read(tmp_path):
    records = [
        Record("q", ("p", "r"), ("n", "m"), instruction="Instruct: find\nQuery: "),
        Record("s", ("t",)),
        Record("u", ("v",), tuple(f"n{i}" for i in range(30))),
    ]
    assert write_records(tmp_path / "set.parquet", records) == 3
    found = read_source(Source(path=str(tmp_path / "set.parquet")))
    assert (found.format, found.task) == ("f2llm", "retrieval")
    assert [(r.query, r.positives, len(r.negatives)) for r in found.records] == [
        ("Instruct: find\nQuery: q", ("p",), 2),
        ("Instruct: find\nQuery: q", ("r",), 2),
        ("s", ("t",), 0),
        ("u", ("v",), 24),
    ]
    assert found.records[3].negatives[:2] == ("n0", "n1")
