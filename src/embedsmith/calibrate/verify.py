"""A merge against its parents on a probe of texts: is it still an embedder, and still theirs? A pass/fail table."""

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from embedsmith.calibrate.live_model import LiveMerge
from embedsmith.calibrate.probe import ROLES, Probe, distinct_texts
from embedsmith.core.encoder import Role
from embedsmith.core.errors import CheckpointError, RecipeError
from embedsmith.core.files import atomic_file
from embedsmith.core.terminal import show
from embedsmith.data import RecordSet, text_id
from embedsmith.evaluate.geometry import MatrixShape, Space, neighbour_overlap
from embedsmith.merge.merge_plan import make_plan
from embedsmith.merge.recipe import Bounds, MergeRecipe
from embedsmith.merge.run import merge
from embedsmith.models import Embedder, load

Floats = NDArray[np.float64]


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

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not a number is null."""
        parents = {name: value if math.isfinite(value) else None for name, value in self.parents.items()}
        return {
            "check": self.name,
            "value": self.value if math.isfinite(self.value) else None,
            "limit": self.limit,
            "passed": self.passed,
            "parents": parents,
        }


@dataclass(frozen=True)
class Verification:
    """All rows."""

    checks: tuple[Check, ...]

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    def save(self, path: str | Path) -> None:
        rows = {"passed": not self.failed, "checks": [check.as_dict() for check in self.checks]}
        with atomic_file(path) as file:
            json.dump(rows, file, indent=1)

    def table(self) -> Table:
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
        if self.failed:
            rows = "; ".join(f"{row.name} is {row.value:.4g}, the bound {row.limit:.4g}" for row in self.failed)
            raise CheckpointError(
                f"the merge fails {len(self.failed)} of {len(self.checks)} checks: {rows}",
                where=where,
                fix="merge with a smaller scale or other weights, or write it without --strict",
            )


@dataclass(frozen=True)
class EncodedSample:
    """The distinct texts of a sample as one model sees them.

    `vector_ND`: with their own lengths. `plain_ND`: the same texts without their prompts, `None` where no prompt is
    set. `length_N`: tokens. `query_Q`, `answer_Q`: rows of queries and their documents.
    """

    vector_ND: Floats
    plain_ND: Floats | None
    length_N: Sequence[int]
    query_Q: Sequence[int]
    answer_Q: Sequence[int]

    @classmethod
    def of(cls, model: Embedder, records: RecordSet) -> Self:
        """Every text under its role. Graded pairs give no answers."""
        texts = distinct_texts(records)
        place = {(text_id(text), role): row for row, (text, role) in enumerate(texts)}
        answers = [(r.query, r.positives[0]) for r in records.records if r.task != "sts" and r.positives]
        settings = model.settings
        try:
            model.settings = replace(settings, normalize=False, similarity="dot")
            vector_ND = _in_roles(model, texts, records.task, instruction=None)
            plain_ND = _in_roles(model, texts, records.task, instruction="") if settings.prompts else None
        finally:
            model.settings = settings
        return cls(
            vector_ND,
            plain_ND,
            length_N=[int(model.tokenize([text], role, records.task).length_N[0]) for text, role in texts],
            query_Q=[place[text_id(query), "query"] for query, _ in answers],
            answer_Q=[place[text_id(document), "document"] for _, document in answers],
        )

    @property
    def broken(self) -> int:
        """How many vectors are not finite; there is no `space` then."""
        return int((~np.isfinite(self.vector_ND)).any(axis=1).sum())

    @cached_property
    def space(self) -> Space:
        return Space(Space(self.vector_ND).unit_ND)

    def figures(self) -> dict[str, float]:
        """The geometry of the vectors in numbers (`evaluate.geometry`). Margin of answers: cosine with the answer less
        the mean cosine with the other answers."""
        unit_ND = self.space.unit_ND
        found = {
            "anisotropy (mean cosine)": self.space.mean_cosine(),
            "uniformity": self.space.uniformity(),
            "effective rank": math.exp(MatrixShape.of(unit_ND).entropy),
            "length before normalising": float(np.linalg.norm(self.vector_ND, axis=1).mean()),
        }
        if len(self.query_Q) > 1:
            query_QD, answer_QD = unit_ND[self.query_Q], unit_ND[self.answer_Q]
            score_QQ = query_QD @ answer_QD.T
            others = (score_QQ.sum() - score_QQ.trace()) / (score_QQ.size - len(score_QQ))
            found["alignment"] = Space(query_QD).alignment(Space(answer_QD))
            found["margin of answers"] = float(score_QQ.trace() / len(score_QQ) - others)
        if self.plain_ND is not None:
            prompts = Space(self.plain_ND).prompt_sensitivity(self.space)
            found["cosine with and without prompt"] = prompts["cosine"]
        lengths = self.space.length_sensitivity(self.length_N)
        return found if math.isnan(lengths) else found | {"length sensitivity": lengths}

    def overlap(self, other: Space, count: int) -> float:
        """The mean share of a text's nearest neighbours that it also has in another space of the same texts."""
        return neighbour_overlap(self.space.neighbours(count), other.neighbours(count))

    def kept_by(self, width: int, count: int) -> float:
        """The same with the space of the leading coordinates."""
        return self.overlap(Space(self.space.vector_ND[:, :width]), count)

    def difference(self, other: Self) -> float:
        """The largest of any coordinate of a vector of length 1."""
        return float(np.abs(self.space.vector_ND - other.space.vector_ND).max())


