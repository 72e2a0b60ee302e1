"""Every merging method that also reads data. Apart from the others, because it needs the training code."""

from embedsmith.merge import learned, search

__all__ = ["learned", "search"]
