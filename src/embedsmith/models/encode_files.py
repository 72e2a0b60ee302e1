"""Files of texts to a folder of memory-mapped vectors: in blocks, over several processes, continued after a kill.

The folder holds `vectors.npy` (row i is text i), `ids.txt` (line i is its id), `meta.json` (what made it), for int8
`ranges.npy`, and while work goes on `progress-*.json`: the blocks that are whole on the disk.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.multiprocessing.spawn import ProcessException, spawn

from embedsmith.core.encoder import Role
from embedsmith.core.errors import CheckpointError, DataError, ModelError
from embedsmith.core.files import atomic_file
from embedsmith.core.progress import progress_bar
from embedsmith.data.formats.texts import FileText, read_texts
from embedsmith.models.config import ComputeType
from embedsmith.models.embedder import Embedder
from embedsmith.models.encode import AnyArray, quantize, value_ranges
from embedsmith.models.load import best_device, load

_CALIBRATION = 2048


@dataclass(frozen=True)
class EncodeJob:
    """What to encode and how. `stored`: the type of the numbers on disk; `block`: texts between two saves of the state.

    `dtype`: computes under autocast. `processes`: each takes contiguous blocks and its share of the CPU threads.
    """

    model: str
    files: tuple[Path, ...]
    out: Path
    role: Role = "document"
    task: str | None = None
    column: str | None = None
    dim: int | None = None
    stored: Literal["float32", "float16", "int8"] = "float32"
    dtype: ComputeType | None = None
    block: int = 4096
    processes: int = 1

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
            "settings": settings,
            "prompt": model.settings.prompt_for(self.role, self.task),
            "dim": self.dim or model.encoded_dimension,
            "stored": self.stored,
            "dtype": self.dtype or "float32",
            "column": self.column,
            "block": self.block,
            "inputs": [[path.name, _file_hash(path)] for path in self.files],
        }

    def prepare(self, model: Embedder) -> int:
        """Read everything once: ids, and for int8 the ranges of an evenly spaced sample. Makes an empty array; the
        number of texts."""
        with atomic_file(self.out / "ids.txt") as file:
            count = 0
            for count, one in enumerate(self.texts(), start=1):
                if one.id is not None and ("\n" in one.id or "\r" in one.id):
                    raise DataError(f"the id {one.id!r} has a line break", where=one.where, expected="a one-line id")
                file.write(f"{count - 1 if one.id is None else one.id}\n")
        if count == 0:
            raise DataError("no text in these files", where=", ".join(map(str, self.files)))
        if self.stored == "int8":
            texts = [one.text for one in islice(self.texts(), 0, None, -(-count // _CALIBRATION))]
            with atomic_file(self.out / "ranges.npy", "wb") as file:
                np.save(file, value_ranges(self.vectors(model, texts)))
        np.lib.format.open_memmap(
            self.out / "vectors.npy", mode="w+", dtype=self.stored, shape=(count, self.dim or model.encoded_dimension)
        ).flush()
        return count

    def write_blocks(self, model: Embedder, blocks: Sequence[int], worker: int) -> Iterator[int]:
        """Encode the given blocks (rising); each is flushed, entered in this worker's progress file, then yielded."""
        array = np.lib.format.open_memmap(self.out / "vectors.npy", mode="r+")
        ranges = np.load(self.out / "ranges.npy") if self.stored == "int8" else None
        done = _read_progress(self.out / f"progress-{worker}.json")
        every, position = self.texts(), 0  # blocks ascend: one pass over the files
        for place in blocks:
            start = place * self.block
            texts = [one.text for one in islice(every, start - position, start - position + self.block)]
            position = start + len(texts)
            vectors: AnyArray = self.vectors(model, texts)
            vectors = quantize(vectors, "int8", ranges) if self.stored == "int8" else vectors.astype(self.stored)
            array[start : start + len(vectors)] = vectors
            array.flush()
            done.append(place)
            _write_json(self.out / f"progress-{worker}.json", done)
            yield place

    def vectors(self, model: Embedder, texts: Sequence[str]) -> AnyArray:
        return model.encode(texts, self.role, self.task, dim=self.dim, dtype=self.dtype, show_progress=False)

    def count_done(self, count: int) -> int:
        """How many of `count` texts lie in blocks that are whole on the disk."""
        done: Iterable[int] = chain.from_iterable(map(_read_progress, self.out.glob("progress-*.json")))
        return sum(min(self.block, count - place * self.block) for place in done)

    def blocks_done(self) -> set[int]:
        """Blocks that are done, whoever did them, moved to the first worker's file: the number of processes may
        change."""
        parts = sorted(self.out.glob("progress-*.json"))
        done = sorted(set(chain.from_iterable(map(_read_progress, parts))))
        _write_json(self.out / "progress-0.json", done)
        for path in parts:
            if path.name != "progress-0.json":
                path.unlink()
        return set(done)

    def resume_or_start(self, model: Embedder) -> dict[str, Any]:
        """The folder's own state when it was made by the same command; a fresh one when it holds no vectors yet."""
        identity, out, path = self.identity(model), self.out, self.out / "meta.json"
        if not path.exists() and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise CheckpointError("this is not an empty folder", where=out, fix="choose a new output folder")
        try:
            meta = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {"state": "preparing"}
        except ValueError as error:
            raise CheckpointError(f"cannot read this file: {error}", where=path, fix="delete the folder") from error
        if meta["state"] == "preparing":
            meta = {"state": "preparing", **identity}
            _write_json(path, meta)
            return meta
        if different := [key for key, value in identity.items() if meta.get(key) != value]:
            raise CheckpointError(
                f"this folder was made with another {', '.join(different)}",
                where=out,
                fix="give the same files and options to continue it, or choose a new output folder",
            )
        return meta

    def write_in_processes(self, todo: Sequence[int], count: int, bar: Any) -> None:
        """Contiguous shares of the blocks, a process each; the bar follows their progress files."""
        shares = [share.tolist() for share in np.array_split(np.asarray(todo), min(self.processes, len(todo)))]
        threads = max(torch.get_num_threads() // len(shares), 1)
        context = spawn(_worker, args=(self, shares, threads), nprocs=len(shares), join=False, daemon=True)
        seen = self.count_done(count)
        try:
            while not context.join(timeout=0.5):
                done = self.count_done(count)
                bar.advance(done - seen)
                seen = done
        except ProcessException as error:
            raise ModelError(
                f"an encoding process failed: {str(error).strip().splitlines()[-1]}",
                where=self.out,
                fix="run the same command again to continue; with less memory, use fewer processes",
            ) from error
        bar.advance(count - seen)


def encode_files(job: EncodeJob, show_progress: bool | None = None) -> int:
    """Encode all texts of `job.files` into `job.out`; the number of texts. The same call continues a killed one.

    Errors: `DataError` for unreadable input; `CheckpointError` when `out` holds other vectors, or other files.
    """
    if job.processes < 1 or job.block < 1 or not job.files:
        raise ModelError("nothing to encode with", expected="at least one file, one process and a block of one text")
    model = load(job.model)
    meta = job.resume_or_start(model)
    if meta["state"] == "complete":
        return int(meta["count"])
    if meta["state"] == "preparing":
        meta |= {"count": job.prepare(model), "state": "encoding"}
        _write_json(job.out / "meta.json", meta)
    count = int(meta["count"])
    todo = sorted(set(range(-(-count // job.block))) - job.blocks_done())
    with progress_bar("encode", count, done=job.count_done(count), visible=show_progress) as bar:
        if job.processes == 1 or len(todo) < 2:
            for place in job.write_blocks(model, todo, worker=0):
                bar.advance(min(job.block, count - place * job.block))
        else:
            job.write_in_processes(todo, count, bar)
    _write_json(job.out / "meta.json", meta | {"state": "complete"})
    for path in job.out.glob("progress-*.json"):
        path.unlink()
    return count


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


def _worker(index: int, job: EncodeJob, shares: list[list[int]], threads: int) -> None:
    torch.set_num_threads(threads)
    device = best_device()
    if device == "cuda":
        device = f"cuda:{index % torch.cuda.device_count()}"
    for _ in job.write_blocks(load(job.model, device=device), shares[index], worker=index + 1):
        pass


def _read_progress(path: Path) -> list[int]:
    return [int(place) for place in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def _write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
