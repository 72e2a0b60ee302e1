"""The shape of a model's space, as numbers. Everything is computed in float64 on copies.

CoDiEmb names four measures of a text's token matrix (token-wise similarity, rank, SVD entropy, condition number) but
publishes no formulas; those here are reconstructed. The same four are given for the matrix of text vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedsmith.core.errors import EvaluationError

Matrix = npt.NDArray[np.float64]
NEIGHBOURS = 10
_BLOCK = 2**22  # similarities held at once
_EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class MatrixShape:
    """CoDiEmb's four measures of a matrix [L, D] of row vectors (reconstructed).

    `similarity`: mean cosine of two different rows, 1 / (L (L - 1)) sum_{i != j} cos(h_i, h_j). `rank`: singular
    values above sigma_max max(L, D) eps_fp32. `relative_rank`: rank / min(L, D), comparable between lengths.
    `entropy`: -sum p_i ln p_i with p_i = sigma_i / sum sigma. `condition`: largest over smallest singular value that
    counts for the rank. `deficient`: whether some do not count (the full condition number is infinite then).
    """

    similarity: float
    rank: int
    relative_rank: float
    entropy: float
    condition: float
    deficient: bool


def matrix_shape(matrix_LD: npt.NDArray[np.floating]) -> MatrixShape:
    """Errors: `EvaluationError` for fewer than two rows, a matrix of zeros, and values that are not finite."""
    matrix = _checked(matrix_LD, rows=2)
    sigma = np.linalg.svd(matrix, compute_uv=False)
    if sigma[0] == 0.0:
        raise EvaluationError("all vectors are zero", expected="vectors of a model")
    counting = sigma[sigma > sigma[0] * max(matrix.shape) * _EPS]
    rank, least = len(counting), min(matrix.shape)
    condition = float(sigma[0] / counting[-1])
    return MatrixShape(mean_cosine(matrix), rank, rank / least, entropy_of(sigma), condition, rank < least)


def entropy_of(value_D: npt.NDArray[np.floating]) -> float:
    """-sum p ln p of the values' shares; 0 ln 0 is 0."""
    share = value_D[value_D > 0] / value_D.sum()
    return float(-(share * np.log(share)).sum())


def mean_cosine(matrix_LD: npt.NDArray[np.floating]) -> float:
    """Mean cosine of two different rows: |sum of unit rows|^2 tells the sum over all pairs without making them."""
    unit = unit_rows(_checked(matrix_LD, rows=2))
    count = len(unit)
    of_itself = float(np.square(unit).sum())  # a zero row has no cosine with itself either
    return float((np.square(unit.sum(axis=0)).sum() - of_itself) / (count * (count - 1)))


def token_shapes(tokens: Sequence[npt.NDArray[np.floating]]) -> dict[str, float]:
    """Means of `matrix_shape` over texts, given each text's token states [L, D]. Texts of one token are skipped.

    `condition` is the mean over texts of the condition number within the rank; `deficient_share` is how many texts
    have an infinite one.
    """
    shapes = [matrix_shape(text) for text in tokens if len(text) > 1]
    if not shapes:
        raise EvaluationError("no text has two tokens", fix="give longer texts")
    names = ("similarity", "rank", "relative_rank", "entropy", "condition")
    means = {name: float(np.mean([getattr(shape, name) for shape in shapes])) for name in names}
    return {**means, "deficient_share": float(np.mean([shape.deficient for shape in shapes])), "texts": len(shapes)}


def uniformity(vector_ND: npt.NDArray[np.floating], t: float = 2.0) -> float:
    """ln mean_{i < j} exp(-t |x_i - x_j|^2) of unit vectors; lower is more uniform (Wang and Isola 2020)."""
    unit = unit_rows(_checked(vector_ND, rows=2))
    total, count = 0.0, len(unit)
    for start, cosine_BN in _cosine_blocks(unit):
        value_BN = np.exp(-t * (2.0 - 2.0 * cosine_BN))
        rows = np.arange(len(cosine_BN))
        value_BN[rows, start + rows] = 0.0
        total += float(value_BN.sum())
    return float(np.log(total / (count * (count - 1))))


