"""embedsmith: make a text-embedding model from start to finish.

Names are loaded on first use, so that `import embedsmith` costs no torch; their types stand in `__init__.pyi`.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Embedder": "embedsmith.models",
    "load": "embedsmith.models",
    "merge": "embedsmith.merge",
}

__all__ = ["Embedder", "__version__", "load", "merge"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # reading it costs more than everything else here

        return version("embedsmith")
    if name not in _HOMES:
        raise AttributeError(f"module 'embedsmith' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
