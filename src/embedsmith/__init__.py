"""embedsmith: make a text-embedding model from start to finish.

Names are loaded on first use, so that `import embedsmith` costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedsmith.merge import merge
    from embedsmith.models import Embedder, load

    __version__: str


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
