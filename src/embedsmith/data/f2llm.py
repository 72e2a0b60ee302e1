"""Folders of F2LLM's Parquet files: a dataset a file, with `query`, `passage`, and `negative_1` or up to `negative_24`.

What kind of task a dataset is decides whether the texts of other rows are its negatives. F2LLM's scripts know that by
the names of its datasets; another one is known by its columns, as their tokenizer knows it: with a single negative,
which is the text of another class, it is classification, else retrieval.

Source: F2LLM (arXiv 2510.02294) and its released scripts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embedsmith.core.errors import DataError
from embedsmith.data.formats.file_kinds import parquet_schema
from embedsmith.data.record import Task

_CLASSES = "amazon_counterfactual amazon_polarity imdb toxic_conversations cola"
_CLUSTERS = """amazon_reviews banking77 emotion mtop_intent mtop_domain massive_scenario massive_intent
    tweet_sentiment_extraction arxiv_clustering_p2p arxiv_clustering_s2s biorxiv_clustering_p2p biorxiv_clustering_s2s
    medrxiv_clustering_p2p medrxiv_clustering_s2s reddit_clustering_p2p reddit_clustering_s2s
    stackexchange_clustering_p2p stackexchange_clustering_s2s twentynewsgroups"""
PUBLISHED: Mapping[str, Task] = {
    **dict.fromkeys(_CLASSES.split(), "classification"),
    **dict.fromkeys(_CLUSTERS.split(), "clustering"),
}
"""What F2LLM's datasets are that are not retrieval."""


def task_of_dataset(name: str, negatives: Sequence[str]) -> Task:
    """The kind of a dataset, by its name where F2LLM has published it, else by its columns of negatives."""
    return PUBLISHED.get(name, "classification" if list(negatives) == ["negative_1"] else "retrieval")


def negative_columns(columns: Sequence[str]) -> list[str]:
    """Those of texts: `negative_1`, `negative_2`, ... in the order of their numbers."""
    found = [name for name in columns if name.startswith("negative_") and name[9:].isdecimal()]
    return sorted(found, key=lambda name: int(name[9:]))


def parquet_files(folder: Path) -> dict[str, Path]:
    """The Parquet files in a folder and below, by the names of their datasets, in their order; files of one name in two
    folders are told apart by their folders."""
    files = [path for path in folder.rglob("*.parquet") if not path.name.startswith(".")]
    stems = [path.stem for path in files]
    named = {
        path.stem if stems.count(path.stem) == 1 else "-".join(path.relative_to(folder).with_suffix("").parts): path
        for path in files
    }
    return dict(sorted(named.items()))


def is_f2llm_folder(folder: Path) -> bool:
    """Whether all Parquet files of a folder, of which there are some, are such datasets of texts."""
    files = parquet_files(folder) if folder.is_dir() else {}
    return bool(files) and all({"query", "passage"} <= set(parquet_schema(path).names) for path in files.values())


def f2llm_source(name: str, path: Path) -> dict[str, Any]:
    """How a file is read, as a source of a recipe names it. Errors: `DataError` for other columns."""
    columns = parquet_schema(path).names
    if missing := [column for column in ("query", "passage") if column not in columns]:
        tokens = "query_input_ids" in columns
        raise DataError(
            f"there is no column {missing[0]!r}; found: {', '.join(columns)}",
            where=path,
            expected="query, passage, negative_1, ... as F2LLM's files have them",
            fix=f"make these tokens known: embedsmith tokenize {path.parent} --adopt auto --model MODEL"
            if tokens
            else "rename the columns",
        )
    negatives = negative_columns(columns)
    roles = {"query": "query", "positives": "passage"} | ({"negatives": negatives} if negatives else {})
    return {"path": str(path), "name": name, "task": task_of_dataset(name, negatives), "columns": roles}
