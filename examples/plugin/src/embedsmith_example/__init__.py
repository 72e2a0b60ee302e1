"""Five things of one's own on embedsmith's shelf, a file each. Importing them registers them."""

from embedsmith_example import layout, loss, merge_method, metric, pooling

__all__ = ["layout", "loss", "merge_method", "metric", "pooling"]
