"""Vectors in folders that `embedsmith encode` has written, one or several, searched where they lie: rows are read when
they are asked for, and neither all vectors nor all ids are ever in memory."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedsmith.core.errors import SearchError
from embedsmith.core.inputs import local_path, read_json
from embedsmith.core.quantize import AnyArray
from embedsmith.core.reps import Dense
from embedsmith.search.exact import FloatArray, IndexArray, TopK

_PIECE = 2**14
"""Rows read at once; those of a share are dealt in such pieces."""
_MADE_BY = ("weights", "tokenizer", "settings", "prompt", "dim")


class StoredVectors:
    """A matrix [N, D] in the place of one in memory: `exact_top_k(queries, StoredVectors("vectors"), 10)`. The rows of
    several folders stand behind one another, in the order of the folders. int8 is read as the middle of each step."""

    ndim = 2

    def __init__(self, *folders: str | Path) -> None:
        """Errors: `SearchError` for folders that `encode` has not written to their end, or of several models."""
        if not folders:
            raise SearchError("no folder of vectors", expected="one or several that embedsmith encode has written")
        self.folders = [local_path(folder, SearchError) for folder in folders]
        self.metas = [_meta_of(folder) for folder in self.folders]
        for folder, meta in zip(self.folders, self.metas, strict=True):
            if different := [key for key in _MADE_BY if meta.get(key) != self.metas[0].get(key)]:
                what = f"these vectors were made with another {', '.join(different)} than those in {self.folders[0]}"
                raise SearchError(what, where=folder, fix="encode all folders with one model and the same options")
        self._parts = [_matrix(*one) for one in zip(self.folders, self.metas, strict=True)]
        self._start_F = np.cumsum([0, *map(len, self._parts)])

    def __len__(self) -> int:
        return int(self._start_F[-1])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), int(self._parts[0].shape[1])

    def __getitem__(self, rows: slice) -> FloatArray:
        """Rows one behind another, as fp32."""
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise IndexError(rows)
        found = [np.zeros((0, self.shape[1]), np.float32)]
        for first, part, folder in zip(self._start_F.tolist(), self._parts, self.folders, strict=False):
            values = part[max(start - first, 0) : max(stop - first, 0)]
            if part.dtype == np.int8 and len(values):
                low_D, high_D = np.load(folder / "ranges.npy")
                values = low_D + (values.astype(np.float32) + 128.5) * ((high_D - low_D) / 255)
            found.append(np.asarray(values, np.float32))
        return np.concatenate(found)

    def ids(self, places: Iterable[int]) -> dict[int, str]:
        """Of the texts at some places, read in one pass over the lists of ids."""
        wanted = sorted(set(places))
        found: dict[int, str] = {}
        for first, stop, folder in zip(self._start_F, self._start_F[1:], self.folders, strict=False):
            mine = iter([place for place in wanted if first <= place < stop])
            place = next(mine, None)
            with (folder / "ids.txt").open(encoding="utf-8", newline="\n") as file:
                for row, line in enumerate(file, start=int(first)):
                    if place is None:
                        break
                    if row == place:
                        found[row], place = line.rstrip("\n"), next(mine, None)
        return found

    def top(self, query: Dense, k: int, share: tuple[int, int] = (0, 1)) -> tuple[FloatArray, IndexArray]:
        """score_Qk and index_Qk of the best `k`, best first, ties to the lower place, as the queries' kind scores them.
        `share`: which of how many shares is searched; `merged_top_k` of all is what one search gives."""
        starts = range(0, len(self), _PIECE)[share[0] :: share[1]]
        best = TopK(query, k)
        for start in starts:
            best.add_in_blocks(replace(query, vector_ND=torch.from_numpy(self[start : start + _PIECE])))
        if not starts:
            return np.zeros((len(query), 0), np.float32), np.zeros((len(query), 0), np.int64)
        score_Qk, local_Qk = best.result()
        return score_Qk, np.asarray(starts, np.int64)[local_Qk // _PIECE] + local_Qk % _PIECE

    def between(self, start: int, stop: int) -> Dense:
        return Dense(torch.from_numpy(self[start:stop]))

    @property
    def identity(self) -> str:
        """What the vectors depend on, of all folders."""
        return json.dumps(self.metas, sort_keys=True)


def _meta_of(folder: Path) -> dict[str, Any]:
    fix = "name a folder that embedsmith encode has written"
    if not (folder / "meta.json").is_file():
        raise SearchError("no vectors here", where=folder, fix=fix)
    meta = read_json(folder / "meta.json", SearchError, fix=fix)
    if meta.get("state") != "complete" or type(meta.get("count")) is not int:
        raise SearchError("these vectors are not whole", where=folder, fix="give the command again that encodes them")
    return meta


def _matrix(folder: Path, meta: dict[str, Any]) -> AnyArray:
    path = folder / "vectors.npy"
    try:
        found: AnyArray = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise SearchError(f"not vectors that can be read ({error})", where=path, fix="encode the texts anew") from error
    if found.ndim != 2 or len(found) != meta["count"]:
        raise SearchError(f"an array of the shape {found.shape}", where=path, expected=f"{meta['count']} rows")
    return found
