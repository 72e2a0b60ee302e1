"""What a recipe leaves open is derived, and what it cannot have is refused with the place and a way out."""

import json
import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embedsmith.core.errors import CheckpointError, DataError, EmbedsmithError, RecipeError
from embedsmith.core.recipe import parse
from embedsmith.core.tokens import TokenBatch
from embedsmith.data import read_source
from embedsmith.data.source import DatasetFacts
from embedsmith.models import load
from embedsmith.train import Recipe, TrainConfig, loop, train
from embedsmith.train.build import build_feed, check_tokens, derive_memory, make_accelerator, probes, tokenizer_facts
from embedsmith.train.feed import mixed_supplies
from embedsmith.train.live_negatives import with_live_negatives
from embedsmith.train.step import Memory
from tests.train.test_loop import metrics, run
from tests.train.test_plan_runs import feed_of, pairs, planned, supply_of, write


def refusal(tree):
    recipe = parse(Recipe, tree)
    with pytest.raises(EmbedsmithError) as caught:
        feed = build_feed(recipe, load(recipe.model), recipe.data, recipe.train.balance)
        with_live_negatives(feed, recipe.train.mining)
    return str(caught.value)


INFONCE = {"loss": {"type": "infonce", "head": "sparse"}}
REFUSED = [
    ({"balance": {}}, {}, "data: train.balance needs a retrieval source"),
    (
        {},
        INFONCE,
        "pairs: the loss InfoNCE reads the head 'sparse', which the model lacks\n  expected: one of dense, middle\n",
    ),
    ({}, {"loss": "cosent"}, "pairs: the loss CoSENT needs a score for every pair\n  to fix: use a retrieval loss"),
    ({"mining": {"sources": ["x"]}}, {}, "train.mining.sources: no source is called 'x'\n  expected: pairs"),
    ({"mining": {"sources": ["pairs"]}}, {"negatives": 0}, "source 'pairs': no negatives to keep alive"),
    ({"mining": {"remine_every": 2}}, {"loss": "score_kl"}, "source 'pairs': the loss learns from a teacher's scores"),
]


@pytest.mark.parametrize(("settings", "source", "said"), REFUSED, ids=lambda one: one if isinstance(one, str) else "")
def test_a_refusal_says_where_what_and_what_to_do(tree, settings, source, said):
    message = refusal(tree | {"train": tree["train"] | settings, "data": [tree["data"][0] | source]})
    assert message.startswith(said)
    assert "to fix: " in message or "balance" in said or "called" in said


@pytest.mark.parametrize("plan", [{"lengths": "auto"}, {"duplicates": "forbid"}])
def test_a_stream_without_lengths_and_texts_to_compare_is_refused_with_its_name(tree, tmp_path, plan):
    rows = [{"query": f"red cat {n}", "pos": [f"a mat {n}"]} for n in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=10)
    data = [{"path": str(tmp_path / "rows.parquet"), "streaming": True, "buffer": 20, "batch_size": 8}]
    assert feed_of(tree | {"data": data}).lanes[0].plan.steps_per_epoch == 5
    message = refusal(planned(tree | {"data": data}, **plan))
    assert message.startswith("source 'rows': a stream knows neither the lengths of its rows")
    assert "to fix: leave out train.plan.lengths" in message


def test_live_negatives_leave_alone_what_has_none_unless_it_is_named(tree, tmp_path):
    """Retrieval rows without negatives, a source that draws none, and pairs with scores stay as they are."""
    bare = write(tmp_path / "bare.jsonl", pairs(20))
    data = [tree["data"][0] | {"name": "full"}, bare | {"negatives": 1}, tree["data"][1]]
    lives = lambda **mining: [
        supply.live is not None
        for supply in with_live_negatives(
            feed_of(tree | {"data": data}),
            parse(Recipe, tree | {"train": tree["train"] | {"mining": mining}}).train.mining,
        ).supplies
    ]
    assert lives() == [True, False, False]
    assert lives(sources=["full"]) == [True, False, False]
    assert lives(remine_every=5, pool=10) == [True, True, False]
    for name in ("bare", "scored"):
        with pytest.raises(RecipeError, match=f"source '{name}': no negatives to keep alive"):
            lives(sources=[name])


