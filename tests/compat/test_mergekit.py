"""mergekit's YAML: what it becomes, that it gives mergekit's numbers (its formulas in loops), and what it cannot say.

`python -m bench.merging_peers` compares with mergekit itself.
"""

import math

import pytest
import torch
import yaml
from typer.testing import CliRunner

import embedsmith
from embedsmith.cli import app
from embedsmith.compat.mergekit import merge_tree, mergekit_tree, read_merge
from embedsmith.core.errors import RecipeError
from embedsmith.merge.varying import value_at
from tests.merge.models import child, family, weights

EXAMPLE = """
models:
  - model: a
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: c
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: theta
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
"""examples/ties.yml of mergekit."""


def test_its_own_example():
    made = mergekit_tree(yaml.safe_load(EXAMPLE), "ties.yml")
    assert made == {
        "base": {"path": "theta"},
        "parents": [
            {"path": "a", "weight": 1.0, "density": [1, 0.7, 0.1]},
            {"path": "b", "weight": [0, 0.3, 0.7, 1], "density": 0.5},
            {"path": "c", "weight": [{"value": 0.5, "filter": "mlp"}, {"value": 0}], "density": 0.33},
        ],
        "method": {"type": "ties", "scale": 1.0, "rescale": "none"},
        "dtype": "float16",
        "granularity": "tensor",
        "packaging": {},
    }


def two(method, *parameters, **more):
    models = [{"model": name, "parameters": own} for name, own in zip("abc", parameters, strict=False)]
    return {"merge_method": method, "models": models, **more}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (two("linear", {"weight": 1}, {"weight": 3}), {"type": "average"}),
        (two("linear", {"weight": 0.25}, {"weight": 0.75}, parameters={"normalize": False}), {"type": "average"}),
        (two("task_arithmetic", {}, {}, base_model="x", parameters={"weight": 0.5, "lambda": 2}),
         {"type": "task_arithmetic", "scale": 2.0}),
        (two("task_arithmetic", {}, {}, base_model="x", parameters={"weight": 0.5, "normalize": True}),
         {"type": "average", "scale": 1.0}),
        (two("ties", {}, {}, base_model="x", parameters={"weight": 1, "density": 0.3, "normalize": False}),
         {"type": "ties", "scale": 1.0, "rescale": "none", "normalize": False, "aggregate": "sum", "density": 0.3}),
        (two("dare_ties", {}, {}, base_model="x", parameters={"weight": 1, "density": 0.3}),
         {"type": "dare", "scale": 1.0, "rescale": "l1", "normalize": False, "then": "ties", "density": 0.3}),
        (two("della", {}, {}, base_model="x", parameters={"weight": 1, "density": 0.3, "epsilon": 0.1}),
         {"type": "della", "scale": 1.0, "rescale": "l1", "epsilon": 0.1, "normalize": True, "then": "ties",
          "density": 0.3}),
        (two("breadcrumbs", {}, {}, base_model="x", parameters={"weight": 1, "density": 0.3}),
         {"type": "breadcrumbs", "scale": 1.0, "gamma": 0.01, "normalize": False, "then": "linear", "density": 0.3}),
        (two("sce", {}, {}, base_model="x", parameters={"select_topk": 0.4}), {"type": "sce", "density": 0.4}),
        (two("nuslerp", {"weight": 1}, {"weight": 2}, base_model="x"), {"type": "slerp", "on_antipodal": "linear"}),
        (two("multislerp", {"weight": 1}, {"weight": 2}), {"type": "normalised_mean", "of": "weights"}),
        (two("karcher", {}, {}), {"type": "karcher", "of": "weights"}),
        (two("model_stock", {}, {}, base_model="x"), {"type": "model_stock"}),
    ],
    ids=lambda value: value.get("merge_method", ""),
)  # fmt: skip
def test_methods(config, wanted):
    assert mergekit_tree(config, "x.yml")["method"] == wanted


def test_the_base_among_the_models_is_no_parent_and_the_nearest_place_counts():
    models = [
        {"model": "x"},
        {"model": "a", "parameters": {"weight": [{"filter": "mlp.fc", "value": 2}]}},
        {"model": "b"},
    ]
    made = mergekit_tree(
        {"merge_method": "task_arithmetic", "models": models, "base_model": "x", "parameters": {"weight": [0, 1]}}, "f"
    )
    assert made["parents"] == [
        {"path": "a", "weight": [{"value": 2.0, "filter": "mlp.fc"}, {"value": [0.0, 1.0]}]},
        {"path": "b", "weight": [0.0, 1.0]},
    ]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("org/model@v2", {"path": "org/model", "revision": "v2"}),
        ("base+adapters/a", {"path": "base", "adapter": "adapters/a"}),
        ({"model": {"path": "m", "revision": "r"}, "lora": "l"}, {"path": "m", "revision": "r", "adapter": "l"}),
    ],
)
def test_models_with_revisions_and_adapters(given, wanted):
    models = [{"model": given, "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 1}}]
    assert mergekit_tree({"merge_method": "linear", "models": models}, "f")["parents"][0] == wanted | {"weight": 1.0}


def test_whose_tokenizer():
    by = {"base_model": "x", "parameters": {"weight": 1}}
    assert mergekit_tree(two("ties", {}, {}, **by, tokenizer_source="union"), "f")["packaging"] == {}
    base = mergekit_tree(two("ties", {}, {}, **by, tokenizer={"source": "x"}), "f")["packaging"]
    assert base == {"like": "base", "vocabulary": "align"}
    made = mergekit_tree(two("ties", {}, {}, **by, tokenizer_source="b"), "f")
    assert made["packaging"] == {"like": "b", "vocabulary": "align"}
    assert made["parents"][1] == {"path": "b", "weight": 1.0, "id": "b"}


def test_overrides_name_keys_of_either_form():
    tree = two("linear", {"weight": 1}, {"weight": 1})
    made = merge_tree(tree, "f", ["parameters.weight=2", "models.0.parameters.weight=3", "output=o", "dtype=bfloat16"])
    assert (made["parents"][0]["weight"], made["output"], made["dtype"]) == (3.0, "o", "bfloat16")
    ours = {"parents": ["a"], "method": "average"}
    assert merge_tree(dict(ours), "f", ["output=o"]) == ours | {"output": "o"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("mergekit")
    base, (one, two) = family(root)
    return base, one, two


def raw_slerp(t, left, right):
    """mergekit's: raw weights, a line from a cosine of 0.9995 on."""
    cos = float(left.flatten() @ right.flatten() / left.norm() / right.norm())
    if abs(cos) > 0.9995:
        return (1 - t) * left + t * right
    alpha = math.acos(cos)
    return (math.sin((1 - t) * alpha) * left + math.sin(t * alpha) * right) / math.sin(alpha)


