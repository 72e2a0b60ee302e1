"""Figures of a cloud of vectors, and of how alike two clouds of the same texts are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from embedsmith.calibrate.live import ROLES, texts_of
from embedsmith.calibrate.matching import linear_cka
from embedsmith.core.encoder import Role
from embedsmith.data import RecordSet, text_id
from embedsmith.models import Embedder

__all__ = ["Sample", "encode_sample", "linear_cka", "neighbour_overlap", "portrait", "prefix_overlap"]


@dataclass(frozen=True)
class Sample:
    """The distinct texts of a sample as one model sees them.

    `vector_ND`: of length 1. `length_N`: tokens. `raw_N`: lengths before normalising. `plain_N`: cosine with the same
    text without its prompt, empty where no prompt is set. `query_Q`, `answer_Q`: rows of queries and their documents.
    """

    vector_ND: Tensor
    length_N: Tensor
    raw_N: Tensor
    plain_N: Tensor
    query_Q: Tensor
    answer_Q: Tensor


def encode_sample(model: Embedder, records: RecordSet) -> Sample:
    """Every text under its role, with the vector's own length kept. Graded pairs give no answers."""
    texts = texts_of(records)
    place = {(text_id(text), role): row for row, (text, role) in enumerate(texts)}
    answers = [(r.query, r.positives[0]) for r in records.records if r.task != "sts" and r.positives]
    query_Q = [place[text_id(query), "query"] for query, _ in answers]
    answer_Q = [place[text_id(document), "document"] for _, document in answers]
    settings = model.settings
    try:
        model.settings = dataclasses.replace(settings, normalize=False)
        raw_ND = _in_roles(model, texts, records.task, plain=False)
        plain_ND = _in_roles(model, texts, records.task, plain=True) if settings.prompts else raw_ND[:0]
    finally:
        model.settings = settings
    vector_ND = F.normalize(raw_ND, dim=-1)
    plain_N = (F.normalize(plain_ND, dim=-1) * vector_ND).sum(-1) if len(plain_ND) else plain_ND.sum(-1)
    lengths = [model.tokenize([text], role, records.task).length_N[0] for text, role in texts]
    return Sample(
        vector_ND=vector_ND,
        length_N=torch.tensor(lengths, dtype=torch.float32),
        raw_N=raw_ND.norm(dim=-1),
        plain_N=plain_N,
        query_Q=torch.tensor(query_Q, dtype=torch.int64),
        answer_Q=torch.tensor(answer_Q, dtype=torch.int64),
    )


def _in_roles(model: Embedder, texts: Sequence[tuple[str, Role]], task: str, plain: bool) -> Tensor:
    """vector_ND, with the prompts of the roles, or with none."""
    found: dict[int, Tensor] = {}
    for role in ROLES:
        rows = [row for row, (_, own) in enumerate(texts) if own == role]
        if rows:
            instruction = "" if plain else None
            part = [texts[row][0] for row in rows]
            reps = model.represent(part, role=role, task=task, instruction=instruction, show_progress=False)
            found |= dict(zip(rows, reps["dense"].tensors()[0].float(), strict=True))
    return torch.stack([found[row] for row in range(len(texts))])


def portrait(sample: Sample) -> Mapping[str, float]:
    """The geometry of a cloud in numbers.

    Anisotropy: mean cosine of two texts. Uniformity: log mean e^{-2 |x - y|^2}; alignment: mean |q - d+|^2 (Wang and
    Isola 2020). Effective rank: e^entropy of the squared singular values, centred (Roy and Vetterli 2007). Margin:
    cosine with the answer less the mean cosine with the other answers. Pull of length: |correlation| of log tokens
    with the cosine to the mean vector.
    """
    vector_ND = sample.vector_ND.double()
    count = len(vector_ND)
    cosine_NN = vector_ND @ vector_ND.T
    off_diagonal = cosine_NN[~torch.eye(count, dtype=torch.bool)]
    mean_D = vector_ND.mean(0)
    found = {
        "anisotropy (mean cosine)": float(off_diagonal.mean()),
        "length of the mean vector": float(mean_D.norm()),
        "uniformity": float((-2 * (2 - 2 * off_diagonal)).exp().mean().log()),
        "effective rank": _effective_rank(vector_ND - mean_D),
        "length before normalising": float(sample.raw_N.mean()),
        "pull of length": _pull(sample.length_N.double().log(), vector_ND @ mean_D),
    }
    if len(sample.query_Q) > 1:
        score_QQ = vector_ND[sample.query_Q] @ vector_ND[sample.answer_Q].T
        own_Q = score_QQ.diagonal()
        others = (score_QQ.sum() - own_Q.sum()) / (score_QQ.numel() - len(own_Q))
        found |= {"alignment": float((2 - 2 * own_Q).mean()), "margin of answers": float(own_Q.mean() - others)}
    if len(sample.plain_N):
        found["cosine with and without prompt"] = float(sample.plain_N.mean())
    return found


def _effective_rank(centred_ND: Tensor) -> float:
    value = torch.linalg.svdvals(centred_ND).square()
    total = float(value.sum())
    return math.exp(float(torch.special.entr(value / total).sum())) if total > 0 else 0.0


def _pull(left_N: Tensor, right_N: Tensor) -> float:
    left_N, right_N = left_N - left_N.mean(), right_N - right_N.mean()
    scale = float(left_N.norm() * right_N.norm())
    return abs(float(left_N @ right_N)) / scale if scale > 0 else 0.0


def neighbour_overlap(left_ND: Tensor, right_ND: Tensor, count: int) -> float:
    """The mean share of a text's nearest neighbours that two models have in common."""
    count = min(count, len(left_ND) - 1)
    if count < 1:
        return 1.0
    nearest = [_nearest(vector_ND, count) for vector_ND in (left_ND, right_ND)]
    return float((nearest[0][:, :, None] == nearest[1][:, None, :]).any(-1).double().mean())


def _nearest(vector_ND: Tensor, count: int) -> Tensor:
    cosine_NN = vector_ND @ vector_ND.T
    return cosine_NN.fill_diagonal_(-2.0).topk(count, dim=1).indices


def prefix_overlap(vector_ND: Tensor, width: int, count: int) -> float:
    """The share of the whole vector's nearest neighbours that its leading coordinates find."""
    return neighbour_overlap(F.normalize(vector_ND[:, :width], dim=-1), vector_ND, count)
