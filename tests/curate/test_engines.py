"""Steps divided among processes, and as a cluster divides them: the same records, in the same order, with the same
reports as by one process. (Ray itself: test_ray.py.)"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import embedsmith as es
import embedsmith.curate.run
from embedsmith.api.curating import run_curate
from embedsmith.core.errors import DataError, EngineError, MissingExtraError, RecipeError
from embedsmith.core.reps import Dense
from embedsmith.core.shelf import curation_steps
from embedsmith.curate import (
    CurateRecipe,
    Decontaminate,
    EvaluationText,
    ExactDuplicates,
    Input,
    LabelsToPairs,
    Ledger,
    Length,
    NearDuplicates,
    ScoreFilter,
    SyntheticQueries,
    Tools,
    Trivial,
    apply,
    curate,
)
from embedsmith.curate.comparing import leaving, linked, linked_groups
from embedsmith.curate.engines.local import LocalEngine
from embedsmith.curate.engines.ray_data import Cluster, RayEngine, _check_reachable
from embedsmith.curate.ledger import TextRule
from embedsmith.curate.parts import PART_SHIFT, StageParts, key_rows, sketches_at
from embedsmith.data import Record
from embedsmith.data.writers import write_records
from tests.curate.fake_ray import fake_ray
from tests.curate.test_ask import endpoint, passages, server

__all__ = ["server"]

WORDS = ["fox", "river", "bank", "dog", "tree", "house", "stone", "bird", "cloud", "road", "light", "water", "hill"]


def many(count, seed=0):
    """Records with exact and near duplicates, chains of likeness among them, and texts that are too short."""
    chance, rows = random.Random(seed), []
    while len(rows) < count:
        words = chance.choices(WORDS, k=40)
        for _ in range(chance.choice((1, 1, 2, 5))):
            rows.append(Record(f"what of {words[0]} and {words[1]}", (" ".join(words),), source="in"))
            words[chance.randrange(40)] = chance.choice(WORDS)
        rows += [rows[-1]] * chance.choice((0, 0, 1)) + [Record("short", ("no",), source="in")] * chance.choice(
            (0, 0, 1)
        )
    chance.shuffle(rows)
    return rows[:count]


@pytest.fixture
def parts_of(monkeypatch):
    """Cuts the records into parts of so many."""
    return lambda size: monkeypatch.setattr(embedsmith.curate.run, "PART", size)


STEPS = (Length(), Trivial(), ExactDuplicates(), NearDuplicates(threshold=0.7), Decontaminate(("t",), ngram=4))
TOOLS = Tools(evaluation=lambda names: [EvaluationText("what of fox and dog", "t", "query")])


def without_times(report):
    return [(one.settings, one.taken, one.given, one.left, one.lost, one.notes) for one in report.steps]


def test_processes_change_nothing(tmp_path, parts_of):
    write_records(tmp_path / "in.jsonl", many(160))
    made = {}
    for processes, size in ((1, 10_000), (1, 40), (2, 40), (3, 7)):
        parts_of(size)
        out = tmp_path / f"{processes}-{size}.jsonl"
        recipe = CurateRecipe(Input(path=str(tmp_path / "in.jsonl")), str(out), STEPS, engine=LocalEngine(processes))
        report = curate(recipe, TOOLS)
        made[processes, size] = (out.read_bytes(), without_times(report))
    alone = made[1, 10_000]
    assert all(other == alone for other in made.values())
    kept = many(160)
    for step in STEPS:
        kept = apply(step, kept, TOOLS)[0]
    write_records(tmp_path / "applied.jsonl", kept)
    assert alone[0] == (tmp_path / "applied.jsonl").read_bytes()
    assert [one[0]["type"] for one in alone[1] if one[3]] == [
        "length", "exact_duplicates", "near_duplicates", "decontaminate"
    ]  # fmt: skip


def divided(step, stage, parts, buckets):
    """What leaves, found as a cluster finds it: keys in buckets, links, groups in buckets."""
    keys, places = (np.concatenate(each) for each in zip(*(key_rows(step, stage, [part]) for part in range(parts))))
    links = [linked(keys[mine], places[mine]) for b in range(buckets) for mine in [keys % np.uint64(buckets) == b]]
    place_N, group_N = linked_groups(*(np.concatenate(side) for side in zip(*links)))
    gone = []
    for bucket in reversed(range(buckets)):
        mine = np.flatnonzero(group_N % buckets == bucket)
        mixed = np.random.default_rng(0).permutation(mine)
        found = dict(zip(place_N[mine].tolist(), sketches_at(step, stage, place_N[mine])))
        places = place_N[mixed].tolist()
        gone += leaving(step, group_N[mixed].tolist(), places, [found[place] for place in places])
    return dict(gone)


@pytest.mark.parametrize(
    "step",
    [
        ExactDuplicates(),
        ExactDuplicates(by="query", keep=3),
        NearDuplicates(threshold=0.7),
        NearDuplicates(threshold=0.4, by="positives", permutations=64),
    ],
)
def test_groups_leave_as_one_process_finds(tmp_path, step):
    """The first of each group stays, and what is like one that left, and like none that stays, stays too."""
    rows, size = many(300, seed=1), 45
    stage = StageParts(tmp_path)
    parts = range(0, len(rows), size)
    for number, start in enumerate(parts):
        write_records(stage.part(number), rows[start : start + size])
    like_earlier, told = step.memory(), {}
    for place, row in enumerate(rows):
        if (like := like_earlier(step.sketch(row))) is not None:
            told[((place // size) << PART_SHIFT) + place % size] = like
    assert len(told) > 20
    for buckets in (1, 5):
        assert divided(step, stage, len(parts), buckets) == told


def test_records_that_share_no_key_are_in_no_group():
    places, group = linked_groups(np.array([1, 4], np.int64), np.array([3, 9], np.int64))
    assert (places.tolist(), group.tolist()) == ([1, 3, 4, 9], [1, 1, 4, 4])
    assert [len(each) for each in linked_groups(*linked(np.zeros(0, np.uint64), np.zeros(0, np.int64)))] == [0, 0]
    one, other = linked(np.array([7, 8, 7, 7], np.uint64), np.array([5, 6, 2, 9], np.int64))
    assert list(zip(one.tolist(), other.tolist())) == [(2, 5), (2, 9)]


def test_ledgers_add_up_in_any_order():
    rows = many(60, seed=2)
    _, whole = apply(Length(query_min=5), rows)
    for cut, turned in ((20, False), (41, True)):
        halves = [apply(Length(query_min=5), some)[1] for some in (rows[:cut], rows[cut:])]
        together = Ledger()
        for half in reversed(halves) if turned else halves:
            together.merge(half)
        assert {reason: (one.count, one.examples) for reason, one in together.left.items()} == {
            reason: (one.count, one.examples) for reason, one in whole.left.items()
        }
        assert (together.taken, together.given) == (whole.taken, whole.given)


def test_classes_are_sampled_alike_however_they_are_cut(tmp_path, parts_of):
    rows = [Record(f"text {place}", label=place % 3, task="classification") for place in range(90)]
    write_records(tmp_path / "in.jsonl", rows)
    made = []
    for processes, size in ((1, 100), (2, 20)):
        parts_of(size)
        out = tmp_path / f"{size}.jsonl"
        step = LabelsToPairs(pool=8, negatives=2)
        curate(CurateRecipe(Input(path=str(tmp_path / "in.jsonl")), str(out), (step,), engine=LocalEngine(processes)))
        made.append(out.read_bytes())
    assert made[0] == made[1]
    positives = {json.loads(line)["positives"][0] for line in made[0].splitlines()}
    assert len(positives) <= 3 * 8


@curation_steps.register("own_for_tests")
@dataclass(frozen=True)
class _Own:
    """Every second of all records: a step of which nothing is known."""

    def __call__(self, records, ledger, tools):
        for place, record in enumerate(records):
            ledger.taken += 1
            if place % 2 == 0:
                yield record


@curation_steps.register("faulty_for_tests")
@dataclass(frozen=True)
class _Faulty(TextRule):
    """Ends its process, or fails."""

    how: str

    def fault(self, text, role):
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise DataError("a fault of a step", where="here", fix="mend it")


def test_a_step_of_which_nothing_is_known_sees_all_records(tmp_path, parts_of):
    rows = [Record(f"question number {place}", (f"the answer number {place}",)) for place in range(25)]
    write_records(tmp_path / "in.jsonl", rows)
    parts_of(10)
    out = tmp_path / "out.jsonl"
    report = curate(
        CurateRecipe(Input(path=str(tmp_path / "in.jsonl")), str(out), (_Own(), Length()), engine=LocalEngine(2))
    )
    assert [json.loads(line)["query"] for line in out.read_text().splitlines()] == [row.query for row in rows[::2]]
    assert [(one.taken, one.given) for one in report.steps] == [(25, 25), (25, 13), (13, 13)]


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [("fails", DataError, "here: a fault of a step\n  to fix: mend it"), ("killed", EngineError, "was killed")],
)
def test_what_happens_in_a_process_is_told_and_finished_steps_stay(tmp_path, parts_of, how, error, said):
    write_records(tmp_path / "in.jsonl", many(40))
    parts_of(10)
    recipe = CurateRecipe(
        Input(path=str(tmp_path / "in.jsonl")),
        str(tmp_path / "o.jsonl"),
        (Length(), _Faulty(how)),
        engine=LocalEngine(2),
    )
    with pytest.raises(error) as raised:
        curate(recipe)
    assert said in str(raised.value)
    finished = sorted(path.name[:7] for path in (tmp_path / "o.jsonl.work" / "stages").glob("*.json"))
    assert finished == ["00-read", "01-leng"]


def test_a_killed_curation_leaves_no_process_that_holds_its_output(tmp_path, parts_of):
    write_records(tmp_path / "in.jsonl", many(60))
    code = f"""
