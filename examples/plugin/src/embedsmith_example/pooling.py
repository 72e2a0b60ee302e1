"""A pooling: tokens count by the length of their states. In a recipe: `model: {pooling: by_norm}`."""

from torch import Tensor

from embedsmith.core.shelf import poolings


@poolings.register("by_norm", formula="sum_t m_t |h_t| h_t / sum_t m_t |h_t|")
def by_norm(hidden_NTH: Tensor, pool_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """The mean of the token states, each weighed by its length."""
    weight_NT = hidden_NTH.norm(dim=-1) * pool_NT
    return (weight_NT[..., None] * hidden_NTH).sum(1) / weight_NT.sum(1, keepdim=True).clamp_min(1e-9)
