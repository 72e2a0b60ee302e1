"""A column layout: rows of a search log, `{"typed": ..., "clicked": ..., "skipped": ...}`, are read by name."""

from embedsmith.core.shelf import layouts
from embedsmith.data.formats.columns import Layout


@layouts.register("search_log")
def search_log() -> Layout:
    """What was typed, clicked, and skipped."""
    columns = {"query": "typed", "positives": "clicked", "negatives": "skipped"}
    return Layout(columns, required=("typed", "clicked"), task="retrieval")
