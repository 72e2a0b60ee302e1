"""The reproduction study: verdicts follow from results by the rules, and the document says what the results say."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bench.common import RESULTS, ROOT, read_json
from bench.reproduce import __main__ as command
from bench.reproduce import conan, decoder, m3, self_positioning
from bench.reproduce.claim import MEAN, RETRIEVAL, STS, Bench, Check, Claim, Measure, Row
from bench.reproduce.claims import CLAIMS, results_of, study_of
from bench.reproduce.judge import gap, judge, resampled, verdict
from bench.reproduce.study import replaced, save_lines
from bench.reproduce.table import BEGIN, END, below_text, document_results, results_text, update_document, word_of
from scipy.stats import spearmanr, ttest_1samp

from embedsmith.core.recipe import read_tree

UP = Check("better", "new", "old", RETRIEVAL)
COST = Measure("cost", ("cost",), lower_is_better=True)


def rows(arm, *values, name="debian"):
    return [Row(arm, seed, {name: value}) for seed, value in enumerate(values)]


def with_items(arm, seed, values):
    return Row(arm, seed, {"debian": float(np.mean(values))}, {"debian": tuple(values)})


# Intervals ------------------------------------------------------------------------------------------------------------


def test_interval_over_seeds_is_students():
    found = gap(UP, rows("new", 52.0, 53.0, 55.0) + rows("old", 50.0, 50.5, 51.0))
    exact = ttest_1samp([2.0, 2.5, 4.0], 0).confidence_interval(0.95)
    assert (found.value, found.how) == (pytest.approx(8.5 / 3), "t")
    assert (found.low, found.high) == (pytest.approx(exact.low), pytest.approx(exact.high))


def test_a_winner_below_its_own_best_part_is_said():
    """It wins its check all the same; of its parts the best counts, and an arm that won nothing is left alone."""
    claim = replace(
        CLAIMS["codiemb-fusion"], checks=(Check("", "new", "old", RETRIEVAL), Check("", "old", "new", RETRIEVAL)),
        parts={"new": ("joint", "half"), "old": ("joint",)}, arms=(),
    )  # fmt: skip
    found = [*rows("new", 52.0, 53.0, 55.0), *rows("old", 50.0, 50.5, 51.0)]
    parts = [*rows("joint", 53.0, 54.5, 55.0), *rows("half", 1.0, 1.0, 1.0)]
    (below,) = judge(claim, [*found, *parts], {})["below"]
    assert (below["arm"], below["part"], below["value"]) == ("new", "joint", pytest.approx(-2.5 / 3, abs=1e-4))
    assert "But new lies below joint, which it is made of (debian-dev: -0.83" in below_text([below])
    assert judge(claim, [*found, *rows("joint", 51.0, 52.0, 53.0)], {})["below"] == []


def test_only_seeds_that_both_arms_have_are_compared():
    found = gap(UP, [*rows("new", 1.0, 2.0, 9.0), Row("old", 2, {"debian": 4.0}), Row("old", 7, {"debian": 0.0})])
    assert found.seeds == (5.0,)


def test_an_arm_without_a_seed_stands_beside_every_seed():
    found = gap(UP, [*rows("new", 3.0, 5.0), Row("old", None, {"debian": 1.0})])
    assert found.seeds == (2.0, 4.0)


def test_bootstrap_is_paired_and_covers_seeds_and_items():
    chance = np.random.default_rng(0)
    easy_N = chance.uniform(0, 100, 400)
    same = [with_items("new", 0, easy_N + 1), with_items("old", 0, easy_N)]
    found = gap(UP, same)
    assert found.how == "bootstrap"
    assert found.low == pytest.approx(1.0)  # queries differ widely, their differences do not: pairing sees it
    assert found.high == pytest.approx(1.0)
    split = [with_items("new", 1, easy_N - 1), with_items("old", 1, easy_N)]
    wide = gap(UP, same + split)
    assert wide.low == pytest.approx(-1.0)
    assert wide.high == pytest.approx(1.0)


def test_similarity_is_resampled_as_a_correlation():
    chance = np.random.default_rng(1)
    label_N = chance.uniform(0, 5, 300)
    cosine_N = tuple(label_N / 5 + chance.normal(0, 0.2, 300))
    row = Row("a", 0, {"stsb": 0.0}, {"stsb": cosine_N}, {"stsb": tuple(label_N)})
    value_B = resampled(row, STS)
    assert value_B.mean() == pytest.approx(100 * spearmanr(cosine_N, label_N).statistic, abs=1.0)
    assert 0.5 < value_B.std() < 5


def test_share_and_direction():
    kept = Check("kept", "new", "old", RETRIEVAL, share=0.5)
    assert gap(kept, rows("new", 6.0) + rows("old", 10.0)).value == pytest.approx(1.0)
    cheaper = Check("cheaper", "new", "old", COST)
    assert gap(cheaper, rows("new", 6.0, name="cost") + rows("old", 10.0, name="cost")).value == pytest.approx(4.0)
    narrow = Check("narrow", "new", "new", MEAN.at(64), share=0.95, against=MEAN)
    scores = {"debian": 80.0, "stsb": 90.0, "debian@64": 70.0, "stsb@64": 88.0}
    assert gap(narrow, [Row("new", 0, scores)]).value == pytest.approx(79 - 0.95 * 85)


# Outcomes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "margin", "outcome"),
    [
        ((2.0, 2.1, 2.2), 0.0, "holds"),
        ((-2.0, -2.1, -2.2), 0.0, "contradicted"),
        ((2.0, -1.0, 0.5), 0.0, "open"),
        ((-0.5, -0.4, -0.6), -1.0, "holds"),
        ((-0.5, -0.4, -0.6), 0.0, "contradicted"),
        ((-1.5, -1.6, -1.4), -1.0, "contradicted"),
        ((1.5,), 0.0, "holds"),
        ((0.5,), 0.0, "open"),
        ((-0.5,), 0.0, "open"),
        ((-1.5,), 0.0, "contradicted"),
        ((-0.5,), -1.0, "holds"),
        ((-1.5,), -1.0, "contradicted"),
    ],
)
def test_outcome_of_a_check(values, margin, outcome):
    check = replace(UP, margin=margin)
    found = gap(check, rows("new", *(10 + value for value in values)) + rows("old", *[10.0] * len(values)))
    assert found.outcome(check) == outcome


def test_a_seed_on_the_other_side_leaves_a_check_open():
    """However narrow the bootstrap over items."""
    item_N = np.random.default_rng(0).uniform(0, 100, 500)
    shifts = (3.0, 3.0, 3.0, 3.0, 3.0, -0.1)
    pairs = [(with_items("new", s, item_N + d), with_items("old", s, item_N)) for s, d in enumerate(shifts)]
    found = gap(UP, [row for pair in pairs for row in pair])
    assert found.low > 0
    assert found.outcome(UP) == "open"


GAINS = [True, False]


@pytest.mark.parametrize(
    ("outcomes", "gains", "word"),
    [
        (["holds", "holds"], GAINS, "reproduced"),
        (["holds", "open"], GAINS, "partly"),
        (["holds", "contradicted"], GAINS, "partly"),
        (["open", "holds"], GAINS, "not reproduced"),  # nothing lost, nothing won
        (["open", "contradicted"], GAINS, "not reproduced"),
        (["holds", "open"], [False, False], "partly"),
        (["open"], [True], "not reproduced"),
        (["holds", None], GAINS, "not run yet"),
        ([None], [True], "not run yet"),
    ],
)
def test_verdict(outcomes, gains, word):
    assert verdict(outcomes, gains) == word


def test_what_asks_for_a_gain():
    assert UP.gains
    assert replace(UP, margin=2.0).gains
    assert not replace(UP, margin=-1.0).gains
    assert not replace(UP, share=0.98).gains
    assert replace(UP, measure=COST, share=0.5).gains


def test_untestable_whatever_the_rows():
    assert judge(CLAIMS["conan-softmask"], rows("new", 1.0), {})["verdict"] == "untestable here"


# Rows of other benches ------------------------------------------------------------------------------------------------


def test_rows_of_mining_are_those_of_the_newest_settings():
    run = {"arm": "mined", "seed": 0, "ndcg_at_10": 0.5, "settings": {"steps": 2}}
    newer = run | {"ndcg_at_10": 0.8, "settings": {"steps": 558}}
    found = conan.read_mining({"quality": {"runs": [run, newer, newer | {"arm": "untrained"}]}})
    assert found == [Row("mined", 0, {"debian": 80.0}), Row("untrained", None, {"debian": 80.0})]
    assert conan.read_mining({}) == []
    assert conan.sizes_of_mining({"quality": {"runs": [run, newer | {"max_length": 48}]}}) == {
        "steps": 558,
        "max_length": 48,
    }


def test_rows_of_m3_are_means_over_tasks_of_complete_runs():
    run = {"part": "quality", "model": "x", "steps": 80, "batch": 32, "arm": "distilled", "seed": 0}
    one, two = run | {"task": "a", "scores": {"dense": 40.0}}, run | {"task": "b", "scores": {"dense": 60.0}}
    table = {"runs": [one | {"steps": 2}, one, two, two | {"seed": 1}, one | {"part": "crosslingual"}]}
    found = m3.read_part("quality")(table)
    assert m3.sizes_of("quality")(table) == {"model": "x", "steps": 80, "batch": 32}
    assert found == [Row("distilled", 0, {"dense": 50.0}), Row("distilled: dense", 0, {"ndcg": 50.0})]


def test_rows_of_decoder_cells():
    cell = {"before": {"stsb-en-dev": 0.2, "xquad-en": 0.1}, "after": {"stsb-en-dev": 0.6, "xquad-en": 0.4}}
    better = cell | {"after": {"stsb-en-dev": 0.8, "xquad-en": 0.6}}
    cells = {"causal-last-lora, 80 steps": cell, "causal-last-full, 80 steps": better, "both-mean-lora, 2 steps": cell}
    cells = dict(reversed(cells.items()))
    found = {row.arm: row.scores for row in decoder.read_cells({"cells": cells})}
    assert set(found) == {"causal-last-lora", "causal-last-full", "causal-last untrained", "causal-last, mean"}
    assert found["causal-last, mean"] == pytest.approx({"stsb-en-dev": 70.0, "xquad-en": 50.0})


def merging_run(part, arm, seed=0, **more):
    sizes = {"steps": 60, "layers": 3, "items": 500, "documents": 2000, "probe": 256}
    return {"part": part, "arm": arm, "seed": seed, **sizes, **more}


def test_rows_of_merging():
    score = lambda a, b: {"scores": {"debian-dev": a, "stsb-en-dev": b, "mean": (a + b) / 2}, "texts": 4000}
    arms = {"joint": (70, 80), "joint 0.1": (60, 60), "joint 0.3": (75, 80), "joint 0.5": (60, 60)}
    arms |= {"joint 0.7": (60, 60), "joint 0.9": (60, 60), "self_positioning": (76, 80)}
    runs = [merging_run("table", arm, **score(*values)) for arm, values in arms.items()]
    grid = [merging_run("plane", f"t={t}", **score(70 + t, 80)) for t in range(3)]
    grid.append(merging_run("plane", "t=0", 1, **score(90, 90)))
    found = {row.arm: row.scores for row in self_positioning.read_plane({"runs": runs + grid}) if row.seed == 0}
    assert self_positioning.sizes_of("plane")({"runs": runs + grid})["items"] == 500
    assert found["best joint"]["debian"] == 75
    assert found["best of grid"] == {"debian": 72, "stsb": 80, "texts": 12}
    growth = [merging_run("growth", "retrieval 8", norm=0.5), merging_run("growth", "sts 120", norm=2.0)]
    growth += [merging_run("growth", "joint 0.9", degrees=[20.0, 70.0])]
    assert self_positioning.read_growth({"runs": growth}) == [
        Row("retrieval x1/8", 0, {"length": 0.5}),
        Row("sts x16/8", 0, {"length": 2.0}),
        Row("joint 0.9", 0, {"to retrieval": 20.0, "to sts": 70.0}),
    ]


def test_a_bench_is_called_only_where_rows_are_missing(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(command.subprocess, "run", lambda line, **options: calls.append(line[2:]))
    bench = Bench("bench.other", ("--parts", "x"), "other.json", lambda t: [Row(*row) for row in t], lambda t: {})
    claim = replace(CLAIMS["conan-refreshed"], bench=bench, checks=(UP,))
    study = study_of(tmp_path, tmp_path / "own.json")
    (tmp_path / "other.json").write_text(json.dumps([["new", 0, {"debian": 1}], ["old", 0, {"debian": 0}]]))
    command.make_rows(claim, study, [0])
    assert calls == []
    command.make_rows(claim, study, [0, 1])
    assert calls == [["bench.other", "--parts", "x", "--seeds", "0", "1"]]


# The study's own runs -------------------------------------------------------------------------------------------------


def test_a_row_is_made_once_and_another_process_may_add_to_the_file(tmp_path, monkeypatch):
    study = study_of(tmp_path, tmp_path / "r.json", steps=2)
    study.__dict__["tasks"] = {"stsb": type("Task", (), {"score": [0.5, 5.0]})}  # cached_property

    def measure(study, seed):
        other = {"arm": "x", "seed": 9, "settings": study.settings, "scores": {}, "items": {}}
        save = read_json(study.results, {"runs": []})
        save["runs"].append(other)
        study.results.write_text(json.dumps(save))
        return {"jump_sts": 1.0 + seed}

    study = replace(study, measurers={"balanced loss": measure})
    study.__dict__["tasks"] = {"stsb": type("Task", (), {"score": [0.5, 5.0]})}
    study.record("balanced loss", 1)
    study.record("balanced loss", 1)
    found = study.rows()
    assert [(row.arm, row.seed) for row in found] == [("x", 9), ("balanced loss", 1)]
    assert found[1].scores == {"jump_sts": 2.0}
    assert found[1].labels == {"stsb": (0.5, 5.0)}
    assert replace(study, steps=3).rows() == []


def test_larger_draws_begin_with_smaller_ones_and_seeds_differ(tmp_path):
    study = study_of(tmp_path, tmp_path / "r.json")
    texts = [{"text": number} for number in range(10)]
    read = lambda path: Path(path).read_text().splitlines()
    few, many = (read(study.drawn("a", 0, count, texts)) for count in (4, 13))
    assert many[:4] == few
    assert many[10:] == many[:3]
    assert read(study.drawn("a", 1, 4, texts)) != few
    same = [read(study.drawn(name, 0, 4, texts, order="o")) for name in ("b", "c")]
    assert same[0] == same[1]


def test_weak_pairs_are_wrong_as_often_as_said(tmp_path, monkeypatch):
    source = tmp_path / "debian.jsonl"
    save_lines(source, [{"query": f"q{i}", "pos": [f"d{i}"]} for i in range(500)])
    monkeypatch.setattr(conan, "data_path", lambda name: source)
    study = study_of(tmp_path / "work", tmp_path / "r.json", steps=10, batch=20)
    made = [json.loads(line) for line in conan.weak_pairs(study, 0).read_text().splitlines()]
    assert len(made) == 150
    assert sum(row["query"][1:] != row["pos"][0][1:] for row in made) == round(conan.WRONG * 150)


def test_replaced_negatives_are_counted_over_the_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert replaced(path) == {}
    save_lines(path, [{"step": 1, "loss/debian": 1.0}])
    assert replaced(path) == {}
    save_lines(path, [{"step": step, "negatives_replaced/mined": 2 * step} for step in (1, 2)])
    assert replaced(path) == {"replaced": 6}


def test_jump_is_the_change_from_step_to_step():
    assert conan.jump([1.0, 1.0, 1.0]) == 0
    assert conan.jump([1.0, 3.0, 1.0, 3.0]) == pytest.approx(100.0)
    assert conan.jump([1.0, 1.1, 1.2, 1.3]) < conan.jump([1.0, 1.3, 1.0, 1.3])


# Claims and the document ----------------------------------------------------------------------------------------------


def test_every_claim_is_complete():
    for claim in CLAIMS.values():
        assert all((ROOT / "recipes" / name).exists() and read_tree(ROOT / "recipes" / name) for name in claim.recipes)
        assert claim.recipes, claim.name
        assert bool(claim.checks) == (claim.untestable is None), claim.name
        own = study_of(ROOT, ROOT)
        assert set(claim.arms) <= own.makers.keys() | own.measurers.keys(), claim.name
        if claim.bench is None:
            assert {arm for check in claim.checks for arm in (check.first, check.second)} <= set(claim.arms)
            needed = {part for check in claim.checks for part in (*check.measure.parts, *check.other.parts)}
            widths = {part for part in needed if "@" in part}
            assert not widths or {arm for check in claim.checks for arm in (check.first,)} <= own.widths


def judged(claim, seed=0):
    """A claim judged by invented rows."""
    chance = random.Random(seed)
    names = {part for check in claim.checks for m in (check.measure, check.other) for part in m.parts}
    names |= {part for measure in claim.shown for part in measure.parts}
    arms = {arm for check in claim.checks for arm in (check.first, check.second)}
    invented = [Row(arm, s, {name: chance.uniform(1, 90) for name in names}) for arm in sorted(arms) for s in range(2)]
    return judge(claim, invented, {"steps": 80})


def test_results_have_a_section_for_every_claim_and_every_check():
    found = {name: judged(claim) for name, claim in CLAIMS.items()}
    text = results_text(list(CLAIMS.values()), {"claims": found})
    for name, claim in CLAIMS.items():
        assert f"### {name}\n" in text
        assert found[name]["verdict"] != "not run yet"
        for check in claim.checks:
            assert f"| {check.words} |" in text
    assert "not run yet" not in text


def test_a_verdict_on_one_seed_says_so():
    claim = replace(CLAIMS["conan-refreshed"], checks=(UP,))
    one, two = (judge(claim, rows("new", *[9.0] * n) + rows("old", *[1.0] * n), {}) for n in (1, 2))
    assert word_of(claim, one) == "reproduced (one seed)"
    assert word_of(claim, two) == "reproduced"
    assert word_of(claim, judge(claim, [], {})) == "not run yet"


def test_results_read_well_before_there_are_any():
    text = results_text(list(CLAIMS.values()), {})
    assert text.count("**Verdict.** not run yet.") == sum(claim.untestable is None for claim in CLAIMS.values())
    assert text.count("**Verdict.** untestable here.") == sum(claim.untestable is not None for claim in CLAIMS.values())
    assert "None" not in text


def test_the_results_say_where_they_come_from():
    where = lambda day, cpu: {"date": f"2026-11-{day}T10:00", "cpu": cpu, "cores": 2, "versions": {"torch": "2.13"}}
    runs = [{"minutes": 1.4, "environment": where("21", "A")}, {"minutes": 2.2, "environment": where("23", "B")}]
    line = results_text([], {"runs": runs}).splitlines()[0]
    assert line.startswith(
        "2 runs of the study's own, 4 minutes in all, on A, 2 cores; B, 2 cores; torch 2.13; 2026-11-21 to"
    )


def test_the_document_is_updated_between_its_marks(tmp_path):
    path = tmp_path / "doc.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    claims: list[Claim] = list(CLAIMS.values())
    for _ in range(2):
        update_document(path, claims, {})
    assert document_results(path) == results_text(claims, {})
    assert path.read_text().startswith("before\n")
    assert path.read_text().endswith("\nafter\n")


def test_the_document_says_what_the_results_say():
    text = results_text(list(CLAIMS.values()), read_json(RESULTS / "reproduce.json", {}))
    message = "write it anew: python -m bench.reproduce --table"
    assert document_results(ROOT / "docs" / "reproduction.md") == text, message


@pytest.mark.slow
def test_the_verdicts_follow_from_the_committed_rows():
    """Every claim that is judged, judged again; claims whose rows came later wait for `--table`."""
    study = study_of(ROOT, RESULTS / "reproduce.json")
    for name, kept in read_json(RESULTS / "reproduce.json", {}).get("claims", {}).items():
        assert judge(CLAIMS[name], *results_of(CLAIMS[name], study)) == kept, name
