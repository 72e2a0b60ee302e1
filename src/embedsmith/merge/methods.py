"""Every merging method, imported so that the registry knows them."""

from embedsmith.merge import elements, geometric, guided, learned, search

__all__ = ["elements", "geometric", "guided", "learned", "search"]
