"""Every recipe in recipes/ is valid and takes two steps on a tiny model."""

import json
import re
from itertools import takewhile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedsmith.core.recipe import load_recipe, read_tree
from embedsmith.train import Recipe, train
from tests.tinybert import WORDS, tiny_bert

FILES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
FILES = [path for path in FILES if "sweep" not in read_tree(path)]  # tests/cli/test_sweep.py
RECIPES = [path for path in FILES if {"model", "output"} <= read_tree(path).keys()]  # others: their rooms' tests
TRAINING = sorted(
    path
    for path in FILES[0].parent.rglob("*.yaml")
    if {"model", "output", "data"} <= read_tree(path).keys() and "sweep" not in read_tree(path)
)
ROWS = {
    "retrieval": lambda i: {"query": f"{WORDS[i]} cat", "pos": [f"the {WORDS[i]} dog"], "neg": [f"{WORDS[-i]} tree"]},
    "texts": lambda i: {"text": f"the {WORDS[i]} cat and a {WORDS[-i]} tree"},
    "sts": lambda i: {"text1": f"{WORDS[i]} cat", "text2": f"{WORDS[-i]} dog", "score": i / 16},
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_takes_two_steps(path, tmp_path):
    bert = tiny_bert(tmp_path / "bert")
    changes = [
        f"model.path={bert}",
        "model.max_length=16",
        *([] if read_tree(path).get("task") == "rerank" else ["model.pooling=mean"]),
        "train.steps=2",
        "train.epochs=null",
        "train.log_with=[]",
    ]
    for place, source in enumerate(read_tree(path)["data"]):
        file = tmp_path / f"{place}.jsonl"
        rows = [ROWS[source.get("format", source["task"])](number) for number in range(16)]
        if source.get("streaming"):
            file = file.with_suffix(".parquet")
            pq.write_table(pa.Table.from_pylist(rows), file)
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        widths = source.get("loss", {}).get("dims")
        changes += [f"model.dimension={max(widths)}"] if widths else []  # the tiny encoder gets a head this wide
        changes += [f"data.{place}.path={file}", f"data.{place}.batch_size=4"]
    model = train(load_recipe(path, Recipe, [*changes, f"output={tmp_path / 'run'}"]))
    assert (model / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_a_training_recipe_scores_rows_that_are_not_trained_on_or_says_what_to_score(path):
    """A stream cannot hold anything out, of texts alone nothing can be asked, MNTP makes no embeddings yet, and what a
    reranker reads was mined in the training part."""
    text = path.read_text(encoding="utf-8")
    if path.stem not in ("streaming", "simcse", "tsdae", "mntp", "rerank"):
        assert load_recipe(path, Recipe).evaluate.held_out == 500
        return
    lines = takewhile(lambda line: line.startswith("#"), text.splitlines())
    words = " ".join(line.lstrip("# ") for line in lines)
    (split,) = re.findall(r"embedsmith split ([\w-]+)\.jsonl", words)
    settings = re.findall(r"(?:data\.\d\.path|evaluate\.\w+)=\S*[\w\]]", words[words.index("embedsmith split") :])
    assert load_recipe(path, Recipe, settings).evaluate.tasks == (f"{split}-split/{split}-test",)


def test_a_training_stage_scores_rows_that_are_not_trained_on():
    """Not where texts are only read, and not where mined pairs hang together by the texts that they share."""
    stages = {
        f"{path.stem} {stage['name']}": stage["recipe"].get("evaluate")
        for path in FILES
        for stage in read_tree(path).get("stages", ())
        if stage["verb"] == "train"
    }
    unscored = {name for name, evaluated in stages.items() if evaluated != {"held_out": 500}}
    assert unscored == {"m3 pretrain", "conan-supervised supervised"}
