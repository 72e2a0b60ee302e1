"""What an index asks of its engine. Both engines have Qdrant's data model, each in classes of its own."""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from embedsmith.core.errors import SearchError
from embedsmith.core.reps import Dense, Euclidean, MultiVector, Representation, Reps, Sparse
from embedsmith.search.quantised import SearchPrecision

Kind = Literal["dense", "sparse", "multivector"]
Vector = list[float] | list[list[float]] | tuple[list[int], list[float]]
"""Dense: D numbers. Multi-vector: a list of D numbers for every token. Sparse: coordinates, and their weights."""

Filter = Mapping[str, Any]
"""Conditions on metadata, all of which must hold: `{"lang": "en"}`, `{"lang": ["en", "zh"]}`, `{"year": {"gte": 2000}}`
(gt, gte, lt, lte)."""

METADATA = "metadata"
"""The payload's key under which a document's metadata stand."""


@dataclass(frozen=True)
class FieldSpec:
    """One named field of every document; `width` is D, and None for a sparse field. `precision`: of the codes by which
    the engine looks for dense vectors; the full ones stay beside them, on the disk."""

    kind: Kind
    width: int | None = None
    precision: SearchPrecision = "float32"

    @staticmethod
    def of(representation: Representation, precision: SearchPrecision = "float32") -> FieldSpec:
        """Errors: `SearchError` for a kind of representation that no engine holds."""
        if isinstance(representation, Euclidean):
            raise SearchError(
                f"an index compares by inner products, and this model by distances ({type(representation).__name__})",
                expected="a model whose similarity_fn_name is cosine or dot",
                fix="load it with model.similarity=cosine, or dot, if that ranks as well",
            )
        if isinstance(representation, Dense):
            return FieldSpec("dense", representation.vector_ND.shape[1], precision)
        if isinstance(representation, MultiVector):
            return FieldSpec("multivector", representation.vector_NTD.shape[2])
        if isinstance(representation, Sparse):
            return FieldSpec("sparse")
        raise SearchError(
            f"an index cannot hold {type(representation).__name__}", expected="dense, sparse or multivector"
        )


@dataclass(frozen=True)
class StoredPoint:
    """A document as the engine keeps it. A head may be absent: a text without a single sparse weight has no vector."""

    key: str
    vectors: Mapping[str, Vector]
    payload: Mapping[str, Any]

    @property
    def numbers(self) -> int:
        """How many its vectors are made of."""
        return sum(
            2 * len(vector[0])
            if isinstance(vector, tuple)
            else sum(len(one) if isinstance(one, list) else 1 for one in vector)
            for vector in self.vectors.values()
        )


@dataclass(frozen=True)
class Request:
    """The best `limit` documents of one field. `among`: only these keys, scored exactly. `ef`: how many neighbours the
    graph search keeps in view (`None`: the engine's default). `rescore`: of a field with codes, how many times `limit`
    are scored by their full vectors (0: the codes decide)."""

    head: str
    vector: Vector
    limit: int
    filter: Filter = field(default_factory=dict)
    among: frozenset[str] | None = None
    ef: int | None = None
    rescore: int | None = None


