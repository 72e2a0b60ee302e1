"""Objectives: frozen dataclasses from a batch to a `LossOutput`. Importing this room registers all of them."""

from embedsmith.losses.retrieval import InfoNCE
from embedsmith.losses.sts import CoSENT

__all__ = ["CoSENT", "InfoNCE"]
