"""Objectives: frozen dataclasses from a batch to a `LossOutput`. Importing this room registers all of them."""

from embedsmith.losses.codiemb import CoDiEmbSTS, MidNCE
from embedsmith.losses.conan import CosineConsistency, CrossBatchBalance, balance_weights
from embedsmith.losses.distill import M3RankedKD, MarginMSE, ScoreKL, TeacherNeighbours, TeacherVectors
from embedsmith.losses.labels import Classifier, SupervisedContrastive
from embedsmith.losses.published import F2LLM, ConanWeak, GISTEmbed, Qwen3
from embedsmith.losses.regularisers import GOR, GORST, Flops, Uniformity
from embedsmith.losses.rerankers import Binary, LambdaLoss, ListNet
from embedsmith.losses.retrieval import InfoNCE
from embedsmith.losses.self_distill import M3SelfDistillation
from embedsmith.losses.sts import PRO, AnglE, CoSENT, Pearson, RankKL
from embedsmith.losses.wrappers import Matryoshka, PerHead, Sum, Symmetric, Weighted

__all__ = [
    "F2LLM",
    "GOR",
    "GORST",
    "PRO",
    "AnglE",
    "Binary",
    "Classifier",
    "CoDiEmbSTS",
    "CoSENT",
    "ConanWeak",
    "CosineConsistency",
    "CrossBatchBalance",
    "Flops",
    "GISTEmbed",
    "InfoNCE",
    "LambdaLoss",
    "ListNet",
    "M3RankedKD",
    "M3SelfDistillation",
    "MarginMSE",
    "Matryoshka",
    "MidNCE",
    "Pearson",
    "PerHead",
    "Qwen3",
    "RankKL",
    "ScoreKL",
    "Sum",
    "SupervisedContrastive",
    "Symmetric",
    "TeacherNeighbours",
    "TeacherVectors",
    "Uniformity",
    "Weighted",
    "balance_weights",
]
