"""Every merging method, imported so that the registry knows them."""

from embedsmith.merge import geometric, learned

__all__ = ["geometric", "learned"]
