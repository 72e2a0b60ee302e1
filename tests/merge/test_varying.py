"""Weights, t and densities that differ from tensor to tensor, against loops that look every number up."""

import math

import pytest
import torch
from pydantic import TypeAdapter

from embedsmith.core.errors import RecipeError
from embedsmith.core.recipe import parse
from embedsmith.core.shelf import merge_methods
from embedsmith.merge import MergeRecipe, ParentSpec, merge
from embedsmith.merge.method import Job
from embedsmith.merge.parents import Parent
from embedsmith.merge.varying import Varying, Where, layer_places, value_at
from tests.merge.memory import float_names, held, job_of, random_family, run
from tests.merge.models import family, weights

LAYERS = 4
SHAPES = {
    "backbone.embeddings.weight": (9, 5),
    **{f"backbone.layer.{n}.{part}": (5, 6) for n in range(LAYERS) for part in ("attention.weight", "mlp.weight")},
    "backbone.norm.weight": (5,),
}
BASE, MOVED = random_family(count=3, shapes=SHAPES, seed=3)
NUMBER = {name: int(name.split(".")[2]) if ".layer." in name else None for name in SHAPES}
SETTINGS = [
    0.7,
    [0.0, 0.5, 1.0],
    [2.0],
    [1.0, -0.5],
    [0.1, 0.7, 0.2, 0.9, 0.4, 0.6, 0.3],
    [{"filter": "attention", "value": [0.25, 1.0]}, {"filter": "layer.3", "value": 3}, {"filter": "*", "value": 0.5}],
    [{"layers": [0, 2], "value": [1, 2, 4]}, {"layers": [2, 3], "value": [5, 6]}, {"value": [7, 8]}],
    {"value": [0.2, 0.4]},
]


def looked_up(setting, name):
    """As mergekit says it: entries in their order, then a list by the layer's share of the way."""
    first, after = 0, LAYERS
    if isinstance(setting, dict):
        setting = [setting]
    if isinstance(setting, list) and isinstance(setting[0], dict):
        for entry in setting:
            low, high = entry.get("layers", (0, LAYERS))
            outside = "layers" in entry and (NUMBER[name] is None or not low <= NUMBER[name] < high)
            if not outside and entry.get("filter", "*") in ("*", *(name[a:b] for a in range(40) for b in range(60))):
                setting, (first, after) = entry["value"], (low, high)
                break
    if not isinstance(setting, list):
        return float(setting)
    t = 0.0 if NUMBER[name] is None else 1.0 if after - first == 1 else (NUMBER[name] - first) / (after - first - 1)
    place = t * (len(setting) - 1)
    left = math.floor(place + 1e-12)
    right = min(left + 1, len(setting) - 1)
    return setting[left] + (place - left) * (setting[right] - setting[left])


def read(setting):
    return TypeAdapter(Varying).validate_python(setting)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_setting_says_of_every_tensor_what_it_should(setting):
    places = layer_places(SHAPES)
    for name in SHAPES:
        found = value_at(read(setting), name, places.get(name))
        assert found == pytest.approx(looked_up(setting, name), rel=1e-14, abs=1e-14), name


def varied(rows, granularity="tensor", densities=(None, None, None), count=3):
    """A job whose parents have these weights and densities."""
    parents = [
        Parent(**{**vars(held(str(n), MOVED[n])), "density": None if d is None else read(d)})
        for n, d in zip(range(count), densities, strict=False)
    ]
    by_name = {name: torch.tensor([looked_up(row, name) for row in rows], dtype=torch.float64) for name in SHAPES}
    origin = held("base", BASE)
    return Job(tuple(parents), origin, float_names([*parents, origin]), by_name, granularity)


def vectors(name, count=3):
    return [(MOVED[n][name].double() - BASE[name].double()).flatten() for n in range(count)]


ROWS = ([0.0, 0.5, 1.0], 0.7, [{"filter": "attention", "value": [0.25, 1.0]}, {"value": 0.5}])