def _in_roles(model: Embedder, texts: Sequence[tuple[str, Role]], task: str, instruction: str | None) -> Floats:
    """vector_ND in float64, with the prompts of the roles, or with the instruction instead."""
    found: dict[int, Floats] = {}
    for role in ROLES:
        rows = [row for row, (_, own) in enumerate(texts) if own == role]
        if rows:
            chosen = [texts[row][0] for row in rows]
            reps = model.represent(chosen, role=role, task=task, instruction=instruction, show_progress=False)
            found |= dict(zip(rows, reps["dense"].tensors()[0].double().cpu().numpy(), strict=True))
    return np.stack([found[row] for row in range(len(texts))])


def verify(merged: str | Path | Embedder, live: LiveMerge, sets: Sequence[RecordSet], bounds: Bounds) -> Verification:
    """Check a merged model against the parents in `live`, each on its own sample `sets[i]`.

    `live` is left at its last parent. A vector that is not finite fails the first row, and no other is computed.
    """
    model = merged if isinstance(merged, Embedder) else load(str(merged), device=live.model.device)
    samples = [EncodedSample.of(model, records) for records in sets]
    broken = sum(sample.broken for sample in samples)
    finite = Check("vectors that are not finite", float(broken), 0.0, higher_is_better=False)
    if broken:
        return Verification((finite,))
    parents: dict[str, EncodedSample] = {}
    for place, (name, records) in enumerate(zip(live.names, sets, strict=True)):
        live.place_parent(place)
        parents[name] = EncodedSample.of(live.model, records)
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model")
        reloaded = load(str(Path(folder) / "model"), device=model.device)
        saved = EncodedSample.of(reloaded, sets[0]).difference(samples[0])
    again = EncodedSample.of(model, sets[0]).difference(samples[0])
    checks = [
        finite,
        *_closeness(samples, parents, bounds),
        *_geometry(samples, parents, bounds.slack),
        *_leading_coordinates(samples, parents, bounds),
        Check("second encoding differs by", again, 0.0, higher_is_better=False),
        Check("difference after saving and loading", saved, bounds.same, higher_is_better=False),
    ]
    return Verification(tuple(checks))


