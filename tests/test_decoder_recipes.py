"""Every recipe in recipes/decoder/ is valid and takes two steps on a tiny decoder."""

import json
from pathlib import Path

import pytest

from embedsmith.core.recipe import load_recipe, read_tree
from embedsmith.models import load
from embedsmith.train import Recipe, train
from tests.models.families import tiny
from tests.models.test_decoders import byte_tokenizer
from tests.test_recipes import ROWS

RECIPES = sorted((Path(__file__).parent.parent / "recipes/decoder").glob("*.yaml"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """Two layers, and as wide as the widest Matryoshka width with its own heads needs."""
    folder = tmp_path_factory.mktemp("decoder")
    wide = {"hidden_size": 16, "max_position_embeddings": 256}
    tiny("qwen3", vocab_size=280, **wide).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_takes_two_steps(path, decoder, tmp_path):
    tree = read_tree(path)
    start = decoder
    if tree["model"]["path"].startswith("runs/"):  # a later stage
        start = tmp_path / "before"
        load(str(decoder), pooling="last", max_length=128, device="cpu").save(start)
    changes = [f"model.path={start}", "model.max_length=128", "train.steps=2", "train.epochs=null", "train.log_with=[]"]
    changes += ["train.warmup=1", "train.batch_size=4", "train.precision=fp32"]
    changes += ["model.layers=1"] if "layers" in tree["model"] else []
    for place, source in enumerate(tree["data"]):
        rows = "\n".join(json.dumps(ROWS[source["task"]](number)) for number in range(16))
        (tmp_path / f"{place}.jsonl").write_text(rows)
        changes += [f"data.{place}.path={tmp_path / f'{place}.jsonl'}", f"data.{place}.batch_size=4"]
        if source.get("teacher"):
            load(str(decoder), pooling="last", max_length=128, device="cpu").save(tmp_path / "teacher")
            changes += [f"data.{place}.teacher={tmp_path / 'teacher'}"]
        if source["loss"].get("parts", [{}])[0].get("type") == "matryoshka":
            changes += [f"data.{place}.loss.parts.0.dims=[4]", f"data.{place}.loss.parts.0.weights=null"]
    recipe = load_recipe(path, Recipe, [*changes, f"output={tmp_path / 'run'}"])
    model = train(recipe)
    assert load(str(model), device="cpu").encode(["a cat"]).shape == (1, 16)
    asked = tree["model"].get("attention", "causal")
    assert json.loads((model / "config.json").read_text()).get("is_causal", True) == (asked == "causal")
