"""All claims and arms in one place, in the order of the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.reproduce import codiemb, conan, decoder, m3, self_positioning
from bench.reproduce.claim import Claim, Row
from bench.reproduce.study import Study

CLAIMS: dict[str, Claim] = {
    claim.name: claim for module in (codiemb, conan, m3, decoder, self_positioning) for claim in module.CLAIMS
}


def study_of(work: Path, results: Path, **sizes: Any) -> Study:
    """The study with every arm there is."""
    return Study(
        work,
        results,
        makers=codiemb.MAKERS | conan.MAKERS | decoder.MAKERS,
        measurers=conan.MEASURERS,
        widths=decoder.SCORED_AT_WIDTHS,
        geometry=codiemb.GEOMETRY,
        **sizes,
    )


def results_of(claim: Claim, study: Study) -> tuple[list[Row], dict[str, Any]]:
    """The rows a claim is judged by and the sizes of their runs: those of its bench, or the study's own."""
    return (study.rows(), study.settings) if claim.bench is None else claim.bench.results(study.results.parent)
