"""The texts that `decontaminate` compares with."""

import json

from embedsmith.api.curating import evaluation_texts


def test_the_texts_of_tasks_come_with_task_and_role(tmp_path):
    rows = [{"query": "a cat", "pos": ["the cat sat"]}, {"query": "a dog", "pos": ["the dog ran"]}]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "alike.jsonl").write_text(json.dumps({"text1": "one", "text2": "two", "score": 1}) + "\n")
    names = [str(tmp_path / "asked.jsonl"), f"{tmp_path / 'alike.jsonl'}"]
    found = list(evaluation_texts(names, None))
    assert {(one.text, one.role) for one in found} == {
        ("a cat", "query"), ("a dog", "query"), ("the cat sat", "document"), ("the dog ran", "document"),
        ("one", "query"), ("two", "query"),
    }  # fmt: skip
    assert {one.task for one in found} == set(names)