def test_slices_with_gradients_and_filters_give_its_numbers(folders, tmp_path):
    _, one, _ = folders
    far = child(one, tmp_path / "far", 9, step=0.2)
    config = {
        "merge_method": "slerp",
        "base_model": str(far),
        "slices": [
            {"sources": [{"model": str(path), "layer_range": [n, n + 1]} for path in (one, far)],
             "parameters": {"t": value}}
            for n, value in enumerate(([{"filter": "attention", "value": [0.3, 0.9]}, {"value": 0.5}], [0.2, 0.6]))
        ],
        "dtype": "float32",
    }  # fmt: skip
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    made = embedsmith.merge(file, output=tmp_path / "out", cache=None)
    found, left, right = (weights(path) for path in (made.path, far, one))
    for name in found:
        # one layer a slice: the list's last value; outside: its first
        t = 0.6 if "layer.1." in name else (0.9 if "layer.0." in name else 0.3) if "attention" in name else 0.5
        wanted = raw_slerp(t, left[name].double(), right[name].double())
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-7, msg=name)


def test_the_command_line_takes_it_and_asks_for_an_output(folders, tmp_path):
    base, one, two = folders
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(path), "parameters": {"weight": [0.1, 0.7]}} for path in (one, two)],
    }
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(RecipeError, match="output=runs/merged"):
        read_merge(file)
    done = CliRunner().invoke(app, ["merge", str(file), f"output={tmp_path / 'out'}", "cache=null"])
    assert done.exit_code == 0, done.output
    found, origin, first, second = (weights(path) for path in (tmp_path / "out", base, one, two))
    for name, weight in (("encoder.layer.0.output.dense.weight", 0.1), ("encoder.layer.1.output.dense.weight", 0.7)):
        start = origin[name].double()
        wanted = start + weight * (first[name].double() - start) + weight * (second[name].double() - start)
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-6, atol=1e-8)
    recipe = read_merge(tmp_path / "out" / "recipe.yaml")
    assert value_at(recipe.specs[0].weight, "any", (1, 2)) == 0.7


