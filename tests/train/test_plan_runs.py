"""Plans in whole runs: mixtures, mixed batches, what a run saw, and the overview of an epoch."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from embedsmith import cli
from embedsmith.cli.overview import overview
from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.recipe import parse
from embedsmith.core.shelf import losses
from embedsmith.data import Record, RecordSet
from embedsmith.models import load
from embedsmith.train import Recipe, loop, rehearse, train
from embedsmith.train.build import build_feed
from embedsmith.train.feed import Supply, mixed_supplies, plan_of
from tests.plans import epoch_of
from tests.ranks import on_ranks
from tests.tinybert import WORDS, tiny_bert


def feed_of(tree):
    recipe = parse(Recipe, tree)
    return build_feed(recipe, load(recipe.model), recipe.data)


def planned(tree, **plan):
    return tree | {"train": tree["train"] | {"plan": plan}}


def manifest(tree):
    return json.loads((Path(tree["output"]) / "manifest.json").read_text())


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"path": str(path), "batch_size": 8, "negatives": 0}


def pairs(count, start=0):
    return [
        {"query": f"{WORDS[i % 16]} {i}", "pos": [f"{WORDS[-i % 16]} answer {i}"]} for i in range(start, start + count)
    ]


def test_the_manifest_says_what_a_run_saw(tree):
    train(parse(Recipe, tree))
    found = manifest(tree)
    feed = feed_of(tree)
    plan = feed.lanes[0].plan
    drawn = [plan.at(step) for step in range(12)]
    assert found["steps"] == 12
    assert found["starts"] == [{"step": 0, "ranks": 1}]
    for source, name in enumerate(("pairs", "scored")):
        seen = found["sources"][name]["seen"]
        rows = [step.rows for step in drawn if step.source == source]
        assert seen["steps"] == len(rows)
        assert seen["rows_drawn"] == sum(map(len, rows))
        assert seen["rows"] == len(set(np.concatenate(rows).tolist()))
    assert found["sources"]["pairs"]["content"] == feed.supplies[0].records.fingerprint


def test_a_run_that_dies_and_continues_saw_the_same(tree, tmp_path, monkeypatch):
    train(parse(Recipe, tree))
    other = tree | {"output": str(tmp_path / "other")}
    real, calls = loop.update, []

    def failing(run, parts):
        calls.append(1)
        if len(calls) == 6:
            raise OSError("power cut")
        return real(run, parts)

    monkeypatch.setattr(loop, "update", failing)
    with pytest.raises(OSError, match="power cut"):
        train(parse(Recipe, other))
    found = manifest(other)
    assert (found["steps"], found["finished"]) == (4, False)  # as of its last checkpoint
    assert sum(entry["seen"]["rows_drawn"] for entry in found["sources"].values()) == 4 * 8
    train(parse(Recipe, other))
    assert manifest(other)["finished"]
    assert manifest(other)["starts"] == [{"step": 0, "ranks": 1}, {"step": 4, "ranks": 1}]
    assert manifest(other)["sources"] == manifest(tree)["sources"]


def test_small_sources_are_put_together(tree, tmp_path):
    small = [write(tmp_path / f"{name}.jsonl", pairs(5, start)) for name, start in (("a", 0), ("b", 100), ("c", 200))]
    data = [*small, write(tmp_path / "big.jsonl", pairs(40, 300))]
    merged = planned(tree | {"data": data}, small="merge")
    merged["train"] |= {"steps": 6}
    feed = feed_of(merged)
    assert {supply.records.name: supply.rows for supply in feed.supplies} == {"a+b+c": 15, "big": 40}
    assert feed.steps_per_epoch == 6
    train(parse(Recipe, merged))
    seen = manifest(merged)["sources"]["a+b+c"]["seen"]
    assert set(seen["rows_of"]) == {"a", "b", "c"}
    assert sum(seen["rows_of"].values()) == seen["rows"] == 8


def test_a_small_source_without_its_like_shrinks(tree, tmp_path, caplog):
    data = [write(tmp_path / "one.jsonl", pairs(1)), tree["data"][1]]
    feed = feed_of(planned(tree | {"data": data}, small="merge"))
    assert feed.lanes[0].plan.rows_per_step == (1, 8)
    assert "source 'one' has 1 rows, fewer than its batch_size 8: its batches have 1 rows" in caplog.text


def test_a_file_of_one_row_trains(tree, tmp_path):
    train(parse(Recipe, tree | {"data": [write(tmp_path / "one.jsonl", pairs(1)), tree["data"][0]]}))
    assert manifest(tree)["sources"]["one"]["seen"]["rows"] == 1


def test_an_empty_file_is_named(tree, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        train(parse(Recipe, tree | {"data": [{"path": str(tmp_path / "empty.jsonl")}]}))


def test_duplicate_rows_never_meet(tree, tmp_path):
    rows = [{"query": f"{WORDS[i % 16]} {i // 4}", "pos": [f"answer {i}"]} for i in range(64)]
    plan = feed_of(tree | {"data": [write(tmp_path / "d.jsonl", rows)]}).lanes[0].plan
    for step in range(plan.steps_per_epoch):
        queries = [rows[row]["query"] for row in plan.at(step).rows]
        assert len(set(queries)) == len(queries)
    allowed = feed_of(planned(tree | {"data": [write(tmp_path / "d.jsonl", rows)]}, duplicates="allow"))
    assert allowed.lanes[0].plan.cuts[0].shared is None


def test_parts_and_caps_of_a_source(tree, tmp_path):
    source = write(tmp_path / "p.jsonl", pairs(400))
    feed = feed_of(tree | {"data": [source | {"part": [0, 0.5], "cap": 80}]})
    plan = feed.lanes[0].plan
    assert 160 < plan.sources[0].rows < 240
    assert plan.steps_per_epoch == 10
    assert plan.account(0)[0].unseen["not reached"] > 0


@pytest.mark.parametrize(
    "plan",
    [
        {"schedule": "balanced", "order": "strict"},
        {"schedule": "temperature", "temperature": 0.3, "order": "sequential"},
        {"lengths": "auto"},
        {"batch_tokens": 512, "duplicates": "allow"},
        {"lengths": [6, 9], "batch_sizes": [8, 8, 4]},
        {"batches": "mixed"},
    ],
    ids=lambda plan: "-".join(map(str, plan.values())),
)
def test_every_plan_trains(tree, plan):
    data = [{key: value for key, value in source.items() if key != "batch_size"} for source in tree["data"]]
    chosen = planned(tree | {"data": data}, **plan)
    chosen["train"] |= {"steps": 4, "batch_size": 16}
    train(parse(Recipe, chosen))
    found = manifest(chosen)
    assert sum(entry["seen"]["steps"] for entry in found["sources"].values()) == 4 * (
        1 + (plan == {"batches": "mixed"})
    )


def mixed_tree(tree, folder, steps=2):
    data = [{key: value for key, value in source.items() if key != "batch_size"} for source in tree["data"]]
    settings = tree["train"] | {"steps": steps, "batch_size": 16, "log_with": [], "plan": {"batches": "mixed"}}
    return tree | {"data": data, "train": settings, "output": str(folder)}


def test_a_mixed_step_has_a_part_of_every_kind_weighed_by_its_rows(tree, tmp_path):
    data = [write(tmp_path / f"{name}.jsonl", pairs(30, start)) for name, start in (("a", 0), ("b", 100))]
    mixed = mixed_tree(tree | {"data": [*data, tree["data"][1]]}, tmp_path / "run")
    feed = feed_of(mixed)
    assert [supply.records.name for supply in feed.supplies] == ["a+b", "scored"]
    _, parts = feed.draw(0)
    assert [part.ids.sizes[0] for part in parts] == [11, 5]  # 60 and 24 rows share 16
    assert [part.weight for part in parts] == [11 / 16, 5 / 16]


def test_sources_of_one_name_are_told_apart(tree, tmp_path, caplog):
    """As in en/train.jsonl and zh/train.jsonl."""
    for name in ("en", "zh"):
        (tmp_path / name).mkdir()
    data = [write(tmp_path / name / "train.jsonl", pairs(40)) for name in ("en", "zh")]
    train(parse(Recipe, tree | {"data": data, "train": tree["train"] | {"steps": 10}}))
    seen = {name: entry["seen"]["rows"] for name, entry in manifest(tree)["sources"].items()}
    assert seen == {"train": 40, "train-2": 40}
    assert f"{data[1]['path']}: another source is named 'train' too: this one is called 'train-2'" in caplog.text


@pytest.mark.parametrize("world", range(1, 9))
def test_mixed_batches_are_a_partition_on_any_number_of_ranks(world):
    """The released sampler's `mixed` lets ranks draw the same rows (specification A.5)."""
    supplies = [supply_of("pairs", "infonce", 300), supply_of("more", "infonce", 120), supply_of("sts", "cosent", 200)]
    for supply in mixed_supplies([replace(s, batch_size=24 * world) for s in supplies], 24 * world, world):
        plan = plan_of([supply], world, seed=3)
        seen = []
        for planned in epoch_of(plan):
            slices = [planned.rows_of(place, world).tolist() for place in range(world)]
            assert len({len(rows) for rows in slices}) == 1
            seen += [row for rows in slices for row in rows]
        assert len(set(seen)) == len(seen) == supply.rows - plan.unused_rows[0]
        assert plan.unused_rows[0] == supply.rows % supply.batch_size


