"""Runs that train rerankers: the gradient whatever the memory and the ranks, stops and resumes, scores before and
after, language models with adapters, and what cannot be trained."""

import json

import pytest
import torch
from torch import nn

import embedsmith as es
from embedsmith.core.batch import ABSENT, GroupIds
from embedsmith.core.collectives import average_gradients, rank, world_size
from embedsmith.core.errors import DataError, EmbedsmithError
from embedsmith.core.recipe import parse
from embedsmith.core.reps import Dense
from embedsmith.losses import Binary, LambdaLoss, ListNet, MarginMSE
from embedsmith.train import Recipe, loop, rehearse, train
from embedsmith.train.step import Memory, Part, run_step
from tests.models.test_reranker import TEMPLATE, head, language_model
from tests.ranks import on_ranks
from tests.tinybert import WORDS, tiny_bert
from tests.train.test_loop import assert_equal_weights, assert_same_losses, losses, metrics, on_cpu, run, weights
from tests.train.test_step import MEMORIES
from tests.train.tiny import WHOLE, assert_same, gradients, tokens

ROWS = [
    {
        "query": f"{a} {b}",
        "pos": [f"the {a} {b} sat", f"by {b} a {a}"],
        "neg": [f"the {c} {d} ran" for c, d in zip(WORDS[2:7], WORDS[9:14]) if (c, d) != (a, b)],
    }
    for a in WORDS[2:7]
    for b in WORDS[8:12]
]


