"""Every measure equals a loop over numbers in float64, and says what it should of spaces whose shape is known."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from embedsmith.core.errors import EvaluationError
from embedsmith.evaluate import geometry as g
from embedsmith.evaluate.model_geometry import Geometry, Sample, geometry_table
from embedsmith.models import load
from tests.evaluate.examples import small_tasks
from tests.evaluate.fakes import ConstantEncoder, HashEncoder
from tests.tinybert import tiny_bert


def some(rows=23, columns=9, seed=0, offset=0.4):
    return np.random.default_rng(seed).normal(offset, 1.0, (rows, columns)).astype(np.float32)


def cos(a, b):
    a, b = [float(x) for x in a], [float(x) for x in b]
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def eigenvalues(matrix):
    """Singular values by another way: roots of the eigenvalues of the Gram matrix."""
    wide = matrix.astype(np.float64)
    gram = wide @ wide.T if len(wide) <= wide.shape[1] else wide.T @ wide
    return np.sqrt(np.clip(np.linalg.eigvalsh(gram)[::-1], 0, None))


@pytest.mark.parametrize("shape", [(23, 9), (5, 16), (8, 8)])
def test_the_four_measures_of_codiemb(shape):
    matrix = some(*shape)
    made, sigma = g.MatrixShape.of(matrix), eigenvalues(matrix)
    cosines = [cos(matrix[i], matrix[j]) for i in range(len(matrix)) for j in range(len(matrix)) if i != j]
    assert made.similarity == pytest.approx(sum(cosines) / len(cosines))
    assert (made.rank, made.relative_rank, made.deficient) == (min(shape), 1.0, False)
    share = [float(s) / float(sigma.sum()) for s in sigma]
    assert made.entropy == pytest.approx(-sum(p * math.log(p) for p in share))
    assert made.condition == pytest.approx(float(sigma[0] / sigma[-1]), rel=1e-6)


def test_identical_tokens_are_of_rank_one_and_never_infinite():
    made = g.MatrixShape.of(np.tile(some(1, 16), (6, 1)))
    assert made.similarity == pytest.approx(1.0)
    assert (made.rank, made.deficient) == (1, True)
    assert made.entropy == pytest.approx(0.0, abs=1e-5)
    assert made.condition == pytest.approx(1.0)


def test_the_sanity_values_of_a_gaussian_and_of_an_anisotropic_matrix():
    """The four values of the specification, to the digits it gives: seed 0 of torch, one matrix after the other."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = g.MatrixShape.of(torch.randn(32, 64).double().numpy())
        narrow = g.MatrixShape.of((torch.randn(32, 64) + 10 * torch.randn(64)).double().numpy())
    for shape, expected in ((plain, (-0.004, 32, 3.383, 5.7)), (narrow, (0.991, 32, 1.760, 165.6))):
        assert (round(shape.similarity, 3), shape.rank, round(shape.entropy, 3)) == expected[:3]
        assert shape.condition == pytest.approx(expected[3], abs=0.06)  # given to one digit: 5.733 and 165.55


def test_means_over_texts_skip_texts_of_one_token():
    texts = [some(4, 6, 1), some(1, 6, 2), some(7, 6, 3), np.ones((3, 6))]
    found, parts = g.MatrixShape.means(texts), [g.MatrixShape.of(texts[i]) for i in (0, 2, 3)]
    assert found["texts"] == 3
    assert found["deficient_share"] == pytest.approx(1 / 3)
    for name in ("similarity", "rank", "entropy", "condition"):
        assert found[name] == pytest.approx(sum(getattr(p, name) for p in parts) / 3)
    with pytest.raises(EvaluationError, match="no text has two tokens"):
        g.MatrixShape.means([some(1, 6)])


