"""Scores of exported multi-vector folders in PyLate, in an environment of its own: equal to ours?

    python -m bench.pylate_scores

PyLate 1.6.0 pins sentence-transformers 5.3 and transformers 5.3, with which embedsmith runs, but not its tests: it is
installed under bench/out with what it pins, over this environment's torch. MiniLM with a new multi-vector head (its
weights do not matter here), with and without E5's prompts: PyLate's score is a sum over a query's vectors, ours their
mean, so that the first over the number of vectors is compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.common import ROOT, WORK, minilm
from bench.mergekit_env import installed

PACKAGES = (
    *("pylate==1.6.0", "sentence-transformers==5.3.0", "transformers==5.3.0"),
    *("tokenizers==0.22.2", "huggingface-hub==1.7.2", "datasets==4.7.0"),
)
QUERIES = ["what is late interaction?", "", "the of and", "\U00013000\U00013001", "red cat"]
DOCUMENTS = [
    "late interaction compares token vectors",
    "a red cat sat by the tree",
    "",
    "!!! the of , and",
    "cat " * 900,
]
PROMPTS = {"query": "query: ", "document": "passage: "}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(theirs(sys.argv[1])))
        return
    python = installed("pylate", PACKAGES)
    for name, prompts in (("plain", {}), ("prompts", PROMPTS)):
        folder = WORK / f"pylate-{name}"
        expected = ours(folder, prompts)
        paths = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}"}
        said = subprocess.run(
            [python, "-m", "bench.pylate_scores", str(folder)],
            check=True,
            cwd=ROOT,
            env=paths,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = json.loads(said.stdout.splitlines()[-1])
        worst = max(
            abs(a - b) for one, other in zip(expected, found, strict=True) for a, b in zip(one, other, strict=True)
        )
        print(f"{name}: largest difference of {len(QUERIES) * len(DOCUMENTS)} scores {worst:.1e}")
        if not worst < 1e-4:
            sys.exit("PyLate scores otherwise")


def ours(folder: Path, prompts: dict[str, str]) -> list[list[float]]:
    import torch

    from embedsmith.models import load
    from embedsmith.models.export import export_head

    torch.manual_seed(0)
    options = {"multivector_dim": 32, "prompts": prompts or None, "device": "cpu"}
    model = load(minilm(), heads=("multivector",), new_heads=True, **options)
    export_head(model, folder, "pylate")
    query, document = (
        model.represent(texts, role=role, outputs=("multivector",))["multivector"]
        for texts, role in ((QUERIES, "query"), (DOCUMENTS, "document"))
    )
    scores: list[list[float]] = query.scores(document)[0].tolist()
    return scores


def theirs(folder: str) -> list[list[float]]:
    """In PyLate's environment."""
    from pylate import models, scores

    model = models.ColBERT(folder, device="cpu")

    def encode(texts: list[str], role: str) -> Any:
        prompt = {"prompt_name": role} if model.prompts.get(role) else {}
        return model.encode(texts, is_query=role == "query", show_progress_bar=False, convert_to_tensor=True, **prompt)

    queries, documents = encode(QUERIES, "query"), encode(DOCUMENTS, "document")
    return [
        [float(scores.colbert_scores(query[None], one[None])[0, 0]) / len(query) for one in documents]
        for query in queries
    ]


if __name__ == "__main__":
    main()
