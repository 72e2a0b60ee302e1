"""What a plan says: its arithmetic by hand, its lines by a clock that is played, and what a user types."""

import json
import math

import pytest

import embedsmith as es
from embedsmith.cli.planning import measured
from embedsmith.cli.planning.machines import CARDS
from embedsmith.cli.planning.measured import measured_line, more_of
from embedsmith.core.errors import DataError, ModelError, RecipeError
from embedsmith.data.record import Record


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(measured, "SIZES", (16, 48))
    monkeypatch.setattr("embedsmith.cli.planning.work.search_rate", lambda width: 1e9)


def cost(found, name, texts):
    return next(one for one in found.costs if (one.name, one.texts) == (name, texts))


def test_a_line_is_what_more_rows_took(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measured, "SIZES", (10, 30, 70, 500))
    monkeypatch.setattr(measured.time, "perf_counter", lambda: clock[0])

    def run(rows, folder):
        clock[0] += 2.0 + 0.05 * rows
        (folder / "out").write_bytes(b"x" * (100 + 3 * rows))

    line = measured_line("that", run, patience=4.0)
    assert line.sizes == (30, 70)
    assert (line.fixed, line.each, line.bytes_each) == pytest.approx((2.0, 0.05, 3.0))
    assert line.seconds(1e6) == pytest.approx(50_002)


def test_more_records_are_all_different():
    made = list(more_of([Record("a", ("b",), ("c",)), Record("d")], 7))
    assert made[:2] == [Record("a", ("b",), ("c",)), Record("d")]
    assert len({(one.query, one.positives) for one in made}) == 7
    assert made[4] == Record("a 2", ("b 2",), ("c 2",))


def test_training_on_cards_is_arithmetic(tree):
    tree["data"] = tree["data"][:1]  # batches of 8 rows of 4 texts, of which 3 are drawn
    tree["train"] = {"epochs": 2, "precision": "bf16", "checkpoint_every": 10}
    given = {"gpu": "h100", "nodes": 2, "cards": 4, "tokens_a_text": 10, "disk": 1e9, "network": 4e9, "price": 3}
    found = es.plan(tree, texts=[1e6, 2e6], **given)
    one, two = (cost(found, "train", texts) for texts in (1e6, 2e6))
    model = es.load(tree["model"]["path"], pooling="mean")
    count = sum(p.numel() for p in model.parameters())
    tables = {id(m.weight) for m in model.modules() if hasattr(m, "num_embeddings")}
    multiplied = sum(p.numel() for p in model.parameters() if id(p) not in tables and p.dim() > 1)
    shape = model.backbone.config
    flops = 2 * multiplied + 4 * shape.num_hidden_layers * shape.hidden_size * 10
    steps = 2 * 1e6 / 4 / 8
    assert one.seconds["steps"] == pytest.approx(steps * 3 * flops * 8 * 3 * 10 / (989e12 * 0.3 * 8))
    assert one.seconds["ranks"] == pytest.approx(steps * 2 * 4 * count * 7 / 8 / (4e9 / 4))
    assert one.seconds["disk"] == pytest.approx(steps / 10 * 12 * count / 2e9)
    assert two.hours == pytest.approx(2 * one.hours)
    assert one.card_hours == pytest.approx(8 * one.hours)
    assert one.cost == pytest.approx(3 * one.card_hours)
    assert one.memory > 16 * count
    assert any("h100 at 30% of 989 TFLOP/s" in text for text in found.basis["train"])
    assert es.plan(tree, texts=[1e6], **given | {"utilisation": 0.15}).costs[0].seconds["steps"] == pytest.approx(
        2 * one.seconds["steps"]
    )


