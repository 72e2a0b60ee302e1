"""An encoder of made-up vectors that counts what it encodes, and records to mine from."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F

from embedsmith.core.reps import Dense, MultiVector, Sparse

TOPICS = ["cats", "dogs", "trees", "birds", "stars"]


def vector(text: str, width: int, salt: str) -> np.ndarray:
    """The mean of a fixed random vector a word: texts that share words are near."""
    words = [np.random.default_rng(abs(hash_of(f"{salt}{word}"))).standard_normal(width) for word in text.split()]
    return np.mean(words, axis=0)


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


class Words:
    """dense: normalised mean of word vectors; sparse: a weight a word; multivector: a vector a word."""

    def __init__(self, salt: str = "a", width: int = 16, fail_after: int | None = None) -> None:
        self.salt, self.width, self.encoded, self.fail_after = salt, width, [], fail_after

    def fingerprint(self) -> str:
        return f"words-{self.salt}-{self.width}"

    def represent(self, texts, *, role, task=None, outputs=("dense",)):
        if self.fail_after is not None and len(self.encoded) >= self.fail_after:
            raise KeyboardInterrupt
        self.encoded += list(texts)
        return {head: getattr(self, f"_{head}")(texts) for head in outputs}

    def _dense(self, texts):
        rows = np.stack([vector(text, self.width, self.salt) for text in texts])
        return Dense(F.normalize(torch.from_numpy(rows).float(), dim=-1))

    def _sparse(self, texts):
        rows = [text.split() for text in texts]
        longest = max(map(len, rows))
        ids = [[hash_of(word) % 500 for word in row] + [0] * (longest - len(row)) for row in rows]
        weights = [[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows]
        return Sparse(torch.tensor(ids), torch.tensor(weights))

    def _multivector(self, texts):
        rows = [text.split() for text in texts]
        longest = max(map(len, rows))
        vectors = torch.zeros(len(rows), longest, self.width)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for n, row in enumerate(rows):
            for t, word in enumerate(row):
                one = torch.from_numpy(vector(word, self.width, self.salt)).float()
                vectors[n, t], mask[n, t] = F.normalize(one, dim=-1), True
        return MultiVector(vectors, mask)


def rows(count: int = 30) -> list[dict]:
    """Queries of a topic; the positive shares topic and number, other texts of the topic are hard negatives."""
    return [
        {"query": f"about {TOPICS[n % 5]} number {n}", "pos": [f"text on {TOPICS[n % 5]} number {n} of many"]}
        for n in range(count)
    ]
