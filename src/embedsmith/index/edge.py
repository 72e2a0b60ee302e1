"""An index in a folder, in this process: Qdrant Edge, with a write-ahead log. One process writes, or several read.

The engine writes into the folder even to read it, and two processes harm each other's files. So one reader at a time
has the folder itself open; all others, and those that may not write there, read a copy of their own.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from embedsmith.core.errors import CheckpointError, MissingExtraError, SearchError
from embedsmith.core.files import allocate, atomic_file, disk_errors, full_disk
from embedsmith.core.inputs import local_path, read_json
from embedsmith.core.outputs import clear_left, files_of, holder, sign
from embedsmith.index.vector_store import (
    METADATA,
    FieldSpec,
    Request,
    StoredPoint,
    Vector,
    checked_settings,
    conditions,
)

SETTINGS = "embedsmith_index.json"
_SHARD = "shard"
_FILES = "files.json"
"""The sizes of the engine's files when a writer left them; absent while one writes, and after it was killed."""
_LOCK = "lock"
"""Held by the one that writes, shared by those that read in place or copy."""
_FIRST = "lock-reader"
"""Held by the one reader in place."""
_MOMENT = "lock-files"
"""Held by that reader while it opens and closes the engine, shared by those that copy."""
_ROOM = 2**23
"""Bytes that the engine may need on the disk beside those of the documents."""


