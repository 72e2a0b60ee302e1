"""A static student: a vector a token, made from a teacher; a text is the mean of its tokens' vectors.

    1. every token of the teacher's vocabulary is encoded alone: x_v
    2. the main axes of these vectors (PCA): y_v = B^T (x_v - mean), B [D, d]
    3. frequent tokens weigh less (SIF): w_v = a / (a + p_v), p_v counted in texts, or by Zipf's law of the rank
    4. with texts, the table is trained so that the mean of a text's rows points where the teacher's vector of the text
       does, the mean of all texts taken off, in the same axes; and kept where that agrees better with the teacher on
       texts that were held out

No transformer runs: a text costs a look-up a token. Sources: model2vec (1 to 3), Arora et al. 2017 for SIF; 4 is the
idea of model2vec's Tokenlearn, with a cosine in place of its regression.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from embedsmith.core.encoder import Role
from embedsmith.core.outputs import Kind, atomic_folder
from embedsmith.core.progress import log, progress_bar
from embedsmith.core.reps import Dense, Reps, in_fp32
from embedsmith.core.tokens import IntArray, TokenBatch
from embedsmith.models import Embedder
from embedsmith.models.tokenize import added_tokens

SIF = 1e-3
"""a of the weights: a token that is one of a thousand counts half."""
EPOCHS, BATCH, RATE, HELD_OUT = 15, 128, 3e-3, 0.1
_WINDOW = 4096
_FILES = ("README.md", "config.json", "model.safetensors", "tokenizer.json", "modules.json")
STATIC = Kind(
    "static student",
    (*_FILES, "1_Normalize/**", "config_sentence_transformers.json"),
    ("README.md", "embedsmith distil --static"),
)
"""How the folder of a static student is known."""


@dataclass(frozen=True)
class StaticStudent:
    """`row_VD`: the vector of each token, its weight put in; zeros for special and unknown tokens. `prompts`: none: a
    prompt would be the same for every text. An encoder like any other."""

    tokenizer: Tokenizer
    row_VD: Tensor

    @property
    def dimension(self) -> int:
        return self.row_VD.shape[1]

    def represent(
        self, texts: Sequence[str], *, role: Role, task: str | None = None, outputs: Sequence[str] = ("dense",)
    ) -> Reps:
        """Means of the rows, of length 1; of a text without any token, zeros."""
        return {"dense": Dense(F.normalize(self.means(self.token_ids(texts)), dim=-1))}

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def means(self, ids: Sequence[Sequence[int] | IntArray]) -> Tensor:
        """mean_ND of the rows of N texts, given by the ids of their tokens."""
        return _means(self.row_VD, ids)

    def save(self, folder: str | Path, card: str = "", *, overwrite: bool = True) -> None:
        """model2vec's files in the root, and a modules.json by which sentence-transformers reads them; the folder
        appears whole or not at all. Errors: `CheckpointError` for a folder with something else in it."""
        with atomic_folder(folder, STATIC, overwrite=overwrite) as root:
            save_file({"embeddings": self.row_VD.contiguous()}, root / "model.safetensors")
            self.tokenizer.save(str(root / "tokenizer.json"))
            facts = {"model_type": "model2vec", "architectures": ["StaticModel"], "hidden_dim": self.dimension}
            facts |= {"normalize": True, "seq_length": 1_000_000, "embedding_dtype": "float32"}
            _write_json(root / "config.json", facts)
            kinds = {"": "StaticEmbedding", "1_Normalize": "Normalize"}
            entries = [
                {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for n, (path, kind) in enumerate(kinds.items())
            ]
            _write_json(root / "modules.json", entries)
            (root / "1_Normalize").mkdir()
            general: dict[str, object] = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
            _write_json(root / "config_sentence_transformers.json", general)
            (root / "README.md").write_text(_CARD.format(width=self.dimension, about=card), encoding="utf-8")


def distil_static(teacher: Embedder, texts: Sequence[str], width: int, *, seed: int = 0) -> StaticStudent:
    """The static student of a teacher, of so many numbers a text (at most the teacher's). `texts`: to count tokens in
    and to train on; with none, steps 1 to 3 alone."""
    tokenizer: Tokenizer = copy.deepcopy(teacher.tokenizer.backend_tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    row_VH = token_vectors(teacher)
    special = sorted(set(teacher.tokenizer.all_special_ids) & set(range(len(row_VH))))
    words_V = torch.ones(len(row_VH), dtype=torch.bool)
    words_V[special] = False
    mean_H = row_VH[words_V].mean(0)
    basis_HD = _axes(row_VH[words_V] - mean_H, width)
    counted = StaticStudent(tokenizer, row_VH).token_ids(texts)
    row_VD = (row_VH - mean_H) @ basis_HD * sif_weights(len(row_VH), counted)[:, None]
    row_VD[special] = 0.0
    student = StaticStudent(tokenizer, row_VD)
    distinct = list(dict.fromkeys(texts))
    return student if len(distinct) < 10 * BATCH else _trained(student, teacher, distinct, basis_HD, seed)


def token_vectors(teacher: Embedder) -> Tensor:
    """row_VH: the teacher's vector of each token of its vocabulary alone, between the tokens it puts around a text."""
    front, tail = added_tokens(teacher.tokenizer)
    count = max(teacher.tokenizer.get_vocab().values()) + 1
    count = min(count, len(teacher.backbone.get_input_embeddings().weight))

    def windows() -> Iterator[TokenBatch]:
        for start in range(0, count, _WINDOW):
            rows = [[*front, number, *tail] for number in range(start, min(start + _WINDOW, count))]
            yield TokenBatch.from_rows(rows, [0] * len(rows), is_query=False)

    with progress_bar("tokens", count) as bar:
        made = list(teacher.represent_windows(windows(), advance=bar.advance))
    return torch.cat([in_fp32(reps["dense"].tensors()[0]) for reps in made])


def sif_weights(count: int, ids: Sequence[Sequence[int]]) -> Tensor:
    """weight_V = a / (a + p_v): p_v of tokens counted in texts, each once more than it occurs; without texts by Zipf's
    law, p_v ~ 1 / (v + 2), since vocabularies put frequent tokens first."""
    if any(ids):
        number_V = np.bincount(np.concatenate([np.asarray(row, np.int64) for row in ids if row]), minlength=count)
        share_V = (number_V[:count] + 1) / (number_V[:count] + 1).sum()
    else:
        share_V = 1 / np.arange(2, count + 2)
        share_V /= share_V.sum()
    return torch.from_numpy(SIF / (SIF + share_V)).float()


def agreement(student_ND: Tensor, teacher_ND: Tensor) -> float:
    """The correlation of the cosines of all pairs of texts, by the student and by the teacher."""
    upper = torch.triu_indices(len(student_ND), len(student_ND), 1)
    pairs = [(F.normalize(side, dim=-1) @ F.normalize(side, dim=-1).T)[*upper] for side in (student_ND, teacher_ND)]
    return float(torch.corrcoef(torch.stack(pairs))[0, 1])


def _trained(
    student: StaticStudent, teacher: Embedder, texts: Sequence[str], basis_HD: Tensor, seed: int
) -> StaticStudent:
    """The table, moved so that texts point where the teacher's do; the best of all passes over the texts, by the
    agreement on those held out, or the one it began with."""
    vector_NH = in_fp32(teacher.represent(texts, role="document")["dense"].tensors()[0])
    target_ND = F.normalize((vector_NH - vector_NH.mean(0)) @ basis_HD, dim=-1)
    ids = [np.asarray(row, np.int64) for row in student.token_ids(texts)]
    chance = np.random.default_rng(seed)
    order_N = chance.permutation(len(texts))
    held = order_N[: min(max(int(len(texts) * HELD_OUT), 2), 2000)]
    rows = order_N[len(held) :]
    used_U = np.setdiff1d(np.concatenate([ids[row] for row in rows]), np.flatnonzero((student.row_VD == 0).all(1)))
    known = [row[np.isin(row, used_U)] for row in ids]  # a row of zeros stays one, and only counts in the mean
    held_ids, held_ND = [ids[row] for row in held], target_ND[held]
    first = best = agreement(student.means(held_ids), held_ND)
    table_UD, best_VD = student.row_VD[used_U].clone().requires_grad_(), student.row_VD
    optimizer = torch.optim.Adam([table_UD], RATE)
    batches = -(-len(rows) // BATCH)
    with progress_bar("train", EPOCHS * batches) as bar:
        for epoch in range(EPOCHS):
            optimizer.param_groups[0]["lr"] = RATE * (1 - epoch / EPOCHS)
            for some in np.array_split(chance.permutation(rows), batches):
                mean_ND = _means(table_UD, [np.searchsorted(used_U, known[row]) for row in some])
                loss = (1 - F.cosine_similarity(mean_ND, target_ND[some], dim=-1)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.advance(1)
            now_VD = student.row_VD.clone()
            now_VD[used_U] = table_UD.detach()
            now = agreement(_means(now_VD, held_ids), held_ND)
            if now > best:
                best, best_VD = now, now_VD
    kept = "trained" if best > first else "as it was before training"
    log.info("agreement with the teacher on %d held-out texts: %.3f before, %.3f %s", len(held), first, best, kept)
    return replace(student, row_VD=best_VD)


def _means(row_VD: Tensor, ids: Sequence[Sequence[int] | IntArray]) -> Tensor:
    """mean_ND, with gradient; zeros of a text without tokens."""
    length_N = np.asarray([len(row) for row in ids], np.int64)
    flat_S = torch.from_numpy(np.concatenate([np.asarray(row, np.int64) for row in ids]))
    start_N = torch.from_numpy(np.cumsum(length_N) - length_N)
    mean_ND: Tensor = F.embedding_bag(flat_S, row_VD, start_N, mode="mean")
    return mean_ND


def _axes(centred_VH: Tensor, width: int) -> Tensor:
    """basis_HD: the main axes of the rows, the widest first, each with a sign of its own."""
    _, vector_HH = torch.linalg.eigh((centred_VH.T @ centred_VH).double())
    basis_HD: Tensor = vector_HH.flip(1)[:, :width]
    sign_D = basis_HD.gather(0, basis_HD.abs().argmax(0, keepdim=True)).sign()
    signed_HD: Tensor = basis_HD * sign_D
    return signed_HD.float()


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


_CARD = """\
---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- model2vec
- embedsmith
---

# Static text embedding model

A table of token vectors of {width} numbers: a text is the mean of its tokens' rows, normalised to length 1. Made with
embedsmith (`embedsmith distil --static`). No prompts.
{about}
```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer("path/to/this/folder").encode(["a text"])
```

model2vec reads the same folder: `StaticModel.from_pretrained("path/to/this/folder")`.
"""
