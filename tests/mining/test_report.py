"""What a mining says of itself: counts by hand, a key of which every part counts, places in its refusals."""

import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from embedsmith.core.errors import DataError
from embedsmith.core.recipe import parse
from embedsmith.data import Record
from embedsmith.mining import MineRecipe, Selection, offline
from embedsmith.mining.offline import Counts, MineReport, Texts, candidates_of
from embedsmith.mining.searchers import no_reranker
from tests.mining.fakes import Words, rows
from tests.mining.test_mine import run, tree

__all__ = ["tree"]

RECORDS = [
    Record("a", ("p", "q"), ("n", "m"), teacher_positive_scores=(0.8, 0.5), teacher_negative_scores=(0.6, 0.475)),
    Record("b", ("r",), ("n",), teacher_positive_scores=(-0.5,), teacher_negative_scores=(-0.48,)),
    Record("c", ("s",), (), teacher_positive_scores=(1.0,), teacher_negative_scores=None),
]


def test_counts_by_hand(tmp_path):
    """0.6 is above 0.95 of the weakest positive, 0.475 is just that; -0.48 is below -0.475."""
    counts = Counts.of(RECORDS, RECORDS[:2], wanted=2)
    assert counts == Counts(
        records=2,
        negatives=3,
        short=2,
        empty=1,
        dropped=1,
        suspect=1,
        negative_score=pytest.approx(0.6 + 0.475 - 0.48),
        positive_score=pytest.approx(0.8 + 0.5 - 0.5),
        positives=3,
    )
    (tmp_path / "out").write_bytes(b"12345")
    report = replace(counts, positives=4).report("k", str(tmp_path / "out"), 9, 1.26)
    assert report == MineReport(
        key="k",
        output=str(tmp_path / "out"),
        records=2,
        corpus=9,
        negatives=3,
        short=2,
        empty=1,
        dropped=1,
        suspect=pytest.approx(1 / 3),
        negative_score=pytest.approx((0.6 + 0.475 - 0.48) / 3),
        positive_score=pytest.approx(0.8 / 4),
        seconds=1.3,
        output_bytes=5,
    )
    assert report.lines() == (
        f"2 records, 3 negatives from 9 texts in {tmp_path / 'out'}\n"
        "short 2, without any 1, left out 1; mean score of negatives 0.198, of positives 0.200, suspect 33.3%"
    )
    nothing = replace(counts, negatives=0, positives=0, suspect=0, negative_score=0.0, positive_score=0.0)
    report = nothing.report("k", str(tmp_path / "out"), 9, 1.0)
    assert (report.suspect, report.negative_score, report.positive_score) == (0, 0, 0)


def test_the_parts_of_a_run_add_up_and_the_bar_ends_at_its_end(tree, tmp_path, monkeypatch):
    bars = []

    @contextmanager
    def bar(label, total, done):
        bars.append([label, total, done])
        yield SimpleNamespace(advance=lambda: bars[-1].__setitem__(2, bars[-1][2] + 1))

    monkeypatch.setattr(offline, "progress_bar", bar)
    whole = run(tree | {"part": 100})
    parts = run(tree | {"output": str(tmp_path / "parts.jsonl")})
    assert bars == [["mine", 1, 1], ["mine", 5, 5]]
    same = {"key": whole.key, "output": whole.output, "seconds": whole.seconds}
    assert replace(parts, **same) == replace(
        whole,
        negative_score=pytest.approx(whole.negative_score),
        positive_score=pytest.approx(whole.positive_score),
    )
    assert parts.key != whole.key
    assert json.loads((tmp_path / "parts.report.json").read_text())["records"] == 30
    assert not list((tmp_path / "parts.jsonl.work").glob("parts-*")), "parts go once they are one file"


CHANGES = [
    {"searchers": [{"type": "embedding", "model": "other"}]},
    {"searchers": [{"type": "embedding", "model": "words", "head": "sparse"}]},
    {"corpus": "more"},
    {"data": "other"},
    {"candidates": 11},
    {"select": {"negatives": 3, "near_duplicate": None}},
    {"teacher": {"type": "embedding", "model": "other"}},
    {"short": "drop"},
    {"part": 8},
]


