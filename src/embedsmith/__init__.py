"""embedsmith: make a text-embedding model from start to finish.

What the command line makes, scores, searches and serves is a function here, which takes the keys of the verb's recipe:

    import embedsmith as es

    run = es.train(model="my-model", data="pairs.jsonl", steps=300, output="runs/first")
    print(es.evaluate(run.folder, ["my-task"]))

Names are loaded on first use, so that `import embedsmith` costs no torch; their types stand in `__init__.pyi`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_HOMES = {
    "CrossEncoder": "embedsmith.models",
    "Embedder": "embedsmith.models",
    "Recipe": "embedsmith.train",
    "Source": "embedsmith.data",
    "application": "embedsmith.api.serving",
    "compare": "embedsmith.api.evaluating",
    "export": "embedsmith.api.exporting",
    "load": "embedsmith.models",
    "load_reranker": "embedsmith.models",
    "mine": "embedsmith.api.making",
    "plan": "embedsmith.cli.planning.forecast",
    "split": "embedsmith.api.making",
    "sweep": "embedsmith.cli.sweeping",
    "tokenize": "embedsmith.api.making",
}
_VERBS = {
    "curate": "embedsmith.api.making",
    "distil": "embedsmith.api.making",
    "evaluate": "embedsmith.api.evaluating",
    "index": "embedsmith.api.searching",
    "merge": "embedsmith.api.making",
    "search": "embedsmith.api.searching",
    "serve": "embedsmith.api.serving",
    "train": "embedsmith.api.making",
}
"""Functions that share their name with a room of the package, and where they are."""

__all__ = [
    *("CrossEncoder", "Embedder", "Recipe", "Source", "__version__", "application", "compare", "curate", "distil"),
    *("evaluate", "export", "index", "load", "load_reranker", "merge", "mine", "plan", "search", "serve"),
    *("split", "sweep", "tokenize", "train"),
]


class _Room(ModuleType):
    """A room that is also a verb: `embedsmith.train` holds `embedsmith.train.loop`, and `embedsmith.train(...)` trains.

    Both names are one object, whatever was imported first; its documentation and signature are those of the verb.
    """

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return _verb(self.__name__)(*arguments, **settings)

    def __reduce__(self) -> tuple[Any, ...]:
        return import_module, (self.__name__,)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return _verb(self.__name__).__doc__

    @property
    def __signature__(self) -> Any:
        from inspect import signature

        return signature(_verb(self.__name__))


def _verb(room: str) -> Any:
    name = room.rpartition(".")[2]
    return getattr(import_module(_VERBS[name]), name)


class _Package(ModuleType):
    """The package, to which the import system adds each room when it was loaded."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VERBS and isinstance(value, ModuleType):
            value.__class__ = _Room
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # reading it costs more than everything else here

        return version("embedsmith")
    if name in _VERBS:
        return import_module(f"embedsmith.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'embedsmith' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
