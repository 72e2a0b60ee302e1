"""Curation on Ray, started once for all tests of this file: two workers on this machine. Slow: Ray takes seconds to
start. What Ray is given to do is tested without it, in test_engines.py."""

import json
import os
import signal
from dataclasses import dataclass, replace

import pytest
import torch

import embedsmith.curate.run
from embedsmith.core.errors import DataError, EngineError
from embedsmith.core.reps import Dense
from embedsmith.core.shelf import curation_steps
from embedsmith.curate import (
    CurateRecipe,
    Decontaminate,
    EvaluationText,
    ExactDuplicates,
    Input,
    LabelsToPairs,
    Length,
    NearDuplicates,
    ScoreFilter,
    SyntheticQueries,
    Tools,
    Trivial,
    curate,
)
from embedsmith.curate.engines.local import LocalEngine
from embedsmith.curate.engines.ray_data import RayEngine, _connected
from embedsmith.curate.ledger import TextRule
from embedsmith.data import Record
from embedsmith.data.writers import write_records
from tests.curate.test_ask import endpoint, passages, server
from tests.curate.test_engines import many, without_times

__all__ = ["server"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray():
    pytest.importorskip("ray")
    with _connected(None, 2) as ray:
        yield ray


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(embedsmith.curate.run, "PART", 40)


class Letters:
    """Vectors that count letters; it writes down that it was opened."""

    def __init__(self, name):
        with open(name, "a") as opened:
            opened.write(f"{os.getpid()}\n")

    def represent(self, texts, *, role, task=None, outputs=("dense",)):
        return {"dense": Dense(torch.tensor([[float(text.count(one)) + 1e-3 for one in "abcde"] for text in texts]))}


TOOLS = Tools(
    encoder=lambda name: (Letters(name), "letters"),
    evaluation=lambda names: [EvaluationText("what of fox and dog", "t", "query")],
)


def both(tmp_path, steps, *files, ray_engine):
    """Reports and outputs of both engines."""
    paths = [str(tmp_path / f"{number}.jsonl") for number in range(len(files))]
    for path, rows in zip(paths, files):
        write_records(path, rows)
    made = []
    for name, engine in (("local", LocalEngine(1)), ("ray", ray_engine)):
        out = tmp_path / f"{name}.jsonl.gz"
        report = curate(CurateRecipe(Input(path=paths), str(out), steps, engine=engine), TOOLS)
        made.append((without_times(report), out.read_bytes()))
    return made


def test_every_step_gives_the_records_of_the_local_engine(ray, small_parts, tmp_path):
    labelled = [Record(f"text {place} about dogs", label=place % 3, task="classification") for place in range(60)]
    steps = (
        Length(),
        Trivial(),
        ExactDuplicates(),
        NearDuplicates(threshold=0.7),
        Decontaminate(("t",), ngram=4),
        LabelsToPairs(negatives=2),
        ScoreFilter(str(tmp_path / "opened"), quantile=0.2),
    )
    local, there = both(tmp_path, steps, many(160), labelled, ray_engine=RayEngine(models=2))
    assert there == local
    assert all(one[3] for one in local[0] if one[0]["type"] in ("length", "exact_duplicates", "near_duplicates"))
    opened = (tmp_path / "opened").read_text().split()
    assert opened.count(str(os.getpid())) == 1
    assert 2 <= len(opened) - 1 <= 2 * 2  # of each actor that had a part, to survey and to filter


def test_all_workers_spend_from_one_purse(ray, small_parts, tmp_path, server):
    texts = [json.dumps({"text": record.positives[0]}) + "\n" for record in passages(100)]
    (tmp_path / "in.jsonl").write_text("".join(texts))
    step, out = SyntheticQueries(endpoint(server, max_requests=70, parallel=4)), str(tmp_path / "out.jsonl")
    recipe = CurateRecipe(Input(path=str(tmp_path / "in.jsonl")), out, (step,), engine=RayEngine(models=2))
    report = curate(recipe)
    assert sum(server.asked.values()) == 70
    assert report.records == 70
    assert report.steps[1].left["the budget is used up"]["count"] == 30
    assert report.steps[1].notes["asked"]["requests"] == 70
    again = replace(recipe, steps=(SyntheticQueries(endpoint(server)),))
    assert curate(again).records == 100
    assert sum(server.asked.values()) == 100


@curation_steps.register("ending_for_tests")
@dataclass(frozen=True)
class _Ending(TextRule):
    """The first that it sees ends its worker; or each does, or it fails."""

    mark: str

    def fault(self, text, role):
        if self.mark == "fails":
            raise DataError("a fault of a step", where="here", fix="mend it")
        try:
            if self.mark == "always":
                os.kill(os.getpid(), signal.SIGKILL)
            os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return None
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_replaced(ray, small_parts, tmp_path):
    rows = many(120)
    write_records(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out.jsonl"
    steps = (_Ending(str(tmp_path / "mark")),)
    report = curate(CurateRecipe(Input(path=str(tmp_path / "in.jsonl")), str(out), steps, engine=RayEngine()))
    assert (tmp_path / "mark").exists()
    assert report.records == 120
    assert [json.loads(line)["query"] for line in out.read_text().splitlines()] == [row.query for row in rows]


def test_a_fault_of_a_step_is_told_as_it_is(ray, small_parts, tmp_path):
    write_records(tmp_path / "in.jsonl", many(80))
    out = str(tmp_path / "out.jsonl")
    recipe = CurateRecipe(Input(path=str(tmp_path / "in.jsonl")), out, (Length(), _Ending("fails")), engine=RayEngine())
    with pytest.raises(DataError, match=r"here: a fault of a step\n  to fix: mend it"):
        curate(recipe)
    assert [path.name[:7] for path in sorted((tmp_path / "out.jsonl.work" / "stages").glob("*.json"))] == [
        "00-read",
        "01-leng",
    ]


def test_a_part_that_ends_every_worker_ends_the_curation(ray, small_parts, tmp_path):
    write_records(tmp_path / "in.jsonl", many(20))
    out = str(tmp_path / "out.jsonl")
    recipe = CurateRecipe(Input(path=str(tmp_path / "in.jsonl")), out, (_Ending("always"),), engine=RayEngine())
    with pytest.raises(EngineError, match=r"lost a worker for good(.|\n)*finished steps are kept"):
        curate(recipe)


def test_ray_listens_on_this_machine_alone(ray):
    ours = {address.rpartition(":")[2] for address in (node["NodeManagerAddress"] for node in ray.nodes())}
    assert ours == {"127.0.0.1"}
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
