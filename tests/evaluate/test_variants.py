"""Heads side by side: each column is what evaluating it alone gives, and weights are tuned on other data."""

import itertools
import json
from dataclasses import dataclass, field, replace

import pytest
import torch
from typer.testing import CliRunner

from embedsmith.cli import app
from embedsmith.core.errors import EvaluationError, SearchError
from embedsmith.core.reps import Dense, MultiVector, Sparse
from embedsmith.core.seeds import derive_seed
from embedsmith.evaluate import HybridEncoder, RetrievalTask, STSTask, evaluate, score_heads
from embedsmith.evaluate import variants as heads
from embedsmith.evaluate.variants import tuned_weights

HEADS = ("dense", "sparse", "multivector")


@dataclass
class ThreeHeads:
    """Vectors drawn from a text's hash, under every head; what was asked of it is kept in `calls`."""

    calls: list = field(default_factory=list)
    outputs: tuple = ("dense", "middle", *HEADS)

    def represent(self, texts, *, role, task=None, outputs=("dense",)):
        self.calls.append((role, tuple(texts), tuple(outputs)))
        rows = [torch.Generator().manual_seed(derive_seed(text) % 2**40) for text in texts]
        unit = lambda *shape: torch.stack(
            [torch.nn.functional.normalize(torch.randn(*shape, generator=g), dim=-1) for g in rows]
        )
        words = torch.stack([torch.randint(0, 4, (6,), generator=g) for g in rows])
        made = {
            "dense": Dense(unit(4)),
            "sparse": Sparse(words, unit(6).abs()),
            "multivector": MultiVector(unit(3, 4), torch.ones(len(rows), 3, dtype=torch.bool)),
        }
        return {name: made[name] for name in outputs}

    def fingerprint(self):
        return "three heads"


def collection(name, seed):
    texts = {f"d{number}": f"{name} document {number}" for number in range(20)}
    queries = {f"q{number}": f"{name} question {number} {seed}" for number in range(9)}
    qrels = {query: {f"d{place}": 1, f"d{place + 9}": 2} for place, query in enumerate(queries)}
    return RetrievalTask(name, queries, texts, qrels)


@pytest.fixture
def tasks():
    words = [f"text {number}" for number in range(12)]
    return [collection("one", 0), STSTask("pairs", words[:6], words[6:], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])]


def test_every_column_is_its_own_evaluation(tasks, tmp_path):
    encoder = ThreeHeads()
    made = score_heads(encoder, tasks, HEADS, weights={"dense": 1.0, "sparse": 0.5, "multivector": 2.0})
    assert list(made.columns) == [*HEADS, "dense+sparse", "all"]
    for name, weights in made.weights.items():
        alone = len(weights) == 1
        plain = (
            evaluate(encoder, tasks, head=name)
            if alone
            else evaluate(HybridEncoder(encoder, weights), tasks, head="hybrid")
        )
        for found, expected in zip(made.columns[name], plain, strict=True):
            assert found.main_score == pytest.approx(expected.main_score, abs=1e-6), name
    assert made.weights["dense+sparse"] == {"dense": 1.0, "sparse": 0.5}
    assert made.weights["all"] == {"dense": 1.0, "sparse": 0.5, "multivector": 2.0}
    assert len({results["one"].main_score for results in made.columns.values()}) > 2
    made.save(tmp_path / "heads.json")
    assert json.loads((tmp_path / "heads.json").read_text())["columns"]["all"]["tasks"][0]["task"] == "one"


def test_each_text_is_encoded_once_for_all_heads(tasks):
    encoder = ThreeHeads()
    score_heads(encoder, tasks[:1], HEADS, tune_on=[collection("dev", 1)])
    assert len(encoder.calls) == len(set(encoder.calls)) == 4  # queries and documents of both
    assert {outputs for _, _, outputs in encoder.calls} == {HEADS}


def test_tuned_weights_are_the_best_of_the_grid_on_the_dev_tasks(tasks, monkeypatch):
    monkeypatch.setattr(heads, "GRID", (0.0, 0.5, 2.0))
    encoder, dev = ThreeHeads(), [collection("dev", 1), tasks[1]]
    tried = {}
    for others in itertools.product(heads.GRID, repeat=2):
        weights = dict(zip(HEADS, (1.0, *others), strict=True))
        results = evaluate(HybridEncoder(encoder, weights), dev, head="hybrid")
        tried[(1.0, *others)] = sum(result.main_score for result in results)
    best = tuned_weights(encoder, dev, HEADS)
    assert tried[tuple(best.values())] == pytest.approx(max(tried.values()))
    assert max(tried.values()) > min(tried.values())
    made = score_heads(encoder, tasks, HEADS, tune_on=dev)
    assert made.weights["tuned"] == best


