"""A merge against its parents on a probe of texts: is it still an embedder, and still theirs? A pass/fail table."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedsmith.calibrate.likeness import (
    Sample,
    encode_sample,
    linear_cka,
    neighbour_overlap,
    portrait,
    prefix_overlap,
)
from embedsmith.calibrate.live import LiveMerge, Probe, open_live
from embedsmith.core.errors import CheckpointError
from embedsmith.core.files import atomic_file
from embedsmith.core.settings import section
from embedsmith.data import RecordSet
from embedsmith.merge.plan import make_plan
from embedsmith.merge.recipe import Bounds, MergeRecipe
from embedsmith.models import Embedder, load

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@section
@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Bounds):
    """The bounds of a recipe, and the `probe`: texts, one source a parent in their order, or one for all."""

    probe: Probe


@dataclass(frozen=True)
class Check:
    """One row: the merge's figure, the bound it must keep, the parents' figures. `limit` None is for information."""

    name: str
    value: float
    limit: float | None
    higher_is_better: bool
    parents: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        if self.limit is None:
            return True
        return self.value >= self.limit if self.higher_is_better else self.value <= self.limit


@dataclass(frozen=True)
class Verification:
    """All rows."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def failed(self) -> list[str]:
        return [check.name for check in self.checks if not check.passed]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not a number is null."""
        rows = [
            {
                "check": check.name,
                "value": _number(check.value),
                "limit": check.limit,
                "passed": check.passed,
                "parents": {name: _number(value) for name, value in check.parents.items()},
            }
            for check in self.checks
        ]
        return {"passed": self.passed, "checks": rows}

    def save(self, path: str | Path) -> None:
        with atomic_file(path) as file:
            json.dump(self.as_dict(), file, indent=1)

    def table(self) -> Table:
        from rich.table import Table

        table = Table(title="the merge against its parents", title_justify="left")
        for name in ("check", "merge", "bound", "parents", ""):
            table.add_column(name)
        for check in self.checks:
            sign = ">=" if check.higher_is_better else "<="
            bound = "" if check.limit is None else f"{sign} {check.limit:.4g}"
            parents = ", ".join(f"{name} {value:.4g}" for name, value in check.parents.items())
            word = "" if check.limit is None else "pass" if check.passed else "FAIL"
            table.add_row(check.name, f"{check.value:.4g}", bound, parents, word)
        return table

    def require(self, where: object = None) -> None:
        """Errors: `CheckpointError` naming the failed rows."""
        if not self.passed:
            rows = [check for check in self.checks if not check.passed]
            said = "; ".join(f"{row.name} is {row.value:.4g}, the bound {row.limit:.4g}" for row in rows)
            raise CheckpointError(
                f"the merge fails {len(rows)} of {len(self.checks)} checks: {said}",
                where=where,
                fix="merge with a smaller scale or other weights, or write it without --strict",
            )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def verify(
    merged: str | Path | Embedder, live: LiveMerge, sets: Sequence[RecordSet], config: VerifyConfig
) -> Verification:
    """Check a merged model against the parents in `live`, each on its own sample `sets[i]`.

    `live` is left at its last parent. A vector that is not finite fails the first row, and no other is computed.
    """
    model = merged if isinstance(merged, Embedder) else load(str(merged), device=live.model.device)
    samples = [encode_sample(model, records) for records in sets]
    broken = sum(int((~sample.vector_ND.isfinite()).any(1).sum()) for sample in samples)
    finite = Check("vectors that are not finite", float(broken), 0.0, higher_is_better=False)
    if broken:
        return Verification((finite,))
    theirs = []
    for place, records in enumerate(sets):
        live.place_parent(place)
        theirs.append(encode_sample(live.model, records))
    names = live.names
    checks = [finite, *_likeness(samples, theirs, names, config), *_geometry(samples, theirs, names, config)]
    checks += _retention(samples, theirs, names, config)
    again = encode_sample(model, sets[0]).vector_ND
    checks.append(Check("second encoding differs by", float((again - samples[0].vector_ND).abs().max()), 0.0, False))
    checks.append(_saved(model, samples[0], sets[0], config))
    return Verification(tuple(checks))


def _likeness(
    own: Sequence[Sample], theirs: Sequence[Sample], names: Sequence[str], config: VerifyConfig
) -> list[Check]:
    """CKA and neighbours in common with each parent on that parent's texts; the closest parent must be close."""
    pairs = list(zip(own, theirs, strict=True))
    cka = {n: float(linear_cka(a.vector_ND, b.vector_ND)) for n, (a, b) in zip(names, pairs, strict=True)}
    near = {n: neighbour_overlap(a.vector_ND, b.vector_ND, config.neighbours) for n, (a, b) in zip(names, pairs)}
    return [
        Check("CKA with the closest parent", max(cka.values()), config.cka, True, cka),
        Check("neighbours in common with the closest parent", max(near.values()), config.overlap, True, near),
    ]


