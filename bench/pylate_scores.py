"""Scores of multi-vector folders here and in PyLate, in an environment of its own: equal?

    python -m bench.pylate_scores

PyLate 1.6.0 pins sentence-transformers 5.3 and transformers 5.3, with which embedsmith runs, but not its tests: it is
installed under bench/out with what it pins, over this environment's torch. Both ways, over MiniLM with a new head (its
weights do not matter here):

- written here: M3's head, plain and with E5's prompts, and ColBERT's head in modules of PyLate's own;
- written by PyLate, with its marks, with and without query expansion: read here, saved here, read by PyLate again.

ColBERT's score is PyLate's, a sum over a query's vectors. M3's is their mean: PyLate's is divided by their number.
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
QUERIES = ["what is late interaction?", "", "the of and", "\U00013000\U00013001", "red cat", "red cat " * 40]
DOCUMENTS = [
    "late interaction compares token vectors",
    "a red cat sat by the tree",
    "",
    "!!! the of , and",
    "cat " * 900,
]
PROMPTS = {"query": "query: ", "document": "passage: "}
WRITTEN: dict[str, dict[str, Any]] = {
    "m3": {},
    "m3 with prompts": {"prompts": PROMPTS, "heads_include_prompt": True},
    "colbert": {"multivector": "colbert"},
    "colbert with prompts": {"multivector": "colbert", "prompts": PROMPTS},
}
READ: dict[str, dict[str, Any]] = {
    "expanded": {},
    "expanded, attended": {"attend_to_expansion_tokens": True, "query_length": 16},
    "not expanded": {"do_query_expansion": False, "skiplist_words": ["the", "cat"]},
}
"""Settings of PyLate's `ColBERT`."""


def main() -> None:
    if len(sys.argv) > 2:
        kind, folder = sys.argv[1:3]
        print(json.dumps(theirs(folder) if kind == "score" else made_there(folder, json.loads(sys.argv[3]))))
        return
    from embedsmith.models import load
    from embedsmith.models.exports.libraries import export_head

    for name, options in WRITTEN.items():
        folder = WORK / f"pylate-{name}"
        model = new_model(options)
        export_head(model, folder, "pylate", overwrite=True)
        told(f"written here, {name}", ours(model), in_pylate("score", folder), mean="multivector" not in options)
    for name, settings in READ.items():
        folder = WORK / f"pylate-theirs-{name}"
        expected = in_pylate("make", folder, {**settings, "model_name_or_path": minilm()})
        model = load(str(folder), device="cpu")
        told(f"written by PyLate, {name}", ours(model), expected)
        again = WORK / f"pylate-again-{name}"
        model.save(again)
        told(f"saved here again, {name}", ours(load(str(again), device="cpu")), in_pylate("score", again))


def told(name: str, here: list[list[float]], there: dict[str, Any], mean: bool = False) -> None:
    """Print how far scores lie apart, of sums above 1 in parts of them; end where that is too far."""
    counts = there["counts"] if mean else [1] * len(here)
    pairs = [
        (a, b / n) for row, other, n in zip(here, there["scores"], counts, strict=True) for a, b in zip(row, other)
    ]
    worst = max(abs(a - b) / max(abs(b), 1.0) for a, b in pairs)
    print(f"{name}: largest difference of {len(pairs)} scores {worst:.1e}", flush=True)
    if not worst < 1e-5:
        sys.exit("PyLate scores otherwise")


def in_pylate(kind: str, folder: Path, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """What this file prints in PyLate's environment."""
    python = installed("pylate", PACKAGES)
    said = subprocess.run(
        [python, "-m", "bench.pylate_scores", kind, str(folder), json.dumps(settings)],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return found


def new_model(options: dict[str, Any]) -> Any:
    import torch

    from embedsmith.models import load

    torch.manual_seed(0)
    return load(minilm(), heads=("multivector",), new_heads=True, multivector_dim=32, device="cpu", **options)


def ours(model: Any) -> list[list[float]]:
    query, document = (
        model.represent(texts, role=role, outputs=("multivector",))["multivector"]
        for texts, role in ((QUERIES, "query"), (DOCUMENTS, "document"))
    )
    scores: list[list[float]] = query.scores(document)[0].tolist()
    return scores


def made_there(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """In PyLate's environment: a new model, saved, and its scores."""
    import torch
    from pylate import models

    torch.manual_seed(0)
    models.ColBERT(**settings, embedding_size=32, device="cpu").save(folder)
    return theirs(folder)


def theirs(folder: str) -> dict[str, Any]:
    """In PyLate's environment: scores, and the number of each query's vectors."""
    from pylate import models, scores

    model = models.ColBERT(folder, device="cpu")

    def encode(texts: list[str], role: str) -> Any:
        prompt = {"prompt_name": role} if model.prompts.get(role) else {}
        return model.encode(texts, is_query=role == "query", show_progress_bar=False, convert_to_tensor=True, **prompt)

    queries, documents = encode(QUERIES, "query"), encode(DOCUMENTS, "document")
    found = [[float(scores.colbert_scores(query[None], one[None])[0, 0]) for one in documents] for query in queries]
    return {"scores": found, "counts": [len(query) for query in queries]}


if __name__ == "__main__":
    main()
