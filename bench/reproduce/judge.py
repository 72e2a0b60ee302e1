"""Rows to a verdict. The rules stand here, before any result:

- the interval of a difference is a paired bootstrap of 95 % over seeds and items together (the same items and seeds of
  both arms), where single items are known; else Student's t of 95 % over the seeds' differences; else there is none;
- a check *holds* if the whole interval and every seed's difference lie above its margin; it is *contradicted* if the
  whole interval and every seed's difference lie below; otherwise it is *open*. Without an interval (one seed, no items)
  the difference itself decides: above the margin where the margin is negative, else by `Measure.least` at least;
- a claim is *reproduced* if all its checks hold, *partly* if some do, and *not reproduced* if none does that asks for a
  gain: that nothing is lost proves little where nothing is won (a claim without gains counts all its checks);
  *untestable here* is said by its text alone; and with missing rows there is no verdict yet;
- whoever wins a check and is made of other arms (a merge) is also held against the best of these: a claim is no less
  reproduced where it lies below, but that it does is said.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t

from bench.reproduce.claim import Check, Claim, Measure, Row
from embedsmith.evaluate.compare import spearman_rows

Floats = npt.NDArray[np.float64]
SAMPLES = 1000


@dataclass(frozen=True)
class Gap:
    """first - share * second, positive where the first is better: the mean over seeds, its interval, each seed's."""

    value: float
    low: float | None
    high: float | None
    seeds: tuple[float, ...]
    how: str

    def outcome(self, check: Check) -> str:
        if self.low is None or self.high is None:
            least = 0.0 if check.margin < 0 else check.measure.least
            rest = self.value - check.margin
            return "holds" if rest > 0 and rest >= least else "contradicted" if rest < 0 and -rest >= least else "open"
        if self.low > check.margin and min(self.seeds) > check.margin:
            return "holds"
        return "contradicted" if self.high < check.margin and max(self.seeds) < check.margin else "open"


def score(row: Row, measure: Measure) -> float:
    return statistics.fmean(row.scores[part] for part in measure.parts)


def gap(check: Check, rows: Sequence[Row]) -> Gap | None:
    """The difference that a check is about; `None` where an arm has no rows, or no seed in common."""
    pairs = pairs_of(check, rows)
    if not pairs:
        return None
    sign = -1.0 if check.measure.lower_is_better else 1.0
    each = [sign * (score(a, check.measure) - check.share * score(b, check.other)) for a, b in pairs]
    value = statistics.fmean(each)
    if all(part in a.items for a, _ in pairs for part in check.measure.parts) and all(
        part in b.items for _, b in pairs for part in check.other.parts
    ):
        gap_SB = np.stack(
            [sign * (resampled(a, check.measure) - check.share * resampled(b, check.other)) for a, b in pairs]
        )
        low, high = np.nanquantile(over_seeds(gap_SB), (0.025, 0.975))
        return Gap(value, float(low), float(high), tuple(each), "bootstrap")
    if len(each) < 2:
        return Gap(value, None, None, tuple(each), "one run")
    half = float(t.ppf(0.975, len(each) - 1)) * statistics.stdev(each) / len(each) ** 0.5
    return Gap(value, value - half, value + half, tuple(each), "t")


