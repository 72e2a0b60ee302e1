"""A merge from recipe to folder: plan, prepare, stream, package, rename. One that was cut off starts anew; what it left
lies under a hidden name and is removed."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from glob import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedsmith.core.errors import CheckpointError, RecipeError
from embedsmith.core.outputs import Kind, atomic_folder, check_claim, claimed, files_of
from embedsmith.core.progress import log, progress_bar
from embedsmith.core.recipe import load_recipe, parse, read_tree, save_recipe
from embedsmith.core.settings import to_plain
from embedsmith.merge.adapter import extract, write_adapter
from embedsmith.merge.merge_plan import Plan, make_plan
from embedsmith.merge.method import Combine, combine_coefficients
from embedsmith.merge.methods.coefficient import Average
from embedsmith.merge.methods.formulas import normalised
from embedsmith.merge.package import REPORT, homes, metadata_of, write_around, write_index
from embedsmith.merge.parents import Parent, file_hash, size_of
from embedsmith.merge.recipe import MergeRecipe
from embedsmith.merge.stream import BLOCK, Block, blocks
from embedsmith.merge.writer import LOSSY, RoundingLoss, Slot, TensorFile, parse_size, rounded
from embedsmith.models.folder import read_json
from embedsmith.models.write import saved_model

_SPARE = 1 << 24
"""Bytes that must be left on the disk beside the weights: for everything else in the folder."""

Check = Callable[[Path], None]
"""Looks at a finished folder before it gets its name; an error it raises keeps the folder from appearing."""


@dataclass(frozen=True)
class Merged:
    """A finished merge: its folder, and what merge.json in it says."""

    path: Path
    report: Mapping[str, Any]

    def __str__(self) -> str:
        return str(self.path)


def merge(
    recipe: MergeRecipe | str | Path | None = None,
    /,
    *,
    overwrite: bool = False,
    check: Check | None = None,
    **settings: Any,
) -> Merged:
    """Merge models into one folder that is a whole embedder.

    `recipe`: a `MergeRecipe`, or the path of a YAML file; or the recipe's keys as arguments:
    `merge(parents=["a", "b"], base="c", method="slerp", output="merged")`. `overwrite` replaces a finished merge.
    `check` may refuse the result before it gets its name.
    Errors: `RecipeError`, `ModelError` or `CheckpointError`, each saying what to do.
    """
    if recipe is None:
        recipe = parse(MergeRecipe, settings, where="merge")
    elif settings:
        raise RecipeError("a recipe and single settings are both given", fix="put the settings into the recipe")
    chosen = recipe if isinstance(recipe, MergeRecipe) else load_recipe(recipe, MergeRecipe)
    with claimed(chosen.output, "merge"):
        return _merge(chosen, overwrite, check)


def _merge(chosen: MergeRecipe, overwrite: bool, check: Check | None) -> Merged:
    output = Path(chosen.output)
    kind = _kind(chosen)
    kind.refuse_foreign(output)
    done = None if overwrite else _finished(chosen)
    with _hashing(chosen) as hashing:
        plan = make_plan(chosen)
        hashes = {model.id: hashing.submit(getattr, model, "content_hash") for model in plan.models}
        if done is not None and done["models"] == _about_models(plan, hashes):
            log.info("%s: merged before, from the same models", output)
            if check is not None:
                check(output)
            return Merged(output, done)
        if done is not None:
            raise CheckpointError("it was merged from other weights of these models", where=output, fix=_REPLACE)
        with atomic_folder(output, kind) as partial:
            report = _write_model(plan, partial) if chosen.adapter is None else _write_adapter(plan, partial)
            report["models"] = _about_models(plan, hashes)
            write_around(plan, partial, report)
            save_recipe(chosen, partial / "recipe.yaml")
            if check is not None:
                check(partial)
    for note in report["notes"]:
        log.info("%s", note)
    loss = report["rounding"]["total"]
    if loss is not None and loss > LOSSY:
        log.warning(
            "rounding to %s loses %.0f %% of what the merge changed: write float32 (dtype: float32)",
            report["dtype"],
            100 * loss,
        )
    return Merged(output, report)


_REPLACE = "choose another output, or replace it with --overwrite"


def _kind(recipe: MergeRecipe) -> Kind:
    """How a merge is known: a saved model with its report, and what else was copied from one of these models."""
    specs = [*recipe.specs, *([] if recipe.base_spec is None else [recipe.base_spec])]
    copied = {escape(name) for spec in specs for name in files_of(Path(spec.path).expanduser())}
    own = (REPORT, "recipe.yaml", "verify.json", "report.html")
    return Kind("merge", (*saved_model().entries, *own, *copied), (REPORT, '"method"'))


def _finished(recipe: MergeRecipe) -> dict[str, Any] | None:
    """The report of the same merge, where it stands there. Errors: `CheckpointError` for another merge."""
    output = Path(recipe.output)
    if not files_of(output):
        return None
    if read_tree(output / "recipe.yaml") != to_plain(recipe):
        raise CheckpointError("the folder is not empty: it holds a merge of another recipe", where=output, fix=_REPLACE)
    found: dict[str, Any] = read_json(output / REPORT)
    return found


def plan_in_words(recipe: MergeRecipe, *, overwrite: bool = False) -> str:
    """The plan in words: what would be made how, and what was noticed. Reads headers and a sample, writes nothing.

    Errors: those of `merge` before it writes.
    """
    check_claim(recipe.output, "merge")
    _kind(recipe).refuse_foreign(Path(recipe.output))
    if not overwrite:
        _finished(recipe)
    plan = make_plan(recipe)
    dtype_of = dtypes(plan)
    elements = {name: size_of(plan.holder(name).tensors[name]) for name in plan.names}
    size = sum(count * dtype_of[name].itemsize for name, count in elements.items())
    lines = [
        f"{len(plan.parents)} parents, {len(elements)} tensors, {sum(elements.values()):,} weights, {size:,} bytes"
    ]
    lines += [f"{model.id}: {plan.distance[model.id]:.2%} from the base" for model in plan.parents]
    lines += [f"{method.registered_name}: {len(names)} tensors" for method, names in plan.by_method]
    lines += [f"mean without an ancestor: {len(plan.averaged)} tensors"] if plan.averaged else []
    lines += [f"copied: {len(plan.copied)} tensors"] if plan.copied else []
    lines += [f"configuration, modules and tokenizer from {plan.like.model.id}"]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def dtypes(plan: Plan) -> dict[str, torch.dtype]:
    """Numbers on disk of every tensor: as the recipe says, else the widest among the parents. Buffers stay."""
    wanted = plan.recipe.dtype
    found: dict[str, torch.dtype] = {}
    for name in plan.names:
        own = [parent.tensors[name].dtype for parent in plan.parents if name in parent.tensors]
        widest = reduce(torch.promote_types, own)
        stays = wanted is None or name in plan.copied or name.startswith("token_heads.")
        found[name] = widest if stays else getattr(torch, str(wanted))
    return found


@contextmanager
def _hashing(recipe: MergeRecipe) -> Iterator[ThreadPoolExecutor]:
    """One thread that hashes contents beside the merge. It begins with the folders that the recipe names, before
    the plan is made: a family's code may have to be imported for that."""
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        for spec in [*recipe.specs, *([] if recipe.base_spec is None else [recipe.base_spec])]:
            for file in sorted(Path(spec.path).expanduser().glob("*.safetensors")):
                pool.submit(file_hash, file)
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _write_model(plan: Plan, partial: Path) -> dict[str, Any]:
    """Prepare the methods and write all weights. Returns the report so far."""
    dtype_of = dtypes(plan)
    shard_bytes = None if plan.recipe.shard_size is None else parse_size(plan.recipe.shard_size)
    files = homes(plan, dtype_of, shard_bytes)
    _check_space(files, partial)
    facts: dict[str, Any] = {}
    parts = _prepare(plan, facts, dtype_of)
    rounding = RoundingLoss()
    with _opened(plan, partial, files) as writers:
        _write_blocks(plan, parts, writers, dtype_of, rounding)
        for name in plan.copied:
            file, key = writers[name]
            weights = plan.holder(name).tensors[name]
            for start in range(0, size_of(weights), BLOCK):
                file.write(key, start, weights.read(start, min(start + BLOCK, size_of(weights))))
    _write_heads(parts, files, dtype_of, partial)
    write_index(partial, files)
    return _report(plan, dtype_of, facts, rounding)


