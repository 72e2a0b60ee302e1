"""Several heads scored together: see `search/hybrid.py`, where search and mining find them too."""

from embedsmith.search.hybrid import M3_WEIGHTS, Hybrid, HybridEncoder

__all__ = ["M3_WEIGHTS", "Hybrid", "HybridEncoder"]