def pairs_of(check: Check, rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows of both arms by seed. A row without a seed stands beside every seed of the other arm."""
    first, second = ({row.seed: row for row in rows if row.arm == arm} for arm in (check.first, check.second))
    seeds: list[int | None] = [*sorted({seed for seed in (*first, *second) if seed is not None})] or [None]
    found = [(first.get(seed, first.get(None)), second.get(seed, second.get(None))) for seed in seeds]
    return [(a, b) for a, b in found if a is not None and b is not None]


def over_seeds(gap_SB: Floats) -> Floats:
    """Each resample of items is seen with seeds drawn anew: the mean difference of every resample, [B]."""
    count, samples = gap_SB.shape
    seed_SB = np.random.default_rng(0).integers(0, count, (count, samples))
    mean_B: Floats = np.take_along_axis(gap_SB, seed_SB, axis=0).mean(axis=0)
    return mean_B


def resampled(row: Row, measure: Measure) -> Floats:
    """The measure on resamples of each part's items, [B]; the same resamples for every row with as many items."""
    parts = [_resampled(row.items[part], row.labels.get(part.partition("@")[0])) for part in measure.parts]
    mean_B: Floats = np.mean(parts, axis=0)
    return mean_B


@lru_cache(maxsize=512)
def _resampled(item_N: tuple[float, ...], label_N: tuple[float, ...] | None) -> Floats:
    """Means of the resampled items; with labels, Spearman's correlation with them, times 100."""
    chosen_BN = np.random.default_rng(len(item_N)).integers(0, len(item_N), (SAMPLES, len(item_N)))
    value_BN = np.asarray(item_N)[chosen_BN]
    if label_N is not None:
        return 100 * spearman_rows(value_BN, np.asarray(label_N)[chosen_BN])
    mean_B: Floats = value_BN.mean(axis=1)
    return mean_B


def verdict(outcomes: Sequence[str | None], gains: Sequence[bool]) -> str:
    """Of the outcomes of a claim's checks, and whether each asks for a gain; `None` is a check without rows."""
    if any(outcome is None for outcome in outcomes):
        return "not run yet"
    held = [outcome == "holds" for outcome in outcomes]
    won = any(each for each, gain in zip(held, gains, strict=True) if gain or not any(gains))
    return "reproduced" if all(held) else "partly" if won else "not reproduced"


def judge(claim: Claim, rows: Sequence[Row], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the results table says of a claim, as plain values."""
    if claim.untestable is not None:
        return {"verdict": "untestable here", "checks": [], "arms": {}, "seeds": 0, "sizes": {}}
    gaps = [gap(check, rows) for check in claim.checks]
    outcomes = [None if found is None else found.outcome(check) for check, found in zip(claim.checks, gaps)]
    arms = {arm: summary for arm in claim.shown_arms() if (summary := arm_summary(claim, arm, rows))}
    seeds = [len(found.seeds) for found in gaps if found is not None]
    return {
        "verdict": verdict(outcomes, [check.gains for check in claim.checks]),
        "sizes": dict(sizes),
        "seeds": min(seeds, default=0),
        "checks": [_check_row(check, found) for check, found in zip(claim.checks, gaps)],
        "arms": arms,
        **({"below": below_parts(claim, outcomes, rows)} if claim.parts else {}),
    }


def below_parts(claim: Claim, outcomes: Sequence[str | None], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every arm that won a check and lies below the best arm that it is made of, with the difference between both."""
    won = {(c.first, c.measure): c for c, outcome in zip(claim.checks, outcomes, strict=True) if outcome == "holds"}
    found = []
    for arm, measure in won:
        against = [Check("", arm, part, measure) for part in claim.parts.get(arm, ())]
        gaps = {check.second: own for check in against if (own := gap(check, rows)) is not None}
        if gaps and gaps[best := min(gaps, key=lambda part: gaps[part].value)].value < 0:
            own = gaps[best]
            bounds = {"low": _rounded(own.low), "high": _rounded(own.high)}
            found.append({"arm": arm, "part": best, "measure": measure.words, "value": _rounded(own.value), **bounds})
    return found


def _check_row(check: Check, found: Gap | None) -> dict[str, Any] | None:
    if found is None:
        return None
    bounds = {"low": _rounded(found.low), "high": _rounded(found.high)}
    seeds = [_rounded(value) for value in found.seeds]
    return {"value": _rounded(found.value), **bounds, "seeds": seeds, "how": found.how, "outcome": found.outcome(check)}


def arm_summary(claim: Claim, arm: str, rows: Sequence[Row]) -> dict[str, dict[str, float | int | None]]:
    """Mean and standard deviation over seeds of every measure that is shown and known."""
    own = [row for row in rows if row.arm == arm]
    found: dict[str, dict[str, float | int | None]] = {}
    for measure in claim.shown:
        values = [score(row, measure) for row in own if set(measure.parts) <= row.scores.keys()]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else None
            found[measure.words] = {
                "mean": _rounded(statistics.fmean(values)),
                "sd": _rounded(spread),
                "runs": len(values),
            }
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
