"""The usual errors: what the message says is typed as it stands there, and the command gets past it."""

import json
import re
import shlex

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from embedsmith.models import load
from tests.tinybert import tiny_bert


@pytest.fixture(scope="module")
def place(tmp_path_factory, files):
    """Models, data with faults, and a small recipe of every verb."""
    folder = tmp_path_factory.mktemp("typed")
    bert, heads = str(tiny_bert(folder / "bert")), ("dense", "sparse", "multivector")
    load(bert, pooling="mean", heads=heads, multivector_dim=8, new_heads=True).save(folder / "model")
    other = str(tiny_bert(folder / "other", seed=1))
    load(other, pooling="mean", heads=heads, multivector_dim=8, new_heads=True).save(folder / "stranger")
    load(other, pooling="mean").save(folder / "dense")

    def rows(name, made):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))

    rows("same", ({"query": f"the cat {n}", "pos": ["a dog"]} for n in range(20)))
    rows("few", [{"query": "the cat", "pos": ["a dog"]}])
    rows("holed", [*({"query": f"the cat {n}", "pos": [f"a dog {n}"]} for n in range(20)), {"query": "", "pos": ["x"]}])
    rows("docs", ({"_id": str(n), "text": f"the cat {n}"} for n in range(5)))
    rows("plain", ({"text1": f"a {n}", "text2": f"b {n}", "score": n % 9 - 3} for n in range(20)))
    (folder / "texts.txt").write_text("the cat\na dog\n")
    (folder / "odd.csv").write_text("title,body\nthe cat,a dog\nthe tree,a cat\n")
    flat = {"query": [f"the cat {n}" for n in range(20)], "passage": ["a dog"] * 20, "negative_1": ["tree"] * 20}
    (folder / "flat").mkdir()
    pq.write_table(pa.table(flat), folder / "flat" / "flat.parquet")
    data, model = str(files / "pairs.jsonl"), str(folder / "model")
    steps = {"steps": 1, "batch_size": 4, "precision": "fp32", "log_with": []}
    trees = {
        "train": {"model": {"path": model}, "data": [{"path": data}], "train": steps, "output": str(folder / "run")},
        "mine": {
            "data": {"path": data},
            "searchers": [{"type": "bm25"}],
            "candidates": 8,
            "select": {"negatives": 1, "near_duplicate": None},
            "output": str(folder / "mined.jsonl"),
        },
        "merge": {
            "parents": [{"path": model, "id": "one"}, {"path": str(folder / "stranger"), "id": "two"}],
            "method": {"type": "slerp"},
            "output": str(folder / "merged"),
        },
        "curate": {
            "input": {"path": str(folder / "holed.jsonl")},
            "steps": [{"type": "exact_duplicates"}],
            "output": str(folder / "clean.jsonl"),
        },
        "flat": {
            "model_path": model,
            "train_data_path": str(folder / "flat"),
            "output_dir": str(folder / "flat-run"),
            "pooling_mode": "mean",
            "bi_attn_enabled": True,
            "train_batch_size": 4,
            "train_steps": 1,
            "max_seq_length": 16,
        },
    }
    for name, tree in trees.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return folder