def test_memory_is_what_was_asked_for():
    """A chunk is never larger than the budget of all graphs; on a GPU chunks are larger."""
    on = lambda device, **changes: derive_memory(TrainConfig(**changes), torch.device(device))
    assert on("cpu") == Memory(2048, None, None, 128)
    assert on("cuda") == Memory(32768, None, None, 8192)
    assert on("cpu", micro_batch=7) == Memory(2048, None, 7, 128)
    assert on("cpu", token_budget=20) == Memory(20, 20, None, 128)
    assert on("cpu", token_budget=5000) == Memory(2048, 5000, None, 128)


@pytest.mark.parametrize(("changes", "weight"), [({}, 1.0), ({"cap": 10}, 0.25), ({"cap": 80, "weight": 0.5}, 0.5)])
def test_a_cap_lowers_a_weight_and_never_raises_it(tree, changes, weight):
    [supply] = feed_of(tree | {"data": [tree["data"][0] | changes]}).supplies
    assert supply.weight == weight


def test_the_plan_has_the_recipes_seed_and_the_models_length(tree):
    """Texts of up to nine words, of which the model reads six tokens."""
    drawn = []
    for seed in (0, 1):
        changed = planned(tree, batch_tokens=64)
        data = [{key: value for key, value in tree["data"][0].items() if key != "batch_size"}]
        changed |= {"data": data, "model": tree["model"] | {"max_length": 6}}
        changed["train"] |= {"seed": seed}
        plan = feed_of(changed).lanes[0].plan
        drawn.append([plan.at(step).rows.tolist() for step in range(plan.steps_per_epoch)])
        assert plan.sources[0].facts.length_N.max() == 6
    assert drawn[0] != drawn[1]


def test_even_a_tiny_kind_has_a_row_in_every_mixed_batch():
    supplies = [replace(supply_of(name, loss, rows), batch_size=8) for name, loss, rows in KINDS]
    assert [supply.batch_size for supply in mixed_supplies(supplies, 8, 1)] == [7, 1]


KINDS = [("many", "infonce", 300), ("few", "cosent", 2)]


def tokens_of_cache(model, files, **changes):
    """The records of pairs.jsonl as if they came from a cache that the model itself had made, but for the changes."""
    found = read_source(
        parse(Recipe, {"model": {"path": "x"}, "output": "y", "data": [{"path": str(files / "pairs.jsonl")}]}).data[0]
    )
    facts = DatasetFacts(
        "a", "retrieval", "inline", 40, 0, {}, "document", probes=probes(model, "retrieval", "document")
    )
    tokenizer = tokenizer_facts(model, "m")
    return replace(found, tokens=(replace(tokenizer, **changes.pop("tokenizer", {})), replace(facts, **changes)))


def test_a_cache_is_trained_on_by_the_model_that_made_it_alone(bert, files):
    model = load(str(bert), pooling="mean", device="cpu")
    check = lambda changes, **how: check_tokens(tokens_of_cache(model, files, **changes), model, **how)
    check({}, in_pairs=False)
    own = probes(model, "retrieval", "document")
    for changes, how, error, said in (
        (
            {"tokenizer": {"max_length": 33}},
            {},
            DataError,
            "pairs: its texts have up to 33 tokens, the model takes 32\n",
        ),
        (
            {},
            {"in_pairs": True},
            DataError,
            "pairs: its documents were tokenized as document, the loss reads them as query",
        ),
        (
            {"probes": own | {"query": [1]}},
            {},
            DataError,
            "pairs: it was tokenized with other prompts than the model's (query);",
        ),
        ({}, {"needs_text": ["teacher"]}, RecipeError, "pairs: teacher needs texts, and this source has only tokens"),
    ):
        with pytest.raises(error) as caught:
            check(changes, **{"in_pairs": False} | how)
        assert str(caught.value).startswith(said)


def test_probes_tell_every_way_of_tokenizing_apart(bert):
    prompts = {"query": "find: ", "document": "text: "}
    model = load(str(bert), pooling="mean", prompts=prompts, device="cpu")
    found = probes(model, "retrieval", "document")
    assert list(found) == ["query", "instructed", "document"]
    assert len({tuple(ids) for ids in found.values()}) == 3
    text = ["Which ids does 1 text have?"]
    assert found["query"] == model.tokenize(text, "query", "retrieval").id_S.tolist()
    assert found["document"] == model.tokenize(text, "document", "retrieval").id_S.tolist()


