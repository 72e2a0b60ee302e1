"""What a claim is: words, a source, and checks whose outcome follows from results by a rule fixed beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Measure:
    """A score, or the mean of several (`parts`). `least`: without a confidence interval a smaller difference says
    nothing."""

    words: str
    parts: tuple[str, ...]
    lower_is_better: bool = False
    digits: int = 2
    least: float = 1.0

    def at(self, width: int) -> Measure:
        """The same of vectors cut to their first coordinates."""
        parts = tuple(f"{part}@{width}" for part in self.parts)
        return Measure(f"{self.words} at width {width}", parts, self.lower_is_better, self.digits, self.least)


RETRIEVAL = Measure("debian-dev", ("debian",))
STS = Measure("stsb-en-dev", ("stsb",))
MEAN = Measure("mean of both", ("debian", "stsb"))
TEST = Measure("stsb-en-test", ("stsb-test",))


@dataclass(frozen=True)
class Check:
    """`first` is better than `second` by more than `margin`: first - share * second > margin, with the sign turned
    where lower is better. A negative margin asks only for "not worse by more than that"; `share` 0.95 for 95 %."""

    words: str
    first: str
    second: str
    measure: Measure = MEAN
    margin: float = 0.0
    share: float = 1.0
    against: Measure | None = None

    @property
    def gains(self) -> bool:
        """Whether it asks for something better, not only for nothing lost (a negative margin, a share of a score)."""
        return self.margin >= 0 and (self.share == 1 or self.measure.lower_is_better)

    @property
    def other(self) -> Measure:
        """What the second arm is measured by."""
        return self.against or self.measure


@dataclass(frozen=True)
class Row:
    """Scores of one arm and seed; `seed` is None for an arm that has no randomness and stands beside every seed.
    `items`: values of single queries, pairs or texts by score, for the bootstrap: their mean is the score, or with
    `labels` their correlation."""

    arm: str
    seed: int | None
    scores: Mapping[str, float]
    items: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)
    labels: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Bench:
    """Another bench that already makes the rows of a claim. `sizes`: of the runs that are read."""

    module: str
    arguments: tuple[str, ...]
    file: str
    read: Callable[[Any], list[Row]]
    sizes: Callable[[Any], Mapping[str, Any]]
    takes_seeds: bool = True

    def results(self, folder: Path) -> tuple[list[Row], dict[str, Any]]:
        """The rows, and the sizes of their runs."""
        from bench.common import read_json

        table = read_json(folder / self.file, {})
        rows = self.read(table)
        return rows, dict(self.sizes(table)) if rows else {}


@dataclass(frozen=True)
class Claim:
    """One claim of a system.

    `says`: in words; `source`; `measured`: published figures; `setting`: ours; `checks`: what has to hold; `arms`: own
    runs it needs; `bench`: where rows come from instead; `beside`: arms shown without a check; `shown`: measures;
    `parts`: what an arm is made of, other arms; `full`: what a full-scale test needs; `recipes`: ready for it;
    `untestable`: why, where it cannot be tested here.
    """

    name: str
    system: str
    says: str
    source: str
    measured: str
    setting: str
    full: str
    recipes: tuple[str, ...]
    checks: tuple[Check, ...] = ()
    arms: tuple[str, ...] = ()
    bench: Bench | None = None
    beside: tuple[str, ...] = ()
    shown: tuple[Measure, ...] = (RETRIEVAL, STS, MEAN)
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    untestable: str | None = None

    def shown_arms(self) -> list[str]:
        """Arms of the table, in the order they are named."""
        checked = [arm for check in self.checks for arm in (check.second, check.first)]
        return list(dict.fromkeys([*self.beside, *(self.arms or checked)]))
