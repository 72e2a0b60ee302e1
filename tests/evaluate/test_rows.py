"""Training files are tasks as they are, and evaluated texts that were trained on are counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from embedsmith.core.errors import DataError
from embedsmith.data import Source, read_source
from embedsmith.evaluate import RetrievalTask, STSTask, known_tasks, load_task
from embedsmith.evaluate.overlap import warn_of_overlap
from tests.evaluate.test_load import lines

PAIRS = [
    {"query": "什么是猫", "pos": ["cats", "a pet"], "neg": ["dogs"]},
    {"query": "what barks", "pos": ["dogs"]},
    {"query": "什么是猫", "pos": ["felines"]},
]


def test_each_rows_positives_among_all_texts_of_the_file(tmp_path: Path) -> None:
    task = load_task(lines(tmp_path / "faq.jsonl.gz", PAIRS))
    assert isinstance(task, RetrievalTask)
    assert (task.name, sorted(task.queries.values())) == ("faq", ["what barks", "什么是猫"])
    assert sorted(task.corpus.values()) == ["a pet", "cats", "dogs", "felines"]
    judged = {task.queries[q]: {task.corpus[d] for d in found} for q, found in task.qrels.items()}
    assert judged == {"什么是猫": {"cats", "a pet", "felines"}, "what barks": {"dogs"}}


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("a.csv", "question,answer\nq,p\n", "retrieval"),
        ("b.jsonl", '{"anchor": "a", "positive": "b", "negative_1": "c"}', "retrieval"),
        ("c.tsv", "sentence_A\tsentence_B\tscore\na\tb\t4\n", "sts"),
        ("d.jsonl", '{"premise": "a", "hypothesis": "b", "label": "neutral"}', "sts"),
        ("e.jsonl", '{"query": "a", "positive": ["b"], "negative": ["c"]}', "reranking"),
        ("f.jsonl", '{"sentence1": "a", "sentence2": "b", "label": 1}\n{"text1": 0}', "pair_classification"),
        ("g.csv", "text1,text2,score\na,b,2.5\n", "sts"),
    ],
)
def test_layouts_of_training_files_are_tasks(tmp_path: Path, name: str, text: str, kind: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    if kind == "pair_classification":  # as before: the columns of that kind are its own
        with pytest.raises(DataError):
            load_task(tmp_path / name)
        return
    assert load_task(tmp_path / name).kind == kind
    if kind == "retrieval":
        assert load_task(f"retrieval:{tmp_path / name}").kind == kind
        assert known_tasks(tmp_path) == {}


def test_scored_pairs_of_their_own_columns_keep_their_scores(tmp_path: Path) -> None:
    path = lines(tmp_path / "s.jsonl", [{"text1": "a", "text2": "b", "score": 4}])
    for name in (path, f"sts:{path}"):
        task = load_task(name)
        assert isinstance(task, STSTask)
        assert task.score == [4.0]


def test_texts_that_were_trained_on_are_counted(tmp_path: Path, caplog: Any) -> None:
    trained = read_source(Source(rows=PAIRS, name="faq"))
    same = load_task(lines(tmp_path / "same.jsonl", PAIRS[:2]))
    documents = load_task(lines(tmp_path / "documents.jsonl", [{"query": "new", "pos": ["a  pet"], "neg": ["birds"]}]))
    scored = load_task(lines(tmp_path / "scored.jsonl", [{"text1": "cats", "text2": "b", "score": 1}]))
    other = load_task(lines(tmp_path / "other.jsonl", [{"query": "other", "pos": ["text"]}]))
    with caplog.at_level("INFO", "embedsmith"):
        warn_of_overlap([same, documents, scored, other], [trained])
    told = [(record.levelname, record.getMessage().partition(";")[0]) for record in caplog.records]
    assert told == [
        ("WARNING", "same: 2 of 2 queries and 3 of 3 documents are in the training data (faq)"),
        ("INFO", "documents: 1 of 2 documents are in the training data (faq)"),
        ("WARNING", "scored: 1 of 2 texts are in the training data (faq)"),
    ]


def test_a_run_and_its_model_tell_of_evaluated_texts_that_it_trained_on(tree: Any, typed: Any, files: Path) -> None:
    tree["train"] |= {"steps": 1, "log_with": []}
    tree["evaluate"] = {"tasks": [str(files / "pairs.jsonl")], "before": False}
    recipe = Path(tree["output"]).with_name("recipe.json")
    recipe.write_text(json.dumps(tree), encoding="utf-8")
    told = "pairs: 40 of 40 queries and 41 of 120 documents are in the training data (pairs"
    for arguments in (("train", recipe, "--dry-run"), ("train", recipe)):
        _, err, code = typed(*arguments)
        assert (code, told in err) == (0, True), err
    model = Path(tree["output"]) / "model"
    _, err, code = typed("evaluate", model, "-t", files / "pairs.jsonl")
    assert (code, told in err) == (0, True), err
