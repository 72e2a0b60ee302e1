"""The shape of a model's space, as numbers. Everything is computed in float64 on copies.

CoDiEmb names four measures of a text's token matrix (token-wise similarity, rank, SVD entropy, condition number) but
publishes no formulas; those here are reconstructed. The same four are given for the matrix of text vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

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

    @staticmethod
    def of(matrix_LD: npt.NDArray[np.floating]) -> MatrixShape:
        """Errors: `EvaluationError` for fewer than two rows, a matrix of zeros, and values that are not finite."""
        matrix = Space(matrix_LD)
        sigma = np.linalg.svd(matrix.vector_ND, compute_uv=False)
        if sigma[0] == 0.0:
            raise EvaluationError("all vectors are zero", expected="vectors of a model")
        counting = sigma[sigma > sigma[0] * max(matrix.vector_ND.shape) * _EPS]
        rank, least = len(counting), min(matrix.vector_ND.shape)
        share = sigma[sigma > 0] / sigma.sum()
        entropy, condition = float(-(share * np.log(share)).sum()), float(sigma[0] / counting[-1])
        return MatrixShape(matrix.mean_cosine(), rank, rank / least, entropy, condition, rank < least)

    @staticmethod
    def means(tokens: Sequence[npt.NDArray[np.floating]]) -> dict[str, float]:
        """Means of `MatrixShape` over texts, given each text's token states [L, D]. Texts of one token are skipped.

        `condition` is the mean over texts of the condition number within the rank; `deficient_share` is how many texts
        have an infinite one.
        """
        shapes = [MatrixShape.of(text) for text in tokens if len(text) > 1]
        if not shapes:
            raise EvaluationError("no text has two tokens", fix="give longer texts")
        names = ("similarity", "rank", "relative_rank", "entropy", "condition")
        means = {name: float(np.mean([getattr(shape, name) for shape in shapes])) for name in names}
        return {**means, "deficient_share": float(np.mean([shape.deficient for shape in shapes])), "texts": len(shapes)}


class Space:
    """N vectors of a model, in float64, and how they lie. Measures of two spaces want the same texts in both.

    Errors: `EvaluationError` for fewer vectors than `rows`, and for values that are not finite.
    """

    def __init__(self, vector_ND: npt.NDArray[np.floating], rows: int = 2) -> None:
        self.vector_ND: Matrix = np.asarray(vector_ND, dtype=np.float64)
        if self.vector_ND.ndim != 2 or len(self.vector_ND) < rows:
            raise EvaluationError(
                f"vectors of the shape {self.vector_ND.shape}", expected=f"a matrix of {rows} rows or more"
            )
        if not bool(np.isfinite(self.vector_ND).all()):
            raise EvaluationError("a vector has values that are not finite", fix="check the weights of the model")

    def __len__(self) -> int:
        return len(self.vector_ND)

    @cached_property
    def unit_ND(self) -> Matrix:
        """The rows with length 1; a zero row stays zero."""
        norm = np.linalg.norm(self.vector_ND, axis=1, keepdims=True)
        unit: Matrix = self.vector_ND / np.where(norm > 0, norm, 1.0)
        return unit

    def _cosine_blocks(self) -> Iterator[tuple[int, Matrix]]:
        step = max(_BLOCK // len(self), 1)
        return ((start, self.unit_ND[start : start + step] @ self.unit_ND.T) for start in range(0, len(self), step))

    def mean_cosine(self) -> float:
        """Mean cosine of two different rows: |sum of unit rows|^2 gives the sum over all pairs without making them."""
        of_itself = float(np.square(self.unit_ND).sum())  # a zero row has no cosine with itself either
        return float((np.square(self.unit_ND.sum(axis=0)).sum() - of_itself) / (len(self) * (len(self) - 1)))

    def uniformity(self, t: float = 2.0) -> float:
        """ln mean_{i < j} exp(-t |x_i - x_j|^2) of unit vectors; lower is more uniform (Wang and Isola 2020)."""
        total = 0.0
        for start, cosine_BN in self._cosine_blocks():
            value_BN = np.exp(-t * (2.0 - 2.0 * cosine_BN))
            rows = np.arange(len(cosine_BN))
            value_BN[rows, start + rows] = 0.0
            total += float(value_BN.sum())
        return float(np.log(total / (len(self) * (len(self) - 1))))

    def alignment(self, other: Space, power: float = 2.0) -> float:
        """Mean |x - y|^power of unit vectors of texts that belong together; lower is closer (Wang and Isola 2020)."""
        return float(np.mean(np.linalg.norm(self.unit_ND - other.unit_ND, axis=1) ** power))

    def spectrum(self) -> Matrix:
        """Shares of the variance along the principal directions, from the largest: [min(N, D)], they sum to 1."""
        centred_ND = self.vector_ND - self.vector_ND.mean(axis=0)
        variance = np.square(np.linalg.svd(centred_ND, compute_uv=False))
        share: Matrix = variance / variance.sum() if variance.sum() > 0 else np.zeros_like(variance)
        return share

    def variance(self) -> Matrix:
        """Of every coordinate, [D]."""
        variance: Matrix = self.vector_ND.var(axis=0)
        return variance

    def neighbours(self, k: int = NEIGHBOURS) -> npt.NDArray[np.int64]:
        """index_Nk of the k rows with the highest cosine to each row, without itself; ties go to the lower index."""
        k = min(k, len(self) - 1)
        found = []
        for start, cosine_BN in self._cosine_blocks():
            rows = np.arange(len(cosine_BN))
            cosine_BN[rows, start + rows] = -np.inf
            found.append(np.argsort(-cosine_BN, axis=1, kind="stable")[:, :k])
        return np.concatenate(found)

    def hubness(self, k: int = NEIGHBOURS) -> dict[str, float]:
        """How unevenly rows are neighbours of others (Radovanovic et al. 2010): skewness of the number of lists a row
        is in, E((n - mean)^3) / std^3; the share of rows in none; the largest number over its mean, k."""
        index_Nk = self.neighbours(k)
        number_N = np.bincount(index_Nk.reshape(-1), minlength=len(self)).astype(np.float64)
        centred, spread = number_N - number_N.mean(), number_N.std()
        skewness = float((centred**3).mean() / spread**3) if spread > 0 else 0.0
        largest = float(number_N.max() / index_Nk.shape[1])
        return {"skewness": skewness, "never": float((number_N == 0).mean()), "largest": largest}

    def length_sensitivity(self, length_N: Sequence[int]) -> float:
        """Spearman's correlation, over all pairs of texts, of their cosine and of how far apart the logarithms of their
        lengths are. Negative: texts of like length look alike whatever they mean. NaN where all are equally long."""
        from scipy.stats import spearmanr

        log_N = np.log1p(np.asarray(length_N, dtype=np.float64))
        left, right = np.triu_indices(len(self), 1)
        gap, cosine = np.abs(log_N[left] - log_N[right]), (self.unit_ND @ self.unit_ND.T)[left, right]
        if np.ptp(gap) == 0 or np.ptp(cosine) == 0:
            return float("nan")
        return float(spearmanr(gap, cosine)[0])

    def prompt_sensitivity(self, prompted: Space) -> dict[str, float]:
        """The same texts with another prompt: mean cosine to themselves, and overlap of their neighbours."""
        overlap = neighbour_overlap(self.neighbours(), prompted.neighbours())
        return {"cosine": float((self.unit_ND * prompted.unit_ND).sum(axis=1).mean()), "neighbours": overlap}

    def width_retention(self, widths: Sequence[int] | None = None) -> dict[int, float]:
        """Overlap of the neighbours at each leading width with those of the whole vector (Matryoshka). By default the
        whole width and its halves down to 8."""
        if widths is None:
            widths = [self.vector_ND.shape[1]]
            while widths[-1] // 2 >= 8:
                widths.append(widths[-1] // 2)
        whole = self.neighbours()
        return {width: neighbour_overlap(Space(self.vector_ND[:, :width]).neighbours(), whole) for width in widths}

    def agreement(self, other: Space) -> dict[str, float]:
        """Two models on the same texts, whatever their widths.

        `cka`: linear centred kernel alignment, |X^T Y|_F^2 / (|X^T X|_F |Y^T Y|_F) of centred matrices (Kornblith et
        al. 2019). `cosines`: Spearman's correlation of all pairs' cosines. `neighbours`: overlap of the ten nearest.
        """
        from scipy.stats import spearmanr

        if len(self) != len(other):
            raise EvaluationError(f"{len(self)} and {len(other)} vectors", expected="two models on the same texts")
        x, y = (side.vector_ND - side.vector_ND.mean(axis=0) for side in (self, other))
        norm = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
        cka = float(np.square(np.linalg.norm(x.T @ y)) / norm) if norm > 0 else float("nan")
        rows, columns = np.triu_indices(len(self), 1)
        cosines = [(side.unit_ND @ side.unit_ND.T)[rows, columns] for side in (self, other)]
        constant = any(np.ptp(each) == 0 for each in cosines)
        correlation = float("nan") if constant else float(spearmanr(cosines[0], cosines[1])[0])
        overlap = neighbour_overlap(self.neighbours(), other.neighbours())
        return {"cka": cka, "cosines": correlation, "neighbours": overlap}

    def some_cosines(self, count: int = 5000) -> Matrix:
        """Cosines of random pairs of different texts, the same pairs each time."""
        chance = np.random.default_rng(0)
        left = chance.integers(0, len(self), count)
        right = (left + chance.integers(1, len(self), count)) % len(self)
        cosines: Matrix = np.sum(self.unit_ND[left] * self.unit_ND[right], axis=1)
        return cosines

    def measures(self) -> Mapping[str, float]:
        """The measures of one space, by name. `anisotropy` is the mean cosine of two different texts (Ethayarajh 2019),
        which is also the text form of CoDiEmb's token-wise similarity; `effective_rank` is exp of the entropy of the
        singular values' shares (Roy and Vetterli 2007; RankMe without its epsilon)."""
        shape, share, hubs, variance = MatrixShape.of(self.vector_ND), self.spectrum(), self.hubness(), self.variance()
        mean = float(variance.mean())
        return {
            "anisotropy": shape.similarity,
            "rank": float(shape.rank),
            "svd_entropy": shape.entropy,
            "condition": shape.condition,
            "effective_rank": float(np.exp(shape.entropy)),
            "uniformity": self.uniformity(),
            "first_direction": float(share[0]),
            "directions_for_90": float(directions_for(share, 0.9)),
            "hubness": hubs["skewness"],
            "hub_never": hubs["never"],
            "hub_largest": hubs["largest"],
            "variance_spread": float(variance.std() / mean) if mean > 0 else 0.0,
            "dead_dimensions": float((variance < 1e-3 * mean).sum()) if mean > 0 else float(len(variance)),
        }


def directions_for(share_D: Matrix, part: float) -> int:
    """How many principal directions hold `part` of the variance."""
    if share_D.sum() == 0:
        return 0
    return int(np.searchsorted(np.cumsum(share_D), part * (1 - 1e-12)) + 1)


def neighbour_overlap(left_Nk: npt.NDArray[np.int64], right_Nk: npt.NDArray[np.int64]) -> float:
    """Mean share of the neighbours in one space that are neighbours in the other."""
    shared = [len(np.intersect1d(left, right)) for left, right in zip(left_Nk, right_Nk, strict=True)]
    return float(np.mean(shared) / left_Nk.shape[1])
