"""Small students: which layers stay and what of each matrix, a table equal to its definition, folders that other
libraries read, and the verb."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import embedsmith as es
from embedsmith.core.errors import CheckpointError, ModelError, RecipeError
from embedsmith.distil import run, static_student
from embedsmith.distil.run import DistilRecipe
from embedsmith.distil.smaller import evenly, narrowed
from embedsmith.distil.static_student import agreement, distil_static, sif_weights, token_vectors
from embedsmith.models import load
from tests.claims import watch_claims
from tests.tinybert import WORDS


@pytest.fixture(scope="module")
def teacher(bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "model"
    load(str(bert), pooling="mean", prompts={"query": "the cat "}, device="cpu").save(folder)
    return folder


def texts(count, seed=0):
    chance = np.random.default_rng(seed)
    return [" ".join(chance.choice(WORDS, chance.integers(2, 8))) for _ in range(count)]


def test_layers_are_kept_at_even_distances():
    assert [evenly(12, n) for n in (1, 2, 3, 6)] == [(5,), (0, 11), (0, 6, 11), (0, 2, 4, 7, 9, 11)]
    for depth in range(2, 40):
        for count in range(1, depth):
            kept = evenly(depth, count)
            assert len(set(kept)) == count
            assert list(kept) == sorted(kept)


def test_a_narrower_backbone_has_the_leading_parts_of_every_matrix(teacher):
    backbone = load(str(teacher), device="cpu").backbone
    small = narrowed(backbone, 8)
    config = small.config
    assert not small.training
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (8, 1, 12)
    query = "encoder.layer.1.attention.self.query.weight"
    assert torch.equal(small.state_dict()[query], backbone.state_dict()[query][:8, :8])
    words = small.get_input_embeddings().weight
    assert torch.equal(words, backbone.get_input_embeddings().weight[:, :8])
    assert getattr(small, "pooler", None) is None
    for wrong in (16, 12, 24):
        with pytest.raises(ModelError, match="a multiple of 8 below 16"):
            narrowed(backbone, wrong)


def test_the_table_is_that_of_its_definition(teacher):
    """Each token between [CLS] and [SEP], without a prompt; main axes, then weights by Zipf's law."""
    model = load(str(teacher), device="cpu")
    vocabulary = model.tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    front, tail = model.tokenizer.cls_token_id, model.tokenizer.sep_token_id
    rows = []
    for number in range(len(tokens)):
        ids = torch.tensor([[front, number, tail]])
        states = model.backbone(ids, torch.ones_like(ids)).last_hidden_state[0]
        rows.append(F.normalize(states.mean(0), dim=-1))
    expected = torch.stack(rows).detach()
    torch.testing.assert_close(token_vectors(model), expected, rtol=0, atol=1e-5)

    student = distil_static(model, [], 5)
    special = set(model.tokenizer.all_special_ids)
    words = [n for n in range(len(tokens)) if n not in special]
    centred = (expected - expected[words].mean(0)).double()
    _, _, v = np.linalg.svd(centred[words].numpy(), full_matrices=False)
    axes = v[:5] * np.sign(v[np.arange(5), np.abs(v[:5]).argmax(1)])[:, None]  # the largest coordinate points up
    share = np.array([1 / (rank + 2) for rank in range(len(tokens))])
    weight = static_student.SIF / (static_student.SIF + share / share.sum())
    for number, row in enumerate(student.row_VD):
        if number in special:
            assert row.abs().max() == 0
            continue
        found = (centred[number].numpy() @ axes.T) * weight[number]
        np.testing.assert_allclose(row.numpy(), found, atol=2e-5)

    ids = [vocabulary["cat"], vocabulary["mat"], vocabulary["cat"]]
    made = student.represent(["cat mat cat", ""], role="query")["dense"].vector_ND
    torch.testing.assert_close(made[0], F.normalize(student.row_VD[ids].mean(0), dim=-1))
    assert made[1].abs().max() == 0


def test_frequent_tokens_weigh_less():
    counted = sif_weights(4, [[1, 1, 1], [2], []])
    share = np.array([1, 4, 2, 1]) / 8
    np.testing.assert_allclose(counted.numpy(), static_student.SIF / (static_student.SIF + share), rtol=1e-6)
    by_rank = sif_weights(4, [])
    assert by_rank.tolist() == sorted(by_rank.tolist())