SLICES = {"merge_method": "linear", "parameters": {"weight": 1}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (two("passthrough", {}), "merge_method: passthrough is not here.*(?s:.*)model.layers"),
        (two("slerpp", {}), "did you mean 'slerp'"),
        (two("ties", {"weight": 1}), "base_model is missing"),
        (two("linear", {"weight": 1}, {}), "models.1.parameters.weight is missing"),
        (two("linear", {"weight": 1, "density": 0.5}), "models.0.parameters.density: linear has no such"),
        (two("linear", {"weight": "x"}), "models.0.parameters.weight"),
        (two("linear", {"weight": 1}, {"weight": 1}, parameters={"normalize": False}), "parameters.normalize"),
        (two("linear", {"weight": 1}, base_model="x"), "base_model: linear merges only"),
        (two("slerp", {}, {}), "slerp: 2 models"),
        (two("slerp", {}, {}, base_model="a"), "parameters.t is missing"),
        (two("slerp", {}, {}, base_model="a", chat_template="auto", parameters={"t": 0.5}), "chat_template"),
        (two("slerp", {}, {}, base_model="a", tokenizer_source="z", parameters={"t": 0.5}), "tokenizer_source: 'z'"),
        (two("slerp", {}, {}, base_model="a", tokenizer={"tokens": {}}, parameters={"t": 0.5}), "tokenizer.tokens"),
        (two("karcher", {}, {}, base_model="a"), "one more model of the mean"),
        (two("nuslerp", {"weight": 1}, {"weight": 1}, parameters={"nuslerp_row_wise": True}), "nuslerp_row_wise"),
        (two("ties", {"weight": 1}, base_model="x", parameters={"lambda": [0, 1]}), "lambda differs"),
        (two("ties", {"weight": 1}, base_model="x", parameters={"normalize": 2}), "parameters.normalize is 2"),
        ({**two("linear", {"weight": 1}), "merge_metod": 1}, "merge_metod: unknown key.*did you mean"),
        ({"merge_method": "linear", "modules": {}}, "modules"),
        ({"merge_method": "linear"}, "no models"),
        ({**SLICES, "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]},
                               {"sources": [{"model": "a", "layer_range": [1, 4]}]}]}, "slices.1.sources: layer_range"),
        ({**SLICES, "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]},
                               {"sources": [{"model": "b", "layer_range": [2, 4]}]}]}, "another choice of models"),
        (two("linear", {"weight": 1}) | {"models": [{"model": "a+b+c"}]}, "more than one"),
    ],
)  # fmt: skip
def test_what_it_cannot_say(config, message):
    with pytest.raises(RecipeError, match=message):
        mergekit_tree(config, "config.yml")


def test_slices_that_end_before_the_model_does(folders):
    sources = [{"model": str(path), "layer_range": [0, 1]} for path in folders[1:]]
    with pytest.raises(RecipeError, match="end at layer 1, and the models have 2"):
        mergekit_tree({**SLICES, "slices": [{"sources": sources}]}, "f")