def supply_of(name, loss, count):
    records = [Record(f"{name} {n}", (f"{name} answer {n}",)) for n in range(count)]
    task = "sts" if loss == "cosent" else "retrieval"
    return Supply(RecordSet(name, task, records, name), losses.build(loss), None, 1.0, 1, 0)


def test_a_mixed_batch_is_full_whatever_the_shares_round_to(tree, tmp_path):
    data = [write(tmp_path / f"{name}.jsonl", pairs(24, 100 * place)) for place, name in enumerate("ab")]
    data[1]["loss"] = {"type": "infonce", "temperature": 0.5}
    _, parts = feed_of(mixed_tree(tree | {"data": [*data, tree["data"][1]]}, tmp_path / "run")).draw(0)
    assert sorted(part.ids.sizes[0] for part in parts) == [5, 5, 6]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"weight": 2.0}}, "draws from all rows alike"),
        ({"train": {"batch_size": 1}}, "cannot hold rows of 2 kinds"),
    ],
)
def test_what_cannot_be_mixed_is_refused(tree, tmp_path, change, words):
    mixed = mixed_tree(tree, tmp_path / "run")
    mixed["data"][0] |= change.get("data", {})
    mixed["train"] |= change.get("train", {})
    with pytest.raises(RecipeError, match=words):
        feed_of(mixed)