def _closeness(own: Sequence[EncodedSample], parents: Mapping[str, EncodedSample], bounds: Bounds) -> list[Check]:
    """CKA and neighbours in common with each parent on that parent's texts; the closest parent must be close."""
    cka, near = {}, {}
    for mine, (name, theirs) in zip(own, parents.items(), strict=True):
        cka[name] = mine.space.agreement(theirs.space)["cka"]
        near[name] = mine.overlap(theirs.space, bounds.neighbours)
    return [
        Check("CKA with the closest parent", max(cka.values()), bounds.cka, True, cka),
        Check("neighbours in common with the closest parent", max(near.values()), bounds.overlap, True, near),
    ]


Bound = Callable[[float, float], float]
_BOUNDS: Mapping[str, tuple[bool, Bound | None]] = {
    "anisotropy (mean cosine)": (False, lambda worst, slack: worst + slack),
    "uniformity": (False, lambda worst, slack: worst + slack),
    "alignment": (False, None),
    "effective rank": (True, lambda worst, slack: worst - slack * abs(worst)),
    "margin of answers": (True, lambda worst, slack: worst - slack * abs(worst)),
    "length before normalising": (True, None),
    "cosine with and without prompt": (True, lambda worst, slack: worst - slack),
    "length sensitivity": (True, lambda worst, slack: worst - slack),
}
"""Figure to whether higher is better, and its bound from the worst parent's; without one it is for information."""


def _geometry(own: Sequence[EncodedSample], parents: Mapping[str, EncodedSample], slack: float) -> list[Check]:
    """Figures of the cloud of vectors, the mean over the samples, against the worst of the parents on its own texts."""
    mine = [sample.figures() for sample in own]
    theirs = {name: sample.figures() for name, sample in parents.items()}
    checks = []
    for figure, (higher, bound) in _BOUNDS.items():
        column = {name: values[figure] for name, values in theirs.items() if figure in values}
        values = [values[figure] for values in mine if figure in values]
        if column and values:
            worst = min(column.values()) if higher else max(column.values())
            limit = None if bound is None else bound(worst, slack)
            checks.append(Check(figure, sum(values) / len(values), limit, higher, column))
    return checks


def _leading_coordinates(
    own: Sequence[EncodedSample], parents: Mapping[str, EncodedSample], bounds: Bounds
) -> list[Check]:
    """Matryoshka: neighbours that leading coordinates keep of the whole vector's, against the worst parent's."""
    checks = []
    for width in (width for width in bounds.dims if width < own[0].vector_ND.shape[1]):
        column = {name: s.kept_by(width, bounds.neighbours) for name, s in parents.items()}
        value = sum(sample.kept_by(width, bounds.neighbours) for sample in own) / len(own)
        limit = min(column.values()) * (1 - bounds.slack)
        checks.append(Check(f"neighbours kept by {width} coordinates", value, limit, True, column))
    return checks


def verify_recipe(recipe: MergeRecipe, probe: Probe, folder: str | Path | None = None) -> Verification:
    """The merge that a recipe has written (or another folder) against the recipe's parents."""
    plan = make_plan(recipe)
    live = LiveMerge.of(plan.parents, plan.base)
    return verify(recipe.output if folder is None else folder, live, probe.of_parents(live.parents), recipe.verify)


def merge_verified(recipe: MergeRecipe, files: Sequence[str], strict: bool, overwrite: bool) -> Path:
    """Merge, check the result against the parents, print the table and write verify.json beside the weights.

    With `strict` a merge that fails never gets its name. Errors: `CheckpointError` naming the failed rows.
    """
    probe = Probe.of_recipe(recipe, files)
    if probe is None:
        raise RecipeError("verifying needs texts", fix="name a file for each parent: --probe FILE --probe FILE")

    def check(folder: Path) -> None:
        found = verify_recipe(recipe, probe, folder)
        found.save(folder / "verify.json")
        show(found.table())
        if strict:
            found.require(recipe.output)

    path = merge(recipe, overwrite=overwrite, check=check if strict else None).path
    if not strict:
        check(path)
    return path