class EdgeStore:
    """`FOLDER/embedsmith_index.json` says what the index is, `FOLDER/shard` belongs to the engine.

    `read_only`: to search only; it may lie where nothing can be written, and others may search it at the same time.
    Errors: `SearchError` where another process writes to the index (or reads it, to one that would write), and for
    whatever the engine reports.
    """

    def __init__(self, folder: str | Path, *, read_only: bool = False) -> None:
        self._folder = Path(folder)
        try:
            import qdrant_edge
        except ImportError as error:
            raise MissingExtraError("qdrant-edge-py", "search") from error
        self._engine: Any = qdrant_edge
        self._shard: Any = None
        self._locks: list[IO[bytes]] = []
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        self._writes = False
        if self.settings() is None:
            return
        for file in self._folder.rglob("*"):  # the engine would wait for a pipe, and a loop of links is no lock
            local_path(file, SearchError)
        try:
            self._open_to_read() if read_only else self._open_to_write()
        except BaseException:
            self._let_go()
            raise

    def _open_to_write(self) -> None:
        self._hold()
        self._check_files()
        self._take_room(_ROOM)
        (self._folder / _FILES).unlink(missing_ok=True)
        self._writes = True
        self._load(self._folder / _SHARD)

    def _open_to_read(self) -> None:
        if not self._lock(_LOCK, fcntl.LOCK_SH | fcntl.LOCK_NB):
            raise self._busy()
        if self._may_write() and self._lock(_FIRST, fcntl.LOCK_EX | fcntl.LOCK_NB):
            with self._moment(fcntl.LOCK_EX):
                self._check_files()
                self._load(self._folder / _SHARD)
            return
        self._copy = tempfile.TemporaryDirectory(prefix="embedsmith-search-")
        place = Path(self._copy.name)
        with self._moment(fcntl.LOCK_SH), disk_errors(place):
            self._check_files()
            try:
                shutil.copytree(self._folder / _SHARD, place / _SHARD, copy_function=_copy_data)
            except shutil.Error as error:  # names of files and what the system said of each
                wrong = error.args[0][0]
                raise SearchError(f"cannot read {wrong[0]}: {wrong[2]}", where=self._folder) from error
        self._let_go(but_copy=True)
        self._load(place / _SHARD)

    def _load(self, shard: Path) -> None:
        with self._errors():
            self._shard = self._engine.EdgeShard.load(str(shard))

    def _sizes(self) -> dict[str, int]:
        """Of the engine's files, but for its log, and for those that it writes anew when it opens them."""
        files = (path for path in (self._folder / _SHARD / "segments").rglob("*") if path.is_file())
        kept = (path for path in files if not path.name.endswith("_journal.dat"))
        return {
            str(path.relative_to(self._folder)): 0 if path.suffix == ".json" else path.stat().st_size for path in kept
        }

    def _check_files(self) -> None:
        """Errors: `SearchError` where a file of the engine is missing, cut or too long: it would find less, or end the
        process."""
        path = self._folder / _FILES
        if not path.exists():
            return
        try:
            left = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            left = None
        left = left if isinstance(left, dict) else {}
        now = self._sizes()
        if wrong := sorted(name for name in {*now, *left} if left.get(name) != now.get(name)):
            raise SearchError(
                f"{wrong[0]} is not as it was left",
                where=self._folder,
                fix=f"delete {self._folder}, then index the documents again",
            )

    def _may_write(self) -> bool:
        shard = self._folder / _SHARD
        try:
            self._take_room(2**20)
        except (CheckpointError, OSError):
            return False
        return all(os.access(path, os.W_OK) for path in (shard, *shard.rglob("*")))

    def _take_room(self, size: int) -> None:
        """Errors: `CheckpointError` where the disk has no `size` bytes left: the engine writes into mapped files, and a
        full disk would end the process."""
        with disk_errors(self._folder), tempfile.TemporaryFile(dir=self._folder) as file:
            allocate(file, size)

    def settings(self) -> dict[str, Any] | None:
        path = self._folder / SETTINGS
        if not path.exists():
            return None
        fix = f"delete {self._folder}, then index again"
        return checked_settings(read_json(path, SearchError, fix=fix), path)

    def create(self, fields: Mapping[str, FieldSpec], settings: Mapping[str, Any]) -> None:
        """The settings are written last: a folder without them is no index, and is begun again."""
        engine, shard = self._engine, self._folder / _SHARD
        ours = (_SHARD, _FILES, _LOCK, _FIRST, _MOMENT)
        there = files_of(self._folder)
        if any(name.split("/")[0] not in ours for name in there) or (there and not (self._folder / _LOCK).exists()):
            raise SearchError("the folder holds other files", where=self._folder, fix="choose a new folder")
        self._hold()
        self._take_room(_ROOM)
        self._writes = True
        (self._folder / _FILES).unlink(missing_ok=True)
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
        if spec.kind == "dense" and spec.precision == "float32":
            return engine.EdgeVectorParams(spec.width, engine.Distance.Dot)
        if spec.kind == "dense":
            codes: Any = engine.ScalarQuantizationConfig(engine.ScalarType.Int8, always_ram=True)
            if spec.precision == "binary":  # signs of documents; of a query 8 bits a number
                asked = engine.BinaryQuantizationQueryEncoding.Scalar8Bits
                codes = engine.BinaryQuantizationConfig(always_ram=True, query_encoding=asked)
            return engine.EdgeVectorParams(spec.width, engine.Distance.Dot, on_disk=True, quantization_config=codes)
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
            texts = sum(len(json.dumps(dict(point.payload))) for point in points)
            self._take_room(_ROOM + 3 * texts + 24 * sum(point.numbers for point in points))
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
        exact, codes = request.among is not None, None
        if request.rescore is not None:
            codes = engine.QuantizationSearchParams(
                rescore=request.rescore > 0, oversampling=float(max(request.rescore, 1))
            )
        return engine.QueryRequest(
            request.limit,
            query=engine.Query.Nearest(self._vector(request.vector), using=request.head),
            filter=engine.Filter(must=must) if must else None,
            params=engine.SearchParams(hnsw_ef=request.ef, exact=exact, quantization=codes),
        )

    def _vector(self, vector: Vector) -> Any:
        return self._engine.SparseVector(*vector) if isinstance(vector, tuple) else vector

    def sample(self, head: str, limit: int) -> list[tuple[Vector, dict[str, Any]]]:
        with self._errors():
            request = self._engine.ScrollRequest(limit=limit, with_payload=True, with_vector=[head])
            found, _ = self._shard.scroll(request)
        return [(record.vector[head], record.payload or {}) for record in found if head in (record.vector or {})]

    def count(self) -> int:
        with self._errors():
            return int(self._shard.count(self._engine.CountRequest(exact=True)))

    def optimize(self) -> None:
        with self._errors():
            held = sum(path.stat().st_blocks * 512 for path in self._folder.rglob("*"))
            self._take_room(_ROOM + held)
            self._shard.optimize()

    def close(self) -> None:
        try:
            if self._shard is not None:
                alone = nullcontext() if self._copy else self._moment(fcntl.LOCK_EX)
                with alone, self._errors():
                    self._shard.close()
                    if self._writes:
                        with atomic_file(self._folder / _FILES) as file:
                            json.dump(self._sizes(), file, indent=1)
        finally:
            self._shard = None
            self._let_go()

    def _hold(self) -> None:
        """Keep other processes out; the system lets go when this one ends. The engine's own lock comes too late: a
        second process that opens the folder harms the files of the first before it is turned away."""
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            for name in (_LOCK, _FIRST, _MOMENT):  # for readers that could not make them
                (self._folder / name).touch()
        if not self._lock(_LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB):
            raise self._busy()
        with disk_errors(self._folder):
            sign(self._locks[-1].fileno(), "index")
            clear_left(self._folder)

    def _lock(self, name: str, how: int) -> bool:
        """Hold one of the locks until `close`; whether it could be had. Where there is none and none can be made,
        nobody else can write either."""
        path = self._folder / name
        try:
            file = path.open("r+b" if os.access(path, os.W_OK) else "rb" if path.exists() else "ab")
        except OSError:
            return True
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            file.close()
            return False
        except OSError:
            pass  # a file system without locks
        self._locks.append(file)
        return True

    @contextmanager
    def _moment(self, how: int) -> Iterator[None]:
        before = len(self._locks)
        self._lock(_MOMENT, how)
        try:
            yield
        finally:
            for file in self._locks[before:]:
                file.close()
            del self._locks[before:]

    def _busy(self) -> SearchError:
        told = (self._folder / _LOCK).read_text(encoding="utf-8", errors="replace")
        reads = self._lock(_LOCK, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return SearchError(
            f"another process has this index open: {'a search' if reads else holder(told)}",
            where=self._folder,
            fix="wait until it ends; several writers at a time need a Qdrant server (--url)",
        )

    def _let_go(self, but_copy: bool = False) -> None:
        for file in self._locks:
            file.close()
        self._locks = []
        if self._copy is not None and not but_copy:
            self._copy.cleanup()
            self._copy = None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with disk_errors(self._folder):
            try:
                yield
            except (OSError, SearchError, CheckpointError):
                raise
            except BaseException as error:  # the engine raises nothing more exact, and panics where files are damaged
                if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                    raise
                if (full := full_disk(error, self._folder)) is not None:
                    raise full from error
                raise SearchError(f"the index engine says: {error}", where=self._folder) from error


def _copy_data(source: str, target: str) -> None:
    """A copy of a file without its holes, of which the engine's files are full."""
    with open(source, "rb") as old, open(target, "wb") as new:
        place, size = 0, os.fstat(old.fileno()).st_size
        while place < size:
            try:
                start = os.lseek(old.fileno(), place, os.SEEK_DATA)
            except OSError:  # only a hole is left
                break
            place = os.lseek(old.fileno(), start, os.SEEK_HOLE)
            old.seek(start)
            new.seek(start)
            for left in range(place - start, 0, -(2**20)):
                new.write(old.read(min(left, 2**20)))
        new.truncate(size)
