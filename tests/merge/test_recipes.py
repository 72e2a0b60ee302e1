"""Every merge recipe in recipes/ runs on tiny models."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import embedsmith
from embedsmith.cli import app
from embedsmith.core.recipe import load_recipe, read_tree
from embedsmith.merge import MergeRecipe, merge
from tests.merge.family import retrieval_records, sts_records
from tests.merge.models import family, tiny_base, weights

RECIPES = Path(__file__).parent.parent.parent / "recipes"
FILES = [RECIPES / "best-of-both.yaml", *sorted(RECIPES.glob("merge*.yaml"))]
MERGES = [path for path in FILES if "parents" in read_tree(path)]
PROBED = [path for path in MERGES if "probe" in read_tree(path)["method"]]
STAGES = [path for path in FILES if "stages" in read_tree(path)]
PROBED = [path for path in FILES if "probe" in str(read_tree(path).get("method"))]
PLAIN = [path for path in MERGES if path not in PROBED]


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: path.stem)
def test_recipe_merges(path, tmp_path):
    base, parents = family(tmp_path, 2, prompts={"query": "the "})
    tree = read_tree(path)
    pattern = str(tmp_path / "parent*")
    places = [pattern if "*" in entry["path"] else str(parents[at]) for at, entry in enumerate(tree["parents"])]
    changes = [f"parents.{at}.path={place}" for at, place in enumerate(places)]
    changes += [f"base={base}", f"output={tmp_path / 'out'}", "cache=null"]
    changes += ["packaging.prompts=null"] if "packaging" in tree else []
    result = merge(load_recipe(path, MergeRecipe, changes))
    assert embedsmith.load(str(result.path)).encode("the cat").shape == (16,)


@pytest.mark.parametrize("path", PROBED, ids=lambda path: path.stem)
def test_recipe_with_a_probe_merges(path, tmp_path, folders):
    parents = [f"parents.{at}.path={folders / f'parent-{at}'}" for at in range(len(read_tree(path)["parents"]))]
    files = [f"method.probe.sources.{at}.path={folders / name}.jsonl" for at, name in enumerate(("pairs", "graded"))]
    small = ["method.steps=2", "method.check_every=1", "method.batch_size=4", "method.held_out=0.5"]
    out = tmp_path / "out"
    changes = [
        *parents,
        *files,
        *small,
        "method.probe.negatives=2",
        "unrelated=true",
        f"base={folders / 'base'}",
        f"output={out}",
        "cache=null",
    ]
    result = merge(load_recipe(path, MergeRecipe, changes))
    assert embedsmith.load(str(result.path)).encode("the cat").shape[-1] > 0


@pytest.fixture
def texts(tmp_path):
    """Records of both tasks in files."""
    pairs = [{"query": r.query, "pos": list(r.positives)} for r in retrieval_records(16).records]
    graded = [
        {"text1": r.query, "text2": r.positives[0], "score": r.positive_scores[0]} for r in sts_records(16).records
    ]
    alone = [{"text": row["query"]} for row in pairs]
    for name, rows in (("pairs", pairs), ("graded", graded), ("texts", alone)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("path", PROBED, ids=lambda path: path.stem)
def test_a_recipe_that_reads_texts_merges(path, texts, tmp_path):
    base, parents = family(tmp_path, 2)
    changes = [f"parents.{at}.path={place}" for at, place in enumerate(parents)]
    changes += [f"method.probe.sources.{at}.path={texts / name}.jsonl" for at, name in enumerate(("pairs", "graded"))]
    changes += [f"base={base}", f"output={tmp_path / 'out'}", "cache=null", "method.steps=2", "method.batch_size=4"]
    result = merge(load_recipe(path, MergeRecipe, changes))
    assert sum(result.report[read_tree(path)["method"]["type"]]["weights"].values()) == pytest.approx(1.0)
    assert embedsmith.load(str(result.path)).encode("the cat").shape == (16,)


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_stages_train_merge_and_evaluate(path, texts, tmp_path):
    """Training apart, along a sequence, or of a model in use; the merge lies between base and parents."""
    base = tiny_base(tmp_path / "base")
    changes = [f"output={tmp_path / 'out'}"]
    for place, stage in enumerate(read_tree(path)["stages"]):
        own, recipe = f"stages.{place}.recipe", stage["recipe"]
        if stage["verb"] == "train":
            start = [] if recipe["model"]["path"].startswith("$") else [f"{own}.model.path={base}"]
            quick = ("train.steps=2", "train.log_with=[]", "model.max_length=16")
            changes += [*start, *(f"{own}.{c}" for c in quick)]
            for at, source in enumerate(recipe["data"]):
                file = texts / ("graded.jsonl" if source["task"] == "sts" else "pairs.jsonl")
                changes += [f"{own}.data.{at}.path={file}", f"{own}.data.{at}.batch_size=4"]
            if "anchor" in recipe["train"]:
                changes += [f"{own}.train.anchor.texts.path={texts / 'texts.jsonl'}"]
        elif stage["verb"] == "merge":
            changes += [f"{own}.base={base}", f"{own}.cache=null"]
        else:
            start = [] if recipe["model"].startswith("$") else [f"{own}.model={base}"]
            changes += [*start, f"{own}.tasks=[{texts / 'graded.jsonl'}]"]
            changes += [f"{own}.probes=[]"] if "probes" in recipe else []
    result = CliRunner().invoke(app, ["run", str(path), *changes], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    assert json.loads((out / f"{read_tree(path)['stages'][-1]['name']}.json").read_text())
    found, start = weights(out / "merged"), weights(base)
    assert any(not torch.equal(found[name], start[name]) for name in found)
    if path.stem == "merge-update":
        new = weights(out / "new" / "model")
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, (new[name] + start[name]) / 2, rtol=1e-5, atol=1e-6)
