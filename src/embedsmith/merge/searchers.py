"""Where to look next: each searcher is a generator of rounds of points that is sent the values it asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedsmith.core.errors import MissingExtraError, RecipeError


@dataclass(frozen=True)
class Point:
    """A place in the space of merges: the parents' weights (they sum to 1) and the length lambda."""

    weights: tuple[float, ...]
    length: float

    @property
    def weight_M(self) -> Tensor:
        return torch.tensor(self.weights, dtype=torch.float64)


@dataclass(frozen=True)
class Round:
    """Points to score, on which share of the items."""

    points: tuple[Point, ...]
    share: float = 1.0


Searcher = Generator[Round, Sequence[float], None]


def grid(parents: int, steps: int, lengths: Sequence[float]) -> Searcher:
    """Every combination of weights k / steps that sum to 1, at every length; one round a length, the unmerged corners
    last, since they are the parents themselves."""
    ways = [way for way in itertools.product(range(steps + 1), repeat=parents) if sum(way) == steps]
    ways.sort(key=lambda way: max(way))
    for length in lengths:
        yield Round(tuple(Point(tuple(part / steps for part in way), length) for way in ways))


def halving(parents: int, points: int, lengths: tuple[float, float], keep: float, seed: int) -> Searcher:
    """Random points on a small share of the items; the best `keep` of them on more, until all items are used.

    Weights are uniform on the simplex, lengths uniform between the bounds. Equal weights at the middle length are
    always among them.
    """
    chance = np.random.default_rng(seed)
    left = [Point((1 / parents,) * parents, sum(lengths) / 2)]
    for _ in range(points - 1):
        weights = tuple(float(w) for w in chance.dirichlet(np.ones(parents)))
        left.append(Point(weights, float(chance.uniform(*lengths))))
    rounds = max(math.ceil(math.log(len(left)) / math.log(1 / keep)), 1)
    for place in range(rounds + 1):
        values = yield Round(tuple(left), share=min(keep ** (rounds - place), 1.0))
        order = sorted(range(len(left)), key=lambda n: -values[n])
        left = [left[n] for n in order[: max(math.ceil(keep * len(left)), 1)]]


def evolution(parents: int, start: Point, lengths: tuple[float, float], sigma: float, seed: int) -> Searcher:
    """CMA-ES on (log weights, length) from `start`. Source: Hansen 2016 (1604.00772), package cma."""
    try:
        import cma
    except ImportError as error:
        raise MissingExtraError("cma", "merge") from error
    logs = [math.log(max(w, 1e-3)) for w in start.weights]
    low, high = [-6.0] * parents + [lengths[0]], [6.0] * parents + [lengths[1]]
    options: dict[str, Any] = {"seed": seed + 1, "verbose": -9, "bounds": [low, high]}
    strategy = cma.CMAEvolutionStrategy([*logs, start.length], sigma, options)
    while not strategy.stop():
        found = strategy.ask()
        values = yield Round(tuple(_point(place) for place in found))
        strategy.tell(found, [-value for value in values])


def _point(place: Sequence[float]) -> Point:
    weights = torch.softmax(torch.tensor(list(place[:-1]), dtype=torch.float64), 0)
    return Point(tuple(weights.tolist()), float(place[-1]))


def check_lengths(lengths: Sequence[float]) -> None:
    """Errors: `RecipeError` for lengths that cannot be searched."""
    if not lengths or min(lengths) < 0:
        raise RecipeError(f"lengths {list(lengths)}", expected="numbers from 0 on")
