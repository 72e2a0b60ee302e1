"""Every merging method that reads weights alone, imported so that the registry knows them."""

from embedsmith.merge import elements, geometric, guided

__all__ = ["elements", "geometric", "guided"]