def same(found, name, wanted):
    origin = BASE[name].double().flatten()
    torch.testing.assert_close(found[name] - origin, wanted, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_average_and_task_arithmetic_weigh_every_tensor_by_its_own(granularity):
    average = run("average", varied(ROWS, granularity))
    arithmetic = run({"type": "task_arithmetic", "scale": 0.3}, varied(ROWS, granularity))
    for name in SHAPES:
        a, v = [looked_up(row, name) for row in ROWS], vectors(name)
        total = sum(w * x for w, x in zip(a, v, strict=True))
        same(average, name, total / sum(a))
        same(arithmetic, name, 0.3 * total)


def turned(left, right, t):
    alpha = math.acos(float(left @ right / left.norm() / right.norm()))
    return (math.sin((1 - t) * alpha) * left + math.sin(t * alpha) * right) / math.sin(alpha)


def test_slerp_turns_every_tensor_by_its_own_t():
    """Over all of the model's weights there is one angle; of every tensor its own."""
    t = [{"filter": "mlp", "value": [0.0, 0.3, 1.0]}, {"value": 0.25}]
    method = {"type": "slerp", "t": t}
    chosen = job_of(BASE, MOVED[:2], granularity="tensor")
    by_tensor, whole = run(method, chosen), run(method, job_of(BASE, MOVED[:2]))
    every = [torch.cat([vectors(name, 2)[n] for name in SHAPES]) for n in range(2)]
    place = 0
    for name in SHAPES:
        left, right = vectors(name, 2)
        same(by_tensor, name, turned(left, right, looked_up(t, name)))
        alike = turned(*every, looked_up(t, name))[place : place + len(left)]
        place += len(left)
        same(whole, name, alike)
    assert len(chosen.report["coefficients"]) == len(SHAPES)


def test_slerp_of_raw_weights_is_a_great_circle_or_a_line():
    far = [{name: torch.randn(shape, generator=torch.Generator().manual_seed(n)) for name, shape in SHAPES.items()}
           for n in range(2)]  # fmt: skip
    job = job_of(BASE, far, granularity="tensor")
    found = run({"type": "slerp", "of": "weights", "t": [0.2, 0.8]}, job)
    near = run({"type": "slerp", "of": "weights", "t": 0.25, "linear_above": 0.9995}, job_of(BASE, MOVED[:2]))
    for name in SHAPES:
        left, right = (one[name].double().flatten() for one in far)
        wanted = turned(left, right, looked_up([0.2, 0.8], name))
        torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=1e-12)
        line = 0.75 * MOVED[0][name].double() + 0.25 * MOVED[1][name].double()
        torch.testing.assert_close(near[name], line.flatten(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_with_densities_and_weights_of_their_own(normalize):
    densities = ([1.0, 0.4], 0.5, [{"filter": "mlp", "value": 0.25}, {"value": 0.9}])
    how = {"normalize": normalize, "aggregate": "mean" if normalize else "sum"}
    found = run({"type": "ties", "density": 0.1, **how}, varied(ROWS, densities=densities))
    for name in SHAPES:
        a, kept = [looked_up(row, name) for row in ROWS], []
        for vector, density in zip(vectors(name), densities, strict=True):
            count = int(looked_up(density, name) * len(vector) + 1e-9)
            least = sorted((abs(float(x)) for x in vector.float()), reverse=True)[count - 1]
            kept.append([float(x) if abs(float(x.float())) >= least else 0.0 for x in vector])
        wanted = []
        for column in zip(*kept, strict=True):
            sign = sum(w * x for w, x in zip(a, column, strict=True))
            agree = [(w, x) for w, x in zip(a, column, strict=True) if x * sign > 0]
            total = sum(w for w, _ in agree) if normalize else 1.0
            wanted.append(sum(w * x for w, x in agree) / total if total else 0.0)
        same(found, name, torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("method", ["dare", "breadcrumbs"])
def test_a_parents_own_density_says_how_much_of_it_is_kept(method):
    job = varied((1.0, 1.0, 1.0), densities=(0.2, None, [0.9, 0.5]))
    thin = merge_methods.build({"type": method, "density": 0.6}).thin(job)
    for block in job.blocks():
        share = (thin(block) != 0).double().mean(1)
        wanted = [0.2, 0.6, looked_up([0.9, 0.5], block.name)]
        assert share.tolist() == pytest.approx(wanted, abs=0.35 if method == "dare" else 0.2)


def test_codiemb_and_sce_take_the_weights_of_a_tensor():
    for kind in ("codiemb", "sce"):
        mixed, first = run(kind, varied(([1.0, 0.0], [0.0, 1.0], 0.0))), run(kind, varied((1.0, 0.0, 0.0)))
        last = run(kind, varied((0.0, 1.0, 0.0)))
        torch.testing.assert_close(mixed["backbone.layer.0.mlp.weight"], first["backbone.layer.0.mlp.weight"])
        torch.testing.assert_close(mixed["backbone.layer.3.mlp.weight"], last["backbone.layer.3.mlp.weight"])


def test_a_negative_weight_leads_away_where_the_source_has_real_numbers():
    job = job_of(BASE, MOVED[:2], weights=[1.5, -0.5], granularity="tensor")
    average, slerp = run("average", job), run("slerp", job)
    for name in SHAPES:
        left, right = vectors(name, 2)
        same(average, name, 1.5 * left - 0.5 * right)
        same(slerp, name, turned(left, right, -0.5))
    for method in ("ties", "dare", "sce", "codiemb", "karcher"):
        with pytest.raises(RecipeError, match="at least 0"):
            run(method, job)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return family(tmp_path_factory.mktemp("varying"))


def test_a_recipe_with_gradients_is_merged_kept_and_known_again(folders, tmp_path):
    base, (one, two) = folders
    settings = {
        "parents": [
            {"path": str(one), "weight": [{"filter": "attention", "value": 1}, {"value": [0.25, 1]}]},
            {"path": str(two), "weight": [1, 0.5]},
        ],
        "base": str(base), "method": "average", "output": str(tmp_path / "out"), "cache": None,
    }  # fmt: skip
    made = merge(**settings)
    found, first, second = weights(made.path), weights(one), weights(two)
    last = max(int(name.split(".")[2]) for name in found if ".layer." in name)
    wanted = {
        "embeddings.word_embeddings.weight": (0.25, 1),
        "encoder.layer.0.attention.self.query.weight": (1, 1),
        f"encoder.layer.{last}.attention.self.query.weight": (1, 0.5),
        f"encoder.layer.{last}.output.dense.weight": (1, 0.5),
    }
    for name, (a, b) in wanted.items():
        mean = (a * first[name].double() + b * second[name].double()) / (a + b)
        torch.testing.assert_close(found[name].double(), mean, rtol=1e-6, atol=1e-8)
    assert "varies" in (made.path / "README.md").read_text()
    before = (made.path / "merge.json").stat().st_mtime_ns
    assert merge(**settings).report == made.report
    assert (made.path / "merge.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("parent", "method", "message"),
    [
        ({"weight": [{"filter": "self_attn", "value": 1}, {"value": 1}]}, "average", "no tensor has 'self_attn'"),
        ({"weight": [{"filter": "attention", "value": 1}]}, "average", "no entry fits .*embeddings"),
        ({"weight": [{"layers": [7, 9], "value": 1}, {"value": 1}]}, "average", r"in the layers \[7, 9\]"),
        ({"weight": [0, 0]}, "average", "sum to 0"),
        ({"density": 0.5}, "average", "keeps every entry"),
        ({"density": [0.5, 0.6]}, "ties", "granularity: tensor"),
        ({"weight": [1, 2]}, {"type": "slerp", "t": 0.5}, "t, and weights"),
        ({}, {"type": "slerp", "t": [{"filter": "nowhere", "value": 0}, {"value": 1}]}, "t of slerp"),
    ],
)
def test_settings_that_fit_no_tensor_or_method(folders, tmp_path, parent, method, message):
    base, (one, two) = folders
    other = {"weight": 0} if parent.get("weight") == [0, 0] else {}
    parents = [{"path": str(one), **parent}, {"path": str(two), **other}]
    with pytest.raises(RecipeError, match=message):
        merge(parents=parents, base=str(base), method=method, output=str(tmp_path / "out"), cache=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": []}, "an empty list"),
        ({"weight": [1, {"value": 2}]}, "a list of numbers and entries"),
        ({"weight": [{"value": 1, "filtre": "x"}]}, "unknown key.*did you mean 'filter'"),
        ({"weight": [{"value": 1, "layers": [3, 3]}]}, r"layers \[3, 3\]"),
        ({"weight": float("nan")}, "weight"),
        ({"density": [0.5, 1.5]}, "density is"),
        ({"density": 0}, "more than 0"),
    ],
)
def test_bad_settings(change, message):
    tree = {"parents": [{"path": "a", **change}], "base": "b", "output": "c", "method": "average"}
    with pytest.raises(RecipeError, match=message):
        parse(MergeRecipe, tree)


def test_bad_settings_from_python():
    with pytest.raises(RecipeError, match="weight is"):
        ParentSpec("a", weight=[{"value": 1}])
    with pytest.raises(RecipeError, match="t is"):
        merge_methods.get("slerp")(t=(0.0, 1.2))
    assert ParentSpec("a", weight=(Where(1.0, filter="x"), Where(0.5))).weight


def test_a_method_with_one_weight_a_parent_says_so(folders):
    job = varied(ROWS)
    with pytest.raises(RecipeError, match="one weight for a whole parent"):
        _ = job.weight_M
