"""Hugging Face datasets, from the hub or from a folder, as rows. Needs the extra `hub`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedsmith.core.errors import DataError, MissingExtraError
from embedsmith.data.formats.files import Rows


def is_saved_dataset(path: Path) -> bool:
    """A folder written by `save_to_disk`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def hub_rows(name: str, split: str | None) -> Rows:
    """Rows of one split, numbered from 1; without `split` that is `train`, or the only one.

    Errors: `DataError` if there is no such dataset or split; `MissingExtraError` without the package `datasets`.
    """
    datasets = load_datasets()
    with refused(name):
        found = datasets.load_from_disk(name) if is_saved_dataset(Path(name)) else datasets.load_dataset(name)
    chosen = choose_split(found, split, name)
    rows = enumerate((dict(row) for row in chosen), start=1)
    return Rows(name, rows, version=chosen._fingerprint, size=chosen.data.nbytes)


def load_datasets() -> Any:
    """The package `datasets`. Errors: `MissingExtraError` without it."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "hub") from error
    return datasets


@contextmanager
def refused(name: str) -> Iterator[None]:
    """Whatever the package says of a dataset it cannot load, as a `DataError`."""
    datasets = load_datasets()
    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"cannot load a dataset of this name ({str(error).splitlines()[0]})",
            where=name,
            expected="a file or folder here, or the id of a dataset on the hub",
            fix="check the path; for a hub id, check the network and HF_HUB_OFFLINE",
        ) from error


def choose_split(found: Any, split: str | None, name: object) -> Any:
    """One split of several: the one asked for, else `train`, else the only one. Errors: `DataError`."""
    if not isinstance(found, dict):
        return found
    chosen = split or ("train" if "train" in found else next(iter(found)) if len(found) == 1 else None)
    if chosen not in found:
        raise DataError(
            f"no split {split!r}" if split else "several splits",
            where=name,
            expected=f"one of those found: {', '.join(found)}",
            fix="set split to one of them",
        )
    return found[chosen]
