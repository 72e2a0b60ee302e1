"""A merging method: the median of the parents, weight by weight. In a recipe: `method: median`."""

from dataclasses import dataclass

import torch

from embedsmith.core.shelf import merge_methods
from embedsmith.merge.method import Combine, Job


@merge_methods.register("median", formula="theta_m = median_i theta_i")
@dataclass(frozen=True)
class Median:
    """The median of all parents, which one parent that went astray does not move."""

    base = "optional"
    by_rows = False

    def prepare(self, job: Job) -> Combine:
        return lambda block: torch.stack([parent_E.double() for parent_E in block.parents]).quantile(0.5, dim=0)
