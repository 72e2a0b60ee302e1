"""A cross-encoder as teacher: its scores are those of a direct pass, they filter, and a model learns from them."""

import json

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

from embedsmith.core.errors import ModelError
from embedsmith.core.recipe import parse
from embedsmith.data import Source, read_source
from embedsmith.mining import MineRecipe, mine
from embedsmith.models import load, load_reranker
from embedsmith.train import Recipe, train
from tests.mining.fakes import Words
from tests.tinybert import WORDS, tiny_bert, tiny_config, tiny_tokenizer


def tiny_cross_encoder(folder, seed=0, labels=1):
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = tiny_config(len(tokenizer), num_labels=labels, initializer_range=0.5)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_cross_encoder(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def tree(tmp_path, teacher):
    pairs = [{"query": f"{a} {b}", "pos": [f"the {a} {b} sat"]} for a in WORDS[2:7] for b in WORDS[8:12]]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    return {
        "data": {"path": str(path)},
        "output": str(tmp_path / "mined.jsonl"),
        "searchers": [{"type": "embedding", "model": "words"}],
        "teacher": {"type": "cross-encoder", "model": str(teacher)},
        "candidates": 19,
        "part": 9,
        "select": {"negatives": 19, "near_duplicate": None},
    }


def mined(tree, **changes):
    recipe = parse(MineRecipe, tree | changes)
    mine(recipe, {"words": Words()}.__getitem__, load_reranker)
    return read_source(Source(path=recipe.output)).records


def direct(folder, pairs):
    """Sigmoid of the model's output, one pair at a time."""
    model, tokenizer = BertForSequenceClassification.from_pretrained(folder).eval(), tiny_tokenizer()
    with torch.inference_mode():
        logits = [model(**tokenizer(*pair, return_tensors="pt")).logits.item() for pair in pairs]
    return 1 / (1 + np.exp(-np.array(logits)))


def test_scores_are_those_of_a_direct_pass_and_filter(tree, teacher, tmp_path):
    whole = mined(tree)
    for record in whole[:3]:
        pairs = [(record.query, text) for text in (*record.positives, *record.negatives)]
        np.testing.assert_allclose(
            [*record.teacher_positive_scores, *record.teacher_negative_scores], direct(teacher, pairs), atol=1e-5
        )
    assert np.std([score for record in whole for score in record.teacher_negative_scores]) > 0.05
    limits = {"max_score": 0.8, "relative_margin": 0.05}
    few = mined(tree, select=tree["select"] | {"teacher_limits": limits}, output=str(tmp_path / "few.jsonl"))
    for record, limited in zip(whole, few, strict=True):
        highest = min(0.8, 0.95 * record.teacher_positive_scores[0])
        scored = zip(record.negatives, record.teacher_negative_scores, strict=True)
        assert limited.negatives == tuple(text for text, score in scored if score <= highest)
    assert 0 < sum(len(r.negatives) for r in few) < sum(len(r.negatives) for r in whole)


def divergence(model, record):
    """KL of the student's distribution over a query's texts (temperature 0.02) from the teacher's."""
    texts = [*record.positives, *record.negatives]
    teacher = torch.tensor([*record.teacher_positive_scores, *record.teacher_negative_scores]).softmax(0)
    score = torch.from_numpy(model.encode(record.query, "query") @ model.encode(texts, "document").T)
    return float((teacher * (teacher.log() - (score / 0.02).log_softmax(0))).sum())


def test_a_model_learns_from_its_scores(tree, tmp_path):
    """The loss of the first step is the divergence from the scores in the file, and it falls."""
    records = mined(tree, select={"negatives": 6, "near_duplicate": None})
    bert = tiny_bert(tmp_path / "bert", dropout=0.0)
    loss = {"type": "score_kl", "temperature": 0.02}
    recipe = {
        "model": {"path": str(bert), "pooling": "mean"},
        "data": [{"path": tree["output"], "negatives": 6, "batch_size": 20, "loss": loss, "name": "mined"}],
        "train": {"steps": 12, "learning_rate": 0.01, "log_every": 1, "log_with": [], "precision": "fp32"},
        "output": str(tmp_path / "run"),
    }
    train(parse(Recipe, recipe))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/mined"] for line in lines if "loss/mined" in line]
    student = load(str(bert), pooling="mean")
    assert losses[0] == pytest.approx(np.mean([divergence(student, record) for record in records]), rel=1e-3)
    assert losses[-1] < 0.8 * losses[0]


def test_another_teacher_in_the_same_folder_is_asked_anew(tree, tmp_path):
    folder = tiny_cross_encoder(tmp_path / "moving")
    tree["teacher"]["model"] = str(folder)
    first = mined(tree)
    tiny_cross_encoder(folder, seed=1)
    second = mined(tree)
    assert [r.teacher_negative_scores for r in first] != [r.teacher_negative_scores for r in second]


def test_what_cannot_teach_is_refused(tree, tmp_path):
    def refused(folder, words):
        with pytest.raises(ModelError, match=words):
            mined(tree, teacher={"type": "cross-encoder", "model": str(folder)})

    refused(tiny_bert(tmp_path / "embedder"), "BertModel has no head that scores pairs")
    refused(tiny_cross_encoder(tmp_path / "two", labels=2), "gives 2 scores a pair")
    refused(tmp_path / "nowhere", "no such model folder")
