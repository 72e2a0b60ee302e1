"""What `embedsmith merge` does beside merging: explain, verify, refuse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from embedsmith.calibrate.explain_report import explain_recipe
from embedsmith.calibrate.live import Probe
from embedsmith.calibrate.verify import VerifyConfig, strict_check, verify_recipe
from embedsmith.core.errors import RecipeError
from embedsmith.data import Source
from embedsmith.merge.recipe import MergeRecipe
from embedsmith.merge.run import merge


def probe_of(recipe: MergeRecipe, files: Sequence[str]) -> Probe | None:
    """The texts named on the command line, else those the recipe's own method reads."""
    if files:
        return Probe(sources=tuple(Source(path=file) for file in files))
    own = getattr(recipe.method, "probe", None)
    return own if isinstance(own, Probe) else None


def run_explain(recipe: MergeRecipe, folder: Path, files: Sequence[str], sizes: Sequence[int]) -> Path:
    """Write the explanation of a merge, not the merge; returns the page."""
    if sizes and len(sizes) != len(recipe.parents):
        raise RecipeError(f"{len(sizes)} sizes for {len(recipe.parents)} parents", expected="one a parent")
    return explain_recipe(recipe, probe_of(recipe, files), sizes).save(folder)


def run_verified(recipe: MergeRecipe, files: Sequence[str], strict: bool, overwrite: bool) -> Path:
    """Merge, check the result against the parents and print the table.

    With `strict` a merge that fails is not written. Errors: `CheckpointError` naming the failed rows.
    """
    probe = probe_of(recipe, files)
    if probe is None:
        raise RecipeError("verifying needs texts", fix="name a file for each parent: --probe FILE --probe FILE")
    config = VerifyConfig(probe=probe, **vars(recipe.verify))
    console = Console()
    if strict:
        return merge(recipe, overwrite=overwrite, check=strict_check(recipe, config, console)).path
    path = merge(recipe, overwrite=overwrite).path
    found = verify_recipe(recipe, config)
    found.save(path / "verify.json")
    console.print(found.table())
    return path