def test_uniformity_and_alignment(monkeypatch):
    monkeypatch.setattr(g, "_BLOCK", 60)
    matrix, other = some(), some(seed=1)
    unit = [row / np.linalg.norm(row) for row in matrix.astype(np.float64)]
    theirs = [row / np.linalg.norm(row) for row in other.astype(np.float64)]
    distance = lambda a, b: sum((x - y) ** 2 for x, y in zip(a, b))
    values = [math.exp(-2 * distance(unit[i], unit[j])) for i in range(23) for j in range(i)]
    assert g.Space(matrix).uniformity() == pytest.approx(math.log(sum(values) / len(values)))
    assert g.Space(matrix).alignment(g.Space(other)) == pytest.approx(
        sum(distance(a, b) for a, b in zip(unit, theirs)) / 23
    )
    assert g.Space(matrix).alignment(g.Space(3 * matrix)) == pytest.approx(0.0, abs=1e-12)


def test_spectrum_and_effective_rank():
    matrix = some()
    wide = matrix.astype(np.float64)
    variance = np.sort(np.linalg.eigvalsh(np.cov(wide.T)))[::-1]
    share = g.Space(matrix).spectrum()
    assert share == pytest.approx(variance / variance.sum())
    assert g.directions_for(share, 0.9) == next(k for k in range(1, 10) if share[:k].sum() >= 0.9)
    assert g.directions_for(np.array([0.5, 0.5]), 1.0) == 2
    sigma = eigenvalues(matrix)
    p = sigma / sigma.sum()
    assert g.Space(matrix).measures()["effective_rank"] == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert g.Space(np.eye(7)).measures()["effective_rank"] == pytest.approx(7.0)


def test_neighbours_and_hubs(monkeypatch):
    monkeypatch.setattr(g, "_BLOCK", 60)
    matrix = some()
    index = g.Space(matrix).neighbours(4)
    for row in range(23):
        order = sorted((j for j in range(23) if j != row), key=lambda j: -cos(matrix[row], matrix[j]))
        assert index[row].tolist() == order[:4]
    few = g.Space(matrix[:3]).neighbours(4)  # all others, and not the row itself
    assert [sorted(line) for line in few.tolist()] == [[1, 2], [0, 2], [0, 1]]
    counts = [sum(row in line for line in index.tolist()) for row in range(23)]
    mean = sum(counts) / 23
    third = sum((c - mean) ** 3 for c in counts) / 23
    spread = math.sqrt(sum((c - mean) ** 2 for c in counts) / 23)
    hubs = g.Space(matrix).hubness(4)
    assert hubs["skewness"] == pytest.approx(third / spread**3)
    assert hubs["never"] == pytest.approx(counts.count(0) / 23)
    assert hubs["largest"] == pytest.approx(max(counts) / 4)


def test_overlap_retention_and_variance():
    left, right = np.array([[1, 2], [0, 2], [0, 1]]), np.array([[2, 1], [1, 0], [2, 3]])
    assert g.neighbour_overlap(left, right) == pytest.approx((1 + 0.5 + 0) / 3)
    matrix = some(40, 16)
    kept = g.Space(matrix).width_retention([16, 8, 2])
    assert kept[16] == 1.0
    narrow = [set(line) for line in g.Space(matrix[:, :2]).neighbours().tolist()]
    whole = [set(line) for line in g.Space(matrix).neighbours().tolist()]
    assert kept[2] == pytest.approx(sum(len(a & b) for a, b in zip(narrow, whole)) / 400)
    assert kept[8] > kept[2]
    wide = matrix.astype(np.float64)
    for column, variance in enumerate(g.Space(matrix).variance()):
        mean = sum(wide[:, column]) / 40
        assert variance == pytest.approx(sum((x - mean) ** 2 for x in wide[:, column]) / 40)
    assert list(g.Space(some(12, 100)).width_retention()) == [100, 50, 25, 12]


def test_length_and_prompt_sensitivity():
    matrix, lengths = some(), [10 * (n % 7) + 1 for n in range(23)]
    pairs = [(i, j) for i in range(23) for j in range(i)]
    gaps = [abs(math.log1p(lengths[i]) - math.log1p(lengths[j])) for i, j in pairs]
    expected = spearmanr(gaps, [cos(matrix[i], matrix[j]) for i, j in pairs])[0]
    assert g.Space(matrix).length_sensitivity(lengths) == pytest.approx(expected)
    assert math.isnan(g.Space(matrix).length_sensitivity([5] * 23))
    other = some(seed=1)
    found = g.Space(matrix).prompt_sensitivity(g.Space(other))
    assert found["cosine"] == pytest.approx(sum(cos(a, b) for a, b in zip(matrix, other)) / 23)
    assert g.Space(matrix).prompt_sensitivity(g.Space(matrix)) == {"cosine": pytest.approx(1.0), "neighbours": 1.0}