def write(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def tree(tmp_path):
    return {
        "task": "rerank",
        "model": {"path": str(tiny_bert(tmp_path / "bert"))},
        "data": [{"path": write(tmp_path / "pairs.jsonl"), "name": "pairs", "negatives": 3, "positives": 2}],
        "output": str(tmp_path / "run"),
        "train": {
            **{"steps": 8, "batch_size": 5, "learning_rate": 5e-3, "log_every": 1, "log_with": []},
            **{"precision": "fp32", "checkpoint_every": 3},
        },
    }


# The step.


class TinyPairs(nn.Module):
    """A score a pair, in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.linear = nn.Embedding(60, 16), nn.Linear(16, 1)
        self.double()

    def forward(self, batch, heads, rows=None):
        padded = batch.pad(0, rows=rows)
        hidden_NTH = torch.tanh(self.embed(padded.id_NT)) * padded.mask_NT[..., None]
        return {"score": Dense(self.linear(hidden_NTH.sum(1)))}


def group_part(loss, rank_=0, world=1, groups=8):
    """This rank's share of eight queries with two to five pairs each."""
    counts = [2 + number % 4 for number in range(groups)]
    starts = [sum(counts[:number]) for number in range(groups)]
    mine = range(groups)[rank_ * groups // world : (rank_ + 1) * groups // world]
    pair_QX = torch.full((len(mine), 5), ABSENT)
    for row, group in enumerate(mine):
        pair_QX[row, : counts[group]] = torch.arange(counts[group]) + starts[group] - starts[mine[0]]
    grade_QX = torch.zeros(len(mine), 5)
    grade_QX[:, 0] = 1
    grade_QX[::2, 1] = 0.5
    teacher_QX = torch.sin(torch.arange(groups * 5.0)).view(groups, 5)[mine.start : mine.stop]
    pairs = sum(counts[group] for group in mine)
    ids = GroupIds(pair_QX=pair_QX, grade_QX=grade_QX, teacher_QX=teacher_QX, positives=1, pairs=pairs)
    texts = tokens(sum(counts), 7).take(range(starts[mine[0]], starts[mine[0]] + pairs))
    return texts, [Part("pairs", "retrieval", ids, loss)]


STEP_LOSSES = [Binary(2.0), ListNet(), LambdaLoss(), MarginMSE()]


def of_step(loss, memory=WHOLE, rank_=0, world=1):
    model = TinyPairs()
    output = run_step(model, *group_part(loss, rank_, world), memory)
    average_gradients(model.parameters())
    return output.value.item(), gradients(model)


@pytest.mark.parametrize("loss", STEP_LOSSES, ids=str)
def test_memory_does_not_change_the_gradient(loss):
    value, expected = of_step(loss)
    for memory in (*MEMORIES, Memory(20, 20)):
        found, got = of_step(loss, memory)
        assert found == pytest.approx(value, abs=1e-12)
        assert_same(got, expected)


def every_step():
    return [of_step(loss, memory, rank(), world_size()) for loss in STEP_LOSSES for memory in (WHOLE, Memory(20, 20))]


@pytest.mark.dist
def test_two_ranks_equal_one(tmp_path):
    for one, *several in zip(every_step(), *on_ranks(2, every_step, tmp_path), strict=True):
        assert sum(value for value, _ in several) / 2 == pytest.approx(one[0], abs=1e-12)
        assert_same(several[0][1], one[1])


# Whole runs.


def test_a_run_learns_and_leaves_a_reranker(tree, tmp_path):
    """Every kind of loss; what the first step says is what the untrained model's scores are worth."""
    for loss in ({"type": "listnet", "grade_temperature": 0.1}, "lambda", "binary"):
        more = {"steps": 20, "batch_size": 10, "checkpoint_every": None, "learning_rate": 2e-2}
        data = [tree["data"][0] | {"loss": loss}]
        output = str(tmp_path / (loss if isinstance(loss, str) else loss["type"]))
        run(tree, data=data, train=tree["train"] | more, output=output)
        found = [line["loss/pairs"] for line in losses(output)]
        assert sum(found[-5:]) < 0.97 * sum(found[:5]), loss
    made = es.load_reranker(f"{output}/model")
    first = es.load_reranker(f"{output}/model").score(["cat on"], ["the cat on sat"])
    assert torch.equal(first, made.score(["cat on"], ["the cat on sat"]))
    assert first < 1
    assert (tmp_path / "binary" / "report.html").exists()


def test_a_run_that_dies_and_continues_ends_with_the_same_bits(tree, tmp_path, monkeypatch):
    """Also its new head, which is random: a resume takes it from the checkpoint, or from the same seed."""
    run(tree, output=str(tmp_path / "whole"))
    update = loop.update

    def dying(run_, parts):
        if run_.state.step == 4:
            raise KeyboardInterrupt
        return update(run_, parts)

    monkeypatch.setattr(loop, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tree)
    monkeypatch.setattr(loop, "update", update)
    run(tree)
    assert_equal_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def without_dropout(tree, tmp_path):
    return tree | {"model": {"path": str(tiny_bert(tmp_path / "plain", dropout=0.0))}}


def test_the_losses_of_a_run_do_not_depend_on_the_memory(tree, tmp_path):
    plain = without_dropout(tree, tmp_path)
    plain = plain | {"train": plain["train"] | {"steps": 4}}
    run(plain, output=str(tmp_path / "whole"))
    run(plain, train=plain["train"] | {"token_budget": 64})
    assert_same_losses(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.dist
def test_several_processes_equal_one(tree, tmp_path):
    plain = without_dropout(tree, tmp_path)
    plain = plain | {"train": plain["train"] | {"batch_size": 4, "steps": 4}}
    run(plain, output=str(tmp_path / "one"))
    on_ranks(2, on_cpu, tmp_path, plain)
    assert_same_losses(tmp_path / "run", tmp_path / "one")


@pytest.fixture
def tasks(tmp_path):
    """A retrieval task and a reranking task of the same texts."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    queries = [{"_id": f"q{n}", "text": row["query"]} for n, row in enumerate(ROWS)]
    write(folder / "queries.jsonl", queries)
    corpus = [{"_id": f"d{n}", "text": text} for n, row in enumerate(ROWS) for text in row["pos"][:1]]
    write(folder / "corpus.jsonl", corpus)
    lines = ["query-id\tcorpus-id\tscore", *(f"q{n}\td{n}\t1" for n in range(len(ROWS)))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    reranking = [{"query": row["query"], "positive": row["pos"], "negative": row["neg"]} for row in ROWS]
    return str(folder), write(tmp_path / "ranked.jsonl", reranking)


def test_scores_before_and_after_of_retrieval_and_reranking_tasks(tree, tasks, tmp_path):
    embedder = tmp_path / "embedder"
    es.load(tree["model"]["path"], pooling="mean").save(embedder)
    evaluate = {"tasks": list(tasks), "embedder": str(embedder), "depth": 5, "every": 4}
    trained = es.train(
        {**tree, "evaluate": evaluate | {"validation": [tree["data"][0] | {"name": "kept"}]}}, steps=16, batch_size=10
    )
    assert list(trained.scores) == ["beir", "ranked"]
    assert trained.scores["ranked"] > trained.scores_before["ranked"]
    lines = metrics(tree["output"])
    alone = es.evaluate(str(embedder), tasks[0]).main_scores()["beir"]
    assert lines[0]["score/beir/embedder"] == pytest.approx(alone, abs=1e-9)
    assert any("validation_loss/kept" in line for line in lines)
    reranked = es.evaluate(str(embedder), tasks[0], rerank=trained.folder, depth=5).main_scores()
    assert reranked["beir"] == pytest.approx(trained.scores["beir"], abs=1e-9)
    assert es.evaluate(trained.folder, tasks[1]).main_scores()["ranked"] == pytest.approx(trained.scores["ranked"])
    assert trained.reranker.rank("cat on", ["the dog", "the cat on sat"])[0][0] in (0, 1)
    with pytest.raises(EmbedsmithError, match="no embedder"):
        _ = trained.model


@pytest.mark.slow
def test_a_language_model_learns_through_an_adapter_and_goes_on_after_a_stop(tree, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    about = {"template": TEMPLATE, "instructions": {"default": "far"}, "max_length": 40, "lora": {"r": 4}}
    tree = tree | {"model": {"path": str(language_model(tmp_path / "lm")), **about}}
    tree = tree | {"train": tree["train"] | {"learning_rate": 0.02}}
    run(tree, output=str(tmp_path / "whole"))
    update = loop.update

    def dying(run_, parts):
        if run_.state.step == 5:
            raise KeyboardInterrupt
        return update(run_, parts)

    monkeypatch.setattr(loop, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tree)
    monkeypatch.setattr(loop, "update", update)
    run(tree)
    assert_same_losses(tmp_path / "run", tmp_path / "whole")
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "whole")[name], rtol=0, atol=1e-6)
    made = es.load_reranker(str(tmp_path / "run" / "model"))
    assert made.settings.asks
    assert made.settings.prompt == "far"


def test_a_dry_run_says_what_would_be_done(tree):
    said = rehearse(parse(Recipe, tree))
    assert "loss: binary" in said
    assert "no text is longer than the 32 tokens" in said


def test_scored_pairs_and_instructions_are_read_too(tree, tmp_path):
    """Graded pairs teach by their scores; a record's own instruction stands before its query."""
    scored = write(
        tmp_path / "scored.jsonl",
        [{"text1": row["query"], "text2": row["pos"][0], "score": n % 5} for n, row in enumerate(ROWS)],
    )
    instructed = [{**row, "instruction": f"{WORDS[n % 3]} "} for n, row in enumerate(ROWS)]
    graded = write(tmp_path / "graded.jsonl", instructed)
    run(tree, data=[{"path": scored, "task": "sts"}, {"path": graded}])
    found = metrics(tree["output"])
    assert any("loss/scored" in line for line in found)
    assert any("loss/graded" in line for line in found)


def test_what_cannot_train_a_reranker_is_refused(tree, tmp_path):
    def refused(words, **changes):
        with pytest.raises(EmbedsmithError, match=words) as caught:
            train(parse(Recipe, tree | changes))
        assert not (tmp_path / "run" / "recipe.yaml").exists()
        return str(caught.value)

    source = tree["data"][0]
    bare = write(tmp_path / "bare.jsonl", [{"query": row["query"], "pos": row["pos"]} for row in ROWS])
    labelled = write(tmp_path / "labels.jsonl", [{"text": row["query"], "label": n % 2} for n, row in enumerate(ROWS)])
    assert "embedsmith mine" in refused("no row has negatives", data=[{"path": bare}])
    said = refused("the loss InfoNCE reads vectors", data=[source | {"loss": "infonce"}])
    assert "binary, lambda, listnet, margin_mse, score_kl" in said
    refused(
        "the loss Matryoshka reads vectors",
        data=[source | {"loss": {"type": "matryoshka", "inner": "binary", "dims": [4]}}],
    )
    refused("not from classification", data=[{"path": labelled}])
    refused("teacher of a reranker's source", data=[source | {"teacher": tree["model"]["path"]}])
    refused("shuffle of a reranker's source", data=[source | {"shuffle": 0.1}])
    refused("this model gives 5 scores a pair", model={"path": str(head(tmp_path / "five", labels=5))})
    refused("model.pooling of a reranker", model=tree["model"] | {"pooling": "mean"})
    refused("train.mining is of embedding models", train=tree["train"] | {"mining": {}})
    refused("train.shard of a reranker", train=tree["train"] | {"shard": True})
    refused("evaluate.dims is of embedding models", evaluate={"tasks": ["a"], "dims": [4]})
    refused("evaluate.embedder without a reranker", task="embed", evaluate={"embedder": "a"})
    es.tokenize(model={**tree["model"], "pooling": "mean"}, data=source["path"], out=str(tmp_path / "tokens"))
    with pytest.raises(DataError, match="task: rerank needs texts"):
        train(parse(Recipe, tree | {"data": [{"path": str(tmp_path / "tokens")}]}))
