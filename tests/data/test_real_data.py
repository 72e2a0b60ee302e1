"""Real files, where they lie beside the repository."""

from pathlib import Path

import pytest
import torch
from tests.plans import plan_from

from embedsmith.core.seeds import derive_seed
from embedsmith.data import Source, negatives_per_query, pair_texts, read_source, retrieval_texts

DATA = Path(__file__).parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data in ../shared/data")


def read(path, **more):
    return read_source(Source(path=str(DATA / path), **more))


@pytest.mark.parametrize(
    ("path", "format_", "task", "count", "negatives", "score_range"),
    [
        ("pairs/debian-en-train.jsonl.gz", "flagembedding", "retrieval", 51629, 0, None),
        ("pairs/nli-zh-hard.jsonl.gz", "flagembedding", "retrieval", 2701, 4, None),
        ("pairs/trecqa-train.jsonl", "flagembedding", "retrieval", 83, 4, None),
        ("sts/stsb-en-train.jsonl", "pairs", "sts", 5749, 0, (0, 5)),
        ("sts/sick-train.jsonl", "pairs", "sts", 4500, 0, (1, 5)),
        ("sts/afqmc-dev.jsonl", "pairs", "sts", 4316, 0, (0, 1)),
        ("retrieval/xquad-en", "beir", "retrieval", 1190, 0, (0, 1)),
        ("labels/banking77-train.jsonl", "labels", "classification", 10003, 0, None),
    ],
)
def test_what_is_understood(path, format_, task, count, negatives, score_range):
    found = read(path)
    assert (found.format, found.task, len(found.records), found.skipped) == (format_, task, count, ())
    assert negatives_per_query(Source(path=path), found.records) == negatives
    assert found.score_range == score_range


def test_natural_language_inference_by_declared_columns():
    columns = {"text": "premise", "label": "label"}
    found = read("nli/snli-zh-dev.jsonl.gz", columns=columns, limit=500)
    assert (found.task, found.labels) == ("classification", ("contradiction", "entailment", "neutral"))


def test_an_empty_document_of_cranfield_is_left_out_of_its_row():
    found = read("retrieval/cranfield")
    assert (len(found.records), found.skipped, found.left_out) == (225, (), {"empty positive": 1})
    assert found.score_range == (0, 3)


def test_batches_of_real_records():
    sets = [read("pairs/nli-zh-hard.jsonl.gz"), read("sts/stsb-en-train.jsonl")]
    plan = plan_from(tuple(len(found.records) for found in sets), (64, 128), seed=1, world=2)
    for step in range(20):
        planned = plan.at(step)
        rows = planned.rows_of(1, 2)
        records = [sets[planned.source].records[row] for row in rows]
        seeds = [derive_seed(1, planned.visit, int(row)) for row in rows]
        if planned.source == 0:
            _, _, ids = retrieval_texts(records, positives=1, negatives=4, seeds=seeds)
            assert (ids.negative_id_QM >= 0).double().mean() > 0.95
            assert torch.isin(ids.positive_id_QP, ids.document_id_N).all()
        else:
            labels = pair_texts(records, seeds=seeds)[2].label_N
            assert labels.min() >= 0
            assert labels.max() <= 1
