"""The hybrid index: dense, sparse and multi-vector fields in one engine, in a folder or on a server."""

from embedsmith.search.index.documents import Document, read_documents
from embedsmith.search.index.edge import EdgeStore
from embedsmith.search.index.explain import Explanation, Match, explain
from embedsmith.search.index.fusion import Fusion, ReciprocalRank, WeightedSum
from embedsmith.search.index.index import Hit, HybridIndex, Written, open_index
from embedsmith.search.index.server import ServerStore
from embedsmith.search.index.store import Filter, Store

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
