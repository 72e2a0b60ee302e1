"""Hard negatives: mined offline, and refreshed while a model trains. A model is only an `Encoder` here."""

from embedsmith.mining.bm25 import Bm25Search
from embedsmith.mining.config import Corpus, Limits, LiveNegatives, MineRecipe, Selection
from embedsmith.mining.offline import MineReport, mine
from embedsmith.mining.searchers import CrossEncoderTeacher, EmbeddingSearch

__all__ = [
    "Bm25Search",
    "Corpus",
    "CrossEncoderTeacher",
    "EmbeddingSearch",
    "Limits",
    "LiveNegatives",
    "MineRecipe",
    "MineReport",
    "Selection",
    "mine",
]
