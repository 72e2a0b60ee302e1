"""Vectors to neighbours. An encoder is known here only by what it returned."""

from embedsmith.search.exact import TopK
from embedsmith.search.quantised import Quantised
from embedsmith.search.top_k import exact_top_k, merged_top_k

__all__ = ["Quantised", "TopK", "exact_top_k", "merged_top_k"]