def _write_adapter(plan: Plan, partial: Path) -> dict[str, Any]:
    """The merge as an adapter: a few megabytes. Returns the report so far."""
    assert plan.recipe.adapter is not None
    found, facts = extract(plan, plan.recipe.adapter.rank)
    write_adapter(found, plan, partial)
    if found.left_out > 0:
        log.warning("%.2f %% of the merge lies in weights that an adapter has no place for", 100 * found.left_out)
    return _report(plan, dtypes(plan), {**facts, "adapter": found.report()}, RoundingLoss())


@dataclass(frozen=True)
class MergedPart:
    """Tensors made in one way."""

    parents: tuple[Parent, ...]
    base: Parent | None
    names: tuple[str, ...]
    combine: Combine
    by_rows: bool = False

    def made(self, wanted: Iterable[str]) -> Iterator[tuple[Block, Tensor]]:
        """Blocks of the wanted tensors with their merged weights, not rounded yet."""
        names = tuple(name for name in self.names if name in wanted)
        for block in blocks(self.parents, self.base, names, size=BLOCK, by_rows=self.by_rows):
            yield block, self.combine(block)


def _prepare(plan: Plan, facts: dict[str, Any], dtype_of: Mapping[str, torch.dtype]) -> list[MergedPart]:
    """Every method prepared, and the means of what has no ancestor. Each method's report goes into `facts`."""
    found: list[MergedPart] = []
    for method, names in plan.by_method:
        job = plan.job(names)
        combine = method.prepare(job)
        # nobody looks at the base of a plain mean but the rounding report: one model less to read
        unread = isinstance(method, Average) and method.is_mean and all(dtype_of[n].itemsize > 2 for n in names)
        found.append(MergedPart(plan.parents, None if unread else plan.base, names, combine, method.by_rows))
        for key, value in job.report.items():
            facts.setdefault(key, {}).update(value)
    for holders in dict.fromkeys(plan.averaged.values()):
        names = tuple(name for name, having in plan.averaged.items() if having == holders)
        weight_M = normalised(plan.weight_M[list(holders)])
        mean = combine_coefficients(dict.fromkeys(names, weight_M))
        found.append(MergedPart(tuple(plan.parents[place] for place in holders), None, names, mean))
    return found


