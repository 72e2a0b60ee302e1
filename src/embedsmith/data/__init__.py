"""Texts as records: reading, writing, drawing batches. Knows only `core`."""

from embedsmith.data.draw import group_texts, pair_texts, retrieval_texts
from embedsmith.data.mixture import Joined, joined, part_of
from embedsmith.data.plan.config import PlanConfig
from embedsmith.data.plan.plan import Account, BatchPlan, PlannedSource, PlannedStep
from embedsmith.data.plan.separate import RowFacts, row_facts
from embedsmith.data.read import read_source
from embedsmith.data.record import Record, Task, text_id
from embedsmith.data.source import RecordSet, Source, negatives_per_query
from embedsmith.data.writers import write_records

__all__ = [
    "Account",
    "BatchPlan",
    "Joined",
    "PlanConfig",
    "PlannedSource",
    "PlannedStep",
    "Record",
    "RecordSet",
    "RowFacts",
    "Source",
    "Task",
    "group_texts",
    "joined",
    "negatives_per_query",
    "pair_texts",
    "part_of",
    "read_source",
    "retrieval_texts",
    "row_facts",
    "text_id",
    "write_records",
]
