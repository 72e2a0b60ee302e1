"""Tasks from files, good and bad, and by name."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from embedsmith.core.errors import DataError, EvaluationError
from embedsmith.core.shelf import task_kinds
from embedsmith.evaluate import RetrievalTask, STSTask, data_folder, known_tasks, load_task, load_tasks, split_names
from embedsmith.evaluate.tasks.kinds import Format, TaskKind, has_columns

CORPUS = [{"_id": "d1", "title": "Cats ", "text": "sleep"}, {"_id": 2, "title": "", "text": "dogs"}]
QUERIES = [{"_id": 7, "text": "what sleeps"}, {"_id": "q8", "text": "what barks"}]
QRELS = "query-id\tcorpus-id\tscore\n7\td1\t2\nq8\t2\t1\n"
STS = [{"text1": "a", "text2": "b", "score": 1}, {"text1": "c", "text2": "d", "score": "2.5"}]


def lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def beir(folder: Path, corpus: Any = CORPUS, queries: Any = QUERIES, qrels: str = QRELS) -> Path:
    lines(folder / "corpus.jsonl", corpus)
    lines(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(qrels, encoding="utf-8")
    return folder


def test_a_beir_folder(tmp_path: Path) -> None:
    task = load_task(beir(tmp_path / "pets.v1"))
    assert isinstance(task, RetrievalTask)
    assert task.name == "pets.v1"
    assert task.corpus == {"d1": "Cats  sleep", "2": "dogs"}
    assert task.queries == {"7": "what sleeps", "q8": "what barks"}
    assert task.qrels == {"7": {"d1": 2}, "q8": {"2": 1}}


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.jsonl.gz"])
def test_an_sts_file(tmp_path: Path, name: str) -> None:
    task = load_task(lines(tmp_path / name, STS))
    assert isinstance(task, STSTask)
    assert (task.name, list(task.text1), list(task.score)) == ("mine", ["a", "c"], [1.0, 2.5])


def test_sts_columns_may_be_called_sentence(tmp_path: Path) -> None:
    task = load_task(lines(tmp_path / "s.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 3, "split": "x"}]))
    assert isinstance(task, STSTask)
    assert list(task.text2) == ["b"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text1": "a", "text2": "b", "score": "NaN"}], r"f.jsonl:1: the score is 'NaN'"),
        ([STS[0], {"text1": "a", "text2": "b", "score": True}], r"f.jsonl:2: the score is True"),
        ([STS[0], {"text1": "a", "score": 1}], r"f.jsonl:2: the column 'text2' is missing"),
        ([STS[0], {"text1": "a", "text2": " ", "score": 1}], r"f.jsonl:2: 'text2' is empty"),
        ([STS[0], {"text1": "a", "text2": 3, "score": 1}], r"f.jsonl:2: 'text2' is 3"),
        ([STS[0], [1, 2]], r"f.jsonl:2"),
        ([STS[0], "{"], r"f.jsonl:2"),
        ([{"ask": "a", "reply": ["b"]}], r"'text1' is missing\n  expected: found: ask, reply"),
        ([], "no rows"),
    ],
)
def test_a_wrong_sts_row_names_its_line(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_task(lines(tmp_path / "f.jsonl", rows))


def test_a_repeated_id_that_nobody_judged_counts_once_with_its_last_text(tmp_path: Path, caplog: Any) -> None:
    extra = [{"_id": "x", "text": "first"}, {"_id": "x", "text": "last"}]
    task = load_task(beir(tmp_path / "b", corpus=[*CORPUS, *extra]))
    assert task.corpus["x"] == "last"
    assert f"corpus.jsonl:{len(CORPUS) + 2}: the id 'x' appears twice" in caplog.text


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"corpus": [CORPUS[0], CORPUS[0]]}, r"corpus.jsonl:2: the judged id 'd1' appears twice"),
        (
            {"corpus": [{"_id": "2", "text": "a"}, {"_id": 2, "text": "b"}]},
            r"corpus.jsonl:2: the judged id '2' appears",
        ),
        ({"corpus": []}, r"corpus.jsonl: the file has no rows"),
        ({"corpus": [{"title": "a", "text": "b"}]}, r"corpus.jsonl:1: the id is None"),
        ({"corpus": [{"_id": "a", "title": 3, "text": "b"}]}, r"corpus.jsonl:1: 'title' is 3"),
        ({"queries": [{"_id": "7", "text": ""}]}, r"queries.jsonl:1: 'text' is empty"),
        ({"queries": [{"_id": "x", "text": "other"}]}, "no judged query is in queries.jsonl"),
        ({"qrels": "query-id\tcorpus-id\tscore\n"}, r"test.tsv: the file has no judgements"),
        ({"qrels": "a\tb\tc\n7\td1\t1\n"}, "expected: columns corpus-id, query-id, score"),
        ({"qrels": QRELS + "7\td1\t1\n"}, r"test.tsv:4: 'd1' has the grades 2 and 1 for query '7'"),
        ({"qrels": QRELS + "7\t2\t0.5\n"}, r"test.tsv:4: the grade is '0.5'"),
        ({"qrels": "query-id\tcorpus-id\tscore\n7\td1\t0\n"}, "no query has a relevant document"),
    ],
)
def test_a_wrong_beir_folder_says_what_is_wrong(tmp_path: Path, parts: dict[str, Any], message: str) -> None:
    with pytest.raises((DataError, EvaluationError), match=message):
        load_task(beir(tmp_path / "t", **parts))


def test_a_document_may_be_empty(tmp_path: Path) -> None:
    task = load_task(beir(tmp_path / "t", corpus=[*CORPUS, {"_id": "471", "title": "", "text": ""}]))
    assert isinstance(task, RetrievalTask)
    assert task.corpus["471"] == ""


def test_a_split_that_is_missing_names_those_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no judgements for the split 'dev'[^$]*choose another split: test"):
        load_task(beir(tmp_path / "t"), split="dev")


def test_a_folder_that_is_no_task(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a task"):
        load_task(tmp_path)


def data(folder: Path) -> Path:
    beir(folder / "retrieval" / "cranfield")
    lines(folder / "sts" / "stsb-en-test.jsonl", STS)
    lines(folder / "sts" / "stsb-en-dev.jsonl.gz", STS)
    lines(folder / "pairs" / "train.jsonl", [{"query": "a", "pos": ["b"]}])
    lines(folder / "labels" / "broken.jsonl", ["{"])
    return folder


def test_names_are_looked_up_in_the_data_folder(tmp_path: Path) -> None:
    folder = data(tmp_path)
    assert sorted(known_tasks(folder)) == ["cranfield", "stsb-en-dev", "stsb-en-test"]
    assert load_task("cranfield", data_dir=folder).kind == "retrieval"
    assert load_task("stsb-en", data_dir=folder).name == "stsb-en-test"
    assert load_task("stsb-en", data_dir=folder, split="dev").name == "stsb-en-dev"


def test_a_name_that_two_tasks_share_is_qualified(tmp_path: Path) -> None:
    lines(tmp_path / "sts" / "same.jsonl", STS)
    lines(tmp_path / "more" / "same.jsonl", STS)
    assert sorted(known_tasks(tmp_path)) == ["more/same", "sts/same"]


def test_an_unknown_name_is_met_with_the_nearest_and_all(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"did you mean 'cranfield'[^$]*one of: cranfield, stsb-en-dev, stsb"):
        load_task("crandfield", data_dir=data(tmp_path))


def test_without_a_data_folder_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert data_folder() is None
    with pytest.raises(EvaluationError, match="no data folder was found"):
        load_task("cranfield")
    with pytest.raises(EvaluationError, match="no such folder"):
        data_folder("nowhere")
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert data_folder() == Path("../shared/data")
    (tmp_path / "work" / "data").mkdir()
    assert data_folder() == Path("data")


def test_names_come_apart_at_commas_and_spaces_unless_a_path_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my file.jsonl").touch()
    assert split_names(["a,b", "c d , e", "my file.jsonl"]) == ["a", "b", "c", "d", "e", "my file.jsonl"]


def test_a_kind_of_ones_own_is_found_by_its_files_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task_kinds.names()
    monkeypatch.setattr(task_kinds, "_entries", dict(task_kinds._entries))

    def read(path: Path, name: str, split: str) -> STSTask:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return STSTask(name, [row["a"] for row in rows], [row["b"] for row in rows], [row["likeness"] for row in rows])

    @task_kinds.register("likeness")
    class Likeness(TaskKind):
        formats = (Format(has_columns({"a", "b", "likeness"}), read),)

    rows = [{"a": "x", "b": "y", "likeness": 1}, {"a": "x", "b": "z", "likeness": 0}]
    lines(tmp_path / "mine.jsonl", rows)
    for name in ("mine", "likeness:mine", tmp_path / "mine.jsonl"):
        task = load_task(name, data_dir=tmp_path)
        assert isinstance(task, STSTask)
        assert list(task.score) == [1, 0]


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [lines(tmp_path / f"{place}/mine.jsonl", STS) for place in ("a/dev", "b/dev", "c/test")]
    other = lines(tmp_path / "other.jsonl", STS)
    names = [task.name for task in load_tasks([*paths[:2], other])]
    assert names == ["a/dev/mine", "b/dev/mine", "other"]
    assert [task.name for task in load_tasks([paths[0], paths[2]])] == ["dev/mine", "test/mine"]
    assert [task.name for task in load_tasks([paths[0], paths[0]])] == ["mine", "mine"]  # which evaluate refuses
