"""Every merging method that reads weights alone, imported so that the registry knows them."""

from embedsmith.merge.methods import coefficient as geometric
from embedsmith.merge.methods import element as elements
from embedsmith.merge.methods import guided

__all__ = ["elements", "geometric", "guided"]
