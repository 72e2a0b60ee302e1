"""The same index on a Qdrant server or cluster, by URL: many readers and writers at once."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from embedsmith.core.errors import MissingExtraError, SearchError
from embedsmith.core.keys import checked_address
from embedsmith.core.progress import log
from embedsmith.core.text_out import remember_secret, without_secrets
from embedsmith.index.vector_store import (
    METADATA,
    FieldSpec,
    Request,
    StoredPoint,
    Vector,
    checked_settings,
    conditions,
)

T = TypeVar("T")
_WAITS = (0.5, 2.0, 8.0)
"""Seconds before another try of a call that did not reach the server."""
_NUMBERS = 2**20
"""Numbers in one call: some 22 MB of JSON, where a server by default refuses more than 32."""

_ROWS = 1000
"""Documents in one answer where all are looked through."""


class ServerStore:
    """A collection of a Qdrant server. `url` may also be `:memory:`, or a folder for the client's own engine.

    Errors: `SearchError` when the server cannot be reached after several tries, or refuses a call.
    """

    def __init__(self, url: str, collection: str, *, api_key: str | None = None, waits: Sequence[float] = _WAITS):
        try:
            from qdrant_client import QdrantClient, models
        except ImportError as error:
            raise MissingExtraError("qdrant-client", "search") from error
        self._models: Any = models
        if api_key is not None:
            remember_secret(api_key)
        if "://" in url:
            checked_address(url, "url")
            self._client = QdrantClient(url=url, api_key=api_key, check_compatibility=False)
        else:
            self._client = QdrantClient(url) if url == ":memory:" else QdrantClient(path=url)
        self._where, self._collection, self._waits = f"{url} ({collection})", collection, waits

    def settings(self) -> dict[str, Any] | None:
        if not self._call(lambda: self._client.collection_exists(self._collection)):
            return None
        metadata = self._call(lambda: self._client.get_collection(self._collection)).config.metadata or {}
        if "embedsmith" not in metadata:
            raise SearchError("this collection was not made by embedsmith", where=self._where, fix="choose a new name")
        return checked_settings(metadata["embedsmith"], self._where)

    def create(self, fields: Mapping[str, FieldSpec], settings: Mapping[str, Any]) -> None:
        models = self._models
        vectors = {name: self._params(spec) for name, spec in fields.items() if spec.kind != "sparse"}
        sparse = {name: models.SparseVectorParams() for name, spec in fields.items() if spec.kind == "sparse"}
        self._call(
            lambda: self._client.create_collection(
                self._collection,
                vectors_config=vectors,
                sparse_vectors_config=sparse,
                metadata={"embedsmith": dict(settings)},
            )
        )

    def _params(self, spec: FieldSpec) -> Any:
        models = self._models
        if spec.kind == "dense" and spec.precision == "float32":
            return models.VectorParams(size=spec.width, distance=models.Distance.DOT)
        if spec.kind == "dense":
            codes: Any = models.ScalarQuantization(
                scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
            )
            if spec.precision == "binary":  # signs of documents; of a query 8 bits a number
                asked = models.BinaryQuantizationQueryEncoding.SCALAR8BITS
                codes = models.BinaryQuantization(
                    binary=models.BinaryQuantizationConfig(always_ram=True, query_encoding=asked)
                )
            return models.VectorParams(
                size=spec.width, distance=models.Distance.DOT, on_disk=True, quantization_config=codes
            )
        by_token = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
        no_graph = models.HnswConfigDiff(m=0)
        return models.VectorParams(
            size=spec.width, distance=models.Distance.DOT, multivector_config=by_token, hnsw_config=no_graph
        )

    def upsert(self, points: Sequence[StoredPoint]) -> None:
        """In several calls where one would be larger than a server takes."""
        for some in _in_calls(points):
            rows = [
                self._models.PointStruct(
                    id=p.key, vector={name: self._vector(v) for name, v in p.vectors.items()}, payload=dict(p.payload)
                )
                for p in some
            ]
            self._call(lambda rows=rows: self._client.upsert(self._collection, rows, wait=True))  # type: ignore[misc]

    def delete(self, keys: Sequence[str]) -> None:
        chosen = self._models.PointIdsList(points=list(keys))
        self._call(lambda: self._client.delete(self._collection, chosen, wait=True))

    def payloads(self, keys: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
        found = self._call(
            lambda: self._client.retrieve(self._collection, list(keys), with_payload=list(names), with_vectors=False)
        )
        return {str(record.id): record.payload or {} for record in found}

    def search(self, requests: Sequence[Request]) -> list[list[tuple[str, float]]]:
        rows = [self._request(request) for request in requests]
        found = self._call(lambda: self._client.query_batch_points(self._collection, rows))
        return [[(str(point.id), float(point.score)) for point in answer.points] for answer in found]

    def _request(self, request: Request) -> Any:
        models = self._models
        must = []
        for key, kind, value in conditions(request.filter):
            if kind == "range":
                must.append(models.FieldCondition(key=f"{METADATA}.{key}", range=models.Range(**value)))
            else:
                match = models.MatchAny(any=value) if kind == "any" else models.MatchValue(value=value)
                must.append(models.FieldCondition(key=f"{METADATA}.{key}", match=match))
        if request.among is not None:
            must.append(models.HasIdCondition(has_id=sorted(request.among)))
        codes = None
        if request.rescore is not None:
            codes = models.QuantizationSearchParams(
                rescore=request.rescore > 0, oversampling=float(max(request.rescore, 1))
            )
        return models.QueryRequest(
            query=self._vector(request.vector),
            using=request.head,
            limit=request.limit,
            filter=models.Filter(must=must) if must else None,
            params=models.SearchParams(hnsw_ef=request.ef, exact=request.among is not None, quantization=codes),
        )

    def _vector(self, vector: Vector) -> Any:
        if isinstance(vector, tuple):
            return self._models.SparseVector(indices=vector[0], values=vector[1])
        return vector

    def sample(self, head: str, limit: int) -> list[tuple[Vector, dict[str, Any]]]:
        """In several calls where one would be larger than a server likes to send."""
        rows: list[tuple[Vector, dict[str, Any]]] = []
        after: Any = None
        for _ in range(0, limit, _ROWS):
            count = min(_ROWS, limit - len(rows))
            found, after = self._call(
                lambda count=count, after=after: self._client.scroll(  # type: ignore[misc]
                    self._collection, limit=count, offset=after, with_payload=True, with_vectors=[head]
                )
            )
            rows += [(point.vector[head], point.payload or {}) for point in found if head in (point.vector or {})]
            if after is None:
                break
        return rows

    def count(self) -> int:
        return int(self._call(lambda: self._client.count(self._collection, exact=True)).count)

    def optimize(self) -> None:
        """A server does this by itself."""

    def close(self) -> None:
        self._client.close()

    def _call(self, call: Callable[[], T]) -> T:
        """Try again where the server was not reached; what it refuses, it would refuse again."""
        from qdrant_client.http.exceptions import ApiException, ResponseHandlingException

        for number, wait in enumerate((*self._waits, None)):
            try:
                return call()
            except ResponseHandlingException as error:
                if wait is None:
                    raise SearchError(
                        f"the server cannot be reached ({error}), after {number + 1} tries",
                        where=self._where,
                        fix="start it, then give the same command again: what was written is kept",
                    ) from None
                log.warning("%s: %s; trying again in %g s", self._where, without_secrets(str(error)), wait)
                time.sleep(wait)
            except (ApiException, ValueError) as error:
                # its words may hold the key
                raise SearchError(f"the server says: {error}", where=self._where) from None
        raise AssertionError("the last try returns or raises")


def _in_calls(points: Sequence[StoredPoint]) -> Iterator[list[StoredPoint]]:
    """Points in order, at most `_NUMBERS` numbers together (a point of more comes alone)."""
    some: list[StoredPoint] = []
    held = 0
    for point in points:
        if some and held + point.numbers > _NUMBERS:
            yield some
            some, held = [], 0
        some, held = [*some, point], held + point.numbers
    if some:
        yield some
