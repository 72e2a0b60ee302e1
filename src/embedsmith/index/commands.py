"""Where an index lies; and the verb `search`: which model made the index, and how hits are shown."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

from rich.table import Table
from rich.text import Text

from embedsmith.core.encoder import Reranker, Role
from embedsmith.core.errors import RecipeError, SearchError
from embedsmith.core.inputs import local_path
from embedsmith.core.recipe import parse_value
from embedsmith.core.terminal import Printed
from embedsmith.index.edge import EdgeStore
from embedsmith.index.hits import Fusion, HitExplanation, ReciprocalRank, WeightedSum
from embedsmith.index.index import Hit, open_index, reranked_hits
from embedsmith.index.server import ServerStore
from embedsmith.index.vector_store import Filter, Store
from embedsmith.models import Embedder, load, load_reranker
from embedsmith.search.quantised import RESCORE, SearchPrecision

_TEXT = 120
"""Characters of a text that a table shows."""
_MATCHES = 5
"""Matches of a head that a table shows."""


@dataclass(frozen=True)
class Place:
    """A folder, or a collection of a Qdrant server."""

    folder: Path | None = None
    url: str | None = None
    collection: str = "embedsmith"
    api_key: str | None = field(default=None, repr=False)

    def open(self, *, read_only: bool = False) -> Store:
        if (self.folder is None) == (self.url is None):
            raise SearchError("where is the index?", expected="either a folder or --url of a Qdrant server")
        if self.url is not None:
            return ServerStore(self.url, self.collection, api_key=self.api_key)
        assert self.folder is not None
        return EdgeStore(local_path(self.folder, SearchError) if read_only else self.folder, read_only=read_only)


def checked_precision(given: str | None) -> SearchPrecision | None:
    """Errors: `SearchError` for one that no index has."""
    if given not in (None, "float32", "int8", "binary"):
        raise SearchError(f"the precision is {given!r}", expected="float32, int8 or binary")
    return cast(SearchPrecision | None, given)


@dataclass(frozen=True, repr=False)
class FoundHits(Printed):
    """The hits of one query, and how each came about where that was asked for."""

    query: str
    hits: Sequence[Hit]
    explanations: Sequence[HitExplanation]

    def as_json(self) -> str:
        """One line."""
        row: dict[str, Any] = {"query": self.query, "hits": [asdict(hit) for hit in self.hits]}
        if self.explanations:
            row["explanations"] = [asdict(found) for found in self.explanations]
        return json.dumps(row, ensure_ascii=False)

    def table(self) -> Table:
        """The hits with the score of every head, and the strongest matches where they were asked for."""
        heads = sorted({head for hit in self.hits for head in hit.scores})
        columns = ["", "score", *heads, "id", "text", *(["matches"] if self.explanations else [])]
        table = Table(*columns, title=Text(self.query), title_justify="left")
        for number, hit in enumerate(self.hits):
            scores = [f"{hit.scores[head]:.3f}" if head in hit.scores else "-" for head in heads]
            line = " ".join(hit.text.split())
            short = line if len(line) <= _TEXT else line[: _TEXT - 1] + "…"
            cells: list[str | Text] = [str(number + 1), f"{hit.score:.3f}", *scores, Text(hit.id), Text(short)]
            if self.explanations:
                cells.append(Text(_matches(self.explanations[number])))
            table.add_row(*cells)
        return table


def _matches(found: HitExplanation) -> str:
    lines = []
    for head, matches in found.matches.items():
        pairs = []
        for match in matches[:_MATCHES]:
            same = match.query_token == match.document_token
            tokens = match.query_token if same else f"{match.query_token}→{match.document_token}"
            pairs.append(f"{tokens} {match.score:.2f}")
        lines.append(f"{head}: {', '.join(pairs) or 'nothing shared'}")
    return "\n".join(lines)


def run_search(
    place: Place,
    queries: Sequence[str],
    k: int = 10,
    *,
    model: str | Embedder | None = None,
    weights: Mapping[str, float] | None = None,
    rrf: bool = False,
    candidates: int = 100,
    filter: Filter | None = None,
    explained: bool = False,
    rescore: int = RESCORE,
    rerank: str | Reranker | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[FoundHits]:
    """The best `k` documents of every query (see `HybridIndex.search`).

    `model`: a new place of the model that made the index, or that model. `weights`: of the heads (`None`: M3's).
    `rrf`: fuse ranks instead of scores. `explained`: say which tokens matched. `rerank`: a reranker, or its folder or
    hub id, that puts the first `candidates` hits into order anew. `options`: of `load`, those that the index was made
    with. Errors: `SearchError` for no query and no index.
    """
    if not queries:
        raise SearchError("no query", expected="one query or more, or --file")
    store = place.open(read_only=True)
    try:
        settings = store.settings()
        if settings is None:
            raise SearchError(
                "there is no index here",
                where=place.folder or place.url,
                fix="make one: embedsmith index MODEL DOCUMENTS --to FOLDER",
            )
        if isinstance(model, Embedder):
            encoder = model
        elif named := model or settings["model"]:
            encoder = load(named, **options or {})
        else:
            what = "this index was made by a model in memory"
            raise SearchError(what, fix="name the model, or its folder: model=...")
        index = open_index(encoder, store, model=model if isinstance(model, str) else "")
        fusion: Fusion | None = None if weights is None else WeightedSum(weights)
        if rrf:
            fusion = ReciprocalRank(weights or dict.fromkeys(index.heads, 1.0))
        reranker = load_reranker(rerank) if isinstance(rerank, str) else rerank
        wanted = k if reranker is None else max(k, candidates)
        hits = index.search(queries, wanted, fusion=fusion, candidates=candidates, filter=filter, rescore=rescore)
        if reranker is not None:
            asked = [query for query, found in zip(queries, hits, strict=True) for _ in found]
            scores = iter(reranker.score(asked, [hit.text for found in hits for hit in found]).tolist())
            hits = [reranked_hits(found, islice(scores, len(found)))[:k] for found in hits]
        reasons = [
            [_explain(encoder, index.heads, query, hit) for hit in found] if explained else []
            for query, found in zip(queries, hits, strict=True)
        ]
        return [FoundHits(*found) for found in zip(queries, hits, reasons, strict=True)]
    finally:
        store.close()


def _explain(model: Embedder, heads: Sequence[str], query: str, hit: Hit) -> HitExplanation:
    texts: tuple[tuple[str, Role], ...] = ((query, "query"), (hit.text, "document"))
    left, right = (model.represent([text], role=role, outputs=heads) for text, role in texts)
    ids = (model.tokenize([text], role=role).id_S.tolist() for text, role in texts)
    mine, theirs = (model.tokenizer.convert_ids_to_tokens(each) for each in ids)
    return HitExplanation.of(left, right, mine, theirs, model.tokenizer.convert_ids_to_tokens)


def parse_pairs(texts: Sequence[str], what: str) -> dict[str, Any]:
    """`["dense=1", "lang=[en, zh]"]` as a mapping; values are YAML. Errors: `SearchError`."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise SearchError(f"{what} {text!r}", expected="key=value")
        try:
            found[key] = parse_value(value, what)
        except RecipeError as error:
            raise SearchError(f"{what} {text!r} is not YAML", expected="such as lang=en or year={gte: 2000}") from error
    return found


def parse_weights(texts: Sequence[str]) -> dict[str, float] | None:
    """Errors: `SearchError` for a weight that is no finite number from 0."""
    found = parse_pairs(texts, "the weight")
    for head, weight in found.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise SearchError(f"the weight {head}={weight} is not a number from 0", expected="such as sparse=0.3")
    return {head: float(weight) for head, weight in found.items()} or None
