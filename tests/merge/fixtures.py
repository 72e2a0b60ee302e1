"""A family of saved embedders and files of records, for tests that start from folders."""

import json

import pytest
import torch

from embedsmith.models import load
from tests.merge.family import retrieval_records, sts_records
from tests.tinybert import tiny_bert


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and two parents as saved embedders, and a file of each task."""
    root = tmp_path_factory.mktemp("family")
    model = load(str(tiny_bert(root / "plain", dropout=0.0)), pooling="mean")
    model.save(root / "base")
    for place in range(2):
        torch.manual_seed(place)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save(root / f"parent-{place}")
    pairs = [{"query": r.query, "pos": list(r.positives)} for r in retrieval_records(20).records]
    graded = [
        {"text1": r.query, "text2": r.positives[0], "score": r.positive_scores[0]} for r in sts_records(20).records
    ]
    for name, rows in (("pairs", pairs), ("graded", graded)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root
