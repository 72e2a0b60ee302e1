"""An index in a folder, in this process: Qdrant Edge, with a write-ahead log. One process at a time."""

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from embedsmith.core.errors import MissingExtraError, SearchError
from embedsmith.core.files import atomic_file, disk_errors
from embedsmith.core.inputs import read_json, typed
from embedsmith.index.engine import METADATA, FieldSpec, Request, StoredPoint, Vector, conditions

SETTINGS = "embedsmith_index.json"
_SHARD = "shard"
_LOCK = "lock"


@dataclass(frozen=True)
class _Settings:
    """What the file of settings says at least."""

    model: str
    fingerprint: str
    heads: list[str]


class EdgeStore:
    """`FOLDER/embedsmith_index.json` says what the index is, `FOLDER/shard` belongs to the engine.

    Errors: `SearchError` where another process has the index open, and for whatever the engine reports.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        try:
            import qdrant_edge
        except ImportError as error:
            raise MissingExtraError("qdrant-edge-py", "search") from error
        self._engine: Any = qdrant_edge
        self._shard: Any = None
        self._lock: IO[bytes] | None = None
        if self.settings() is not None:
            self._hold()
            with self._errors():
                self._shard = self._engine.EdgeShard.load(str(self._folder / _SHARD))

    def settings(self) -> dict[str, Any] | None:
        path = self._folder / SETTINGS
        if not path.exists():
            return None
        fix = "delete the folder and make the index again: embedsmith index"
        found = read_json(path, SearchError, fix=fix)
        typed(_Settings, found, path, SearchError, fix=fix)
        return found

    def create(self, fields: Mapping[str, FieldSpec], settings: Mapping[str, Any]) -> None:
        """The settings are written last: a folder without them is no index, and is begun again."""
        engine, shard = self._engine, self._folder / _SHARD
        if self._folder.exists() and any(path.name not in (_SHARD, _LOCK) for path in self._folder.iterdir()):
            raise SearchError("the folder holds other files", where=self._folder, fix="choose a new folder")
        self._hold()
        shutil.rmtree(shard, ignore_errors=True)
        with self._errors():
            shard.mkdir(parents=True)
            vectors = {name: self._params(spec) for name, spec in fields.items() if spec.kind != "sparse"}
            sparse = {name: engine.EdgeSparseVectorParams() for name, spec in fields.items() if spec.kind == "sparse"}
            self._shard = engine.EdgeShard.create(str(shard), engine.EdgeConfig(vectors=vectors, sparse_vectors=sparse))
        with atomic_file(self._folder / SETTINGS) as file:
            json.dump(dict(settings), file, ensure_ascii=False, indent=1)

    def _params(self, spec: FieldSpec) -> Any:
        """Scores are inner products; token vectors get no graph: they re-rank, or are compared one by one."""
        engine = self._engine
        if spec.kind == "dense":
            return engine.EdgeVectorParams(spec.width, engine.Distance.Dot)
        by_token = engine.MultiVectorConfig(engine.MultiVectorComparator.MaxSim)
        no_graph = engine.HnswIndexConfig(m=0, ef_construct=4, full_scan_threshold=10)
        return engine.EdgeVectorParams(
            spec.width, engine.Distance.Dot, multivector_config=by_token, hnsw_config=no_graph
        )

    def upsert(self, points: Sequence[StoredPoint]) -> None:
        with self._errors():
            rows = [
                self._engine.Point(p.key, {name: self._vector(v) for name, v in p.vectors.items()}, dict(p.payload))
                for p in points
            ]
            self._shard.update(self._engine.UpdateOperation.upsert_points(rows))
            self._shard.flush()

    def delete(self, keys: Sequence[str]) -> None:
        with self._errors():
            self._shard.update(self._engine.UpdateOperation.delete_points(list(keys)))
            self._shard.flush()

    def payloads(self, keys: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
        with self._errors():
            found = self._shard.retrieve(list(keys), list(names), False)
        return {str(record.id): record.payload or {} for record in found}

    def search(self, requests: Sequence[Request]) -> list[list[tuple[str, float]]]:
        with self._errors():
            batch = self._engine.QueryBatchRequest([self._request(request) for request in requests])
            return [[(str(point.id), point.score) for point in found] for found in self._shard.query_batch(batch)]

    def _request(self, request: Request) -> Any:
        engine = self._engine
        must = []
        for key, kind, value in conditions(request.filter):
            if kind == "range":
                must.append(engine.FieldCondition(f"{METADATA}.{key}", range=engine.RangeFloat(**value)))
            else:
                match = engine.MatchAny(value) if kind == "any" else engine.MatchValue(value)
                must.append(engine.FieldCondition(f"{METADATA}.{key}", match=match))
        if request.among is not None:
            must.append(engine.HasIdCondition(set(request.among)))
        exact = request.among is not None
        return engine.QueryRequest(
            request.limit,
            query=engine.Query.Nearest(self._vector(request.vector), using=request.head),
            filter=engine.Filter(must=must) if must else None,
            params=engine.SearchParams(hnsw_ef=request.ef, exact=exact),
        )

    def _vector(self, vector: Vector) -> Any:
        return self._engine.SparseVector(*vector) if isinstance(vector, tuple) else vector

    def count(self) -> int:
        with self._errors():
            return int(self._shard.count(self._engine.CountRequest(exact=True)))

    def optimize(self) -> None:
        with self._errors():
            self._shard.optimize()

    def close(self) -> None:
        if self._shard is not None:
            with self._errors():
                self._shard.close()
            self._shard = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _hold(self) -> None:
        """Keep other processes out; the system lets go when this one ends. The engine's own lock comes too late: a
        second process that opens the folder harms the files of the first before it is turned away."""
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / _LOCK).open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            self._lock = None
            raise SearchError(
                "another process has this index open",
                where=self._folder,
                fix="wait until it ends; several processes at a time need a Qdrant server (--url)",
            ) from error

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with disk_errors(self._folder):
            try:
                yield
            except (OSError, SearchError):
                raise
            except Exception as error:  # the engine raises nothing more exact
                if "No space left" in str(error):
                    raise OSError(28, "No space left on device") from error
                raise SearchError(f"the index engine says: {error}", where=self._folder) from error
