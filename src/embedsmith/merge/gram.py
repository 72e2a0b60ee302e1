"""One pass over the weights: inner products of the task vectors, tensor by tensor, in float64.

Every geometric method returns theta_0 + sum_i c_i V_i with c a function of K_ij = <V_i, V_j> only (spec: work in
coefficient space). K is measured once for a set of models, kept under the hash of their contents, and added up to
modules, blocks or the whole model.
"""

import hashlib
import io
import math
import re
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedsmith.core.files import write_cache
from embedsmith.core.progress import progress_bar
from embedsmith.merge.parents import Parent, size_of
from embedsmith.merge.recipe import Granularity
from embedsmith.merge.stream import BLOCK, UNIT, Block, blocks

_BLOCK = re.compile(r"^(.*?\.\d+)\.")
_FORMAT = "gram-1"


@dataclass(frozen=True)
class Gram:
    """Inner products of task vectors and base, by tensor name.

    full_by_name: [M + 1, M + 1] float64; rows 0..M-1 are V_1..V_M, row M is theta_0. size_by_name: elements.
    nonzero_by_name: [M] elements that moved.
    """

    full_by_name: Mapping[str, Tensor]
    size_by_name: Mapping[str, int]
    nonzero_by_name: Mapping[str, Tensor]

    def of(self, names: Sequence[str]) -> Tensor:
        """K [M, M] of the vectors made of these tensors; sums are exactly rounded, so order does not matter."""
        return self.full(names)[:-1, :-1]

    def full(self, names: Sequence[str]) -> Tensor:
        """The same with the base as the last row and column."""
        stack = torch.stack([self.full_by_name[name] for name in names])
        flat = stack.flatten(1).T.tolist()
        return torch.tensor([math.fsum(column) for column in flat], dtype=torch.float64).view(stack.shape[1:])


def groups(names: Sequence[str], granularity: Granularity) -> dict[str, tuple[str, ...]]:
    """Names that count as one vector. `block`: everything under one numbered layer (`backbone.encoder.layer.3`), the
    rest by its first two parts (`backbone.embeddings`); `module`: weight and bias of one layer together."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[_key(name, granularity)].append(name)
    return {key: tuple(members) for key, members in found.items()}


def _key(name: str, granularity: Granularity) -> str:
    if granularity == "model":
        return "model"
    if granularity == "tensor":
        return name
    if granularity == "module":
        return name.rpartition(".")[0] or name
    return block_of(name)


def block_of(name: str) -> str:
    """The numbered layer a tensor belongs to, or the part of the model outside the layers."""
    match = _BLOCK.match(name)
    return match[1] if match else ".".join(name.split(".")[:2])


def measure(
    parents: Sequence[Parent],
    base: Parent,
    names: Sequence[str],
    *,
    cache: Path | None = None,
    block: int = BLOCK,
) -> Gram:
    """The Gram matrices of `names`, from the cache folder or in one pass (and then into the cache).

    The cache is keyed by the contents of the models, so renamed or copied folders find it and changed ones do not.
    """
    key = cache_key([*parents, base], names)
    file = None if cache is None else cache / f"{key}.npz"
    found = None if file is None else _load(file)
    if found is None:
        found = _measure(parents, base, names, block)
        if file is not None:
            _save(found, file)
    return found


def cache_key(models: Sequence[Parent], names: Sequence[str]) -> str:
    digest = hashlib.sha256(_FORMAT.encode())
    for model in models:
        digest.update(model.content_hash.encode())
    for name in sorted(names):
        digest.update(name.encode() + b"\0")
    return digest.hexdigest()[:32]


def _measure(parents: Sequence[Parent], base: Parent, names: Sequence[str], block: int) -> Gram:
    width = len(parents) + 1
    full: dict[str, Tensor] = {}
    nonzero = {name: torch.zeros(len(parents), dtype=torch.int64) for name in names}
    total = sum(size_of(base.tensors[name]) for name in names)
    with progress_bar("measuring task vectors", total) as bar:
        for piece in blocks(parents, base, names, size=block):
            size = size_of(base.tensors[piece.name])
            if piece.start == 0:
                products = np.zeros((-(-size // UNIT), width, width))
            delta_ME = piece.delta_ME
            products[piece.start // UNIT : -(-piece.stop // UNIT)] = _unit_products(delta_ME, piece)
            nonzero[piece.name] += delta_ME.count_nonzero(1)
            if piece.stop == size:
                full[piece.name] = _exact_sum(products)
            bar.advance(piece.stop - piece.start)
    empty = {name: torch.zeros(width, width, dtype=torch.float64) for name in names if name not in full}
    return Gram({**full, **empty}, {name: size_of(base.tensors[name]) for name in names}, nonzero)


def _unit_products(delta_ME: Tensor, block: Block) -> NDArray[np.float64]:
    """[units, M + 1, M + 1]: inner products over each unit of UNIT elements, the last one padded with zeros."""
    assert block.base_E is not None
    stacked = torch.cat([delta_ME, block.base_E.double()[None]]).numpy()
    missing = -stacked.shape[1] % UNIT
    if missing:
        stacked = np.pad(stacked, ((0, 0), (0, missing)))
    units = stacked.reshape(len(stacked), -1, UNIT).transpose(1, 0, 2)
    products: NDArray[np.float64] = np.matmul(units, units.transpose(0, 2, 1))
    return products


def _exact_sum(products: NDArray[np.float64]) -> Tensor:
    flat = products.reshape(len(products), -1).T.tolist()
    return torch.tensor([math.fsum(column) for column in flat], dtype=torch.float64).view(*products.shape[1:])


def _save(gram: Gram, file: Path) -> None:
    arrays: dict[str, NDArray[np.generic]] = {}
    for place, name in enumerate(gram.full_by_name):
        arrays[f"name{place}"] = np.array(name)
        arrays[f"full{place}"] = gram.full_by_name[name].numpy()
        arrays[f"size{place}"] = np.array(gram.size_by_name[name])
        arrays[f"nonzero{place}"] = gram.nonzero_by_name[name].numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # numpy types the keywords as its flags too
    write_cache(file, buffer.getvalue())


def _load(file: Path) -> Gram | None:
    """`None` where there is none, or a file that cannot be read: it is then measured again."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            count = sum(1 for key in arrays.files if key.startswith("name"))
            names = [str(arrays[f"name{place}"]) for place in range(count)]
            full = {name: torch.from_numpy(arrays[f"full{place}"]) for place, name in enumerate(names)}
            sizes = {name: int(arrays[f"size{place}"]) for place, name in enumerate(names)}
            nonzero = {name: torch.from_numpy(arrays[f"nonzero{place}"]) for place, name in enumerate(names)}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return Gram(full, sizes, nonzero)
