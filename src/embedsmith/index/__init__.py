"""The hybrid index: dense, sparse and multi-vector fields in one engine, in a folder or on a server."""

from embedsmith.index.documents import Document, read_documents
from embedsmith.index.edge import EdgeStore
from embedsmith.index.engine import Filter, Store
from embedsmith.index.hits import Explanation, Fusion, Match, ReciprocalRank, WeightedSum, explain
from embedsmith.index.index import Hit, HybridIndex, Written, open_index
from embedsmith.index.server import ServerStore

__all__ = [
    "Document",
    "EdgeStore",
    "Explanation",
    "Filter",
    "Fusion",
    "Hit",
    "HybridIndex",
    "Match",
    "ReciprocalRank",
    "ServerStore",
    "Store",
    "WeightedSum",
    "Written",
    "explain",
    "open_index",
    "read_documents",
]