def test_a_query_taken_from_the_corpus_does_not_find_itself_while_tuning():
    task = collection("dev", 1)
    queries = {f"d{n}": task.corpus[f"d{n}"] for n in range(5)}
    qrels = {f"d{n}": {f"d{n + 1}": 1} for n in range(5)}
    own = replace(task, queries=queries, qrels=qrels, ignore_identical_ids=True)
    found = heads._dev_scores(ThreeHeads(), own, HEADS).score((1.0, 0.3, 1.0))
    assert found == pytest.approx(evaluate(HybridEncoder(ThreeHeads()), [own], head="hybrid")[0].main_score)


@pytest.mark.parametrize("weights", [{"dense": 0.0, "sparse": 0.0}, {}, {"dense": -1.0}, {"dense": float("inf")}])
def test_weights_that_say_nothing_are_refused(weights):
    with pytest.raises(SearchError, match="one above 0"):
        HybridEncoder(ThreeHeads(), weights)


def test_a_head_of_weight_0_is_not_computed(tasks):
    encoder = ThreeHeads()
    evaluate(HybridEncoder(encoder, {"dense": 1.0, "sparse": 0.0}), tasks, head="hybrid")
    assert {outputs for _, _, outputs in encoder.calls} == {("dense",)}


def test_one_head_or_strange_weights_are_refused(tasks):
    with pytest.raises(EvaluationError, match="two or more"):
        score_heads(ThreeHeads(), tasks, ["dense"])
    for weights in ({"colour": 1.0}, {"dense": 0.0}, {"dense": 1.0, "sparse": float("nan")}, {"dense": float("inf")}):
        with pytest.raises(EvaluationError, match="not all 0"):
            score_heads(ThreeHeads(), tasks, HEADS, weights=weights)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("embedsmith.api.evaluating.load_either", lambda name, _: ThreeHeads())
    for name in ("one", "two"):
        task = collection(name, 0)
        (tmp_path / name / "qrels").mkdir(parents=True)
        for file, rows in (("corpus", task.corpus), ("queries", task.queries)):
            lines = [json.dumps({"_id": key, "text": text}) + "\n" for key, text in rows.items()]
            (tmp_path / name / f"{file}.jsonl").write_text("".join(lines))
        rows = [f"{query}\t{doc}\t{grade}\n" for query, grades in task.qrels.items() for doc, grade in grades.items()]
        for split, some in (("test", rows[:8]), ("dev", rows[8:])):
            (tmp_path / name / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(some))
    return tmp_path


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_command_prints_them_and_writes_json(folder):
    out = folder / "heads.json"
    arguments = ("--head", "all", "--weight", "sparse=0.3", "--weight", "dense=1", "--tune", "one", "--json", out)
    shown = invoke("evaluate", "model", "one", "two", "--data", folder, "--keep", folder / "kept", *arguments).output
    assert all(word in shown for word in ("dense+sparse", "tuned", "multive"))
    plain = json.loads(out.read_text())
    assert plain["weights"]["all"] == {"dense": 1.0, "sparse": 0.3, "multivector": 0.0}
    assert [task["task"] for task in plain["columns"]["tuned"]["tasks"]] == ["one", "two"]
    alone = invoke("evaluate", "model", "one", "--data", folder, "--head", "hybrid", "--weight", "dense=1").output
    assert f"{100 * plain['columns']['dense']['tasks'][0]['main_score']:.2f}" in alone


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--tune", "one"), "--head all"),
        (("--weight", "dense=1"), "--weight with --head of the model"),
        (("--head", "all", "--engine", "sentence-transformers"), "embedsmith alone"),
        (("--head", "all", "--tune", "one", "--split", "dev"), "tuned on one"),
    ],
)
def test_options_that_do_not_go_together(folder, arguments, says):
    with pytest.raises(EvaluationError, match=says):
        invoke("evaluate", "model", "one", "--data", folder, *arguments)
