"""Hard negatives: mined offline, and refreshed while a model trains. A model is only an `Encoder` here."""

from embedsmith.mining.config import (
    Bm25Search,
    Corpus,
    CrossEncoder,
    EmbeddingSearch,
    Limits,
    LiveNegatives,
    MineRecipe,
    Selection,
)
from embedsmith.mining.offline import mine
from embedsmith.mining.report import MineReport

__all__ = [
    "Bm25Search",
    "Corpus",
    "CrossEncoder",
    "EmbeddingSearch",
    "Limits",
    "LiveNegatives",
    "MineRecipe",
    "MineReport",
    "Selection",
    "mine",
]
