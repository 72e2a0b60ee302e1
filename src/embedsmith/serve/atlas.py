"""The map of an index: its documents as points of a plane, with what they can be coloured by and their neighbours."""

import importlib.util
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh

from embedsmith.index import Document, HybridIndex
from embedsmith.search import exact_top_k
from embedsmith.serve.failures import RequestError

Floats = npt.NDArray[np.floating[Any]]

POINTS = 4000
"""Documents on a map: what a phone still draws at once."""
_NEIGHBOURS = 6
_TEXT = 240
_FIELDS = 12
_KINDS = 200
"""Different values of a field, at most, that is told in kinds."""
_NUMBERS = 9
"""Different numbers, at least, that are shown by a ramp rather than in kinds."""


def methods() -> list[str]:
    """How a map can be drawn here."""
    return ["pca", *(["umap"] if importlib.util.find_spec("umap") is not None else [])]


class Atlas:
    """Maps that were drawn, one of each model's index and method: the second reader gets the first one's.

    A map is drawn anew when the index was opened anew, and when the number of its documents has changed.
    """

    def __init__(self) -> None:
        self._drawn: dict[tuple[str, str], tuple[HybridIndex, int, dict[str, Any]]] = {}
        self._lock = threading.Lock()

    def map(self, name: str, index: HybridIndex, method: str) -> dict[str, Any]:
        """Plain values for JSON. `name`: of the model that made the index.

        Errors: `RequestError` for an index without dense vectors, and an unknown method or one that is not installed.
        """
        if method not in ("pca", "umap"):
            raise RequestError(f"no map is drawn by {method[:40]!r}", param="method", expected="pca or umap")
        if method not in methods():
            fix = "draw it by pca, or pip install umap-learn where the server runs"
            raise RequestError("UMAP is not installed here", param="method", fix=fix)
        if "dense" not in index.heads:
            raise RequestError("the map is drawn from dense vectors", expected="an index with the head dense")
        with self._lock:
            count = len(index)
            kept = self._drawn.get((name, method))
            if kept is None or kept[0] is not index or kept[1] != count:
                kept = self._drawn[name, method] = (index, count, draw(index, method, count))
            return kept[2]


def draw(index: HybridIndex, method: str, total: int) -> dict[str, Any]:
    """Points between -1 and 1; of large indexes those of a sample."""
    documents, vector_ND = index.sample("dense", POINTS)
    variance = None
    if method == "pca":
        point_N2, variance = pca(vector_ND)
    else:
        point_N2 = umap(vector_ND)
    near_Nk, cosine_Nk = neighbours(vector_ND, _NEIGHBOURS)
    return {
        "method": method,
        "methods": methods(),
        "head": "dense",
        "variance": variance,
        "total": total,
        "ids": [one.id for one in documents],
        "texts": [one.text if len(one.text) <= _TEXT else f"{one.text[: _TEXT - 1]}…" for one in documents],
        "lengths": [len(one.text) for one in documents],
        "x": [round(float(x), 4) for x in point_N2[:, 0]],
        "y": [round(float(y), 4) for y in point_N2[:, 1]],
        "neighbours": near_Nk.tolist(),
        "cosines": [[round(each, 4) for each in row] for row in cosine_Nk.tolist()],
        "fields": fields_of(documents),
    }


def pca(vector_ND: Floats) -> tuple[Floats, float]:
    """The two directions in which the vectors differ most, as coordinates within [-1, 1], and their share of the whole
    variance. The sign of a direction is that of its largest entry, so that the same vectors give the same map."""
    count, width = vector_ND.shape
    centred_ND = vector_ND.astype(np.float64) - vector_ND.mean(axis=0, dtype=np.float64) if count else np.zeros((0, 1))
    if count < 2 or width < 2:
        first_N1 = centred_ND[:, :1]
        return _framed(np.concatenate([first_N1, np.zeros_like(first_N1)], axis=1)), 1.0
    covariance_DD = centred_ND.T @ centred_ND
    _, direction_D2 = eigh(covariance_DD, subset_by_index=(width - 2, width - 1))
    direction_D2 = direction_D2[:, ::-1]
    largest_2 = np.take_along_axis(direction_D2, np.abs(direction_D2).argmax(axis=0)[None], 0)[0]
    point_N2 = centred_ND @ (direction_D2 * np.where(largest_2 < 0, -1.0, 1.0))
    whole = float(np.trace(covariance_DD))
    return _framed(point_N2), float((point_N2**2).sum()) / whole if whole > 0 else 1.0


def umap(vector_ND: Floats) -> Floats:
    """Neighbourhoods of cosines, as coordinates within [-1, 1]; of fewer than four vectors as `pca` draws them."""
    from umap import UMAP

    if len(vector_ND) < 4:
        return pca(vector_ND)[0]
    nearby = min(15, len(vector_ND) - 1)
    start = "spectral" if len(vector_ND) > 32 else "random"
    made = UMAP(n_neighbors=nearby, metric="cosine", init=start, random_state=0, n_jobs=1)
    return _framed(np.asarray(made.fit_transform(vector_ND), np.float64))


def _framed(point_N2: Floats) -> Floats:
    """Around zero, the farthest coordinate at 1."""
    if not len(point_N2):
        return np.zeros((0, 2))
    point_N2 = point_N2 - (point_N2.max(axis=0) + point_N2.min(axis=0)) / 2
    farthest = float(np.abs(point_N2).max())
    return point_N2 / farthest if farthest > 0 else point_N2


def neighbours(vector_ND: Floats, count: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """The nearest other documents by cosine, and the cosines; fewer than `count` of a small index."""
    number = len(vector_ND)
    if number < 2:
        return np.zeros((number, 0), np.int64), np.zeros((number, 0), np.float32)
    length_N1 = np.maximum(np.linalg.norm(vector_ND, axis=1, keepdims=True), 1e-12)
    unit_ND = (vector_ND / length_N1).astype(np.float32)
    score_Nk, index_Nk = exact_top_k(unit_ND, unit_ND, count + 1)
    others_Nk = index_Nk != np.arange(number)[:, None]
    others_Nk[others_Nk.all(axis=1), -1] = False  # among many equal ones a document may not find itself
    shape = (number, index_Nk.shape[1] - 1)
    return index_Nk[others_Nk].reshape(shape), score_Nk[others_Nk].reshape(shape)


def fields_of(documents: Sequence[Document]) -> dict[str, dict[str, Any]]:
    """Metadata that a map can be coloured by: `numbers`, or `kinds` where values come again; null where a document has
    none. Fields that name each document by itself are left out."""
    count: dict[str, int] = {}
    for one in documents:
        for name, value in one.metadata.items():
            if isinstance(value, str | int | float):
                count[name] = count.get(name, 0) + 1
    found = {}
    for name in sorted(count, key=lambda name: -count[name])[:_FIELDS]:
        field = _field([one.metadata.get(name) for one in documents])
        if field is not None:
            found[name] = field
    return found


def _field(values: Sequence[Any]) -> dict[str, Any] | None:
    plain = [value if isinstance(value, str | int | float) else None for value in values]
    known = [value for value in plain if value is not None]
    different = len(set(known))
    if different < 2:
        return None
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in known) and different >= _NUMBERS:
        numbers = [None if value is None or not np.isfinite(float(value)) else float(value) for value in plain]
        return {"kind": "numbers", "values": numbers}
    if different > min(_KINDS, max(2, len(known) // 2)):
        return None
    return {"kind": "kinds", "values": [None if value is None else str(value)[:80] for value in plain]}