class Store(Protocol):
    """An engine's collection. Every method raises `SearchError` where the engine fails."""

    def settings(self) -> dict[str, Any] | None:
        """What `create` was given; `None` where there is no index yet."""

    def create(self, fields: Mapping[str, FieldSpec], settings: Mapping[str, Any]) -> None: ...

    def upsert(self, points: Sequence[StoredPoint]) -> None:
        """Write or replace; durable when it returns."""

    def delete(self, keys: Sequence[str]) -> None: ...

    def payloads(self, keys: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Those of the keys that exist, with the named entries of their payload."""

    def search(self, requests: Sequence[Request]) -> list[list[tuple[str, float]]]:
        """(key, score) of the best of every request, best first. A multi-vector score is the sum over query tokens."""

    def sample(self, head: str, limit: int) -> list[tuple[Vector, dict[str, Any]]]:
        """The vectors of a head and the payloads of `limit` documents, those of the lowest keys: keys are hashes of
        ids, so that they are as good as drawn by chance, and the same every time. Without those that lack the head."""

    def count(self) -> int: ...

    def optimize(self) -> None:
        """Build what makes searching fast, where the engine does not do so by itself."""

    def close(self) -> None: ...


def checked_settings(found: Any, where: object) -> dict[str, Any]:
    """What an index says of itself. Errors: `SearchError` for anything but what `open_index` writes."""
    texts = isinstance(found, dict) and all(isinstance(found.get(key), str) for key in ("model", "fingerprint"))
    heads = found.get("heads") if texts else None
    named = isinstance(heads, list) and heads and all(isinstance(head, str) for head in heads)
    known = texts and found.get("precision", "float32") in ("float32", "int8", "binary")
    if not named or not known or found.get("format") != 1:
        raise SearchError(
            "not what embedsmith writes of an index", where=where, fix="delete the index, then make it again"
        )
    return dict(found)


def check_finite(reps: Reps, names: Sequence[str]) -> None:
    """Errors: `SearchError` naming the first text, of those called `names`, with a value that is not finite."""
    for head, rep in reps.items():
        for tensor in rep.floating():
            if not bool(tensor.isfinite().all()):
                row = int((~tensor.isfinite()).flatten(1).any(1).nonzero()[0])
                raise SearchError(
                    f"the {head} vector of {names[row]} is not finite",
                    fix="check the weights; a run that diverged leaves NaN in them",
                )


def point_key(document_id: str) -> str:
    """The engine's key of a document: a UUID made from its id, so that writing a document again replaces it."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, document_id))


def vectors_of(reps: Reps, count: int) -> list[dict[str, Vector]]:
    """The vectors of every text by head; a head that has nothing to find a text by (no sparse weight, no token) is left
    out."""
    found: list[dict[str, Vector]] = [{} for _ in range(count)]
    for head, rep in reps.items():
        rows: Iterable[Vector | None]
        if isinstance(rep, Dense):
            rows = rep.vector_ND.tolist()
        elif isinstance(rep, MultiVector):
            pairs = zip(rep.vector_NTD, rep.mask_NT, strict=True)
            rows = (vector_TD[mask_T].tolist() or None for vector_TD, mask_T in pairs)
        else:
            assert isinstance(rep, Sparse)
            rows = ((list(best), list(best.values())) if best else None for best in lexical_weights(rep))
        for of_text, vector in zip(found, rows, strict=True):
            if vector is not None:
                of_text[head] = vector
    return found


def lexical_weights(representation: Sparse) -> list[dict[int, float]]:
    """Weight by coordinate of every row. A token that comes twice counts with its larger weight, as in M3."""
    rows = zip(representation.coordinate_NT.tolist(), representation.weight_NT.tolist(), strict=True)
    found: list[dict[int, float]] = []
    for coordinates, weights in rows:
        best: dict[int, float] = {}
        for coordinate, weight in zip(coordinates, weights, strict=True):
            if weight != 0 and weight > best.get(coordinate, -math.inf):
                best[coordinate] = weight
        found.append(best)
    return found


_BOUNDS = ("gt", "gte", "lt", "lte")
_KEY = re.compile(r'(?:[\w-]+|"[^"]+")(?:\[\d*\])*(?:\.(?:[\w-]+|"[^"]+")(?:\[\d*\])*)*')
"""A path into metadata, as Qdrant reads it; names with other signs stand in quotes."""


def conditions(filter_: Filter) -> list[tuple[str, str, Any]]:
    """(key, "value" | "any" | "range", value) of every condition, checked. Errors: `SearchError`."""
    found: list[tuple[str, str, Any]] = []
    for key, wanted in filter_.items():
        if not _KEY.fullmatch(key):
            raise SearchError(f"the filter on {key!r}", expected='a name such as lang, "two words" or author.name')
        if isinstance(wanted, Mapping):
            if not wanted or set(wanted) - set(_BOUNDS) or not all(map(_is_number, wanted.values())):
                raise SearchError(
                    f"the filter on {key!r} is {dict(wanted)}", expected=f"numbers for {', '.join(_BOUNDS)}"
                )
            found.append((key, "range", {name: float(bound) for name, bound in wanted.items()}))
        elif isinstance(wanted, list | tuple):
            if not wanted or len({type(one) for one in wanted}) > 1 or not all(_is_exact(one) for one in wanted):
                raise SearchError(f"the filter on {key!r} is {list(wanted)}", expected="texts, or whole numbers")
            found.append((key, "any", list(wanted)))
        elif _is_exact(wanted):
            found.append((key, "value", wanted))
        else:
            raise SearchError(
                f"the filter on {key!r} is {wanted!r}", expected="a text, a whole number, true or false, or a range"
            )
    return found


def _is_exact(value: object) -> bool:
    """A text of Unicode, or a whole number of 64 bits."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode() == value
    return isinstance(value, int) and -(2**63) <= value < 2**63


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