def alignment(left_ND: npt.NDArray[np.floating], right_ND: npt.NDArray[np.floating], power: float = 2.0) -> float:
    """Mean |x - y|^power of unit vectors of texts that belong together; lower is closer (Wang and Isola 2020)."""
    left, right = (unit_rows(_checked(side, rows=1)) for side in (left_ND, right_ND))
    return float(np.mean(np.linalg.norm(left - right, axis=1) ** power))


def spectrum(vector_ND: npt.NDArray[np.floating]) -> Matrix:
    """Shares of the variance along the principal directions, from the largest: [min(N, D)], they sum to 1."""
    vector = _checked(vector_ND, rows=2)
    variance = np.square(np.linalg.svd(vector - vector.mean(axis=0), compute_uv=False))
    share: Matrix = variance / variance.sum() if variance.sum() > 0 else np.zeros_like(variance)
    return share


def effective_rank(vector_ND: npt.NDArray[np.floating]) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007; RankMe without its epsilon)."""
    return float(np.exp(entropy_of(np.linalg.svd(_checked(vector_ND, rows=1), compute_uv=False))))


def directions_for(share_D: Matrix, part: float) -> int:
    """How many principal directions hold `part` of the variance."""
    if share_D.sum() == 0:
        return 0
    return int(np.searchsorted(np.cumsum(share_D), part * (1 - 1e-12)) + 1)


def neighbours(vector_ND: npt.NDArray[np.floating], k: int = NEIGHBOURS) -> npt.NDArray[np.int64]:
    """index_Nk of the k rows with the highest cosine to each row, without itself; ties go to the lower index."""
    unit = unit_rows(_checked(vector_ND, rows=2))
    k = min(k, len(unit) - 1)
    found = []
    for start, cosine_BN in _cosine_blocks(unit):
        rows = np.arange(len(cosine_BN))
        cosine_BN[rows, start + rows] = -np.inf
        found.append(np.argsort(-cosine_BN, axis=1, kind="stable")[:, :k])
    return np.concatenate(found)


def hubness(index_Nk: npt.NDArray[np.int64]) -> dict[str, float]:
    """How unevenly rows are neighbours of others (Radovanovic et al. 2010): skewness of the number of lists a row is
    in, E((n - mean)^3) / std^3; the share of rows in none; the largest number over its mean, k."""
    count, k = index_Nk.shape
    number_N = np.bincount(index_Nk.reshape(-1), minlength=count).astype(np.float64)
    centred, spread = number_N - number_N.mean(), number_N.std()
    skewness = float((centred**3).mean() / spread**3) if spread > 0 else 0.0
    return {"skewness": skewness, "never": float((number_N == 0).mean()), "largest": float(number_N.max() / k)}


def neighbour_overlap(left_Nk: npt.NDArray[np.int64], right_Nk: npt.NDArray[np.int64]) -> float:
    """Mean share of the neighbours in one space that are neighbours in the other."""
    shared = [len(np.intersect1d(left, right)) for left, right in zip(left_Nk, right_Nk, strict=True)]
    return float(np.mean(shared) / left_Nk.shape[1])


def dimension_variance(vector_ND: npt.NDArray[np.floating]) -> Matrix:
    """Variance of every coordinate, [D]."""
    variance: Matrix = _checked(vector_ND, rows=1).var(axis=0)
    return variance


def length_sensitivity(vector_ND: npt.NDArray[np.floating], length_N: Sequence[int]) -> float:
    """Spearman's correlation, over all pairs of texts, of their cosine and of how far apart the logarithms of their
    lengths are. Negative: texts of like length look alike whatever they say. NaN where all are equally long."""
    from scipy.stats import spearmanr

    unit, log_N = unit_rows(_checked(vector_ND, rows=3)), np.log1p(np.asarray(length_N, dtype=np.float64))
    left, right = np.triu_indices(len(unit), 1)
    gap, cosine = np.abs(log_N[left] - log_N[right]), (unit @ unit.T)[left, right]
    if np.ptp(gap) == 0 or np.ptp(cosine) == 0:
        return float("nan")
    return float(spearmanr(gap, cosine)[0])


def prompt_sensitivity(plain_ND: npt.NDArray[np.floating], prompted_ND: npt.NDArray[np.floating]) -> dict[str, float]:
    """The same texts with another prompt: mean cosine to themselves, and overlap of their neighbours."""
    left, right = (unit_rows(_checked(side, rows=2)) for side in (plain_ND, prompted_ND))
    overlap = neighbour_overlap(neighbours(left), neighbours(right))
    return {"cosine": float((left * right).sum(axis=1).mean()), "neighbours": overlap}


def width_retention(vector_ND: npt.NDArray[np.floating], widths: Sequence[int]) -> dict[int, float]:
    """Overlap of the neighbours at each leading width with those of the whole vector (Matryoshka)."""
    vector = _checked(vector_ND, rows=2)
    whole = neighbours(vector)
    return {width: neighbour_overlap(neighbours(vector[:, :width]), whole) for width in widths}


def halved_widths(dimension: int, least: int = 8) -> list[int]:
    """The whole width and its halves down to `least`."""
    widths = [dimension]
    while widths[-1] // 2 >= least:
        widths.append(widths[-1] // 2)
    return widths


def against(left_ND: npt.NDArray[np.floating], right_ND: npt.NDArray[np.floating]) -> dict[str, float]:
    """Two models on the same texts, whatever their widths.

    `cka`: linear centred kernel alignment, |X^T Y|_F^2 / (|X^T X|_F |Y^T Y|_F) of centred matrices (Kornblith et al.
    2019). `cosines`: Spearman's correlation of all pairs' cosines. `neighbours`: overlap of the ten nearest.
    """
    from scipy.stats import spearmanr

    left, right = (_checked(side, rows=3) for side in (left_ND, right_ND))
    if len(left) != len(right):
        raise EvaluationError(f"{len(left)} and {len(right)} vectors", expected="two models on the same texts")
    x, y = (side - side.mean(axis=0) for side in (left, right))
    norm = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    cka = float(np.square(np.linalg.norm(x.T @ y)) / norm) if norm > 0 else float("nan")
    rows, columns = np.triu_indices(len(left), 1)
    cosines = [(unit @ unit.T)[rows, columns] for unit in (unit_rows(left), unit_rows(right))]
    constant = any(np.ptp(each) == 0 for each in cosines)
    agreement = float("nan") if constant else float(spearmanr(cosines[0], cosines[1])[0])
    overlap = neighbour_overlap(neighbours(left), neighbours(right))
    return {"cka": cka, "cosines": agreement, "neighbours": overlap}


def sentence_space(vector_ND: npt.NDArray[np.floating]) -> Mapping[str, float]:
    """The measures of a set of text vectors, by name. `anisotropy` is the mean cosine of two different texts
    (Ethayarajh 2019), which is also the text form of CoDiEmb's token-wise similarity."""
    shape, share = matrix_shape(vector_ND), spectrum(vector_ND)
    variance, hubs = dimension_variance(vector_ND), hubness(neighbours(vector_ND))
    mean = float(variance.mean())
    return {
        "anisotropy": shape.similarity,
        "rank": float(shape.rank),
        "svd_entropy": shape.entropy,
        "condition": shape.condition,
        "effective_rank": float(np.exp(shape.entropy)),
        "uniformity": uniformity(vector_ND),
        "first_direction": float(share[0]),
        "directions_for_90": float(directions_for(share, 0.9)),
        "hubness": hubs["skewness"],
        "hub_never": hubs["never"],
        "hub_largest": hubs["largest"],
        "variance_spread": float(variance.std() / mean) if mean > 0 else 0.0,
        "dead_dimensions": float((variance < 1e-3 * mean).sum()) if mean > 0 else float(len(variance)),
    }


def unit_rows(matrix_ND: Matrix) -> Matrix:
    """Rows of length 1; a zero row stays zero."""
    norm = np.linalg.norm(matrix_ND, axis=1, keepdims=True)
    unit: Matrix = matrix_ND / np.where(norm > 0, norm, 1.0)
    return unit


def _cosine_blocks(unit_ND: Matrix) -> Iterator[tuple[int, Matrix]]:
    step = max(_BLOCK // len(unit_ND), 1)
    return ((start, unit_ND[start : start + step] @ unit_ND.T) for start in range(0, len(unit_ND), step))


def _checked(matrix: npt.NDArray[np.floating], rows: int) -> Matrix:
    wide = np.asarray(matrix, dtype=np.float64)
    if wide.ndim != 2 or len(wide) < rows:
        raise EvaluationError(f"vectors of the shape {wide.shape}", expected=f"a matrix of {rows} rows or more")
    if not bool(np.isfinite(wide).all()):
        raise EvaluationError("a vector has values that are not finite", fix="check the weights of the model")
    return wide