def test_given_rates_take_the_place_of_what_is_measured(tree, monkeypatch):
    monkeypatch.setattr("embedsmith.cli.planning.work._measured_step", lambda *given: pytest.fail("measured"))
    tree["data"], tree["train"] = tree["data"][:1], {"steps": 100}
    found = es.plan(
        tree, texts=[1e6], tokens_a_text=10, tokens_a_second={"train": 320.0, "encode": 1e6}, disk=1e9, price=1.0
    )
    assert cost(found, "train", 1e6).seconds["steps"] == pytest.approx(100 * 8 * 3 * 10 / 320)
    assert cost(found, "encode", 1e6).seconds == {"run": pytest.approx(10.0)}
    assert "320 tokens a second of each, as given" in str(found)


def test_a_pipeline_on_this_machine_as_typed(bert, files, tmp_path, typed, monkeypatch):
    monkeypatch.setattr("embedsmith.cli.planning.work._measured_step", lambda *given: (0.5, 7.0, "half a second"))
    model = {"path": str(bert), "pooling": "mean"}
    searchers = [{"type": "bm25"}]
    mine = {"data": {"path": "${clean}"}, "searchers": searchers, "candidates": 8, "select": {"negatives": 2}}
    stages = [
        {
            "name": "clean",
            "verb": "curate",
            "recipe": {"input": {"path": str(files / "pairs.jsonl")}, "steps": [{"type": "exact_duplicates"}]},
        },
        {"name": "hard", "verb": "mine", "recipe": mine},
        {"name": "fit", "verb": "train", "recipe": {"model": model, "data": [{"path": "${hard}", "batch_size": 8}]}},
        {"name": "scores", "verb": "evaluate", "recipe": {"model": "${fit}", "tasks": ["stsb-en"]}},
    ]
    (tmp_path / "run.json").write_text(json.dumps({"output": str(tmp_path / "all"), "stages": stages}))
    out, _, code = typed("plan", tmp_path / "run.json", "--texts", "1e5,1e6", "--json")
    assert code == 0
    told = json.loads(out)
    names = ["clean", "hard", "fit", "scores", "encode", "index"]
    assert [one["name"] for one in told["costs"]] == names * 2
    fit = next(one for one in told["costs"] if (one["name"], one["texts"]) == ("fit", 1e6))
    assert fit["seconds"]["steps"] == pytest.approx(0.5 * math.ceil(1e6 / 4 / 8))
    clean = {one["texts"]: one["hours"] for one in told["costs"] if one["name"] == "clean"}
    assert 0 < clean[1e5] <= clean[1e6]
    assert all(told["basis"][name] for name in names)
    assert not (tmp_path / "all").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json"]


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"gpu": "h1000"}, RecipeError, "did you mean 'h100'"),
        ({"tokens_a_second": {"mine": 1.0}}, RecipeError, "train=TOKENS_A_SECOND"),
        ({"texts": [0]}, RecipeError, "counts"),
        ({"nodes": 0}, RecipeError, "nodes"),
        ({"overrides": ["model.path=nowhere"]}, ModelError, "nowhere"),
        ({"overrides": ["data.0.path=gone.jsonl"]}, DataError, r"gone\.jsonl"),
    ],
)
def test_what_is_wrong_is_named(tree, options, error, told):
    with pytest.raises(error, match=told):
        es.plan(tree, **{"gpu": "h100", "disk": 1e9} | options)


def test_numbers_that_are_none_are_told_before_anything_is_read(typed):
    for option, value in (("--texts", "many"), ("--rate", "train=fast"), ("--rate", "train")):
        _, told, code = typed("plan", "gone.yaml", option, value)
        assert (code, option in told, "1e6 or 250000" in told) == (1, True, True)


def test_a_model_too_large_for_its_card_is_told(tree, monkeypatch):
    from embedsmith.cli.planning import machines

    monkeypatch.setitem(machines.CARDS, "h100", machines.GpuCard("h100", 989, 1e4, 450e9))
    tree["data"] = tree["data"][:1]
    found = es.plan(tree, texts=[1e6], gpu="h100", tokens_a_text=10, disk=1e9)
    assert any("not one text of 32 tokens fits h100" in text for text in found.basis["train"])


def test_cards_have_names_as_they_are_typed():
    assert all(name == card.name == name.lower() for name, card in CARDS.items())
    assert CARDS["h100"].tflops == 989
