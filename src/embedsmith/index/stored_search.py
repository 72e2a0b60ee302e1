"""The verb `search` over folders of vectors that `embedsmith encode` has written (`--vectors`): every vector is scored,
or those that an approximate index proposes. On ranks each searches its share."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedsmith.core.collectives import join_ranks, on_every_rank, on_first_rank, rank, world_size
from embedsmith.core.errors import SearchError
from embedsmith.core.progress import log
from embedsmith.core.reps import Cosine, Dense, Euclidean, Manhattan
from embedsmith.data.formats.texts import read_texts
from embedsmith.index.commands import FoundHits
from embedsmith.index.index import Hit
from embedsmith.models import Embedder, load
from embedsmith.models.encode_files import weights_hash
from embedsmith.search.approximate import COMPARED, ApproximateIndex, found_share
from embedsmith.search.exact import FloatArray, IndexArray
from embedsmith.search.stored import StoredVectors
from embedsmith.search.top_k import top_k_of_ranks


def run_stored_search(
    folders: Sequence[str | Path],
    queries: Sequence[str],
    k: int = 10,
    *,
    model: str | Embedder | None,
    texts: Sequence[str | Path] = (),
    approximate: str | None = None,
    effort: int = 128,
    work: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[FoundHits]:
    """The best `k` vectors of every query, on every rank.

    `model`: the one that made the vectors. `texts`: the files that were encoded, in their order, from which the hits'
    texts are read. `approximate`: FAISS's description of an index (`IVF4096,Flat`), which is made in `work` (`None`:
    beside the first folder) unless it is there; `effort`: candidates that a query looks at. How many of the nearest it
    finds is told, on a sample of the queries. Errors: `SearchError` for another model, and what reading raises.
    """
    if not queries:
        raise SearchError("no query", expected="one query or more, or --file")
    join_ranks()
    vectors = on_every_rank(lambda: StoredVectors(*folders), "search")
    if model is None:
        raise SearchError("which model made these vectors?", fix="give --model, the one that they were encoded with")
    encoder = model if isinstance(model, Embedder) else on_every_rank(lambda: load(model, **options or {}), "search")
    query = on_every_rank(lambda: _encoded(encoder, vectors, queries), "search")
    share = (rank(), world_size())
    if approximate is None:
        score_Qk, index_Qk = _merged(lambda: vectors.top(query, k, share), k)
    else:
        if type(query) is not Dense:
            what = f"an approximate index compares by inner products, and this model as {type(query).__name__}"
            raise SearchError(what, fix="leave --approximate out: every vector is then scored")
        index = _index(vectors, approximate, effort, Path(work) if work else None)
        blocks = range(len(index.starts))[share[0] :: share[1]]
        score_Qk, index_Qk = _merged(lambda: index.top(query, k, blocks), k)
        some = query.rows(slice(0, COMPARED))
        exact = _merged(lambda: vectors.top(some, k, share), k)[1]
        if rank() == 0:
            found = found_share(exact, index_Qk[:COMPARED])
            message = "%s finds %.1f %% of the %d nearest, on %d of the queries; --effort raises it (now %d)"
            log.info(message, approximate, 100 * found, k, len(some), effort)
    return on_first_rank(lambda: list(_hits(vectors, queries, score_Qk, index_Qk, texts)))


def _encoded(model: Embedder, vectors: StoredVectors, queries: Sequence[str]) -> Dense:
    """The queries in the kind that scores them as the model's similarity says. Errors: `SearchError` for a model that
    did not make the vectors."""
    meta = vectors.metas[0]
    if weights_hash(model) != meta["weights"]:
        raise SearchError(
            "these vectors were made by a model with other weights",
            where=vectors.folders[0],
            fix="give --model the one that they were encoded with",
        )
    width = None if meta["dim"] == model.encoded_dimension else meta["dim"]
    vector_QD = torch.from_numpy(model.encode(list(queries), role="query", dim=width))
    similarity, unit = model.settings.similarity, model.settings.normalize
    kinds: dict[str, type[Dense]] = {
        "euclidean": Euclidean,
        "manhattan": Manhattan,
        "cosine": Dense if unit else Cosine,
    }
    return kinds.get(similarity, Dense)(vector_QD)


def _index(vectors: StoredVectors, factory: str, effort: int, work: Path | None) -> ApproximateIndex:
    name = hashlib.blake2b(f"{factory} {vectors.identity}".encode(), digest_size=8).hexdigest()
    home = work or vectors.folders[0].with_name(f"{vectors.folders[0].name}.faiss")
    place = home / f"{factory.replace(',', '-')}-{name}"
    index = ApproximateIndex(place, factory, len(vectors), vectors.between, effort)

    def act() -> None:
        index.train()
        index.build(range(len(index.starts))[rank() :: world_size()])

    on_every_rank(act, "build the index", "the same command goes on")
    return index


def _merged(search: Any, k: int) -> tuple[FloatArray, IndexArray]:
    """What all ranks have found in their shares."""
    return top_k_of_ranks(on_every_rank(search, "search"), k)


def _hits(
    vectors: StoredVectors,
    queries: Sequence[str],
    score_Qk: FloatArray,
    index_Qk: IndexArray,
    files: Sequence[str | Path],
) -> Iterator[FoundHits]:
    places = sorted(set(index_Qk[index_Qk >= 0].tolist()))
    ids = vectors.ids(places)
    texts = _texts_at(places, ids, vectors, files) if files else {}
    for query, score_k, index_k in zip(queries, score_Qk.tolist(), np.asarray(index_Qk).tolist(), strict=True):
        found = [(place, score) for place, score in zip(index_k, score_k, strict=True) if place >= 0]
        yield FoundHits(
            query, [Hit(ids[place], score, {"dense": score}, texts.get(place, ""), {}) for place, score in found], []
        )


def _texts_at(
    places: Sequence[int], ids: Mapping[int, str], vectors: StoredVectors, files: Sequence[str | Path]
) -> dict[int, str]:
    """In one pass over the files. Errors: `SearchError` for files that are not those that were encoded."""
    column = vectors.metas[0].get("column")
    every = (one for file in files for one in read_texts(file, column=column, titles=".jsonl" in Path(file).suffixes))
    found: dict[int, str] = {}
    position = 0
    fix = "give --texts the files that were encoded, in their order"
    for place in places:
        one = next(islice(every, place - position, None), None)
        position = place + 1
        if one is None:
            raise SearchError(f"there are fewer texts than vectors: none for the vector {place}", fix=fix)
        if one.id is not None and str(one.id) != ids[place]:
            what = f"the id is {one.id!r} here, and {ids[place]!r} among the vectors"
            raise SearchError(what, where=one.where, fix=fix)
        found[place] = one.text
    return found