def test_two_models_on_the_same_texts():
    left, right = some(30, 6), some(30, 11, seed=1)
    found = g.Space(left).agreement(g.Space(right))
    x, y = (m.astype(np.float64) - m.astype(np.float64).mean(0) for m in (left, right))
    kernel, other = x @ x.T, y @ y.T
    assert found["cka"] == pytest.approx((kernel * other).sum() / math.sqrt((kernel**2).sum() * (other**2).sum()))
    pairs = [(i, j) for i in range(30) for j in range(i)]
    cosines = [[cos(m[i], m[j]) for i, j in pairs] for m in (left, right)]
    assert found["cosines"] == pytest.approx(spearmanr(*cosines)[0])
    turned, _ = np.linalg.qr(some(6, 6, seed=2).astype(np.float64))
    same = g.Space(left).agreement(g.Space(left.astype(np.float64) @ turned))
    assert same["neighbours"] == 1.0
    with pytest.raises(EvaluationError, match="same texts"):
        g.Space(left).agreement(g.Space(right[:5]))


def test_a_collapsed_space_is_told_not_crashed_on():
    space = g.Space(np.ones((20, 8), np.float32)).measures()
    assert space["anisotropy"] == pytest.approx(1.0)
    assert space["effective_rank"] == pytest.approx(1.0, abs=1e-6)
    assert space["dead_dimensions"] == 8
    assert space["first_direction"] == 0.0
    assert all(math.isfinite(value) for value in space.values())


@pytest.mark.parametrize("bad", [np.full((4, 3), np.nan), np.ones((1, 3)), np.ones(3), np.zeros((4, 3))])
def test_what_has_no_shape_is_an_error(bad):
    with pytest.raises(EvaluationError):
        g.Space(bad).measures()


@pytest.mark.parametrize("name", ["sts", "pairs", "classes", "clusters", "search", "rerank"])
def test_texts_to_look_at_come_from_any_task(name):
    sample = Sample.of(small_tasks()[name], 15)
    assert len(sample.texts) == len(set(sample.texts)) == 15
    assert bool(sample.pairs) == (name in ("sts", "pairs", "search", "rerank"))


def test_all_measures_of_a_model_with_and_without_token_states(tmp_path):
    bert = tiny_bert(tmp_path / "bert")
    model = load(str(bert), pooling="mean", device="cpu", prompts={"query": "the big cat ", "document": ""})
    sample = Sample.of(small_tasks()["search"], 30)
    found = Geometry.of(model, sample)
    assert found.numbers["prompt/cosine"] < 0.999
    assert found.numbers["token/texts"] == 30
    assert found.numbers["width/16"] == 1.0
    assert found.numbers["pairs/alignment"] > 0
    states = model.represent([sample.texts[0]], role="document", outputs=("tokens",))["tokens"]
    assert int(states.mask_NT.sum()) == 5, "five letters, without [CLS] and [SEP]"
    json.dumps(found.as_dict(), allow_nan=False)
    plain = Geometry.of(HashEncoder(), sample)
    assert not any(name.startswith("token/") for name in plain.numbers)
    together = sample.agreement(model, HashEncoder())
    assert geometry_table([found, plain], ["a", "b"], together).row_count > len(found.numbers)
    assert "token/similarity" in sample.logged(model)


def test_a_constant_model_can_be_looked_at():
    numbers = Geometry.of(ConstantEncoder(), Sample.of(small_tasks()["search"], 20)).numbers
    assert numbers["sentence/anisotropy"] == pytest.approx(1.0)


def test_a_sample_needs_texts(tmp_path):
    with pytest.raises(EvaluationError, match="3 or more"):
        Sample(("a", "b"))
    (tmp_path / "texts.txt").write_text("one\n\ntwo\ntwo\nthree\n")
    assert Sample.read(tmp_path / "texts.txt").texts == ("one", "two", "three")
