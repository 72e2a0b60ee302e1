"""An encoder of three heads without a network: every word has a random vector and a weight, fixed by its hash."""

import hashlib

import torch
import torch.nn.functional as F

from embedsmith.core.reps import Dense, MultiVector, Sparse


class Words:
    def __init__(self, seed=0, dimension=16, width=8):
        self.seed, self.dimension, self.width = seed, dimension, width

    def fingerprint(self):
        return hashlib.sha256(f"{self.seed} {self.dimension} {self.width}".encode()).hexdigest()

    def represent(self, texts, *, role, task=None, outputs=("dense",)):
        rows = [text.lower().split() or ["[empty]"] for text in texts]
        longest = max(map(len, rows))
        mask_NT = torch.zeros(len(rows), longest, dtype=torch.bool)
        id_NT = torch.zeros(len(rows), longest, dtype=torch.int64)
        weight_NT = torch.zeros(len(rows), longest)
        vector_NTD = torch.zeros(len(rows), longest, self.dimension)
        for n, words in enumerate(rows):
            for t, word in enumerate(words):
                mask_NT[n, t], id_NT[n, t] = True, self.word_id(word)
                weight_NT[n, t] = 0.0 if word in ("the", "of", "[empty]") else 0.1 + (id_NT[n, t] % 10) / 10
                generator = torch.Generator().manual_seed(int(id_NT[n, t]))
                vector_NTD[n, t] = torch.randn(self.dimension, generator=generator)
        vector_ND = F.normalize(vector_NTD.sum(1), dim=-1)
        made = {
            "dense": Dense(vector_ND),
            "sparse": Sparse(id_NT, weight_NT),
            "multivector": MultiVector(
                F.normalize(vector_NTD[..., : self.width], dim=-1) * mask_NT[..., None], mask_NT
            ),
        }
        return {name: made[name] for name in outputs}

    def word_id(self, word):
        return int.from_bytes(hashlib.sha256(f"{self.seed}{word}".encode()).digest()[:3], "little")
