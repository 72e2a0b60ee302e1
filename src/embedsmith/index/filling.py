"""The verb `index`: documents into an index, by one process, by ranks or by shards (`core/sharing.py`).

A part of the work is a batch of documents, of which those are encoded that the index does not have as they are. An
index in a folder has one writer: ranks and shards keep the vectors of their batches in `FOLDER.work`, and who ends the
work writes the documents as one process does, finding their vectors there. A Qdrant server has any number of writers:
there ranks and shards write their batches themselves.
"""

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedsmith.core.collectives import lost_ranks, objects_of_all_ranks
from embedsmith.core.encoder import Encoder, fingerprint
from embedsmith.core.errors import DataError
from embedsmith.core.outputs import clear_left, delivered, discard
from embedsmith.core.progress import log, progress_bar
from embedsmith.core.sharing import Shard, Sharing
from embedsmith.data.writers import batched
from embedsmith.index.commands import Place
from embedsmith.index.index import Document, HybridIndex, Written, open_index, read_documents
from embedsmith.index.vector_store import Store
from embedsmith.models import Embedder, load
from embedsmith.search.cached import CachedEncoder
from embedsmith.search.quantised import SearchPrecision

Fresh = npt.NDArray[np.bool_] | None
"""Which documents, by their number, have to be written; `None`: all."""


def run_index(
    model: str | Embedder,
    documents: str | Sequence[Document],
    place: Place,
    heads: Sequence[str] | None,
    batch: int,
    options: Mapping[str, Any] | None = None,
    precision: SearchPrecision | None = None,
    *,
    shard: Shard | None = None,
    join: bool = False,
) -> tuple[Written, int]:
    """Index the documents of a file or BEIR folder, or given ones; what is there unchanged is left alone, and what has
    no text is left out and told. Gives the size, too. `options`: of `load`, for a model by its path. `precision`: see
    `open_index`. `shard`, `join`: see `Sharing`; a shard of an index in a folder writes nothing there, and gives zeros.

    A file is read twice: what is wrong with it is an error before anything is encoded.
    """
    given = (model, documents, tuple(heads or ()), batch, dict(options or {}), precision)
    if place.folder is None:
        sharing = Sharing.asked("index", f"{place.collection}.index", shard, join)
        with lost_ranks():
            return _Filling(place, sharing, *given).on_server()
    with delivered(place.folder, "index", shared=shard is not None or join) as where:
        folder = Path(where)
        sharing = Sharing.asked("index", folder, shard, join)
        with sharing.claim():
            filling = _Filling(replace(place, folder=folder), sharing, *given)
            return filling.in_folder(folder.with_name(f"{folder.name}.work"))


