"""The hybrid index: dense, sparse and multi-vector fields in one engine, in a folder or on a server."""

from embedsmith.index.edge import EdgeStore
from embedsmith.index.hits import Fusion, HitExplanation, Match, ReciprocalRank, WeightedSum
from embedsmith.index.index import Document, Hit, HybridIndex, Written, open_index, read_documents, reranked_hits
from embedsmith.index.server import ServerStore
from embedsmith.index.vector_store import Filter, Store

__all__ = [
    "Document",
    "EdgeStore",
    "Filter",
    "Fusion",
    "Hit",
    "HitExplanation",
    "HybridIndex",
    "Match",
    "ReciprocalRank",
    "ServerStore",
    "Store",
    "WeightedSum",
    "Written",
    "open_index",
    "read_documents",
    "reranked_hits",
]
