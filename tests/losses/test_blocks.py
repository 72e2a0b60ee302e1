"""Streamed scores equal the plain path, in value and gradient, on every head; and they never hold the matrix."""

from dataclasses import fields, replace

import pytest
import torch

from embedsmith.core.reps import Dense
from embedsmith.losses import (
    F2LLM,
    GOR,
    InfoNCE,
    M3RankedKD,
    M3SelfDistillation,
    Matryoshka,
    MidNCE,
    Qwen3,
    SupervisedContrastive,
    Uniformity,
)
from tests.losses.cases import CASES, examples_for
from tests.losses.examples import run

STREAMED = [loss for cases in CASES.values() for loss in cases if "block_size" in {f.name for f in fields(loss)}]
INNER = [InfoNCE(0.2, margin=0.1, hardness_weight=2.0), Qwen3(0.2), F2LLM(0.2), M3SelfDistillation(0.2), Uniformity()]


def assert_equal_runs(loss, streamed):
    for example in examples_for(loss).values():
        value, gradients = run(loss, example)
        got, got_gradients = run(streamed, example)
        assert got.item() == pytest.approx(value.item(), abs=1e-12)
        for a, b in zip(got_gradients, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block_size", [1, 5, 7, 1000])
@pytest.mark.parametrize("loss", STREAMED, ids=lambda loss: type(loss).__name__)
def test_streamed_equals_plain(loss, block_size):
    """Seven does not divide the number of candidates: the last block is short."""
    assert_equal_runs(loss, replace(loss, block_size=block_size))


@pytest.mark.parametrize("head", ["dense", "sparse", "multivector"])
def test_streamed_equals_plain_on_every_head(head):
    loss = InfoNCE(0.2, head, margin=0.3, include_qq=True, include_dd=True, symmetric=True)
    assert_equal_runs(loss, replace(loss, block_size=4))


@pytest.mark.parametrize("inner", INNER, ids=lambda loss: type(loss).__name__)
def test_streamed_equals_plain_under_matryoshka(inner):
    assert_equal_runs(Matryoshka(inner, (5, 2)), Matryoshka(replace(inner, block_size=5), (5, 2)))


@pytest.mark.parametrize("loss", [Qwen3(0.2, margin=0.0), InfoNCE(0.2, relative_margin=1.0)], ids=str)
def test_equal_scores_stay_within_a_margin_however_they_are_rounded(loss, monkeypatch):
    """Repeated texts score exactly as the positive does; another processor's rounding must not drop them."""
    example = examples_for(loss)["adversarial"]
    expected, _ = run(loss, example)
    generator, scores = torch.Generator().manual_seed(0), Dense.scores

    def rounded(self, other, widths=None):
        score_WQK = scores(self, other, widths)
        return score_WQK + 3e-7 * torch.empty_like(score_WQK).uniform_(-1, 1, generator=generator)

    monkeypatch.setattr(Dense, "scores", rounded)
    for _ in range(10):
        assert run(loss, example)[0].item() == pytest.approx(expected.item(), abs=1e-5)


def test_every_streaming_loss_is_here():
    assert {type(loss) for loss in STREAMED} >= {InfoNCE, MidNCE, SupervisedContrastive, M3RankedKD, Uniformity, GOR}


def test_no_block_larger_than_asked_is_scored(monkeypatch):
    widest = []
    scores = Dense.scores

    def watched(self, other, widths=None):
        widest.append(len(other))
        return scores(self, other, widths)

    monkeypatch.setattr(Dense, "scores", watched)
    loss = InfoNCE(0.2, include_qq=True, include_dd=True, block_size=3)
    run(loss, examples_for(loss)["adversarial"])
    assert max(widest) == 3
