"""Settings: frozen dataclasses that are their own schema. What each field may hold stands in its annotation, and is
checked whether a recipe or a Python caller gave it; what it means stands in the docstring of its class.

Imported by the shelf and so by `--help`: pydantic is loaded where something is checked.
"""

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from embedsmith.core.errors import RecipeError
from embedsmith.core.text_out import without_secrets

C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Range:
    """Limits of a number or word in an annotation, under pydantic's names. A number with a range is finite."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    min_length: int | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        limits = {name: value for name, value in vars(self).items() if value is not None}
        finite = {"allow_inf_nan": False} if source is float else {}
        return handler(source) | limits | finite


Finite = Annotated[float, Range()]
Positive = Annotated[float, Range(gt=0)]
NotNegative = Annotated[float, Range(ge=0)]
Share = Annotated[float, Range(ge=0, le=1)]
Count = Annotated[int, Range(gt=0)]
Width = Annotated[int, Range(gt=0, le=2**17)]
"""How many numbers a vector has: more than 131,072 is a slip, and would not fit any memory."""
Word = Annotated[str, Range(min_length=1)]
Weights = Annotated[Mapping[str, NotNegative], Range(min_length=1)]


_CONFIG: Any = {"arbitrary_types_allowed": True, "allow_inf_nan": False}


def section(cls: C) -> C:
    """Class decorator for a frozen dataclass of settings: unknown keys of a recipe become errors, and so do values
    outside the ranges and words that the annotations allow, for Python callers too. No number is NaN or infinite.

    Errors: `RecipeError` naming the setting, what came and what was expected.
    """
    cls.__pydantic_config__ = {"extra": "forbid", **_CONFIG}  # type: ignore[attr-defined]
    plain_init: Callable[..., None] = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(plain_init)

    @functools.wraps(plain_init)
    def checked_init(self: Any, *args: Any, **values: Any) -> None:
        try:
            given = signature.bind(self, *args, **values).arguments
        except TypeError:
            given = {}  # a wrong call: the dataclass says it better
        for name, limits in _limits(cls).items():
            if name in given:
                _check(cls, name, given[name], limits)
        plain_init(self, *args, **values)

    cls.__init__ = checked_init  # type: ignore[misc]
    return cls


def _check(cls: type, name: str, value: Any, limits: Any) -> None:
    from pydantic import ValidationError

    try:
        limits.validate_python(value)
    except ValidationError as error:
        expected = " or ".join(dict.fromkeys(one["msg"].removeprefix("Input should be ") for one in error.errors()))
        raise RecipeError(f"{name} is {value!r}", where=name_of(cls), expected=expected) from None


@functools.cache
def _limits(cls: type) -> dict[str, Any]:
    """A check (a `TypeAdapter`) for every field whose annotation limits its values; types alone are left to the type
    checker."""
    from pydantic import TypeAdapter

    hints = typing.get_type_hints(cls, include_extras=True)
    names = [f.name for f in dataclasses.fields(cls) if f.init and _is_limited(hints[f.name])]
    return {name: TypeAdapter(hints[name], config=_CONFIG) for name in names}


def _is_limited(hint: Any) -> bool:
    """Whether a hint holds a range, a number with a fraction or a choice of words, and nothing but plain values."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return True
    if typing.get_origin(hint) is Annotated:
        return is_plain(parts[0]) and any(isinstance(extra, Range) or hasattr(extra, "metadata") for extra in parts[1:])
    return hint is float or (is_plain(hint) and any(_is_limited(part) for part in parts))


def is_plain(hint: Any) -> bool:
    """Whether a hint is made of numbers, words and sequences of them: no section and no component, which check
    themselves."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return True
    if origin is Annotated:
        return is_plain(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType, tuple, list, dict, Mapping):
        return all(part is Ellipsis or is_plain(part) for part in typing.get_args(hint))
    return hint in (int, float, str, bool, type(None))


def name_of(settings: Any) -> str:
    """What a recipe calls a component (a class or one of its values); the class's name where it has no such name."""
    cls = settings if isinstance(settings, type) else type(settings)
    return str(getattr(cls, "registered_name", cls.__name__))


_ENTRY = re.compile(r"(^(?:\w+, )*\w+|(?:`\w+`, )*`\w+`):\s", re.MULTILINE)


def descriptions(cls: type) -> dict[str, str]:
    """What the docstring of a class of settings (and of those it extends) says of each of its fields.

    A field is described behind its name and a colon: `name: text` at the start of a line, or `` `name`: text``
    anywhere; several names share a text as `one, other: text`. It ends at the next field or at an empty line.
    """
    fields = {f.name for f in dataclasses.fields(cls)}
    found: dict[str, str] = {}
    for home in reversed(cls.__mro__):
        for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(home.__dict__.get("__doc__") or "")):
            entries = [
                (match, names)
                for match in _ENTRY.finditer(paragraph)
                if (names := [name.strip("`") for name in match[1].split(", ")]) and fields.issuperset(names)
            ]
            ends = [match.start() for match, _ in entries[1:]] + [len(paragraph)]
            for (match, names), end in zip(entries, ends):
                text = " ".join(paragraph[match.end() : end].strip(" \n-").split()).rstrip(";,")
                found |= dict.fromkeys(names, text[:1].upper() + text[1:])
    return found


def to_plain(value: Any, exact: bool = False) -> Any:
    """A setting as YAML can hold it: the inverse of parsing, but for secrets, which are left out. `exact`: keep all,
    for data and for what a model is made of."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = getattr(type(value), "registered_name", None)
        head = {} if name is None else {"type": name}
        return head | {f.name: to_plain(getattr(value, f.name), exact) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item, exact) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item, exact) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value) if exact else without_secrets(str(value))


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known name nearest to a wrong one, nothing where none is near."""
    import difflib

    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
