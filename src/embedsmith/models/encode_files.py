"""Files of texts to a folder of vectors that can be memory-mapped: in blocks, over several processes, ranks or shards
(`core/sharing.py`), continued after a kill.

The folder holds `vectors.npy` (row i is text i), `ids.txt` (line i is its id), `meta.json` (what made it), for int8
`ranges.npy`, and while work goes on `progress-*.json`: the blocks that are whole on the disk, a file for each who
writes them. None of them is believed: their sizes must agree, and a block without its vectors is made again. Vectors
are written where they belong, so that nothing has to be joined in the end.
"""

import hashlib
import io
import json
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch.multiprocessing.spawn import ProcessException, spawn

from embedsmith.core.encoder import Role, tokenizer_json
from embedsmith.core.errors import CheckpointError, DataError, ModelError, RecipeError
from embedsmith.core.files import allocate, atomic_file, disk_errors
from embedsmith.core.outputs import clear_left, delivered, files_of
from embedsmith.core.progress import progress_bar
from embedsmith.core.quantize import AnyArray, FloatArray, quantize, value_ranges
from embedsmith.core.settings import Count, section
from embedsmith.core.sharing import Shard, Sharing
from embedsmith.data.formats.texts import FileText, read_texts
from embedsmith.models.embedder import Embedder
from embedsmith.models.encode import Compute, settled_dtype
from embedsmith.models.load import best_device, load

_CALIBRATION = 2048
_STATES = ("preparing", "encoding", "complete")
_LATER = {"tokenizer": ...}
"""What folders of earlier versions do not say."""


