"""The package in examples/plugin, installed as a user's would be: each of its five things is used from a recipe at the
command line, and found in the listings."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import embedsmith
from tests.tinybert import WORDS, tiny_bert

PLUGIN = Path(__file__).parents[2] / "examples" / "plugin"
THINGS = {
    "loss": "huber",
    "pooling": "by_norm",
    "merge-method": "median",
    "metric": "success",
    "column-layout": "search_log",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds the installed package; its source is copied, since building leaves files in it."""
    root = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PLUGIN, root / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(root / "site"), str(root / "source")], check=True)
    return root / "site"


@pytest.fixture(scope="module")
def run(installed):
    """The command line with the package installed; `alone=True`: without it."""

    def command(*arguments: str, alone: bool = False, program: str | None = None) -> subprocess.CompletedProcess[str]:
        source = str(Path(embedsmith.__file__).parents[1])
        places = [source] if alone else [str(installed), source]
        start = ["-c", program] if program else ["-m", "embedsmith"]
        return subprocess.run(
            [sys.executable, *start, *arguments],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(places), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )

    return command


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """A run of two steps from a recipe with the package's loss, pooling and layout; and that recipe."""
    root = tmp_path_factory.mktemp("run")
    chance = random.Random(0)
    text = lambda: " ".join(chance.sample(WORDS, 4))
    write_rows(root / "log.jsonl", [{"typed": text(), "clicked": text(), "skipped": [text()]} for _ in range(16)])
    write_rows(root / "scored.jsonl", [{"text1": text(), "text2": text(), "score": chance.random()} for _ in range(16)])
    recipe = {
        "model": {"path": str(tiny_bert(root / "bert")), "pooling": "by_norm"},
        "data": [
            {"path": str(root / "log.jsonl"), "loss": "infonce", "batch_size": 4},
            {"path": str(root / "scored.jsonl"), "loss": {"type": "huber", "delta": 0.1}, "batch_size": 4},
        ],
        "train": {"steps": 2, "log_with": []},
        "output": str(root / "run"),
    }
    path = root / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    made = run("train", str(path))
    assert made.returncode == 0, made.stderr
    return root


LISTINGS = """
import json, sys
from typer.testing import CliRunner
from embedsmith.cli import app
print(json.dumps([CliRunner().invoke(app, command).output for command in json.loads(sys.argv[1])]))
"""


def listings(run, commands: list[list[str]], alone: bool = False) -> list[str]:
    """What several commands print, in one process."""
    made = run(json.dumps(commands), program=LISTINGS, alone=alone)
    assert made.returncode == 0, made.stderr
    found: list[str] = json.loads(made.stdout.splitlines()[-1])
    return found


def test_all_five_are_listed_with_their_package_explained_and_in_the_schema(run):
    kinds = [["list", kind] for kind in THINGS]
    named = [["list", kind, name] for kind, name in THINGS.items()]
    *shown, schema, merge_schema = listings(run, [*kinds, *named, ["schema"], ["schema", "merge"]])
    for name, text in zip([*THINGS.values(), *THINGS.values()], shown, strict=True):
        assert f"{name} (embedsmith_example)" in text
    assert '"huber"' in schema
    assert '"by_norm"' in schema
    assert '"median"' in merge_schema
    assert not any("embedsmith_example" in text for text in listings(run, kinds, alone=True))


def test_it_was_trained_with_both_losses(trained):
    saved = (trained / "run" / "recipe.yaml").read_text()
    assert "huber" in saved
    assert "by_norm" in saved
    assert (trained / "run" / "finished.json").exists()


COMPARE = """
import sys, numpy as np, embedsmith
from sentence_transformers import SentenceTransformer
texts = ["a cat sat on the mat", "old tree", "the dog ran far by the big blue tree"]
ours = embedsmith.load(sys.argv[1]).encode(texts, role="document")
theirs = SentenceTransformer(sys.argv[1], device="cpu", trust_remote_code=True).encode(texts)
print(float(np.abs(ours - theirs).max()))
"""


def test_the_pooling_is_saved_and_reloads_here_and_in_sentence_transformers(run, trained):
    compared = run(str(trained / "run" / "model"), program=COMPARE)
    assert compared.returncode == 0, compared.stderr
    assert float(compared.stdout.splitlines()[-1]) < 1e-6


@pytest.mark.slow
def test_without_the_package_its_names_are_told_and_nothing_runs(run, trained):
    refused = run("train", str(trained / "recipe.yaml"), f"output={trained / 'other'}", alone=True)
    assert refused.returncode == 1
    assert "by_norm" in refused.stderr
    assert "Traceback" not in refused.stderr
    loaded = run("encode", str(trained / "log.jsonl"), str(trained / "vectors"), "--column", "typed",
                 "--model", str(trained / "run" / "model"), alone=True)  # fmt: skip
    assert loaded.returncode == 1
    assert "by_norm" in loaded.stderr
    assert "Traceback" not in loaded.stderr


def test_the_metric_is_scored(run, trained):
    folder = trained / "asked"
    write_rows(folder / "corpus.jsonl", [{"_id": str(i), "text": f"the {word} {i}"} for i, word in enumerate(WORDS)])
    write_rows(folder / "queries.jsonl", [{"_id": f"q{i}", "text": word} for i, word in enumerate(WORDS)])
    (folder / "qrels").mkdir()
    lines = "".join(f"q{i}\t{i}\t1\n" for i in range(len(WORDS)))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    made = run("evaluate", str(trained / "run" / "model"), "--tasks", str(folder), "--json", str(trained / "r.json"))
    assert made.returncode == 0, made.stderr
    scores = json.loads((trained / "r.json").read_text())["tasks"][0]["scores"]
    assert scores["success_at_100"] == 1.0
    assert 0 <= scores["success_at_1"] <= scores["success_at_10"] <= 1


@pytest.mark.slow
def test_the_merge_method_merges(run, tmp_path):
    from safetensors.numpy import load_file

    parents = [tiny_bert(tmp_path / f"parent-{seed}", seed=seed) for seed in range(3)]
    recipe = {
        "parents": [{"path": str(parent)} for parent in parents],
        "method": "median",
        "unrelated": True,
        "output": str(tmp_path / "m"),
    }
    (tmp_path / "merge.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    made = run("merge", str(tmp_path / "merge.yaml"))
    assert made.returncode == 0, made.stderr
    merged, *given = (load_file(folder / "model.safetensors") for folder in (tmp_path / "m", *parents))
    for name, weight in merged.items():
        stacked = np.stack([one[name] for one in given])
        np.testing.assert_array_equal(weight, np.median(stacked, axis=0).astype(weight.dtype))