@dataclass(frozen=True)
class _Filling:
    place: Place
    sharing: Sharing
    model: str | Embedder
    documents: str | Sequence[Document]
    heads: tuple[str, ...]
    batch: int
    options: Mapping[str, Any]
    precision: SearchPrecision | None

    def in_folder(self, work: Path) -> tuple[Written, int]:
        sharing = self.sharing
        total, content = sharing.every(self._counted)
        encoder = sharing.every(self._encoder)
        if sharing.mode == "alone" and not work.exists():
            made = self._written(encoder, total)
            sharing.end()
            return made
        facts = {"model": fingerprint(encoder), "documents": content, "batch": self.batch, "heads": list(self.heads)}
        sharing.agree(facts | {"precision": self.precision})
        heads, fresh = sharing.first(lambda: self._wanted(encoder))
        if sharing.ends:
            sharing.first(lambda: clear_left(work))
        cached, batches = CachedEncoder.of(encoder, work), range(-(-total // self.batch))
        missing = sharing.first(lambda: self._missing(cached, heads, fresh))
        mine = sharing.share(batches, set(batches) - missing)
        sharing.every(lambda: self._encode(cached, heads, fresh, mine))
        if not sharing.ends:
            sharing.tell(len(batches))
            if fresh is not None and not fresh.any():  # the work was ended before
                sharing.end()
            return Written(), 0

        def end() -> tuple[Written, int]:
            sharing.refuse_missing(self._missing(cached, heads, fresh), len(batches))
            made = self._written(cached, total)
            discard(work)
            sharing.end()
            return made

        return sharing.first(end)

    def on_server(self) -> tuple[Written, int]:
        """Every rank or shard writes its batches; a join sees that all documents are there."""
        sharing = self.sharing
        total, _ = sharing.every(self._counted)
        encoder, store = sharing.every(self._encoder), self.place.open()
        try:
            sharing.first(lambda: len(self._opened(encoder, store)))  # one makes it
            index, batches = self._opened(encoder, store), range(-(-total // self.batch))
            if sharing.mode == "join":
                fresh = self._fresh(index)
                sharing.refuse_missing(set((np.flatnonzero(fresh) // self.batch).tolist()), len(batches))
            mine = set(sharing.share(batches, ()))
            blocks = (block for number, block in enumerate(batched(self._read(), self.batch)) if number in mine)
            share, size = (document for block in blocks for document in block), min(len(mine) * self.batch, total)
            written = sharing.every(lambda: index.add(share, batch=self.batch, total=size, optimize=False))
            if sharing.ends:
                sharing.first(store.optimize)
            else:
                sharing.tell(len(batches))
            every = objects_of_all_ranks(written) if sharing.mode == "ranks" else [written]
            new, changed, unchanged = (sum(column) for column in zip(*map(astuple, every), strict=True))
            return Written(new, changed, unchanged), len(index)
        finally:
            store.close()

    def _given(self) -> Iterable[Document]:
        return read_documents(self.documents, empty=True) if isinstance(self.documents, str) else self.documents

    def _read(self) -> Iterator[Document]:
        """All but those without a text, which can be found by nothing."""
        return (document for document in self._given() if document.text.strip())

    def _counted(self) -> tuple[int, str]:
        """How many documents there are, and a hash of all. Errors: `DataError` for none."""
        digest, count, empty = hashlib.blake2b(digest_size=16), 0, list[str]()
        for document in self._given():
            if not document.text.strip():
                empty.append(document.id)
                continue
            count += 1
            digest.update(f"{document.id} {document.hash}".encode("utf-8", "surrogatepass"))
        where = self.documents if isinstance(self.documents, str) else None
        if count == 0:
            raise DataError("no document with a text", where=where, expected="at least one row with an id and a text")
        if empty:
            place = f"{where}: " if where else ""
            log.warning("%sdocuments without a text, left out: %d (the first: %r)", place, len(empty), empty[0])
        return count, digest.hexdigest()

    def _encoder(self) -> Embedder:
        return load(self.model, **self.options) if isinstance(self.model, str) else self.model

    def _wanted(self, encoder: Embedder) -> tuple[tuple[str, ...], Fresh]:
        """The heads of the index, and which documents it lacks."""
        store = self.place.open(read_only=True)
        try:
            if store.settings() is None:
                return self.heads or _outputs(encoder), None
            index = self._opened(encoder, store)
            return index.heads, self._fresh(index)
        finally:
            store.close()

    def _fresh(self, index: HybridIndex) -> npt.NDArray[np.bool_]:
        return np.concatenate([np.asarray(index.lacking(block), bool) for block in batched(self._read(), self.batch)])

    def _batches(self, fresh: Fresh) -> Iterator[tuple[int, list[str]]]:
        """The number of every batch with the texts of it that have to be written; not those that have none."""
        for number, block in enumerate(batched(self._read(), self.batch)):
            first = number * self.batch
            texts = [one.text for place, one in enumerate(block) if fresh is None or fresh[first + place]]
            if texts:
                yield number, texts

    def _missing(self, cached: CachedEncoder, heads: Sequence[str], fresh: Fresh) -> set[int]:
        """Batches whose vectors are not on the disk."""
        return {
            number
            for number, texts in self._batches(fresh)
            if not all(cached.path(texts, "document", None, head).is_file() for head in heads)
        }

    def _encode(self, cached: CachedEncoder, heads: Sequence[str], fresh: Fresh, mine: Collection[int]) -> None:
        """The vectors of some batches, kept."""
        numbers = set(mine)
        with progress_bar("encode", len(numbers)) as bar:
            for number, texts in self._batches(fresh):
                if number in numbers:
                    cached.represent(texts, role="document", outputs=heads)
                    bar.advance()

    def _written(self, encoder: Encoder, total: int) -> tuple[Written, int]:
        store = self.place.open()
        try:
            index = self._opened(encoder, store)
            return index.add(self._read(), batch=self.batch, total=total), len(index)
        finally:
            store.close()

    def _opened(self, encoder: Encoder, store: Store) -> HybridIndex:
        """The index in a store, made where there is none."""
        name = self.model if isinstance(self.model, str) else ""
        place = os.path.realpath(name) if os.path.exists(name) else name
        heads = self.heads or (_outputs(encoder) if store.settings() is None else None)
        return open_index(encoder, store, heads=heads, precision=self.precision, model=place, create=True)


def _outputs(encoder: Any) -> tuple[str, ...]:
    """The heads of a model, with or without a cache around it."""
    model: Any = encoder.encoder if isinstance(encoder, CachedEncoder) else encoder
    return tuple(name for name in model.outputs if name != "middle")
