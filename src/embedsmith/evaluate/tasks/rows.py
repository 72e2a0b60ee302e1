"""Training files as tasks: rows of any column layout (docs/data.md) that are a query and its positives, or two texts
and a score."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from embedsmith.core.errors import EmbedsmithError
from embedsmith.core.progress import log
from embedsmith.data import Record, Source, read_source, text_id
from embedsmith.data.formats.columns import choose_layout
from embedsmith.data.formats.file_kinds import has_known_kind, sound_rows

JudgedTexts = tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]
"""Queries and corpus by id, and the judgements."""


def task_in(path: Path) -> str | None:
    """What the rows of a file are for, by its first row; `None` for no such file, and for the scored pairs that the
    reader of sts files knows."""
    if not path.is_file() or not has_known_kind(path.name):
        return None
    try:
        _, row = next(sound_rows(path))
        layout = choose_layout(list(row), None, None, path)
        return None if layout.name == "pairs" else layout.task_of(row)
    except (EmbedsmithError, StopIteration):
        return None


def read_rows(path: Path) -> Sequence[Record]:
    found = read_source(Source(path=str(path))).texts_only("evaluation", path)
    if any(record.instruction for record in found.records):
        log.warning("%s: the instructions of its rows are not used: the model's own prompts are", path)
    return found.records


def judged_texts(records: Iterable[Record]) -> JudgedTexts:
    """Every query once, with the positives of all its rows; the corpus is every positive and negative of the file, each
    text once. Texts are the same where `text_id` says so."""
    queries: dict[int, str] = {}
    corpus: dict[int, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for record in records:
        queries.setdefault(query := text_id(record.query), record.query)
        judged = qrels.setdefault(f"q{query}", {})
        for text in (*record.positives, *record.negatives):
            corpus.setdefault(text_id(text), text)
        judged |= {f"d{text_id(text)}": 1 for text in record.positives}
    return (
        {f"q{id_}": text for id_, text in queries.items()},
        {f"d{id_}": text for id_, text in corpus.items()},
        qrels,
    )
