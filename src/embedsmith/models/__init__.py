"""Texts to representations: backbone, pooling, heads, prompts; loading and saving in the formats others read. And pairs
of texts to scores: rerankers."""

from embedsmith.models.config import ModelConfig
from embedsmith.models.cross_encoder import CrossEncoder
from embedsmith.models.embedder import Embedder
from embedsmith.models.load import load
from embedsmith.models.load_reranker import is_reranker, load_reranker

Model = Embedder | CrossEncoder
"""What a run may train."""

__all__ = ["CrossEncoder", "Embedder", "Model", "ModelConfig", "is_reranker", "load", "load_reranker"]
