"""Checks of hyper-parameters: a wrong value is a `RecipeError` before anything is loaded."""

from __future__ import annotations

import math

from embedsmith.core.errors import RecipeError
from embedsmith.core.loss import Loss


def above_zero(loss: Loss, *names: str) -> None:
    """Each named field is a finite number > 0, or `None`."""
    for name in names:
        value = getattr(loss, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise RecipeError(f"{name} is {value}", where=_name(loss), expected="a number above 0")


def not_negative(loss: Loss, *names: str) -> None:
    """Each named field is a finite number >= 0, or `None`, or a sequence of such numbers."""
    for name in names:
        value = getattr(loss, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not (math.isfinite(number) and number >= 0):
                raise RecipeError(f"{name} is {value}", where=_name(loss), expected="0 or more")


def finite(loss: Loss, *names: str) -> None:
    """Each named field is a finite number, or `None`."""
    for name in names:
        value = getattr(loss, name)
        if value is not None and not math.isfinite(value):
            raise RecipeError(f"{name} is {value}", where=_name(loss), expected="a finite number")


def one_of(loss: Loss, name: str, *allowed: str) -> None:
    """The named field is one of a few words (a recipe checks this by its type, Python code does not)."""
    if getattr(loss, name) not in allowed:
        raise RecipeError(
            f"{name} is {getattr(loss, name)!r}", where=_name(loss), expected=f"one of {', '.join(allowed)}"
        )


def not_empty(loss: Loss, *names: str) -> None:
    """Each named field is a word or a sequence with something in it."""
    for name in names:
        if not getattr(loss, name):
            raise RecipeError(f"{name} is empty", where=_name(loss), expected="at least one entry")


def same_length(loss: Loss, name: str, other: str) -> None:
    """Two sequence fields have one entry for each entry of the other; the first may be `None`."""
    value, length = getattr(loss, name), len(getattr(loss, other))
    if value is not None and len(value) != length:
        raise RecipeError(
            f"{name} has {len(value)} entries", where=_name(loss), expected=f"{length}, one for each of {other}"
        )


def wrong(loss: Loss, what: str, expected: str) -> RecipeError:
    """An error about combinations of fields, naming the loss."""
    return RecipeError(what, where=_name(loss), expected=expected)


def _name(loss: Loss) -> str:
    return str(getattr(type(loss), "registered_name", type(loss).__name__))
