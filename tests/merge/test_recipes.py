"""Every merge recipe in recipes/ runs on tiny models."""

from pathlib import Path

import pytest

import embedsmith
from embedsmith.core.recipe import load_recipe, read_tree
from embedsmith.merge import MergeRecipe, merge
from tests.merge.models import family

FILES = sorted((Path(__file__).parent.parent.parent / "recipes").glob("merge*.yaml"))
PLAIN = [path for path in FILES if "parents" in read_tree(path) and "probe" not in str(read_tree(path)["method"])]


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
