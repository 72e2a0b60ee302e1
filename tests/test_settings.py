"""Every setting means something: each field of each class of settings has a description that the schema shows, and
each option of the command line has its help."""

import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import typer.main
from pydantic import TypeAdapter, ValidationError

import embedsmith
from embedsmith.core.settings import _limits, descriptions, is_plain

FOREIGN = (".__main__", ".models.late", ".models.sentence")  # run as a program, or read by other libraries


def modules(package=embedsmith):
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not found.name.endswith(FOREIGN):
            yield importlib.import_module(found.name)


def settings():
    found = {}
    for module in modules():
        for cls in vars(module).values():
            ours = inspect.isclass(cls) and cls.__module__.startswith("embedsmith")
            if ours and dataclasses.is_dataclass(cls) and "__pydantic_config__" in vars(cls):
                found[f"{cls.__module__.removeprefix('embedsmith.')}.{cls.__name__}"] = cls
    return found


SETTINGS = settings()


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_setting_is_described(name):
    cls = SETTINGS[name]
    said = descriptions(cls)
    missing = [f.name for f in dataclasses.fields(cls) if f.init and len(said.get(f.name, "")) < 8]
    assert not missing, f"{name} says nothing of {', '.join(missing)}"


def test_every_option_is_described():
    from embedsmith.cli import app

    for name, command in typer.main.get_command(app).commands.items():
        assert command.help, f"{name} has no help"
        silent = [one.name for one in command.params if one.name != "help" and not getattr(one, "help", None)]
        assert not silent, f"{name} says nothing of {', '.join(silent)}"


OF_OTHERS = {"fast_split", "adam_betas", "max_grad_norm"}  # keys of F2LLM's configs, which `compat` reads
WRITTEN = {"made_from", "train_text", "train_label"}  # what a file or a task holds, and nobody sets


def test_every_setting_is_documented_or_used():
    """In a page, a recipe, a bench or a test."""
    root = Path(__file__).resolve().parents[1]
    files = [
        root / "README.md",
        *(file for name in ("docs", "recipes", "bench", "tests") for file in (root / name).rglob("*")),
    ]
    texts = (
        file.read_text("utf-8") for file in files if file.suffix in (".md", ".py", ".yaml") and file != Path(__file__)
    )
    words = {word for text in texts for word in re.findall(r"\w+", text)} | OF_OTHERS | WRITTEN
    unused = [
        f"{name}: {f.name}" for name, cls in SETTINGS.items() for f in dataclasses.fields(cls) if f.name not in words
    ]
    assert not unused


def holding(hint, number):
    """Values of a hint, each with `number` where a number with a fraction may stand."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is float:
        return [number]
    if origin is typing.Annotated:
        return holding(parts[0], number)
    if origin in (typing.Union, types.UnionType):
        return [value for part in parts for value in holding(part, number)]
    if origin in (dict, Mapping):
        return [{"a": value} for value in holding(parts[1], number)]
    if origin is tuple and Ellipsis not in parts:
        plain = [(holding(part, 0.5) or [1])[0] for part in parts]
        return [
            tuple([*plain[:place], value, *plain[place + 1 :]])
            for place, part in enumerate(parts)
            for value in holding(part, number)
        ]
    return [[value] for value in holding(parts[0], number)] if origin in (list, tuple, Sequence) else []


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_no_setting_is_nan_or_infinite(name):
    """Neither from a recipe nor from Python."""
    cls = SETTINGS[name]
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in (f for f in dataclasses.fields(cls) if f.init):
        for value in (v for number in (math.nan, math.inf, -math.inf) for v in holding(hints[field.name], number)):
            with pytest.raises(ValidationError) as found:
                TypeAdapter(cls).validate_python({field.name: value})
            assert field.name in [error["loc"][0] for error in found.value.errors()], (field.name, value)
            if is_plain(hints[field.name]):  # else its class checks it
                with pytest.raises(ValidationError):
                    _limits(cls)[field.name].validate_python(value)


@pytest.mark.parametrize("name", sorted(name for name, cls in SETTINGS.items() if "output" in cls.__annotations__))
def test_an_empty_output_is_not_the_current_folder(name):
    limits = _limits(SETTINGS[name]).get("output")
    assert limits is not None, "an empty path is read as the current folder"
    with pytest.raises(ValidationError, match="at least 1 character"):
        limits.validate_python("")