def _geometry(
    own: Sequence[Sample], theirs: Sequence[Sample], names: Sequence[str], config: VerifyConfig
) -> list[Check]:
    """Figures of the cloud of vectors, the mean over the samples, against the worst of the parents on its own texts."""
    mine = [portrait(sample) for sample in own]
    parents = {name: portrait(sample) for name, sample in zip(names, theirs, strict=True)}
    checks = []
    for figure, (higher, bound) in _BOUNDS.items():
        column = {name: values[figure] for name, values in parents.items() if figure in values}
        values = [values[figure] for values in mine if figure in values]
        if column and values:
            worst = min(column.values()) if higher else max(column.values())
            limit = None if bound is None else bound(worst, config.slack)
            checks.append(Check(figure, sum(values) / len(values), limit, higher, column))
    return checks


Bound = Callable[[float, float], float]
_BOUNDS: Mapping[str, tuple[bool, Bound | None]] = {
    "anisotropy (mean cosine)": (False, lambda worst, slack: worst + slack),
    "length of the mean vector": (False, None),
    "uniformity": (False, lambda worst, slack: worst + slack),
    "alignment": (False, None),
    "effective rank": (True, lambda worst, slack: worst - slack * abs(worst)),
    "margin of answers": (True, lambda worst, slack: worst - slack * abs(worst)),
    "length before normalising": (True, None),
    "cosine with and without prompt": (True, lambda worst, slack: worst - slack),
    "pull of length": (False, lambda worst, slack: worst + slack),
}
"""Figure to whether higher is better, and its bound from the worst parent's; without one it is for information."""


def _retention(
    own: Sequence[Sample], theirs: Sequence[Sample], names: Sequence[str], config: VerifyConfig
) -> list[Check]:
    """Matryoshka: neighbours that leading coordinates keep of the whole vector's, against the worst parent's."""
    checks = []
    for width in (width for width in config.dims if width < own[0].vector_ND.shape[1]):
        column = {name: prefix_overlap(s.vector_ND, width, config.neighbours) for name, s in zip(names, theirs)}
        value = sum(prefix_overlap(sample.vector_ND, width, config.neighbours) for sample in own) / len(own)
        limit = min(column.values()) * (1 - config.slack)
        checks.append(Check(f"neighbours kept by {width} coordinates", value, limit, True, column))
    return checks


def _saved(model: Embedder, sample: Sample, records: RecordSet, config: VerifyConfig) -> Check:
    """The largest change of a vector when the model is saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model")
        again = encode_sample(load(str(Path(folder) / "model"), device=model.device), records)
    gap = float((again.vector_ND - sample.vector_ND).abs().max())
    return Check("difference after saving and loading", gap, config.same, higher_is_better=False)


def verify_recipe(recipe: MergeRecipe, config: VerifyConfig, folder: str | Path | None = None) -> Verification:
    """The merge that a recipe has written (or another folder) against the recipe's parents."""
    plan = make_plan(recipe)
    live = open_live(plan.parents, plan.base)
    return verify(recipe.output if folder is None else folder, live, config.probe.of_parents(live.parents), config)


def strict_check(recipe: MergeRecipe, config: VerifyConfig, console: Console | None = None) -> Callable[[Path], None]:
    """For `merge(recipe, check=...)`: a result that fails never gets its name; verify.json lies beside its weights."""

    def check(folder: Path) -> None:
        found = verify_recipe(recipe, config, folder)
        found.save(folder / "verify.json")
        if console is not None:
            console.print(found.table())
        found.require(recipe.output)

    return check
