"""Every setting means something: each field of each class of settings has a description that the schema shows, and
each option of the command line has its help."""

import dataclasses
import importlib
import inspect
import pkgutil

import pytest
import typer.main

import embedsmith
from embedsmith.core.settings import descriptions

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
