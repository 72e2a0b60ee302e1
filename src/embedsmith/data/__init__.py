"""Texts as records: reading, writing, drawing batches. Knows only `core`."""

from embedsmith.data.plan import BatchPlan, PlannedStep
from embedsmith.data.read import read_source
from embedsmith.data.record import Record, Task, text_id
from embedsmith.data.source import RecordSet, Source, negatives_per_query
from embedsmith.data.texts import PairTexts, RetrievalTexts, pair_texts, retrieval_texts, row_seeds
from embedsmith.data.writers import write_records

__all__ = [
    "BatchPlan",
    "PairTexts",
    "PlannedStep",
    "Record",
    "RecordSet",
    "RetrievalTexts",
    "Source",
    "Task",
    "negatives_per_query",
    "pair_texts",
    "read_source",
    "retrieval_texts",
    "row_seeds",
    "text_id",
    "write_records",
]
