"""Curation: what to keep of a pile of texts, and what to make of it. Every step is a value that stands alone."""

from embedsmith.core.registry import curation_steps, generators
from embedsmith.data.curate.decontaminate import Decontaminate
from embedsmith.data.curate.dedup import ExactDuplicates, NearDuplicates
from embedsmith.data.curate.endpoint import Endpoint
from embedsmith.data.curate.labels import LabelsToPairs
from embedsmith.data.curate.language import Language
from embedsmith.data.curate.local import LocalModel
from embedsmith.data.curate.read import Corpus, Input
from embedsmith.data.curate.report import Report, render
from embedsmith.data.curate.rules import Boilerplate, Length, Links, Symbols, Trivial
from embedsmith.data.curate.run import CurateRecipe, curate
from embedsmith.data.curate.score import ScoreFilter
from embedsmith.data.curate.step import EvaluationText, Ledger, Step, Tools, apply
from embedsmith.data.curate.synthesize import LongDocuments, SyntheticQueries, TranslateQueries

__all__ = [
    "Boilerplate",
    "Corpus",
    "CurateRecipe",
    "Decontaminate",
    "Endpoint",
    "EvaluationText",
    "ExactDuplicates",
    "Input",
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
    "Step",
    "Symbols",
    "SyntheticQueries",
    "Tools",
    "TranslateQueries",
    "Trivial",
    "apply",
    "curate",
    "curation_steps",
    "generators",
    "render",
]
