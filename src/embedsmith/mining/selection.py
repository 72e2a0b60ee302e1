"""From a query's candidates to its negatives: when two texts count as the same, who may be a negative, and in which
order they are taken."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from embedsmith.core.seeds import derive_seed
from embedsmith.core.words import folded, runs
from embedsmith.mining.config import Mask, Selection
from embedsmith.search.exact import FloatArray, IndexArray

_GRAM = 5  # characters
SUSPECT = 0.95
"""A negative that scores more than this share of its query's weakest positive is counted as probably false."""


def loose_id(text: str) -> int:
    """Equal for texts that differ only in case, width, white space or punctuation."""
    same = folded(text)
    letters = "".join(run for run, _ in runs(same)).replace("_", "") or same
    return int.from_bytes(hashlib.blake2b(letters.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def shingles(text: str) -> frozenset[str]:
    """Character 5-grams of the folded text; a shorter text is its own."""
    same = " ".join(folded(text).split())
    return frozenset(same[place : place + _GRAM] for place in range(max(len(same) - _GRAM + 1, 1)))


def overlap(left: frozenset[str], right: frozenset[str]) -> float:
    """Jaccard: shared over all."""
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)


@dataclass(frozen=True)
class Ranked:
    """One query's candidates, best first, and the scores of its weakest positive. Teacher scores may be absent."""

    index_C: IndexArray
    score_C: FloatArray
    positive: float
    teacher_C: FloatArray | None = None
    teacher_positive: float = float("nan")

    def may_be_negative(self, select: Selection) -> Mask:
        """mask_C of the candidates within all limits. One without a teacher score passes the teacher's."""
        mask_C = select.limits.allow(self.score_C, self.positive)
        if self.teacher_C is not None:
            taught_C = select.teacher_limits.allow(self.teacher_C, self.teacher_positive)
            mask_C &= taught_C | np.isnan(self.teacher_C)
        return mask_C


def order_of(score_C: FloatArray, select: Selection, key: object) -> list[int]:
    """Places in the order in which the strategy takes them. `key` and the seed decide every draw."""
    places = list(range(len(score_C)))
    if select.strategy == "stepped":
        return places[conan_window(select.round, select.negatives, select.offset, len(places))]
    if select.strategy == "top":
        return places
    chance = random.Random(derive_seed(select.seed, "negatives", key))
    draw_C = np.array([chance.random() for _ in places])
    if select.strategy == "random":
        return [int(place) for place in np.argsort(draw_C, kind="stable")]
    noise_C = -np.log(-np.log(np.clip(draw_C, 1e-12, 1 - 1e-12)))  # Gumbel: the order is a draw without replacement
    return [int(place) for place in np.argsort(-(score_C / select.temperature + noise_C), kind="stable")]


def conan_window(round_: int, negatives: int, offset: int, count: int) -> slice:
    """Ranks of the negatives after `round_` replacements, for n negatives: [(i - 1) n + offset, i n + offset) in the
    i-th (Conan-embedding, 3.2), and before it the n ranks before `offset`, or the first n where n is more
    (reconstructed). A window that a short list does not hold is moved back to its end (reconstructed)."""
    start = max(offset - negatives, 0) if round_ == 0 else (round_ - 1) * negatives + offset
    start = max(min(start, count - negatives), 0)
    return slice(start, min(start + negatives, count))


def take(
    order: Sequence[int],
    texts: Sequence[str],
    against: Sequence[str],
    count: int,
    near_duplicate: float | None,
) -> list[int]:
    """The first `count` places of `order` whose texts are no near-duplicates of `against` or of one another."""
    if near_duplicate is None:
        return list(order[:count])
    known = [shingles(text) for text in against]
    taken: list[int] = []
    for place in order:
        if len(taken) == count:
            break
        mine = shingles(texts[place])
        if all(overlap(mine, other) < near_duplicate for other in known):
            taken.append(place)
            known.append(mine)
    return taken


def fuse(index_lists: Sequence[IndexArray]) -> Iterator[IndexArray]:
    """Row by row, the union of several searchers' candidates, by the sum of 1 / (60 + rank) (reciprocal rank fusion,
    Cormack et al. 2009); ties to the lower index. One searcher's order stays as it is."""
    for rows in zip(*index_lists, strict=True):
        if len(rows) == 1:
            yield rows[0][rows[0] >= 0]
            continue
        merits: dict[int, float] = {}
        for row in rows:
            for place, index in enumerate(row[row >= 0].tolist()):
                merits[index] = merits.get(index, 0.0) + 1 / (61 + place)
        yield np.array(sorted(merits, key=lambda index: (-merits[index], index)), np.int64)
