"""Live negatives in whole runs: exact on resume, the same on two ranks as on one, mined anew by the model itself."""

import json
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from embedsmith.core.errors import CheckpointError, RecipeError, TrainingError
from embedsmith.core.recipe import parse
from embedsmith.train import Recipe, train
from embedsmith.train import loop as loop_module
from embedsmith.train.build import make_accelerator
from embedsmith.train.checkpoint import Checkpoints
from embedsmith.train.feed import Feed
from embedsmith.train.live_negatives import LiveMining
from embedsmith.train.loop import build
from tests.ranks import on_ranks
from tests.tinybert import WORDS, tiny_bert


@pytest.fixture
def pools(tmp_path):
    """24 rows with 14 ranked negatives each; some name a positive of their own among them."""
    chance = random.Random(1)
    text = lambda: " ".join(chance.sample(WORDS, chance.randint(2, 6)))
    rows = [{"query": text(), "pos": [text()], "neg": [text() for _ in range(14)]} for _ in range(24)]
    rows[0]["neg"][8] = rows[0]["pos"][0]
    path = tmp_path / "pools.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def live(tree, pools, tmp_path):
    """Six epochs of three steps without dropout; every change of a score replaces."""
    model = {"path": str(tiny_bert(tmp_path / "plain", dropout=0.0)), "pooling": "mean"}
    mining = {"factor": 0.97, "ceiling": 2.0, "too_easy": -1.0}
    data = [{"path": str(pools), "batch_size": 8, "negatives": 2, "name": "pools"}]
    settings = tree["train"] | {"steps": 18, "checkpoint_every": 5, "log_with": [], "mining": mining}
    return tree | {"model": model, "data": data, "train": settings}


def changed(tree, folder, **mining):
    settings = tree["train"] | {"mining": tree["train"]["mining"] | mining}
    return tree | {"train": settings, "output": str(folder)}


def weights(folder):
    return load_file(Path(folder) / "model" / "model.safetensors")


def lines(folder, key):
    entries = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [entry[key] for entry in entries if key in entry]


SETTINGS = [
    {},
    {"rule": "scheduled", "every": 4, "rescored": 6},
    {"guard": 0.9, "remine_every": 7, "pool": 16},
    {"refill": "remine", "pool": 14},
]


@pytest.mark.parametrize("mining", SETTINGS, ids=["v2", "v1", "remine", "refill"])
def test_a_run_that_was_stopped_ends_with_the_same_weights(live, tmp_path, monkeypatch, mining):
    whole, broken = (changed(live, tmp_path / name, **mining) for name in ("whole", "broken"))
    train(parse(Recipe, whole))
    plain = loop_module.update

    def stopping(run, parts):
        if run.state.step == 12:
            raise TrainingError("a power cut")
        return plain(run, parts)

    monkeypatch.setattr(loop_module, "update", stopping)
    with pytest.raises(TrainingError):
        train(parse(Recipe, broken))
    monkeypatch.setattr(loop_module, "update", plain)
    train(parse(Recipe, broken))
    for key, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "broken")[key]), key
    assert sum(lines(tmp_path / "whole", "negatives_replaced/pools")) > 10
    assert lines(tmp_path / "whole", "negatives_replaced/pools") == lines(
        tmp_path / "broken", "negatives_replaced/pools"
    )
    if "remine_every" in mining:
        assert lines(tmp_path / "whole", "remine_seconds")


def test_the_negatives_in_use_are_those_of_the_state(live):
    """The texts of a batch are the positives and what `draw` says, and the scores that come back are the model's."""
    run = build(parse(Recipe, live), make_accelerator(parse(Recipe, live)))
    _, source = run.mining.sources[0]
    rows = run.feed.lanes[0].plan.at(0).rows
    tokens, [part] = run.feed.draw(0)
    records = source.supply.records.records
    negatives = {records[int(r)].negatives[c] for r, cs in zip(rows, source.state.draw(rows, 0)) for c in cs}
    wanted = negatives | {text for r in rows for text in records[int(r)].positives}
    assert part.ids.sizes[1] == len(wanted)
    run.model.eval()
    from embedsmith.train.loop import update

    update(run, (tokens, [part]))
    score_QS = source.seen[:, :-1]
    for place, row in enumerate(rows.tolist()):
        for slot, candidate in enumerate(source.state.draw(rows, 0)[place].tolist()):
            texts = [records[row].query, records[row].negatives[candidate]]
            if texts[1] in records[row].positives:
                assert score_QS[place, slot].isnan()
    run.mining.after_step(0, run.loss)
    assert source.state.first_step_N[rows].tolist() == [0] * len(rows)


def test_a_source_without_negatives_is_mined_before_the_first_step(live, tmp_path, files):
    rows = [json.loads(line) for line in (files / "pairs.jsonl").read_text().splitlines()]
    path = tmp_path / "bare.jsonl"
    path.write_text("".join(json.dumps({"query": r["query"], "pos": r["pos"]}) + "\n" for r in rows))
    bare = changed(live, tmp_path / "bare", remine_every=8, pool=20)
    bare["data"] = [{"path": str(path), "batch_size": 8, "negatives": 2, "name": "bare"}]
    train(parse(Recipe, bare))
    assert lines(tmp_path / "bare", "negatives_hardness/bare")[0] != 0
    with pytest.raises(RecipeError, match="no source is called 'other'"):
        train(parse(Recipe, changed(live, tmp_path / "x", sources=["other"])))
    bare["train"]["mining"] = {"sources": ["bare"]}
    with pytest.raises(RecipeError, match="no negatives to keep alive"):
        train(parse(Recipe, bare | {"output": str(tmp_path / "y")}))


