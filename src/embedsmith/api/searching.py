"""A hybrid index from Python: `index` makes or updates one, `search` asks it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedsmith.core.encoder import Reranker
from embedsmith.core.errors import DataError, SearchError
from embedsmith.core.keys import checked_variable, key_from
from embedsmith.core.progress import lines_shown
from embedsmith.core.sharing import Shard
from embedsmith.index import Document, Filter, Written
from embedsmith.index.commands import FoundHits, Place, checked_precision, run_search
from embedsmith.index.filling import run_index
from embedsmith.index.stored_search import run_stored_search
from embedsmith.models import Embedder


@dataclass(frozen=True)
class Indexed(Written):
    """What was written, and how many documents the index holds now."""

    size: int = 0

    def __str__(self) -> str:
        return f"{self.new} new, {self.changed} changed, {self.unchanged} unchanged; {self.size} in the index"


def index(
    model: str | Path | Embedder,
    documents: str | Path | Iterable[str | Mapping[str, Any] | Document],
    to: str | Path | None = None,
    *,
    url: str | None = None,
    collection: str = "embedsmith",
    api_key_env: str | None = None,
    heads: Sequence[str] | None = None,
    precision: str | None = None,
    batch: int = 256,
    shard: Shard | None = None,
    join: bool = False,
) -> Indexed:
    """Index documents under every head of a model; an index that is there is updated. The ranks of a launcher share
    the work: all of them must call this.

    >>> import embedsmith as es
    >>> print(es.index("my-model", ["a cat on the mat", "the big red tree"], to="my-index"))
    2 new, 0 changed, 0 unchanged; 2 in the index

    `model`: a folder, a hub id, or a model that is loaded. `documents`: a file, a BEIR folder, or texts, dicts
    (`{"id": "a", "text": "...", "lang": "en"}`; what is neither is metadata) and `Document`s; texts are named by their
    numbers. One without a text is left out, and told. `to`: the index's folder; or `url`, `collection` and
    `api_key_env` (an environment variable) of a Qdrant server. `heads`: all by default. `precision`: `int8` or
    `binary` finds dense vectors by such codes, kept in memory. `batch`: documents written together. `shard`: which of
    how many shards this call is, `(0, 4)`; `join`: end the work of shards (docs/ranks.md).
    Errors: those of `embedsmith index`.
    """
    place = _place(to, url, collection, api_key_env)
    held = (
        str(documents) if isinstance(documents, str | Path) else [_document(n, one) for n, one in enumerate(documents)]
    )
    with lines_shown():
        known = str(model) if isinstance(model, Path) else model
        codes = checked_precision(precision)
        written, size = run_index(known, held, place, heads, batch, precision=codes, shard=shard, join=join)
    return Indexed(written.new, written.changed, written.unchanged, size)


def search(
    queries: str | Sequence[str],
    index: str | Path | None = None,
    k: int = 10,
    *,
    url: str | None = None,
    collection: str = "embedsmith",
    api_key_env: str | None = None,
    model: str | Path | Embedder | None = None,
    weights: Mapping[str, float] | None = None,
    rrf: bool = False,
    candidates: int = 100,
    rescore: int = 4,
    filter: Filter | None = None,
    explain: bool = False,
    rerank: str | Path | Reranker | None = None,
    vectors: str | Path | Sequence[str | Path] = (),
    texts: str | Path | Sequence[str | Path] = (),
    approximate: str | None = None,
    effort: int = 128,
) -> list[FoundHits]:
    """Search an index by all heads together: the `k` best documents of every query.

    >>> import embedsmith as es
    >>> written = es.index("my-model", ["a cat on the mat", "the big red tree"], to="my-index")
    >>> found = es.search("a cat on the mat", "my-index", k=1)
    >>> found[0].hits[0].text
    'a cat on the mat'

    `queries`: one or several. `index`: the index's folder; or `url`, `collection` and `api_key_env` of a Qdrant
    server. `model`: the model, where it is not where it was when the index was made. `weights`: of the heads, such as
    `{"dense": 1, "sparse": 0.3}`. `rrf`: fuse ranks instead of scores. `candidates`: documents each head proposes;
    `rescore`: of an index with codes, how many times as many of these are scored in full. `filter`: of metadata, such
    as `{"lang": "en"}`. `explain`: say which tokens matched. `rerank`: a reranker, or its folder or hub id, that reads
    the first `candidates` hits and orders them anew.
    `vectors`: instead of an index, folders that `encode` has written with `model`, searched where they lie; `texts`:
    the files that were encoded, to show texts; `approximate`: search by such an index of FAISS (`IVF4096,Flat`), where
    a query looks at `effort` candidates. Ranks of a launcher share the search: all of them must call this.
    Errors: those of `embedsmith search`.
    """
    asked = [queries] if isinstance(queries, str) else list(queries)
    known = str(model) if isinstance(model, Path) else model
    if folders := [vectors] if isinstance(vectors, str | Path) else list(vectors):
        if index is not None or url is not None:
            raise SearchError("both vectors and an index", fix="name one of them")
        files = [texts] if isinstance(texts, str | Path) else list(texts)
        with lines_shown():
            return run_stored_search(
                folders, asked, k, model=known, texts=files, approximate=approximate, effort=effort
            )
    place = _place(index, url, collection, api_key_env)
    with lines_shown():
        return run_search(
            place,
            asked,
            k,
            model=known,
            weights=weights,
            rrf=rrf,
            candidates=candidates,
            rescore=rescore,
            filter=filter,
            explained=explain,
            rerank=str(rerank) if isinstance(rerank, Path) else rerank,
        )


def _place(folder: str | Path | None, url: str | None, collection: str, api_key_env: str | None) -> Place:
    key = key_from(checked_variable(api_key_env, "api_key_env"))
    return Place(None if folder is None else Path(folder), url, collection, key)


def _document(number: int, given: str | Mapping[str, Any] | Document) -> Document:
    if isinstance(given, Document):
        return given
    if isinstance(given, str):
        return Document(str(number), given)
    name = "_id" if "_id" in given else "id"
    text = given.get("text")
    if not isinstance(text, str):
        raise DataError("no text", where=f"document {number}", expected='a dict such as {"id": "a", "text": "..."}')
    metadata = {key: value for key, value in given.items() if key not in (name, "text")}
    return Document(str(given.get(name, number)), text, metadata)