@dataclass(frozen=True)
class _Array:
    """How rows of numbers lie in a .npy file, so that one is written and checked without being mapped: writing into a
    mapped file ends the process where the disk is full."""

    path: Path
    kind: str
    rows: int
    width: int

    @property
    def header(self) -> bytes:
        head = io.BytesIO()
        kind = np.lib.format.dtype_to_descr(np.dtype(self.kind))
        content = {"descr": kind, "fortran_order": False, "shape": (self.rows, self.width)}
        np.lib.format.write_array_header_1_0(head, content)
        return head.getvalue()

    @property
    def size(self) -> int:
        return len(self.header) + self.rows * self.row_size

    @property
    def row_size(self) -> int:
        return self.width * np.dtype(self.kind).itemsize

    def allocate(self, replace: bool) -> None:
        """Errors: `CheckpointError` where the disk has no room for it."""
        if replace:
            self.path.unlink(missing_ok=True)
        with atomic_file(self.path, "wb", replace=replace) as file:
            file.write(self.header)
            allocate(file, self.size)

    def check(self) -> None:
        """Errors: `CheckpointError` for a file that is missing, of another size or of other numbers."""
        with _found(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != self.size or file.read(len(self.header)) != self.header:
                what = f"{size} bytes that are not {self.rows} rows of {self.width} numbers of {self.kind}"
                raise _damaged(what, self.path)

    def read(self, start: int, rows: int) -> AnyArray:
        with _found(self.path) as file:
            file.seek(len(self.header) + start * self.row_size)
            found: AnyArray = np.frombuffer(file.read(rows * self.row_size), self.kind)
            return found.reshape(-1, self.width)

    def write(self, file: BinaryIO, start: int, values: AnyArray) -> None:
        """Rows from `start` on, durable when it returns."""
        file.seek(len(self.header) + start * self.row_size)
        file.write(np.ascontiguousarray(values).tobytes())
        file.flush()
        os.fsync(file.fileno())


@section
@dataclass(frozen=True)
class EncodeJob:
    """What to encode and how.

    - `model`: its folder or hub id.
    - `changes`: fields of `ModelConfig` that change it, such as `pooling`, `prompts` and `max_length`.
    - `files`: those of the texts, in their order.
    - `out`: the folder of the vectors.
    - `role`: whose prompt is put before the texts.
    - `task`: use the prompt of this task.
    - `column`: the column or key that holds the texts.
    - `dim`: leading coordinates that are kept.
    - `stored`: the type of the numbers on disk.
    - `dtype`: computes under autocast; `auto` takes 16 bits where the hardware multiplies them.
    - `block`: texts between two saves of the state.
    - `processes`: each takes contiguous blocks and its share of the CPU threads.
    """

    model: str
    files: tuple[Path, ...]
    out: Path
    role: Role = "document"
    task: str | None = None
    column: str | None = None
    dim: Count | None = None
    stored: Literal["float32", "float16", "int8"] = "float32"
    dtype: Compute | None = None
    block: Count = 4096
    processes: Count = 1
    changes: dict[str, Any] = field(default_factory=dict)

    def texts(self) -> Iterator[FileText]:
        """Of all files. In JSON lines a title stands in front of its text; in tables only the one column counts."""
        for path in self.files:
            yield from read_texts(path, column=self.column, titles=".jsonl" in path.suffixes)

    def identity(self, model: Embedder) -> dict[str, Any]:
        """Everything the vectors depend on."""
        settings = json.loads(json.dumps(asdict(model.settings)))
        del settings["similarity"], settings["truncate_dim"]  # the latter is in `dim`
        return {
            "format": 1,
            "weights": weights_hash(model),
            "tokenizer": hashlib.sha256(tokenizer_json(model.tokenizer).encode()).hexdigest(),
            "settings": settings,
            "prompt": model.settings.prompt_for(self.role, self.task),
            "dim": self.dim or model.encoded_dimension,
            "stored": self.stored,
            "dtype": self.dtype or "float32",
            "column": self.column,
            "block": self.block,
            "inputs": [[path.name, _file_hash(path)] for path in self.files],
        }

    def prepare(self, model: Embedder, replace: bool) -> int:
        """Read everything once: ids, and for int8 the ranges of an evenly spaced sample. Takes the room that the
        vectors need on the disk; the number of texts. Without `replace`, what another shard has written stays."""
        with atomic_file(self.out / "ids.txt") as file:
            count = 0
            for count, one in enumerate(self.texts(), start=1):
                if one.id is not None and any(mark in one.id for mark in "\n\r"):
                    raise DataError(f"the id {one.id!r} has a line break", where=one.where, expected="a one-line id")
                file.write(f"{count - 1 if one.id is None else one.id}\n")
        if count == 0:
            raise DataError("no text in these files", where=", ".join(map(str, self.files)))
        if self.stored == "int8":
            sample = list(islice(self.texts(), 0, None, -(-count // _CALIBRATION)))
            with atomic_file(self.out / "ranges.npy", "wb", replace=replace) as file:
                [vectors] = self.vectors(model, iter([[one.text for one in sample]]))
                np.save(file, value_ranges(self.finite_vectors(vectors, sample)))
        self.array(model, count).allocate(replace)
        return count

    def array(self, model: Embedder, count: int) -> _Array:
        return _Array(self.out / "vectors.npy", self.stored, count, self.dim or model.encoded_dimension)

    def check(self, model: Embedder, count: int) -> None:
        """Errors: `CheckpointError` unless the files are those of so many texts."""
        self.array(model, count).check()
        with _found(self.out / "ids.txt") as file:
            lines = sum(part.count(b"\n") for part in iter(lambda: file.read(2**20), b""))
        if lines != count:
            raise _damaged(f"{lines} ids of {count} vectors", self.out / "ids.txt")
        self.ranges(model)

    def ranges(self, model: Embedder) -> FloatArray | None:
        """Of every coordinate, for int8. Errors: `CheckpointError` for a file that holds anything else."""
        if self.stored != "int8":
            return None
        array = _Array(self.out / "ranges.npy", "float32", 2, self.dim or model.encoded_dimension)
        array.check()
        ranges = array.read(0, 2)
        if not np.isfinite(ranges).all():
            raise _damaged("ranges that are not finite", array.path)
        return ranges

    def write_blocks(self, model: Embedder, count: int, blocks: Sequence[int], worker: str) -> Iterator[int]:
        """Encode the given blocks (rising); each is on the disk, then entered in this worker's progress file, then
        yielded. While a GPU computes one the next is read and tokenised, in a thread."""
        ranges, array = self.ranges(model), self.array(model, count)
        done = self.progress(self.out / f"progress-{worker}.json", count)
        reading: deque[list[FileText]] = deque()  # blocks that are read and not yet written

        def windows() -> Iterator[list[str]]:
            for texts in self.blocks_of_texts(count, blocks):
                reading.append(texts)
                yield [one.text for one in texts]

        with disk_errors(array.path), array.path.open("r+b") as file:
            for place, made in zip(blocks, self.vectors(model, windows()), strict=True):
                vectors: AnyArray = self.finite_vectors(made, reading.popleft())
                if self.stored == "int8":
                    vectors = quantize(vectors, "int8", ranges)
                array.write(file, place * self.block, vectors)
                done.append(place)
                _write_json(self.out / f"progress-{worker}.json", done)
                yield place

    def blocks_of_texts(self, count: int, blocks: Sequence[int]) -> Iterator[list[FileText]]:
        """The texts of the given blocks (rising), in one pass over the files. Errors: `DataError` for files that have
        changed."""
        every, position = self.texts(), 0
        for place in blocks:
            start = place * self.block
            texts = list(islice(every, start - position, start - position + self.block))
            position = start + len(texts)
            if position != min(start + self.block, count):
                raise DataError(
                    f"{position} texts instead of {count}: the files changed while they were read",
                    where=", ".join(map(str, self.files)),
                    fix=f"delete {self.out}, then give the same command again",
                )
            yield texts

    def finite_vectors(self, vectors: AnyArray, texts: Sequence[FileText]) -> AnyArray:
        """The vectors, as they are stored but for int8. Errors: `ModelError` naming the text whose vector is not
        finite."""
        with np.errstate(over="ignore"):
            stored = vectors if self.stored == "int8" else vectors.astype(self.stored)
        if not np.isfinite(stored).all():
            row = int((~np.isfinite(stored)).any(1).argmax())
            small = np.isfinite(vectors[row]).all()
            raise ModelError(
                f"the vector of this text is not finite{f' in {self.stored}' if small else ''}",
                where=texts[row].where,
                fix="give --stored float32"
                if small
                else f"check the weights of {self.model}; a run that diverged leaves NaN in them",
            )
        return stored

    def vectors(self, model: Embedder, windows: Iterator[Sequence[str]]) -> Iterator[AnyArray]:
        """Of each window of texts."""
        return model.encode_windows(windows, self.role, self.task, dim=self.dim, dtype=self.dtype)

    def progress(self, path: Path, count: int) -> list[int]:
        """The blocks that a progress file names; none where it is not what was written."""
        places = _read_json(path) if path.exists() else []
        if isinstance(places, list) and all(type(place) is int for place in places):
            return places if set(places) <= set(range(-(-count // self.block))) else []
        return []

    def blocks_named(self, count: int) -> set[int]:
        """Blocks that are said to be whole on the disk."""
        return set(chain.from_iterable(self.progress(path, count) for path in self.out.glob("progress-*.json")))

    def count_done(self, count: int) -> int:
        """How many of `count` texts lie in such blocks."""
        return sum(min(self.block, count - place * self.block) for place in self.blocks_named(count))

    def blocks_done(self, model: Embedder, count: int, gather: bool) -> list[int]:
        """Blocks that are done, whoever did them; with `gather` moved to the first worker's file: the number of
        processes may change. A block with a row of zeros, as it was allocated, is not done."""
        array, named = self.array(model, count), sorted(self.blocks_named(count))
        done = [place for place in named if array.read(place * self.block, self.block).any(1).all()]
        if gather:
            _write_json(self.out / "progress-0.json", done)
            for path in self.out.glob("progress-*.json"):
                if path.name != "progress-0.json":
                    path.unlink()
        return done

    def resume_or_start(self, identity: dict[str, Any], model: Embedder, sharing: Sharing) -> dict[str, Any]:
        """The folder's own state when it was made by the same command; a fresh one when it holds no vectors yet."""
        out, path = self.out, self.out / "meta.json"
        if not path.exists() and ((out.exists() and not out.is_dir()) or files_of(out)):
            raise CheckpointError("this is not an empty folder", where=out, fix="choose a new output folder")
        meta = _read_json(path) if path.exists() else {"format": 1, "state": "preparing"}
        if not isinstance(meta, dict) or meta.get("format") != 1 or meta.get("state") not in _STATES:
            raise _damaged("not what encode writes", path)
        if sharing.mode != "shard":  # what others are writing would go
            clear_left(out)
        if meta["state"] == "preparing":
            if sharing.mode == "join":
                sharing.refuse_unbegun()
            meta = {"state": "preparing", **identity}
            _write_json(path, meta)
            return meta
        if different := [key for key, value in identity.items() if meta.get(key, _LATER.get(key)) not in (value, ...)]:
            raise CheckpointError(
                f"this folder was made with another {', '.join(different)}",
                where=out,
                fix="give the same files and options to continue it, or choose a new output folder",
            )
        if type(meta.get("count")) is not int or meta["count"] < 1:
            raise _damaged(f"the count is {meta.get('count')!r}", path)
        self.check(model, meta["count"])
        return meta

    def write_in_processes(self, todo: Sequence[int], count: int, name: str, bar: Any) -> None:
        """Contiguous shares of the blocks, a process each; the bar follows their progress files. How many threads a
        process has does not depend on how much is left, so that a continued run gives the same numbers."""
        shares = [share.tolist() for share in np.array_split(np.asarray(todo), min(self.processes, len(todo)))]
        threads = max(torch.get_num_threads() // self.processes, 1)
        context = spawn(_worker, args=(self, count, shares, threads, name), nprocs=len(shares), join=False, daemon=True)
        first = seen = self.count_done(count)
        wanted = sum(min(self.block, count - place * self.block) for place in todo)
        try:
            while not context.join(timeout=0.5):
                done = min(self.count_done(count), first + wanted)  # other shards write, too
                bar.advance(done - seen)
                seen = done
        except ProcessException as error:
            said = re.split(r"^[\w.]*(?:Error|Interrupt): ", str(error).strip(), flags=re.MULTILINE)[-1]
            raise ModelError(
                f"an encoding process failed: {said}",
                where=self.out,
                fix="run the same command again to continue; with less memory, use fewer processes",
            ) from error
        bar.advance(first + wanted - seen)


def encode_files(
    job: EncodeJob, show_progress: bool | None = None, *, shard: Shard | None = None, join: bool = False
) -> int:
    """Encode all texts of `job.files` into `job.out`; the number of texts. The same call continues a killed one.

    The ranks of a launcher share the blocks. `shard`: which of how many this is, `(0, 4)` or `"0/4"`, for shards that
    are started each by itself; `join`: end their work. Errors: `DataError` for unreadable input; `CheckpointError` when
    `out` holds other vectors, or other files, or when blocks are missing at the join.
    """
    if not job.files:
        raise DataError("nothing to encode", expected="at least one file")
    with delivered(job.out, "encode", shared=shard is not None or join) as place:
        job = replace(job, out=Path(place))
        sharing = Sharing.asked("encode", job.out, shard, join)
        if sharing.mode == "ranks" and job.processes > 1:
            raise RecipeError(
                "--processes under a launcher, whose ranks are the processes", fix="leave --processes out"
            )
        with sharing.claim():
            return _encode(job, sharing, show_progress)


def _encode(job: EncodeJob, sharing: Sharing, show_progress: bool | None) -> int:
    model = sharing.every(lambda: load(job.model, **job.changes))
    job = replace(job, dtype=settled_dtype(job.dtype, model.device))  # what `auto` is belongs to the folder's identity
    identity = sharing.every(lambda: job.identity(model))
    sharing.agree(identity)
    meta = sharing.first(lambda: _begun(job, identity, model, sharing))
    count = int(meta["count"])
    blocks = range(-(-count // job.block))
    if meta["state"] == "encoding":
        done = sharing.first(lambda: job.blocks_done(model, count, gather=sharing.ends and sharing.mode != "join"))
        todo = sharing.share(blocks, set(done))
        sharing.every(lambda: _write(job, model, count, todo, sharing, show_progress))
        if not sharing.ends:
            sharing.tell(len(blocks))
            return count
    sharing.first(lambda: _end(job, model, meta, sharing, len(blocks)))
    return count


def _begun(job: EncodeJob, identity: dict[str, Any], model: Embedder, sharing: Sharing) -> dict[str, Any]:
    """The state of the folder, made ready."""
    meta = job.resume_or_start(identity, model, sharing)
    if meta["state"] == "preparing":
        meta |= {"count": job.prepare(model, replace=sharing.mode != "shard"), "state": "encoding"}
        _write_json(job.out / "meta.json", meta)
    return meta


def _write(
    job: EncodeJob, model: Embedder, count: int, todo: Sequence[int], sharing: Sharing, show_progress: bool | None
) -> None:
    """Make the given blocks."""
    every = sum(min(job.block, count - place * job.block) for place in todo)
    done = 0 if sharing.count > 1 else count - every
    with progress_bar("encode", done + every, done=done, visible=show_progress) as bar:
        if job.processes == 1 or not todo:
            for place in job.write_blocks(model, count, todo, worker=sharing.name):
                bar.advance(min(job.block, count - place * job.block))
        else:
            job.write_in_processes(todo, count, sharing.name, bar)


def _end(job: EncodeJob, model: Embedder, meta: dict[str, Any], sharing: Sharing, blocks: int) -> None:
    """Say that the vectors are whole, if they are."""
    if meta["state"] == "encoding":
        sharing.refuse_missing(set(range(blocks)) - job.blocks_named(meta["count"]), blocks)
        job.check(model, meta["count"])
        _write_json(job.out / "meta.json", meta | {"state": "complete"})
    for path in job.out.glob("progress-*.json"):
        path.unlink()
    sharing.end()


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 of all weights by name: equal for equal models, wherever they lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read this file ({error.strerror})", where=path, fix="check the path") from error


def _worker(index: int, job: EncodeJob, count: int, shares: list[list[int]], threads: int, name: str) -> None:
    torch.set_num_threads(threads)
    device = best_device()
    if device == "cuda":
        device = f"cuda:{index % torch.cuda.device_count()}"
    model, worker = load(job.model, device=device, **job.changes), f"{name}-process-{index}"
    for _ in job.write_blocks(model, count, shares[index], worker):
        pass


def _found(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise _damaged(f"cannot read this file ({error.strerror})", path) from error


def _damaged(what: str, path: str | Path) -> CheckpointError:
    return CheckpointError(what, where=path, fix=f"delete {Path(path).parent}, then give the same command again")


def _read_json(path: Path) -> Any:
    """`None` for what is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
