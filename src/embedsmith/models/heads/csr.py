"""Sparse codes of a dense vector, as CSR has them: the few largest of many learned directions.

    w = relu(top_k( W (x - b_pre) + b )),   x: the text's vector before it is normalised

Source: Contrastive Sparse Representation (Wen et al., 2025, "Beyond Matryoshka"); sentence-transformers'
SparseAutoEncoder for the names of the weights and for x normalised by its own mean and deviation (`normalize`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from embedsmith.core.errors import ModelError
from embedsmith.core.reps import Sparse
from embedsmith.core.tokens import PaddedTokens
from embedsmith.models.heads.base import Head, HeadSource, cpu_state


@dataclass(frozen=True)
class CsrSpec:
    """`width_in`: of x. `width`: how many directions. `k`: how many a text keeps. `normalize`: x by its own mean and
    deviation first. `file`: of the weights."""

    width_in: int
    width: int
    k: int
    normalize: bool
    file: Path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CsrSpec) and self._shape == other._shape

    def __hash__(self) -> int:
        return hash(self._shape)

    @property
    def _shape(self) -> tuple[int, int, int, bool]:
        return self.width_in, self.width, self.k, self.normalize

    def build(self, source: HeadSource) -> CsrHead:
        """Errors: `ModelError` for weights that are missing or of another shape."""
        if source.width != self.width_in:
            raise ModelError(
                f"the sparse head takes vectors of {self.width_in} numbers, and the model gives {source.width}",
                where=self.file,
                expected="a head that belongs to this model",
                fix="copy the folder again, as a whole",
            )
        head = CsrHead(self)
        try:
            tensors = load_file(self.file)
            if "decoder.linear.weight" in tensors:  # the encoder's own, of which a file may hold either name
                tensors.setdefault("encoder.weight", tensors["decoder.linear.weight"])
            head.load_state_dict({name: tensors[name] for name in head.state_dict()})
        except (OSError, LookupError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"cannot read this head ({error})", where=self.file, fix="copy the file again") from error
        return head


class CsrHead(Head):
    """The sparse head over a text's vector."""

    file = "csr_head.safetensors"
    reads_vector = True

    def __init__(self, spec: CsrSpec) -> None:
        super().__init__()
        self.spec = spec
        self.pre_bias = nn.Parameter(torch.zeros(spec.width_in))  # sentence-transformers' names
        self.encoder = nn.Linear(spec.width_in, spec.width, bias=False)
        self.latent_bias = nn.Parameter(torch.zeros(spec.width))

    @classmethod
    def build(cls, source: HeadSource) -> Head:
        """The head in a folder that holds others too."""
        path = source.folder / cls.file
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["spec"])
        except (OSError, LookupError, SafetensorError, ValueError) as error:
            raise ModelError(f"cannot read this head ({error})", where=path, fix="copy the file again") from error
        width_in, width, k, normalize = about
        return CsrSpec(width_in, width, k, normalize, path).build(source)

    def forward(self, vector_ND: Tensor, padded: PaddedTokens, part_NT: Tensor) -> Sparse:
        if self.spec.normalize:
            vector_ND = vector_ND - vector_ND.mean(-1, keepdim=True)
            vector_ND = vector_ND / (vector_ND.std(-1, keepdim=True) + 1e-5)
        latent_NV = F.linear(vector_ND - self.pre_bias, self.encoder.weight, self.latent_bias)
        weight_NK, place_NK = latent_NV.topk(min(self.spec.k, self.spec.width), dim=1)
        return Sparse(place_NK, torch.relu(weight_NK))

    def save(self, folder: Path) -> None:
        about = {"spec": json.dumps([self.spec.width_in, self.spec.width, self.spec.k, self.spec.normalize])}
        save_file(cpu_state(self), folder / self.file, about)