def test_agreement_is_the_correlation_of_cosines():
    student, teacher = np.random.default_rng(0).standard_normal((2, 6, 4)) * np.arange(1, 7)[:, None]
    cosines = [
        [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for n, a in enumerate(side) for b in side[n + 1 :]]
        for side in (student, teacher)
    ]
    found = agreement(torch.from_numpy(student), torch.from_numpy(teacher))
    assert found == pytest.approx(np.corrcoef(cosines)[0, 1])


def test_training_brings_it_nearer_to_the_teacher_on_texts_that_were_held_out(teacher, monkeypatch, caplog):
    monkeypatch.setattr(static_student, "BATCH", 32)
    monkeypatch.setattr(static_student, "EPOCHS", 0)
    model = load(str(teacher), device="cpu")
    some, other = texts(700), texts(200, seed=9)
    plain = distil_static(model, some, 8)
    monkeypatch.setattr(static_student, "EPOCHS", 6)
    with caplog.at_level("INFO"):
        student = distil_static(model, some, 8)
    assert re.search(r"on \d+ held-out texts: .* trained", caplog.text)
    target = model.represent(other, role="document")["dense"].vector_ND
    target = target - target.mean(0)  # what all texts have in common is taken off
    before, after = (
        agreement(one.represent(other, role="query")["dense"].vector_ND, target) for one in (plain, student)
    )
    assert after > before + 0.02
    assert torch.equal((student.row_VD == 0).all(1), (plain.row_VD == 0).all(1))
    again = distil_static(model, some, 8)
    assert torch.equal(again.row_VD, student.row_VD)


def test_other_libraries_read_the_folder(teacher, tmp_path):
    from sentence_transformers import SentenceTransformer

    student = distil_static(load(str(teacher), device="cpu"), [], 6)
    student.save(tmp_path / "static")
    theirs = SentenceTransformer(str(tmp_path / "static"), device="cpu")
    some = ["the cat sat", "a big old tree zz"]
    made = student.represent(some, role="document")["dense"].vector_ND
    np.testing.assert_allclose(theirs.encode(some), made.numpy(), atol=1e-6)
    np.testing.assert_allclose(load(str(tmp_path / "static"), device="cpu").encode(some), made.numpy(), atol=1e-6)
    with pytest.raises(CheckpointError):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "mine.txt").write_text("mine")
        student.save(tmp_path / "other")


def test_the_verb_makes_a_smaller_student_and_goes_on(typed, teacher, files, tmp_path, monkeypatch):
    claims = watch_claims(monkeypatch, run, tmp_path / "small", "load")
    alone = tmp_path / "texts.jsonl"
    alone.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(16)))
    out = tmp_path / "small"
    command = ["distil", teacher, out, "--data", alone, "--data", files / "pairs.jsonl", "--layers", "1", "--hidden"]
    command += ["8", "--steps", "2", "--batch-size", "8"]
    shown, errors, code = typed(*command)
    assert code == 0, errors
    assert "texts a second" in shown
    assert claims
    assert all(claims)
    student = es.load(str(out))
    assert student.dimension == 8
    assert student.backbone.config.num_hidden_layers == 1
    start = es.load(str(tmp_path / "small.distil" / "start"))
    assert not torch.equal(start.backbone.get_input_embeddings().weight, student.backbone.get_input_embeddings().weight)
    assert (tmp_path / "small.distil" / "report.html").exists()
    told = json.loads((tmp_path / "small.distil" / "distil.json").read_text())
    assert told["student"]["dimension"] == 8
    again, errors, code = typed(*command)
    assert (again, code) == (shown, 0)
    assert "distilled before" in errors
    _, errors, code = typed(*command[:-1], "4")
    assert code == 1
    assert "the student of other settings" in errors


def test_the_verb_makes_a_static_student_with_scores(typed, teacher, files, tmp_path):
    out = tmp_path / "static"
    task = tmp_path / "similar.jsonl"
    task.write_text((files / "scored.jsonl").read_text())
    shown, errors, code = typed("distil", teacher, out, "--static", "--dims", "6", "--tasks", task)
    assert code == 0, errors
    assert "numbers a text" in shown
    assert "texts a second" in shown
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "nothing is said of the student"),
        ({"static": True, "layers": 1}, "static beside layers"),
        ({"layers": 1}, "without texts to learn from"),
    ],
)
def test_what_cannot_be_distilled_is_refused(settings, words):
    with pytest.raises(RecipeError, match=words):
        DistilRecipe(teacher="a", output="b", **settings)


def test_more_layers_than_there_are(teacher, files, tmp_path):
    with pytest.raises(ModelError, match="layers=2, and the teacher has 2"):
        es.distil(teacher, tmp_path / "out", data=str(files / "pairs.jsonl"), layers=2)
