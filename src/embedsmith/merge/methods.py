"""Every merging method, imported so that the registry knows them."""

from embedsmith.merge import geometric

__all__ = ["geometric"]
