"""A metric of rankings: retrieval and reranking show its mean at every cut, as `success_at_1`, `success_at_3`, ..."""

import numpy as np

from embedsmith.evaluate.metrics import Floats, Graded, metric


@metric("success", of="rankings", formula="1 if one of the first k documents is relevant, else 0")
def success(found: Graded, k: int) -> Floats:
    """Whether the first k documents hold a relevant one."""
    return (found.grade_Qk[:, :k] > 0).any(axis=1).astype(np.float64)
