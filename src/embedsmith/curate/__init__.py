"""Curation: what to keep of a pile of texts, and what to make of it. Every step is a value that stands alone."""

from embedsmith.curate.decontaminate import Decontaminate
from embedsmith.curate.dedup import ExactDuplicates, NearDuplicates
from embedsmith.curate.from_labels import LabelsToPairs
from embedsmith.curate.generators import Endpoint, LocalModel
from embedsmith.curate.input_records import Input, InputRecords
from embedsmith.curate.ledger import EvaluationText, Ledger, Tools, apply
from embedsmith.curate.outcome import Report
from embedsmith.curate.rules import Boilerplate, Language, Length, Links, Symbols, Trivial
from embedsmith.curate.run import CurateRecipe, curate
from embedsmith.curate.score import ScoreFilter
from embedsmith.curate.synthesize import LongDocuments, SyntheticQueries, TranslateQueries

__all__ = [
    "Boilerplate",
    "CurateRecipe",
    "Decontaminate",
    "Endpoint",
    "EvaluationText",
    "ExactDuplicates",
    "Input",
    "InputRecords",
    "LabelsToPairs",
    "Language",
    "Ledger",
    "Length",
    "Links",
    "LocalModel",
    "LongDocuments",
    "NearDuplicates",
    "Report",
    "ScoreFilter",
    "Symbols",
    "SyntheticQueries",
    "Tools",
    "TranslateQueries",
    "Trivial",
    "apply",
    "curate",
]
