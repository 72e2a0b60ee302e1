"""A claim of a paper as a small controlled experiment: `python -m bench.reproduce CLAIM [CLAIM ...] [--seeds 0 1 2]`.

    python -m bench.reproduce --list                  # the claims, what each needs, and its verdict so far
    python -m bench.reproduce codiemb-joint           # train and score what is missing, judge, print
    python -m bench.reproduce --table                 # write the results into docs/reproduction.md

Runs are appended to bench/results/reproduce.json and never done again, so a command can be stopped and continued, and
claims share arms. A claim whose experiment is another bench reads that bench's results, and calls it where rows are
missing. The rules of the verdict are in bench/reproduce/judge.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from bench.common import RESULTS, ROOT, WORK, read_json, write_json
from bench.reproduce.claim import Claim
from bench.reproduce.claims import CLAIMS, results_of, study_of
from bench.reproduce.judge import judge, pairs_of
from bench.reproduce.study import Study
from bench.reproduce.table import claim_text, update_document, word_of

DOCUMENT = ROOT / "docs" / "reproduction.md"
NO_RANDOMNESS = frozenset({"untrained"})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"of {', '.join(CLAIMS)}; or `all`")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--list", action="store_true", help="the claims and their verdicts")
    parser.add_argument("--table", action="store_true", help="judge all claims and write docs/reproduction.md")
    parser.add_argument("--steps", type=int, default=80, help="of every arm")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--items", type=int, default=500, help="queries of debian-dev; three times as many pairs")
    parser.add_argument("--documents", type=int, default=2000, help="of debian-dev")
    parser.add_argument("--work", type=Path, default=WORK / "reproduce")
    parser.add_argument("--results", type=Path, default=RESULTS / "reproduce.json")
    a = parser.parse_args()
    wanted = list(CLAIMS) if a.claims == ["all"] else a.claims
    if unknown := [name for name in wanted if name not in CLAIMS]:
        parser.error(f"no claim {unknown[0]!r}; there are {', '.join(CLAIMS)}")
    if not (wanted or a.list or a.table):
        parser.error("name a claim, or give --list or --table")
    sizes = {"steps": a.steps, "batch": a.batch, "items": a.items, "documents": a.documents}
    study = study_of(a.work.resolve(), a.results.resolve(), **sizes)
    for name in wanted:
        make_rows(CLAIMS[name], study, a.seeds)
        keep_verdicts(study, [name])
        print(claim_text(CLAIMS[name], read_json(study.results, {})["claims"][name]))
    if a.table:
        keep_verdicts(study, list(CLAIMS))
        update_document(DOCUMENT, CLAIMS.values(), read_json(study.results, {}))
        print(f"wrote {DOCUMENT.relative_to(ROOT)}")
    if a.list:
        print_list(study)


def make_rows(claim: Claim, study: Study, seeds: list[int]) -> None:
    """Everything the claim's checks need; seed by seed, so that a study cut short still compares the arms."""
    for arm in (arm for arm in claim.arms if arm in NO_RANDOMNESS):
        study.record(arm, None)
    for seed in seeds:
        for arm in (arm for arm in claim.arms if arm not in NO_RANDOMNESS):
            study.record(arm, seed)
    if claim.bench is not None and lacking(claim, study, seeds):
        options = ["--seeds", *map(str, seeds)] if claim.bench.takes_seeds else []
        subprocess.run(
            [sys.executable, "-m", claim.bench.module, *claim.bench.arguments, *options], check=True, cwd=ROOT
        )


def lacking(claim: Claim, study: Study, seeds: list[int]) -> bool:
    """Whether a check of a claim has no rows, or fewer than the seeds ask for."""
    assert claim.bench is not None
    rows, _ = results_of(claim, study)
    least = len(seeds) if claim.bench.takes_seeds else 1
    return any(len(pairs_of(check, rows)) < least for check in claim.checks)


def keep_verdicts(study: Study, names: list[str]) -> None:
    """Judge these claims by the rows there are, beside the runs. Another process may add to the file meanwhile."""
    found = {name: judge(CLAIMS[name], *results_of(CLAIMS[name], study)) for name in names}
    table = read_json(study.results, {})
    known = table.get("claims", {}) | found
    table["claims"] = {name: known[name] for name in CLAIMS if name in known}
    write_json(study.results, table)


def print_list(study: Study) -> None:
    known = read_json(study.results, {}).get("claims", {})
    for claim in CLAIMS.values():
        needs = f"{len(claim.arms)} arms" if claim.bench is None else claim.bench.module
        needs = "-" if claim.untestable else needs
        print(f"{claim.name:26}{word_of(claim, known.get(claim.name)):26}{needs:24}{claim.says}")


if __name__ == "__main__":
    main()
