"""Numbers that differ from tensor to tensor: spread over the layers, or by a part of the tensor's name.

    weight: 0.5                                    one number
    weight: [0, 0.5, 1]                            from the first layer to the last, linearly between these
    weight: [{filter: attention, value: [0, 1]}, {value: 0.5}]

The first entry that fits a tensor counts. Layer n of L takes the place n / (L - 1) of a list, and what lies outside the
layers (embeddings, a last norm, heads) takes its first number: both as mergekit has them.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator

from embedsmith.core.errors import RecipeError
from embedsmith.core.settings import Finite, Range, section

_LAYER = re.compile(r"^(backbone\..*?)\.(\d+)\.")
_FORMS = "a number, a list of numbers (spread over the layers), or a list of entries {filter: ..., value: ...}"
Numbers = Annotated[tuple[Finite, ...], Range(min_length=1)]
Place = tuple[int, int]
"""The number of a layer, and how many layers there are."""


@section
@dataclass(frozen=True)
class Where:
    """A value for some tensors.

    `value`: a number, or several that are spread over the layers. `filter`: the tensors with this in their names,
    `*` or nothing for all. `layers`: only those from the first number up to, and without, the second; several values
    are spread over these.
    """

    value: Finite | Numbers
    filter: str | None = None
    layers: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.layers is not None and not 0 <= self.layers[0] < self.layers[1]:
            fix = "write the first layer and the one after the last, such as [0, 6]"
            raise RecipeError(f"layers {list(self.layers)}", expected="a layer and a later one", fix=fix)

    def fits(self, name: str, place: Place | None) -> bool:
        """Whether it says something of this tensor."""
        inside = self.layers is None or (place is not None and self.layers[0] <= place[0] < self.layers[1])
        return inside and (self.filter in (None, "*") or str(self.filter) in name)

    def at(self, place: Place | None) -> float:
        if self.layers is not None and place is not None:
            place = place[0] - self.layers[0], self.layers[1] - self.layers[0]
        return _spread(self.value, place)


def _checked(value: Any) -> Any:
    """Take a single entry as a list of one. Errors: `RecipeError` for a list that is empty or mixes two kinds."""
    if isinstance(value, Mapping | Where):
        return [value]
    if not isinstance(value, list | tuple):
        return value
    entries = [isinstance(one, Mapping | Where) for one in value]
    if not value or (any(entries) and not all(entries)):
        raise RecipeError("an empty list" if not value else "a list of numbers and entries", expected=_FORMS)
    return value


Varying = Annotated[Finite | Numbers | tuple[Where, ...], BeforeValidator(_checked)]


def _spread(value: float | Sequence[float], place: Place | None) -> float:
    """A number, or the place of a layer between several."""
    if isinstance(value, int | float):
        return float(value)
    number, count = place or (0, 2)
    # the only layer of one has the last value
    exact = number * (len(value) - 1) / (count - 1) if count > 1 else len(value) - 1.0
    left = int(exact)
    right, share = min(left + 1, len(value) - 1), exact - left
    return (1 - share) * value[left] + share * value[right]


def value_at(setting: Varying, name: str, place: Place | None) -> float | None:
    """What a setting says of a tensor; `None` where no entry fits it."""
    if isinstance(setting, int | float):
        return float(setting)
    entries = [one for one in setting if isinstance(one, Where)]
    if not entries:
        return _spread([float(one) for one in setting if isinstance(one, int | float)], place)
    return next((one.at(place) for one in entries if one.fits(name, place)), None)


def numbers_of(setting: Varying) -> list[float]:
    """Every number it holds, in their order."""
    if isinstance(setting, int | float):
        return [float(setting)]
    values = [one.value if isinstance(one, Where) else one for one in setting]
    return [float(n) for value in values for n in (value if isinstance(value, list | tuple) else [value])]


def mean_of(setting: Varying) -> float:
    """One number for all of it, where only one will do: which parent is the heaviest, what an explanation compares."""
    values = numbers_of(setting)
    return sum(values) / len(values)


def check_numbers(name: str, setting: Varying, least: float = -math.inf, most: float = math.inf) -> None:
    """Errors: `RecipeError` for a setting of an unknown form, and for a number that is not finite or out of range."""
    parts = (setting,) if isinstance(setting, int | float) else setting
    wrong = not all(isinstance(one, int | float | Where) for one in parts)
    if wrong or not all(math.isfinite(value) and least <= value <= most for value in numbers_of(setting)):
        limits = "" if math.isinf(least) else f", from {least:g} to {most:g}"
        raise RecipeError(f"{name} is {setting!r}", expected=_FORMS + limits)


def varies(setting: Varying) -> bool:
    """Whether it is more than one number for all tensors."""
    return not isinstance(setting, int | float)


def layer_places(names: Iterable[str]) -> dict[str, Place]:
    """The layer of every tensor that lies in one of the encoder's numbered layers, and how many there are."""
    found = {name: match for name in names if (match := _LAYER.match(name))}
    counts: dict[str, int] = {}
    for match in found.values():
        counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    return {name: (int(match[2]), counts[match[1]]) for name, match in found.items()}


def check_filters(setting: Varying, names: Sequence[str], places: Mapping[str, Place], where: str) -> None:
    """Errors: `RecipeError` for an entry that fits no tensor, and for a tensor that no entry fits."""
    for entry in [] if isinstance(setting, int | float) else [one for one in setting if isinstance(one, Where)]:
        if not any(entry.fits(name, places.get(name)) for name in names):
            layers = "" if entry.layers is None else f" in the layers {list(entry.layers)}"
            raise RecipeError(
                f"no tensor{layers} has {entry.filter!r} in its name",
                where=where,
                expected=f"a part of such names as {names[len(names) // 2]}",
                fix="correct this entry, or take it away",
            )
    for name in names:
        if value_at(setting, name, places.get(name)) is None:
            raise RecipeError(f"no entry fits {name}", where=where, fix="add an entry without a filter: {value: ...}")
