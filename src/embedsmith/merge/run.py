"""A merge from recipe to folder: plan, prepare, stream, package, rename. One that was cut off starts anew; what it left
lies under a hidden name and is removed."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedsmith.core.errors import CheckpointError, RecipeError
from embedsmith.core.outputs import Kind, atomic_folder, check_claim, claimed, delivered, files_of
from embedsmith.core.progress import log, progress_bar
from embedsmith.core.recipe import load_recipe, parse, save_recipe
from embedsmith.core.settings import to_plain
from embedsmith.merge.adapter import MergedAdapter
from embedsmith.merge.merge_plan import Plan, make_plan
from embedsmith.merge.method import Combine, Job, combine_coefficients
from embedsmith.merge.methods.coefficient import Average
from embedsmith.merge.methods.formulas import normalised
from embedsmith.merge.package import LOSSY, REPORT, Rounding, Slot, TensorFile, homes, metadata_of, write_around
from embedsmith.merge.parents import file_hash
from embedsmith.merge.recipe import MergeRecipe
from embedsmith.merge.tensor_blocks import BLOCK, Block
from embedsmith.models.folder import read_folder_json
from embedsmith.models.write import saved_model

_SPARE = 1 << 24
"""Bytes that must be left on the disk beside the weights: for everything else in the folder."""

Part = tuple[Job, Combine, bool]
"""Tensors made in one way: the job that names them, how, and whether by whole rows."""
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
    with delivered(chosen.output, "merge") as place, claimed(place, "merge"):
        return _merge(replace(chosen, output=place), overwrite, check)


def _merge(chosen: MergeRecipe, overwrite: bool, check: Check | None) -> Merged:
    output = Path(chosen.output)
    done = _finished(chosen, overwrite)
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
        with atomic_folder(output, _kind()) as partial:
            if chosen.adapter is None:
                files = homes(plan)
                report = _write_model(plan, partial, files)
            else:
                files, found = {}, MergedAdapter.of(plan, chosen.adapter.rank)
                found.write(partial)
                report = _report(plan, found.report(), Rounding())
            report["models"] = _about_models(plan, hashes)
            write_around(plan, partial, files, report)
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


def _kind() -> Kind:
    """How the folder of a merge is recognised: a saved model with a report. What else lies in it was copied from the
    parents, and is copied again into the merge that replaces it."""
    own = (REPORT, "recipe.yaml", "verify.json", "report.html")
    return Kind("merge", (*saved_model().entries, *own), (REPORT, '"method"'))


def _finished(recipe: MergeRecipe, overwrite: bool) -> dict[str, Any] | None:
    """The report of the same merge, if it is finished already and is not to be replaced. Errors: `CheckpointError`
    where the output holds another merge, or something that is no merge."""
    output = Path(recipe.output)
    _kind().refuse_other(output)
    if overwrite or not files_of(output):
        return None
    if to_plain(load_recipe(output / "recipe.yaml", MergeRecipe)) != to_plain(recipe):
        raise CheckpointError("the folder is not empty: it holds a merge of another recipe", where=output, fix=_REPLACE)
    found: dict[str, Any] = read_folder_json(output / REPORT)
    return found


def plan_in_words(recipe: MergeRecipe, *, overwrite: bool = False) -> str:
    """The plan in words: what would be made how, and what was noticed. Reads headers and a sample, writes nothing.

    Errors: those of `merge` before it writes.
    """
    check_claim(recipe.output, "merge")
    _finished(recipe, overwrite)
    return make_plan(recipe).in_words()


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


def _write_model(plan: Plan, partial: Path, files: Mapping[Path, Mapping[str, Slot]]) -> dict[str, Any]:
    """Prepare the methods and write all weights. Returns the report so far."""
    _check_space(files, partial)
    facts: dict[str, Any] = {}
    parts = _prepare(plan, facts)
    rounding = Rounding(plan.recipe.seed if plan.recipe.rounding == "stochastic" else None)
    places: dict[str, tuple[TensorFile, str]] = {}  # canonical name to the file that holds it and its name there
    with ExitStack() as opened:
        for path, slots in files.items():
            if path.suffix == ".safetensors":
                file = TensorFile(partial / path, slots.values(), metadata_of(plan, path, slots))
                opened.enter_context(file)
                places |= {name: (file, slot.name) for name, slot in slots.items()}
        with progress_bar("merging", sum(plan.holder(n).size(n) for n in places if n not in plan.copied)) as bar:
            for block, exact_E in _made(parts, places):
                file, key = places[block.name]
                file.write(key, block.start, rounding(exact_E, plan.dtypes[block.name], block))
                bar.advance(len(exact_E))
        for name in plan.copied:
            (file, key), holder = places[name], plan.holder(name)
            for start in range(0, holder.size(name), BLOCK):
                values_E = holder.tensors[name].read(start, min(start + BLOCK, holder.size(name)))
                file.write(key, start, values_E)
    for path, slots in files.items():
        if path.suffix == ".pt":  # token heads: small, and kept as torch.save files, so written whole
            state = {slot.name: torch.empty(slot.shape, dtype=slot.dtype) for slot in slots.values()}
            for block, exact_E in _made(parts, slots):
                made_E = Rounding()(exact_E, plan.dtypes[block.name], block)
                state[slots[block.name].name].view(-1)[block.start : block.stop] = made_E
            with (partial / path).open("wb") as head:
                torch.save(state, head)
    return _report(plan, facts, rounding)


def _prepare(plan: Plan, facts: dict[str, Any]) -> list[Part]:
    """Every method prepared, and the means of what has no ancestor. Each method's report goes into `facts`."""
    found: list[Part] = []
    for method, names in plan.by_method:
        job = plan.job(names)
        combine = method.prepare(job)
        # nobody looks at the base of a plain mean but the rounding report: one model less to read
        unread = isinstance(method, Average) and method.is_mean and all(plan.dtypes[n].itemsize > 2 for n in names)
        found.append((replace(job, base=None) if unread else job, combine, method.by_rows))
        for key, value in job.report.items():
            facts.setdefault(key, {}).update(value)
    for holders in dict.fromkeys(plan.averaged.values()):
        names = tuple(name for name, having in plan.averaged.items() if having == holders)
        own = plan.weights(names)
        every = own if isinstance(own, Mapping) else dict.fromkeys(names, own)
        weights = {name: normalised(weight_M[list(holders)]) for name, weight_M in every.items()}
        job = Job(tuple(plan.parents[place] for place in holders), None, names, weights)
        found.append((job, combine_coefficients(weights), False))
    return found


def _made(parts: Iterable[Part], wanted: Iterable[str]) -> Iterator[tuple[Block, Tensor]]:
    """Blocks of the wanted tensors with their merged weights, not rounded yet."""
    for job, combine, by_rows in parts:
        for block in job.blocks(tuple(name for name in job.names if name in wanted), by_rows):
            yield block, combine(block)


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
            "weight": to_plain(model.weight) if model is not plan.base else 0.0,
            "distance": f"{plan.distance[model.id]:.2%}" if model.id in plan.distance else "-",
            "sha256": hashes[model.id].result(),
        }
        for model in plan.models
    ]


def _report(plan: Plan, facts: Mapping[str, Any], rounding: Rounding) -> dict[str, Any]:
    main = [plan.dtypes[name] for name in plan.names if name.startswith("backbone.")]
    floats = [dtype for dtype in main if dtype.is_floating_point]
    return {
        "embedsmith": version("embedsmith"),
        "method": plan.recipe.method.registered_name,
        "settings": to_plain(plan.recipe.method),
        "dtype": str(max(floats, key=lambda dtype: dtype.itemsize)).removeprefix("torch."),
        "like": plan.like.model.id,
        **facts,
        "rounding": rounding.report(),
        "notes": list(plan.notes),
    }
