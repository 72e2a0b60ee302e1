"""Texts to representations: backbone, pooling, heads, prompts; loading and saving in the formats others read."""

from embedsmith.models.config import ModelConfig
from embedsmith.models.embedder import Embedder
from embedsmith.models.load import load

__all__ = ["Embedder", "ModelConfig", "load"]
