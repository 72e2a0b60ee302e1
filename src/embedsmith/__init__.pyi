from embedsmith.api.evaluating import compare as compare
from embedsmith.api.evaluating import evaluate as evaluate
from embedsmith.api.exporting import export as export
from embedsmith.api.making import curate as curate
from embedsmith.api.making import distil as distil
from embedsmith.api.making import merge as merge
from embedsmith.api.making import mine as mine
from embedsmith.api.making import split as split
from embedsmith.api.making import tokenize as tokenize
from embedsmith.api.making import train as train
from embedsmith.api.searching import index as index
from embedsmith.api.searching import search as search
from embedsmith.api.serving import application as application
from embedsmith.api.serving import serve as serve
from embedsmith.cli.planning.forecast import plan as plan
from embedsmith.cli.sweeping import sweep as sweep
from embedsmith.data import Source as Source
from embedsmith.models import CrossEncoder as CrossEncoder
from embedsmith.models import Embedder as Embedder
from embedsmith.models import load as load
from embedsmith.models import load_reranker as load_reranker
from embedsmith.train import Recipe as Recipe

__version__: str
__all__ = [
    "CrossEncoder",
    "Embedder",
    "Recipe",
    "Source",
    "__version__",
    "application",
    "compare",
    "curate",
    "distil",
    "evaluate",
    "export",
    "index",
    "load",
    "load_reranker",
    "merge",
    "mine",
    "plan",
    "search",
    "serve",
    "split",
    "sweep",
    "tokenize",
    "train",
]
