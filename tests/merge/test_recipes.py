"""Every merge recipe in recipes/ runs on tiny models."""

from pathlib import Path

import pytest

import embedsmith
from embedsmith.core.recipe import load_recipe, read_tree
from embedsmith.merge import MergeRecipe, merge
from tests.merge.models import family

FILES = sorted((Path(__file__).parent.parent.parent / "recipes").glob("merge*.yaml"))
MERGES = [path for path in FILES if "parents" in read_tree(path)]
PROBED = [path for path in MERGES if "probe" in read_tree(path)["method"]]
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