import time, embedsmith.curate.run as run, embedsmith.curate.rules as rules
from embedsmith.curate import *
from embedsmith.curate.engines.local import LocalEngine
from embedsmith.curate.engines.ray_data import Cluster, RayEngine, _check_reachable
run.PART = 10
rules.Length.fault = lambda *more: time.sleep(60)
input = Input(path={str(tmp_path / "in.jsonl")!r})
curate(CurateRecipe(input, {str(tmp_path / "o.jsonl")!r}, (Length(),), engine=LocalEngine(2)))
"""
    running = subprocess.Popen([sys.executable, "-c", code])
    stages = tmp_path / "o.jsonl.work" / "stages"
    while not list(stages.glob("01-*/.part*")):
        assert running.poll() is None
        time.sleep(0.05)
    running.kill()
    running.wait()
    parts_of(10)
    out = str(tmp_path / "o.jsonl")
    report = curate(CurateRecipe(Input(path=str(tmp_path / "in.jsonl")), out, (Length(),), engine=LocalEngine(1)))
    assert report.steps[0].given == 60


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(DataError, match=r"not there(.|\n)*all of them share"):
        list(StageParts(tmp_path).lines(0))
    with pytest.raises(RecipeError, match=r"unknown engine 'rey'(.|\n)*ray"):
        run_curate(str(tmp_path / "in.jsonl"), [str(tmp_path / "o.jsonl")], ["length"], engine="rey")


def test_without_ray_the_line_that_installs_it_is_told(tmp_path, monkeypatch):
    write_records(tmp_path / "in.jsonl", many(10))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r'pip install "embedsmith\[ray\]"'):
        run_curate(str(tmp_path / "in.jsonl"), [str(tmp_path / "o.jsonl")], ["length"], engine="ray")


def test_where_no_cluster_answers_it_is_told_at_once():
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(EngineError, match=rf"{address}: no Ray cluster answers(.|\n)*ray start --head"):
        _check_reachable(address)
    assert time.monotonic() - began < 10


def test_the_engine_of_the_command_line_goes_before_that_of_the_recipe(tmp_path, monkeypatch):
    """And keeps its settings where it is the same."""
    made = []
    monkeypatch.setattr("embedsmith.api.curating.curate", lambda recipe, tools, overwrite: made.append(recipe.engine))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{input: {path: in.jsonl}, output: o.jsonl, steps: [length], engine: {type: ray, workers: 3}}")
    for engine, address in ((None, None), ("local", None), (None, "auto"), ("ray", "h:1")):
        run_curate(str(recipe), [], [], engine=engine, address=address)
    assert made == [RayEngine(workers=3), LocalEngine(), RayEngine("auto", 3), RayEngine("h:1", 3)]
    run_curate("in.jsonl", ["o.jsonl", "engine=ray"], ["length"], address="auto")
    assert made[-1] == RayEngine("auto")


def test_the_engine_from_python(monkeypatch):
    made = []
    monkeypatch.setattr("embedsmith.api.making.run_curate", lambda recipe, *tools, **more: made.append(recipe.engine))
    for engine in ("ray", {"type": "ray", "address": "auto"}, {"type": "local", "processes": 2}):
        es.curate(input="in.jsonl", steps=["length"], output="o.jsonl", engine=engine)
    assert made == [RayEngine(), RayEngine("auto"), LocalEngine(2)]
    with pytest.raises(RecipeError, match="processes is 0"):
        LocalEngine(0)


@pytest.fixture
def cluster(monkeypatch):
    """Stands in for a cluster: what is sent is pickled, and comes back in any order."""
    ray = fake_ray()
    monkeypatch.setitem(sys.modules, "ray", ray)

    @contextmanager
    def start(self, folder):
        running = Cluster(ray, folder, 2, self.models or 1, 0)
        yield running
        running.close()

    monkeypatch.setattr(RayEngine, "start", start)


class Letters:
    """Vectors that count letters."""

    opened = 0

    def represent(self, texts, *, role, task=None, outputs=("dense",)):
        return {"dense": Dense(torch.tensor([[float(text.count(one)) + 1e-3 for one in "abcde"] for text in texts]))}


def open_letters(name):
    Letters.opened += 1
    return Letters(), "letters"


def test_a_cluster_gives_what_one_process_gives(cluster, tmp_path, parts_of):
    labelled = [Record(f"text {place} about dogs", label=place % 3, task="classification") for place in range(40)]
    paths = [str(tmp_path / name) for name in ("in.jsonl", "labelled.jsonl")]
    write_records(paths[0], many(120))
    write_records(paths[1], labelled)
    parts_of(30)
    steps = (*STEPS, LabelsToPairs(negatives=2), _Own(), ScoreFilter("m", quantile=0.2))
    made, opened = [], []
    for name, engine in (("one", LocalEngine(1)), ("ray", RayEngine(models=2))):
        Letters.opened, out = 0, tmp_path / f"{name}.jsonl.gz"
        recipe = CurateRecipe(Input(path=paths), str(out), steps, engine=engine)
        made.append((without_times(curate(recipe, replace(TOOLS, encoder=open_letters))), out.read_bytes()))
        opened.append(Letters.opened)
    assert made[0] == made[1]
    assert opened == [1, 2]  # once to survey and once to filter, however many parts there are


def test_a_cluster_spends_from_one_purse(cluster, tmp_path, parts_of, server):
    texts = [json.dumps({"text": record.positives[0]}) + "\n" for record in passages(60)]
    (tmp_path / "in.jsonl").write_text("".join(texts))
    parts_of(10)
    asks, out = SyntheticQueries(endpoint(server, max_requests=40, parallel=4)), str(tmp_path / "out.jsonl")
    recipe = CurateRecipe(Input(path=str(tmp_path / "in.jsonl")), out, (asks,), engine=RayEngine(models=2))
    report = curate(recipe)
    assert (sum(server.asked.values()), report.records) == (40, 40)
    assert report.steps[1].left["the budget is used up"]["count"] == 20
    assert report.steps[1].notes["asked"]["requests"] == 40
    assert curate(replace(recipe, steps=(SyntheticQueries(endpoint(server)),))).records == 60
    assert sum(server.asked.values()) == 60


def test_a_share_of_an_endpoint(server):
    whole = endpoint(server, parallel=8, requests_per_minute=60.0, max_requests=10)
    share = whole.shared(3)
    assert (share.parallel, share.requests_per_minute, share.max_requests) == (2, 20.0, 10)
    assert endpoint(server, parallel=2).shared(9).parallel == 1
    assert share.identity() == whole.identity()


def test_a_fault_on_a_cluster_is_told_as_it_is(cluster, tmp_path, parts_of):
    write_records(tmp_path / "in.jsonl", many(20))
    parts_of(10)
    recipe = CurateRecipe(
        Input(path=str(tmp_path / "in.jsonl")), str(tmp_path / "o.jsonl"), (_Faulty("fails"),), engine=RayEngine()
    )
    with pytest.raises(DataError, match=r"^here: a fault of a step\n  to fix: mend it$"):
        curate(recipe)