TRAIN = "train @/train.yaml --dry-run"
SCORED = "{path: %/scored.jsonl, score_range: [0, 1]}"
MODEL = "evaluate @/model %/scored.jsonl"
CASES = {
    "no pooling": (f"{TRAIN} model.path=@/bert", r"(model\.pooling=mean)"),
    "no pooling, evaluate": ("evaluate @/bert %/scored.jsonl", r"example (--pooling) (mean)"),
    "a loss by its name elsewhere": (f"{TRAIN} data.0.loss.type=mnrl", r"typed: (data\.0\.loss\.type=infonce)"),
    "odd columns": ("inspect @/odd.csv", r"typed: (columns\.query=title) (columns\.positives=body)"),
    "odd columns, init": (
        "init --data @/odd.csv --model @/model @/first",
        r"typed: (columns\.query=title) (columns\.positives=body)",
        "init --data @/odd.csv --model @/model @/first $0 $1",
        "train @/first/recipe.yaml train.steps=1 train.log_with=[] --dry-run",
    ),
    "typing error": (f"{TRAIN} train.epoch=1", r"did you mean '(epochs)'", f"{TRAIN} train.$0=1 train.steps=null"),
    "too small": (f"{TRAIN} data.0.path=@/few.jsonl train.plan.small=drop", r"set (train\.plan\.small=shrink)"),
    "duplicates": (f"{TRAIN} data.0.path=@/same.jsonl", r"set (train\.plan\.duplicates=allow)"),
    "no part": (f"{TRAIN} data.0.part=[0,0.000001]", r"data\.N\.(part=\[0, 0\.5\])", f"{TRAIN} 'data.0.$0'"),
    "best of nothing": (f"{TRAIN} train.final=best", r"or (train\.final=last)"),
    "ratio": (f"{TRAIN} train.plan.schedule=ratio", r"example (\S+) and (train\.plan\.ratio\.retrieval=3)"),
    "share": (
        f"{TRAIN} 'data=[{{path: %/pairs.jsonl}}, {SCORED}]' train.plan.schedule=ratio train.plan.ratio.retrieval=1",
        r"set (train\.plan\.ratio\.sts=1)",
    ),
    "packing": (f"{TRAIN} model.packing=true model.attention=softmask", r"set (model\.packing=false)"),
    "causal": (f"{TRAIN} model.attention=causal", r"use (model\.attention=native)"),
    "no head": (
        f"{TRAIN} model.path=@/dense 'data.0.loss={{type: infonce, head: sparse}}'",
        r"add it: (model\.heads=\[.*\])",
    ),
    "bad row": (f"{TRAIN} data.0.path=@/holed.jsonl", r"(on_error): (skip)", f"{TRAIN} data.0.$0=$1"),
    "scores": (
        f"{TRAIN} data.0.path=@/plain.jsonl data.0.task=sts",
        r"declare it: (score_range): ",
        f"{TRAIN} data.0.path=@/plain.jsonl data.0.task=sts data.0.$0=[-5,9]",
    ),
    "flat duplicates": ("train @/flat.yaml --dry-run", r"set (train\.plan\.duplicates=allow)"),
    "candidates": (
        "mine @/mine.yaml candidates=2 select.negatives=3",
        r"set (candidates) to (\d+)",
        "mine @/mine.yaml select.negatives=3 $0=$1",
    ),
    "window": (
        "mine @/mine.yaml select.negatives=3 select.window=2 output=@/2.jsonl",
        r"make (select\.window) larger",
        "mine @/mine.yaml select.negatives=3 $0=4 output=@/2.jsonl",
    ),
    "teacher": (
        "mine @/mine.yaml 'select.teacher_limits={relative_margin: 0.1}' output=@/3.jsonl",
        r"or use (select\.limits)",
        "mine @/mine.yaml '$0={relative_margin: 0.1}' output=@/3.jsonl",
    ),
    "no base": (
        "merge @/merge.yaml method.type=task_arithmetic unrelated=true --dry-run",
        r"set (base)",
        "merge @/merge.yaml method.type=task_arithmetic unrelated=true --dry-run $0=@/model",
    ),
    "strangers": ("merge @/merge.yaml base=@/model --dry-run", r"(unrelated=true)"),
    "row to curate": ("curate @/curate.yaml", r"(input\.on_error=skip)"),
    "tune": (f"{MODEL} --tune %/scored.jsonl", r"add (--head) (all)", f"{MODEL} $0 $1"),
    "no task": ("evaluate @/model", r"name some with (--tasks)", "evaluate @/model $0 %/scored.jsonl"),
    "weight": (f"{MODEL} --weight sparse=1", r"use (--head) (hybrid) or all"),
    "no place for pooling": (
        "encode @/texts.txt @/vectors --model @/bert",
        r"embedsmith (convert) MODEL NEW_FOLDER (\S+)",
        "$0 @/bert @/made $1",
        "encode @/texts.txt @/vectors --model @/made",
    ),
    "no index": (
        "search cat --index @/index",
        r"embedsmith (index) MODEL DOCUMENTS (--to) FOLDER",
        "$0 @/model @/docs.jsonl $1 @/index",
        "search cat --index @/index",
    ),
    "no out": (
        "tokenize %/pairs.jsonl -m @/model",
        r"add (--out)",
        "tokenize %/pairs.jsonl -m @/model $0 @/tokens",
    ),
    "other length": (
        "tokenize %/pairs.jsonl -m @/model --out @/tokens --max-length 9",
        r"the same (--max-length)",
        "tokenize %/pairs.jsonl -m @/model --out @/tokens",
    ),
}
"""A command that fails (@ is the folder, % that of the shared files), what its message says to type, and the commands
with what was found as $0 and $1; without them it is added to the first."""


@pytest.mark.parametrize("name", CASES)
def test_the_fix_of_a_message_works_when_typed(name, place, files, typed):
    wrong, pattern, *right = CASES[name]

    def words(command, *found):
        for number, word in enumerate(found):
            command = command.replace(f"${number}", word)
        return shlex.split(command.replace("%", str(files)).replace("@", str(place)))

    _, err, code = typed(*words(wrong))
    assert code == 1, err
    assert "to fix: " in err or "did you mean" in err
    found = re.search(pattern, err)
    assert found, err
    commands = [words(text, *found.groups()) for text in right] or [[*words(wrong), *found.groups()]]
    for command in commands:
        _, err, code = typed(*command)
        assert code == 0, err
