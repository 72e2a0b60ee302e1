"""Vectors to neighbours. An encoder is known here only by what it returned."""

from embedsmith.search.exact import TopK
from embedsmith.search.quantised import Quantised
from embedsmith.search.stored import StoredVectors
from embedsmith.search.top_k import exact_top_k, merged_top_k

__all__ = ["Quantised", "StoredVectors", "TopK", "exact_top_k", "merged_top_k"]