def work(trees):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    for tree in trees:
        train(parse(Recipe, tree))


@pytest.mark.dist
def test_two_ranks_equal_one_with_every_plan(tree, tmp_path):
    """Mixed batches, and length groups whose rows are dealt to ranks by length."""
    plain = tree | {"model": {"path": str(tiny_bert(tmp_path / "plain", dropout=0.0)), "pooling": "mean"}}
    grouped = mixed_tree(plain, "")
    grouped["train"] |= {"plan": {"lengths": "auto", "schedule": "balanced"}}
    trees = {"mixed": mixed_tree(plain, ""), "grouped": grouped}
    work([one | {"output": str(tmp_path / f"{name} 1")} for name, one in trees.items()])
    on_ranks(2, work, tmp_path, [one | {"output": str(tmp_path / f"{name} 2")} for name, one in trees.items()])
    for name in trees:
        one, two = (load_file(tmp_path / f"{name} {world}" / "model" / "model.safetensors") for world in (1, 2))
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, rtol=0, atol=2e-5, msg=f"{name}: {key}")


def refused(folder, tree):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    path = Path(folder) / os.environ["RANK"] / "pairs.jsonl"
    try:
        train(parse(Recipe, tree | {"data": [{"path": str(path), "batch_size": 8}]}))
    except DataError as error:
        return str(error)
    return "trained"


@pytest.mark.dist
def test_ranks_that_see_different_files_are_refused_on_all_of_them(tree, tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        write(tmp_path / str(rank) / "pairs.jsonl", pairs(32, start=rank))
    for message in on_ranks(2, refused, tmp_path, str(tmp_path), tree):
        assert "rank 1 reads another content than rank 0: pairs" in message


def stop_at(tree, step):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    real = loop.update

    def failing(run, parts):
        if run.state.step == step:
            raise OSError("power cut")
        return real(run, parts)

    loop.update = failing
    try:
        train(parse(Recipe, tree))
    except OSError:
        return
    finally:
        loop.update = real


@pytest.mark.dist
def test_a_run_that_goes_on_with_other_ranks_ends_as_if_it_had_not(tree, tmp_path):
    """Without dropout the weights do not depend on the ranks, so the same weights mean the same batches."""
    plain = tree | {"model": {"path": str(tiny_bert(tmp_path / "plain", dropout=0.0)), "pooling": "mean"}}
    plain["train"] = plain["train"] | {"plan": {"lengths": "auto"}, "steps": 7, "log_with": []}
    train(parse(Recipe, plain | {"output": str(tmp_path / "one")}))
    moved = plain | {"output": str(tmp_path / "moved")}
    on_ranks(2, stop_at, tmp_path, moved, 4)
    train(parse(Recipe, moved))
    assert manifest(moved)["starts"] == [{"step": 0, "ranks": 2}, {"step": 4, "ranks": 1}]
    assert manifest(moved)["sources"] == manifest(plain | {"output": str(tmp_path / "one")})["sources"]
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "moved"))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=2e-5, msg=key)


def test_the_overview_of_an_epoch(tree):
    found = overview(parse(Recipe, tree))
    feed = feed_of(tree)
    assert found.steps == feed.steps_per_epoch == 8
    assert [one.account.steps for one in found.sources] == [5, 3]
    draws = [feed.draw(step) for step in range(8)]
    for source, name in zip(found.sources, ("pairs", "scored"), strict=True):
        tokens = sum(len(drawn.id_S) for drawn, parts in draws if parts[0].source == name)
        assert source.tokens == tokens  # as few steps as are sampled: nothing is estimated
        assert source.tokens <= source.padded_tokens
        assert source.seconds > 0
    assert found.seconds == pytest.approx(sum(one.seconds for one in found.sources))


def test_the_verb_inspect_prints_the_plan_of_a_recipe(tree, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    shown = CliRunner().invoke(cli.app, ["inspect", str(path), "train.plan.schedule=balanced", "--no-time"])
    assert shown.exit_code == 0, shown.output
    assert "an epoch: 10 steps, not timed; the run: 12 steps" in shown.output
    assert "scored: 16 rows are seen again" in shown.output
    tree = json.loads(CliRunner().invoke(cli.app, ["inspect", str(path), "--json", "--no-time"]).stdout)
    assert tree["sources"][0]["account"]["rows"] == 40
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_how_rows_become_batches(tree):
    said = rehearse(parse(Recipe, planned(tree, lengths=[8])))
    assert "source pairs: retrieval, 40 rows, 5 steps of 8 an epoch" in said