def _write_blocks(
    plan: Plan,
    parts: list[MergedPart],
    writers: Mapping[str, tuple[TensorFile, str]],
    dtype_of: Mapping[str, torch.dtype],
    rounding: RoundingLoss,
) -> None:
    """All blocks of tensors in safetensors files."""
    seed = plan.recipe.seed if plan.recipe.rounding == "stochastic" else None
    total = sum(size_of(plan.holder(name).tensors[name]) for name in writers if name not in plan.copied)
    with progress_bar("merging", total) as bar:
        for part in parts:
            for block, exact_E in part.made(writers):
                written_E = rounded(exact_E, dtype_of[block.name], block, seed)
                rounding.add(block, exact_E, written_E)
                file, key = writers[block.name]
                file.write(key, block.start, written_E)
                bar.advance(len(written_E))


def _write_heads(
    parts: list[MergedPart],
    files: Mapping[Path, Mapping[str, Slot]],
    dtype_of: Mapping[str, torch.dtype],
    partial: Path,
) -> None:
    """Token heads: small, and kept as torch.save files, so written whole."""
    for path, slots in files.items():
        if path.suffix != ".pt":
            continue
        state = {slot.name: torch.empty(slot.shape, dtype=slot.dtype) for slot in slots.values()}
        for part in parts:
            for block, exact_E in part.made(slots):
                made_E = rounded(exact_E, dtype_of[block.name], block, None)
                state[slots[block.name].name].view(-1)[block.start : block.stop] = made_E
        with (partial / path).open("wb") as file:
            torch.save(state, file)


@contextmanager
def _opened(
    plan: Plan, partial: Path, files: Mapping[Path, Mapping[str, Slot]]
) -> Iterator[dict[str, tuple[TensorFile, str]]]:
    """Canonical name to the open safetensors file that holds it and its name there."""
    open_files: list[TensorFile] = []
    found: dict[str, tuple[TensorFile, str]] = {}
    try:
        for path, slots in files.items():
            if path.suffix == ".safetensors":
                file = TensorFile(partial / path, list(slots.values()), metadata_of(plan, path, slots))
                open_files.append(file)
                found |= {name: (file, slot.name) for name, slot in slots.items()}
        yield found
        for file in open_files:
            file.sync()
    finally:
        for file in open_files:
            file.close()


def _check_space(files: Mapping[Path, Mapping[str, Slot]], partial: Path) -> None:
    """Errors: `CheckpointError` before anything is written when the disk cannot hold the result."""
    needed = _SPARE + sum(slot.bytes for slots in files.values() for slot in slots.values())
    place = partial.parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(
            f"the merge needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB left; nothing was written",
            where=partial.parent,
            fix="free some space or choose an output on another disk, then run the same command again",
        )


def _about_models(plan: Plan, hashes: Mapping[str, Future[str]]) -> list[dict[str, Any]]:
    return [
        {
            "id": model.id,
            "path": model.folder.name,
            "weight": model.weight if model is not plan.base else 0.0,
            "distance": f"{plan.distance[model.id]:.2%}" if model.id in plan.distance else "-",
            "sha256": hashes[model.id].result(),
        }
        for model in plan.models
    ]


def _report(
    plan: Plan, dtype_of: Mapping[str, torch.dtype], facts: Mapping[str, Any], rounding: RoundingLoss
) -> dict[str, Any]:
    main = [dtype_of[name] for name in plan.names if name.startswith("backbone.") and dtype_of[name].is_floating_point]
    return {
        "embedsmith": version("embedsmith"),
        "method": plan.recipe.method.registered_name,
        "settings": to_plain(plan.recipe.method),
        "dtype": str(max(main, key=lambda dtype: dtype.itemsize)).removeprefix("torch."),
        "like": plan.like.model.id,
        **facts,
        "rounding": {"total": rounding.total(), "blocks": rounding.report()},
        "notes": list(plan.notes),
    }
