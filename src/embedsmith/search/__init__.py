"""Vectors to neighbours. An encoder is known here only by what it returned."""

from embedsmith.search.exact import TopK, exact_top_k

__all__ = ["TopK", "exact_top_k"]