def test_bf16_is_autocast_over_whole_weights(tree):
    """The run's forward pass gives other numbers, near those of fp32; its parameters stay as they were."""
    tokens = TokenBatch.from_rows([[2, 5, 6, 7, 3], [2, 9, 3]], [0, 0], False)
    vectors = []
    for precision in ("fp32", "bf16"):
        recipe = parse(Recipe, tree | {"train": tree["train"] | {"precision": precision}})
        built = loop.build(recipe, make_accelerator(recipe))
        built.model.eval()
        assert {parameter.dtype for parameter in built.model.parameters()} == {torch.float32}
        vectors.append(built.encode(tokens, ["dense"], np.arange(2))["dense"].vector_ND.detach().float())
    assert 1e-6 < float((vectors[0] - vectors[1]).abs().max()) < 0.05


def test_a_short_run_saves_after_every_step_and_a_long_one_after_a_tenth(tree, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        loop.Checkpoints, "save", lambda self, model, extras, optimizer, state, *given: saved.append(state.step)
    )
    monkeypatch.setattr(loop.Checkpoints, "finish", lambda self, model, summary: tmp_path)
    monkeypatch.setattr(loop, "report_run", lambda *given: None)
    for steps in (4, 25):
        run(
            tree,
            train=tree["train"] | {"steps": steps, "checkpoint_every": None, "log_with": []},
            output=f"{tmp_path}/{steps}",
        )
    assert saved == [1, 2, 3, 4, *range(2, 25, 2), 25]


def test_a_run_beside_the_main_thread_leaves_signals_alone(tree, tmp_path):
    """As in a notebook's worker: handlers can be set in the main thread only."""
    failed = []

    def work():
        try:
            run(tree, train=tree["train"] | {"steps": 1, "log_with": []})
        except Exception as error:  # noqa: BLE001  (shown by the main thread)
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failed == []
    assert (tmp_path / "run" / "finished.json").exists()


def test_what_a_run_says_while_it_holds_its_output(tree, tmp_path, monkeypatch):
    held = tmp_path / ".run.embedsmith.lock"
    seen = []
    real = loop.update
    monkeypatch.setattr(loop, "update", lambda *given: seen.append(json.loads(held.read_text())) or real(*given))
    run(tree, train=tree["train"] | {"steps": 1, "log_with": []})
    assert [one["verb"] for one in seen] == ["train"]
    assert not held.exists()


def test_all_backward_passes_of_a_step_lie_in_the_engines_block(tree):
    """ZeRO-2 reduces gradients when the block ends; nothing may be reduced before, nor updated inside."""
    recipe = parse(Recipe, tree)
    built = loop.build(recipe, make_accelerator(recipe))
    events = []

    class Block:
        def __enter__(self):
            events.append(("begins", [p.grad is None for p in built.model.parameters()].count(False)))

        def __exit__(self, *error):
            events.append(("ends", [p.grad is None for p in built.model.parameters()].count(False) > 0))

    step = built.engine.step
    built.engine.backward = Block
    built.engine.step = lambda *given: events.append("update") or step(*given)
    loop.update(built, built.feed.draw(0))
    assert events == [("begins", 0), ("ends", True), "update"]


def test_refusals_of_an_output_name_it(tree, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "thesis.tex").touch()
    with pytest.raises(CheckpointError) as caught:
        run(tree)
    assert str(caught.value) == f"{output}: the folder is not empty and holds no run\n  to fix: choose another output"
    (output / "thesis.tex").unlink()
    short = tree | {"train": tree["train"] | {"steps": 1, "log_with": []}}
    train(parse(Recipe, short))
    with pytest.raises(CheckpointError) as caught:
        run(short, train=short["train"] | {"seed": 1})
    assert str(caught.value).startswith(f"{output}: the folder holds a run of another recipe (train.seed: 0 -> 1)\n")
    assert [line["step"] for line in metrics(output)] == [1]
    recipe = (output / "recipe.yaml").read_text()
    (output / "recipe.yaml").write_text(recipe.replace("train:", "train:\n  stepz: 3"))
    with pytest.raises(RecipeError) as caught:
        run(short)
    assert str(caught.value).startswith(f"{output / 'recipe.yaml'}: ")
    (output / "recipe.yaml").write_text(recipe)
    (output / "model" / "config.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        run(short)
    assert str(caught.value).startswith(f"{output / 'model'}: this run is finished, but its model is gone\n")
