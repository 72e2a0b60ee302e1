from embedsmith.merge import merge as merge
from embedsmith.models import Embedder as Embedder
from embedsmith.models import load as load

__version__: str
__all__ = ["Embedder", "__version__", "load", "merge"]