def test_every_part_of_the_key_counts_and_places_do_not(tree, tmp_path):
    """A change of what the result depends on mines anew; the same from or to another folder does not."""
    for name, content in (("other", rows(29)), ("more", [{"text": "one more text on cats"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    places = {"other": {"path": str(tmp_path / "other.jsonl")}, "more": [{"path": str(tmp_path / "more.jsonl")}]}

    def key(encoders=None, **changes):
        changes = {
            name: places.get(value, value) if isinstance(value, str) else value for name, value in changes.items()
        }
        recipe = parse(MineRecipe, tree | changes)
        texts = Texts.read(recipe)
        encoders = encoders or {"words": Words(), "other": Words("b", 8)}
        sides = texts.searched(encoders.__getitem__, no_reranker, tmp_path)
        models = {}
        for each in (*recipe.searchers, *([recipe.teacher] if recipe.teacher else [])):
            models |= each.open(sides).models()
        return offline._agreed_key(recipe, texts, models)

    keys = [key(), *(key(**change) for change in CHANGES), key({"words": Words("c")})]
    assert len(set(keys)) == len(keys)
    moved = {"output": str(tmp_path / "x.jsonl"), "work": str(tmp_path / "w"), "vectors": str(tmp_path / "v")}
    assert key(**moved) == keys[0]


def test_a_searcher_is_never_asked_for_more_than_there_is(tree):
    texts = Texts.read(parse(MineRecipe, tree))
    asked = []

    class Backwards:
        def top(self, start, stop, k):
            asked.append(k)
            index_Qk = np.tile(np.arange(29, 29 - k, -1), (stop - start, 1))
            return index_Qk.astype(np.float32), index_Qk

    candidates_of(texts, [Backwards()], 500, Selection(), 0, 3)
    index_Q, score_Q = candidates_of(texts, [Backwards()], 5, Selection(negatives=2, skip=1, window=2), 28, 30)
    assert asked == [30, 7]
    assert [row.tolist() for row in index_Q] == [[27, 26], [27, 26]], (
        "29 and 28 answer the queries; the best is skipped"
    )
    assert [row.tolist() for row in score_Q] == [[27.0, 26.0], [27.0, 26.0]]
    index_Q, score_Q = candidates_of(texts, [Backwards(), Backwards()], 5, Selection(), 0, 1)
    assert score_Q is None
    assert index_Q[0].tolist() == [29, 28, 27, 26, 25]


def test_refusals_name_their_place_and_a_way_out(tree, tmp_path):
    data = tree["data"]["path"]

    def said(error, **changes):
        with pytest.raises(error) as caught:
            run(tree, **changes)
        return str(caught.value)

    message = said(DataError, candidates=60, select={"skip": 30, "negatives": 4})
    assert message.startswith(f"{data}: the corpus has 30 texts, and the first 30 ranks are left out\n  to fix: add a")
    high = {"negatives": 4, "limits": {"min_score": 5.0}}
    assert said(DataError, select=high).startswith(f"{data}: no record got a negative: 30 texts, of which")
    scored = tmp_path / "scored.jsonl"
    scored.write_text(json.dumps({"text1": "a", "text2": "b", "score": 1.0}) + "\n", encoding="utf-8")
    message = said(DataError, data={"path": str(scored), "task": "sts"})
    assert message.startswith(f"{scored}: records of task sts have no hard negatives\n  expected: retrieval records")
    (tmp_path / "empty.txt").write_text("\n")
    message = said(DataError, corpus=[{"path": str(tmp_path / "empty.txt")}])
    assert message == f"{tmp_path / 'empty.txt'}: no text in this corpus\n  to fix: name another file, or leave it out"


def test_ranks_that_read_something_else_are_told_what(tree, monkeypatch):
    recipe = parse(MineRecipe, tree)
    texts = Texts.read(recipe)
    for name, other in (("recipe", {}), ("texts", "x"), ("models", {"words": "z"}), ("version", 0)):
        monkeypatch.setattr(offline, "objects_of_all_ranks", lambda mine, n=name, o=other: [mine, mine, mine | {n: o}])
        with pytest.raises(DataError) as caught:
            offline._agreed_key(recipe, texts, {"words": "y"})
        fix = "give every machine the same files and models"
        assert str(caught.value) == f"mine: rank 2 has another {name} than rank 0\n  to fix: {fix}"
