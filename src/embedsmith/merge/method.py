"""What a merging method is: a frozen dataclass that looks at the job once and says how to make each block.

Every geometric method returns theta_0 + sum_i c_i V_i with c a function of K_ij = <V_i, V_j> only. K is measured once
for a set of models, tensor by tensor in float64, kept under the hash of their contents, and added up to modules, blocks
or the whole model.
"""

import hashlib
import io
import math
import re
import zipfile
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedsmith.core.errors import RecipeError
from embedsmith.core.files import write_cache
from embedsmith.core.progress import progress_bar
from embedsmith.merge.parents import Parent
from embedsmith.merge.recipe import Granularity
from embedsmith.merge.tensor_blocks import BLOCK, UNIT, Block, blocks, drawn, nth_largest
from embedsmith.merge.varying import Place, Varying, layer_places, value_at

Combine = Callable[[Block], Tensor]
"""A block of all models to the merged weights [E] of that block, in float64 (or float32)."""
Base = Literal["needed", "optional"]
_BLOCK = re.compile(r"^(.*?\.\d+)\.")
_FORMAT = "gram-1"


@contextmanager
def settings_of(tensors: str) -> Iterator[None]:
    """An error of settings is told with the tensors that they are for."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(error.what, where=tensors, expected=error.expected, fix=error.fix) from error


@dataclass(frozen=True)
class Gram:
    """Inner products of task vectors and base, by tensor name. Without a base vectors begin at zero: raw weights.

    full_by_name: [M + 1, M + 1] float64; rows 0..M-1 are V_1..V_M, row M is theta_0 (or zero). size_by_name: elements.
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
        return _exact_sum(torch.stack([self.full_by_name[name] for name in names]))

    @classmethod
    def measured(
        cls,
        parents: Sequence[Parent],
        base: Parent | None,
        names: Sequence[str],
        cache: Path | None = None,
        block: int = BLOCK,
    ) -> Self:
        """Of `names`, from the cache folder or in one pass (and then into the cache).

        The cache is keyed by the contents of the models, so renamed or copied folders find it and changed ones do not.
        """
        if cache is None:
            return cls.by_a_pass(parents, base, names, block)
        digest = hashlib.sha256(_FORMAT.encode())
        for model in (*parents, *([] if base is None else [base])):
            digest.update(model.content_hash.encode())
        digest.update(b"raw" if base is None else b"")
        for name in sorted(names):
            digest.update(name.encode() + b"\0")
        file = cache / f"{digest.hexdigest()[:32]}.npz"
        try:
            with np.load(file, allow_pickle=False) as kept:
                places = {str(kept[f"name{place}"]): place for place in range(len(kept.files) // 4)}
                full = {name: torch.from_numpy(kept[f"full{place}"]) for name, place in places.items()}
                sizes = {name: int(kept[f"size{place}"]) for name, place in places.items()}
                return cls(full, sizes, {n: torch.from_numpy(kept[f"nonzero{place}"]) for n, place in places.items()})
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # not there yet, or damaged: measured again
            found = cls.by_a_pass(parents, base, names, block)
        arrays: dict[str, NDArray[np.generic]] = {}
        for place, name in enumerate(found.full_by_name):
            arrays[f"name{place}"] = np.array(name)
            arrays[f"full{place}"] = found.full_by_name[name].numpy()
            arrays[f"size{place}"] = np.array(found.size_by_name[name])
            arrays[f"nonzero{place}"] = found.nonzero_by_name[name].numpy()
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # numpy types the keywords as its flags too
        write_cache(file, buffer.getvalue())
        return found

    @classmethod
    def by_a_pass(cls, parents: Sequence[Parent], base: Parent | None, names: Sequence[str], block: int) -> Self:
        """Every unit of UNIT elements by itself (the last one padded with zeros), then added up exactly."""
        width = len(parents) + 1
        full = {name: torch.zeros(width, width, dtype=torch.float64) for name in names}
        nonzero = {name: torch.zeros(len(parents), dtype=torch.int64) for name in names}
        size = {name: parents[0].size(name) for name in names}
        with progress_bar("measuring task vectors", sum(size.values())) as bar:
            for piece in blocks(parents, base, names, size=block):
                if piece.start == 0:
                    products = np.zeros((-(-size[piece.name] // UNIT), width, width))
                base_E = torch.zeros(piece.stop - piece.start) if piece.base_E is None else piece.base_E
                delta_ME = torch.stack([parent_E.double() for parent_E in piece.parents]).sub_(base_E.double())
                nonzero[piece.name] += delta_ME.count_nonzero(1)
                rows = torch.cat([delta_ME, base_E.double()[None]]).numpy()
                missing = -rows.shape[1] % UNIT
                rows = np.pad(rows, ((0, 0), (0, missing))) if missing else rows
                units = rows.reshape(width, -1, UNIT).transpose(1, 0, 2)
                products[piece.start // UNIT : -(-piece.stop // UNIT)] = np.matmul(units, units.transpose(0, 2, 1))
                if piece.stop == size[piece.name]:
                    full[piece.name] = _exact_sum(torch.from_numpy(products))
                bar.advance(piece.stop - piece.start)
        return cls(full, size, nonzero)


def _exact_sum(stack: Tensor) -> Tensor:
    """Over the first axis, exactly rounded."""
    flat = stack.flatten(1).T.tolist()
    return torch.tensor([math.fsum(column) for column in flat], dtype=torch.float64).view(stack.shape[1:])


def groups(names: Sequence[str], granularity: Granularity) -> dict[str, tuple[str, ...]]:
    """Names that count as one vector. `block`: everything under one numbered layer (`backbone.encoder.layer.3`), the
    rest by its first two parts (`backbone.embeddings`); `module`: weight and bias of one layer together."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        module = name.rpartition(".")[0] or name
        key = {"model": "model", "block": block_of(name), "module": module, "tensor": name}[granularity]
        found[key].append(name)
    return {key: tuple(members) for key, members in found.items()}


def block_of(name: str) -> str:
    """The numbered layer a tensor belongs to, or the part of the model outside the layers."""
    match = _BLOCK.match(name)
    return match[1] if match else ".".join(name.split(".")[:2])


@dataclass(frozen=True)
class Job:
    """What a method may read. `names`: the float tensors it has to make; `weights`: the parents' weights a_i [M],
    float64, as the recipe says (not normalised), or those of every tensor by its name; `groups`: names that share one
    set of coefficients. `report`: what a method wants written into merge.json (`coefficients`, densities, costs)."""

    parents: tuple[Parent, ...]
    base: Parent | None
    names: tuple[str, ...]
    weights: Tensor | Mapping[str, Tensor]
    granularity: Granularity = "model"
    seed: int = 0
    cache: Path | None = None
    block: int = BLOCK
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def weight_M(self) -> Tensor:
        """The parents' weights. Errors: `RecipeError` where they differ from tensor to tensor, for a method that cannot
        use that."""
        if isinstance(self.weights, Mapping):
            raise RecipeError(
                "this method has one weight for a whole parent, and the weights differ from tensor to tensor",
                where="parents",
                fix="give every parent one number as its weight, or use method: average, slerp, ties or their like",
            )
        return self.weights

    def weight_of(self, name: str) -> Tensor:
        """The parents' weights for a tensor, [M]."""
        return self.weights[name] if isinstance(self.weights, Mapping) else self.weights

    @cached_property
    def places(self) -> Mapping[str, Place]:
        """Layer and number of layers, of every tensor that lies in one."""
        return layer_places(self.parents[0].tensors)

    def density_of(self, name: str, usual: float) -> Tensor:
        """The share of its entries that every parent keeps of a tensor, [M]: its own, or the method's."""
        own: list[Varying] = [usual if parent.density is None else parent.density for parent in self.parents]
        found = [value_at(setting, name, self.places.get(name)) for setting in own]
        return torch.tensor(found, dtype=torch.float64)

    def density_of_group(self, names: tuple[str, ...], usual: float) -> list[float]:
        """The same of a group, which is trimmed as one. Errors: `RecipeError` where its tensors differ."""
        found = {tuple(self.density_of(name, usual).tolist()) for name in names}
        if len(found) > 1:
            raise RecipeError(
                "the densities differ inside of what is trimmed as one",
                where="parents",
                fix="set granularity: tensor, or block where densities differ from layer to layer alone",
            )
        return list(found.pop())

    @cached_property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Group key to names, by the granularity."""
        return groups(self.names, self.granularity)

    @cached_property
    def group_of(self) -> Mapping[str, str]:
        """Name to the key of its group."""
        return {name: key for key, names in self.groups.items() for name in names}

    @cached_property
    def gram(self) -> Gram:
        """Inner products of the task vectors of every tensor (without a base: of the weights): one pass over the
        weights, or the cache."""
        return Gram.measured(self.parents, self.base, self.names, self.cache, self.block)

    def size(self, name: str) -> int:
        """Elements of a tensor."""
        return self.parents[0].size(name)

    def blocks(self, names: tuple[str, ...] | None = None, by_rows: bool = False) -> Iterator[Block]:
        """A pass over the weights."""
        chosen = self.names if names is None else names
        return blocks(self.parents, self.base, chosen, size=self.block, by_rows=by_rows)

    def thresholds(
        self,
        ranks_of: Callable[[tuple[str, ...], int], Sequence[Sequence[int]]],
        keys: Callable[[Block], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Tensor name to the values [M, R] at the ranks that `ranks_of` gives each parent for the names of the tensor's
        group and their size together.

        `keys`: a block to what is ranked, rows [M, E] of values that are not negative; by default |V_i| in float32.
        """
        found: dict[str, Tensor] = {}
        for names in self.groups.values():
            total = sum(self.size(name) for name in names)

            def passes(names: tuple[str, ...] = names) -> Iterable[Tensor]:
                return (b.delta_ME.abs_().float() if keys is None else keys(b) for b in self.blocks(names))

            wanted = ranks_of(names, total)
            ranks = sorted({rank for row in wanted for rank in row})
            values_MU = nth_largest(passes, ranks, total)
            chosen_MR = torch.tensor([[ranks.index(rank) for rank in row] for row in wanted])
            found |= dict.fromkeys(names, values_MU.gather(1, chosen_MR))
        return found

    def drawn(self, block: Block) -> Tensor:
        """Numbers in [0, 1) [M, E], each parent its own, keyed by the parent's place."""
        own = (f"{place} {block.name}" for place in range(len(self.parents)))
        return torch.stack([drawn(self.seed, name, block.start, block.stop) for name in own])


class Method(Protocol):
    """What a merging method is: a frozen dataclass that extends this and is registered in `core.shelf.merge_methods`.

    `base`: whether task vectors are needed. `by_rows`: blocks must be whole rows. `thins`: whether parents may have a
    density of their own. `prepare` may pass over the weights,
    read data and train; what it returns is called for every block of `job.names`, each tensor's blocks in order.
    """

    registered_name: ClassVar[str]
    base: ClassVar[Base] = "needed"
    by_rows: ClassVar[bool] = False
    thins: ClassVar[bool] = False

    @abstractmethod
    def prepare(self, job: Job) -> Combine: ...


def combine_coefficients(coefficients: Mapping[str, Tensor], raw: bool = False) -> Combine:
    """theta_m = (1 - sum_i c_i) theta_0 + sum_i c_i theta_i, which is theta_0 + sum_i c_i V_i, in float64.

    `coefficients`: tensor name to c [M]. `raw`: sum_i c_i theta_i, whatever the sum of the coefficients. Written over
    the weights themselves, so that identical parents come out bit for bit, and one whose coefficients sum to 1 needs
    no base.
    """
    plain = {name: [float(value) for value in coef_M] for name, coef_M in coefficients.items()}

    def combine(block: Block) -> Tensor:
        coefs = plain[block.name]
        rest = 1.0 - math.fsum(coefs)
        if raw or abs(rest) < 4e-16 * len(coefs):  # the sum is 1 but for rounding: the base has no share at all
            rest = 0.0
        terms = [(coef, parent_E) for coef, parent_E in zip(coefs, block.parents, strict=True) if coef]
        if rest:
            if block.base_E is None:
                raise RecipeError(f"the coefficients of {block.name} sum to {1 - rest}", fix="give the merge a base")
            terms.append((rest, block.base_E))
        (first, first_E), *others = terms  # no coefficient at all leaves all to the base
        merged_E = first_E.to(torch.float64, copy=True).mul_(first)
        for coef, values_E in others:
            merged_E.add_(values_E.double(), alpha=coef)  # converted first: ten times faster than a mixed addition
        return merged_E

    return combine