def test_curves_are_in_tensorboard_and_the_report(live, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = changed(live, tmp_path / "run", remine_every=8, pool=14)
    shown["train"] |= {"log_with": ["tensorboard"], "log_every": 2}
    train(parse(Recipe, shown))
    events = EventAccumulator(str(next((tmp_path / "run").rglob("events.out.tfevents.*")).parent)).Reload()
    measures = ("hardness", "replaced", "suspect", "exhausted")
    for key in (*(f"negatives_{measure}/pools" for measure in measures), "remine_seconds"):
        written = lines(tmp_path / "run", key)
        assert len(written) > 2, key
        shown_there = {event.step: event.value for event in events.Scalars(key)}
        assert list(shown_there.values()) == pytest.approx(written), key
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    section = page.split("<h2>Negatives</h2>")[1].split("<h2>")[0]
    charts = dict(re.findall(r'<figcaption>(.*?)</figcaption>.*?application/json">(.*?)</script>', section, re.DOTALL))
    for measure in measures:
        assert json.loads(charts[measure])["data"][0]["y"] == lines(tmp_path / "run", f"negatives_{measure}/pools")
    assert "Seconds spent on mining anew, so far" in charts


@pytest.mark.parametrize("loss", ["score_kl", {"type": "sum", "parts": ["infonce", "margin_mse"]}])
def test_negatives_without_scores_are_not_mined_for_a_loss_of_scores(live, tmp_path, loss):
    tree = changed(live, tmp_path / "run", remine_every=5)
    tree["data"] = [tree["data"][0] | {"loss": loss}]
    with pytest.raises(RecipeError, match="negatives mined while training have none"):
        train(parse(Recipe, tree))


def test_a_damaged_state_is_named(live, tmp_path, monkeypatch):
    broken = changed(live, tmp_path / "run")
    monkeypatch.setattr(Checkpoints, "finish", lambda *_: (_ for _ in ()).throw(TrainingError("a power cut")))
    with pytest.raises(TrainingError):
        train(parse(Recipe, broken))
    last = max((tmp_path / "run" / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    (last / "mining.pt").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="state of live negatives cannot be read"):
        train(parse(Recipe, broken))


def work(trees):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    for tree in trees:
        train(parse(Recipe, tree))


def disagree(tree):
    from embedsmith.core.collectives import rank

    os.environ["ACCELERATE_USE_CPU"] = "true"
    plain = LiveMining.after_step

    def drifting(self, step, *rest):
        plain(self, step, *rest)
        self.sources[0][1].state.round_N[0] += rank()

    LiveMining.after_step = drifting
    try:
        train(parse(Recipe, tree))
    except TrainingError as error:
        return str(error)
    finally:
        LiveMining.after_step = plain
    return ""


@pytest.mark.dist
def test_two_ranks_choose_the_negatives_of_one(live, tmp_path):
    settings = {"v2": {}, "v1": SETTINGS[1], "remine": {"remine_every": 7, "pool": 16}}
    for name, mining in settings.items():
        train(parse(Recipe, changed(live, tmp_path / f"{name}-one", **mining)))
    on_ranks(2, work, tmp_path, [changed(live, tmp_path / f"{name}-two", **m) for name, m in settings.items()])
    for name in settings:
        one, two = tmp_path / f"{name}-one", tmp_path / f"{name}-two"
        assert lines(one, "negatives_replaced/pools") == lines(two, "negatives_replaced/pools"), name
        for key, tensor in weights(one).items():
            torch.testing.assert_close(tensor, weights(two)[key], rtol=0, atol=2e-5, msg=f"{name}: {key}")
    messages = on_ranks(2, disagree, tmp_path, changed(live, tmp_path / "drift"))
    assert all(message.startswith("pools: ranks disagree about the negatives") for message in messages)


@pytest.mark.dist
@pytest.mark.slow
def test_layouts_of_the_balance_choose_the_same_negatives(live, files, tmp_path):
    data = [
        live["data"][0] | {"batch_size": 12, "loss": "cross_batch_balance"},
        {"path": str(files / "scored.jsonl"), "task": "sts", "batch_size": 12, "score_range": [0, 1]},
    ]
    base = live | {"data": data, "train": live["train"] | {"steps": 8}}

    def layout(name, **balance):
        tree = base | {"train": base["train"] | {"balance": balance}}
        return changed(tree, tmp_path / name)

    train(parse(Recipe, layout("one")))
    on_ranks(2, work, tmp_path, [layout("own"), layout("spread", spread_negatives=True)])
    on_ranks(5, work, tmp_path, [layout("five", mode="split"), layout("three", mode="split", sts_ranks=2)])
    expected = lines(tmp_path / "one", "negatives_replaced/pools")
    assert sum(expected) > 4
    for name in ("own", "spread", "five", "three"):
        assert lines(tmp_path / name, "negatives_replaced/pools") == expected, name


def test_what_was_drawn_ahead_is_drawn_again_once_pools_are_mined_anew():
    live = SimpleNamespace(generation=0)
    lane = SimpleNamespace(
        supplies=[SimpleNamespace(live=live)], draw=lambda model, step, seed: ((step, live.generation), None)
    )
    draws = Feed(None, [lane], steps_per_epoch=9, seed=0).run_ahead(0, 7)
    seen = []
    for step, (drawn, _) in enumerate(draws):
        seen.append(drawn)
        live.generation += step in (1, 2, 4)
    assert seen == [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3)]
