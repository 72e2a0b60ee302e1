"""Every merging method that also reads data. Apart from the others, because it needs the training code."""

from embedsmith.calibrate import methods as learned
from embedsmith.calibrate import search

__all__ = ["learned", "search"]
