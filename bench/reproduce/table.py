"""Verdicts as Markdown: what docs/reproduction.md holds between its two marks. No figure is typed by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.reproduce.claim import Check, Claim, Measure
from embedsmith.core.files import atomic_file

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
Judged = Mapping[str, Any]


def update_document(path: Path, claims: Iterable[Claim], table: Mapping[str, Any]) -> None:
    """Put the results of a JSON table between the marks of the document."""
    text = path.read_text(encoding="utf-8")
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    with atomic_file(path) as file:
        file.write(f"{head}{BEGIN}\n{results_text(list(claims), table)}\n{END}{tail}")


def document_results(path: Path) -> str:
    """What stands between the marks."""
    return path.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip("\n")


def results_text(claims: list[Claim], table: Mapping[str, Any]) -> str:
    """Where results come from, the table of all claims, then a section for each."""
    judged: Mapping[str, Judged] = table.get("claims", {})
    lines = [
        about_runs(table.get("runs", [])),
        "",
        "| claim | system | verdict | checks: hold, open, contradicted | seeds |",
        "|---|---|---|---|---|",
    ]
    lines += [overview_row(claim, judged.get(claim.name)) for claim in claims]
    sections = [f"### {claim.name}\n\n{claim_text(claim, judged.get(claim.name))}" for claim in claims]
    return "\n".join(lines) + "\n\n## Claim by claim\n\n" + "\n\n".join(sections)


def about_runs(runs: Sequence[Mapping[str, Any]]) -> str:
    """The study's own runs: how many, how long, on what and when."""
    if not runs:
        return "No runs of the study's own yet."
    machines = sorted({f"{run['environment']['cpu']}, {run['environment']['cores']} cores" for run in runs})
    versions = sorted({f"torch {run['environment']['versions']['torch']}" for run in runs})
    days = sorted(run["environment"]["date"][:10] for run in runs)
    when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    minutes = sum(run["minutes"] for run in runs)
    where = "; ".join([*machines, *versions])
    return f"{len(runs)} runs of the study's own, {minutes:.0f} minutes in all, on {where}; {when}."


def overview_row(claim: Claim, judged: Judged | None) -> str:
    checks = (judged or {}).get("checks") or []
    outcomes = [check["outcome"] for check in checks if check is not None]
    counted = ", ".join(str(outcomes.count(name)) for name in ("holds", "open", "contradicted")) if outcomes else ""
    seeds = (judged or {}).get("seeds") or ""
    return f"| [{claim.name}](#{claim.name}) | {claim.system} | {word_of(claim, judged)} | {counted} | {seeds} |"


def word_of(claim: Claim, judged: Judged | None) -> str:
    """The verdict; one seed says nothing of how much runs differ, so it is told."""
    if not judged:
        return "untestable here" if claim.untestable else "not run yet"
    known = judged["verdict"] in ("reproduced", "partly", "not reproduced")
    return f"{judged['verdict']} (one seed)" if known and judged["seeds"] == 1 else str(judged["verdict"])


def claim_text(claim: Claim, judged: Judged | None) -> str:
    """One claim: words, source, setting, results, verdict, full scale."""
    recipes = ", ".join(f"`recipes/{name}`" for name in claim.recipes)
    parts = [
        f"**Claim.** {claim.says}",
        f"**Source.** {claim.source}. {claim.measured}",
        f"**Here.** {claim.setting}" if claim.untestable is None else f"**Untestable here.** {claim.untestable}",
    ]
    if judged and judged["arms"]:
        sizes = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in judged["sizes"].items())
        parts.append(f"Sizes of the runs below: {sizes}.")
        parts.append("\n".join(arm_table(claim, judged["arms"])))
    if claim.checks:
        parts.append("\n".join(check_table(claim, judged)))
    parts.append(f"**Verdict.** {word_of(claim, judged)}.{below_text((judged or {}).get('below') or [])}")
    parts.append(f"**Full scale.** {claim.full} Recipes: {recipes}.")
    if claim.untestable is None:
        parts.insert(3, f"`python -m bench.reproduce {claim.name}`")
    return "\n\n".join(parts)


def below_text(below: Sequence[Mapping[str, Any]]) -> str:
    """That winners lie below what they are made of."""
    words = []
    for one in below:
        bounds = "" if one["low"] is None else f", 95 %: {one['low']:+.2f} to {one['high']:+.2f}"
        words.append(
            f" But {one['arm']} lies below {one['part']}, which it is made of ({one['measure']}: {one['value']:+.2f}"
            f"{bounds})."
        )
    return "".join(words)


def arm_table(claim: Claim, arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Means and standard deviations over seeds."""
    shown = [measure for measure in claim.shown if any(measure.words in cells for cells in arms.values())]
    lines = ["| arm | " + " | ".join(measure.words for measure in shown) + " |", "|---|" + "---|" * len(shown)]
    for arm, cells in arms.items():
        row = [spread(cells.get(measure.words), measure) for measure in shown]
        lines.append(f"| {arm} | " + " | ".join(row) + " |")
    return lines


def spread(cell: Mapping[str, Any] | None, measure: Measure) -> str:
    if cell is None:
        return ""
    mean = f"{cell['mean']:.{measure.digits}f}"
    return mean if cell["sd"] is None else f"{mean} ± {cell['sd']:.{measure.digits}f}"


def check_table(claim: Claim, judged: Judged | None) -> list[str]:
    """What was asked, and what came of it. Differences are positive where the first arm is better."""
    found = (judged or {}).get("checks") or [None] * len(claim.checks)
    lines = ["| check | asked | difference | 95 % | outcome |", "|---|---|---|---|---|"]
    for check, result in zip(claim.checks, found, strict=True):
        cells = [check.words, asked(check), *(result_cells(check, result) if result else ("", "", "not run yet"))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def asked(check: Check) -> str:
    """The check as a formula."""
    share = "" if check.share == 1 else f"{check.share:g} x "
    first, second = f"{check.first}, {check.measure.words}", f"{share}{check.second}, {check.other.words}"
    if check.measure == check.other and check.first != check.second:
        first, second = check.first, f"{share}{check.second} ({check.measure.words})"
    sign = "below" if check.measure.lower_is_better else "above"
    slack = f" by {check.margin:g}" if check.margin > 0 else f" less {-check.margin:g}" if check.margin < 0 else ""
    return f"{first} {sign} {second}{slack}"


def result_cells(check: Check, result: Mapping[str, Any]) -> tuple[str, str, str]:
    digits = check.measure.digits
    how = {"bootstrap": "bootstrap", "t": "t", "one run": ""}[result["how"]]
    bounds = "" if result["low"] is None else f"{result['low']:+.{digits}f} to {result['high']:+.{digits}f} ({how})"
    return f"{result['value']:+.{digits}f}", bounds, result["outcome"]
