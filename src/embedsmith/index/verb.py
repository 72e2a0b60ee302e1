"""The verbs `index` and `search`: where an index lies, which model made it, and how hits are shown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from embedsmith.core.encoder import Role
from embedsmith.core.errors import SearchError
from embedsmith.index import (
    EdgeStore,
    Explanation,
    Filter,
    Fusion,
    Hit,
    HybridIndex,
    ReciprocalRank,
    ServerStore,
    Store,
    WeightedSum,
    Written,
    explain,
    open_index,
    read_documents,
)

if TYPE_CHECKING:
    from rich.table import Table

    from embedsmith.models import Embedder


@dataclass(frozen=True)
class Place:
    """A folder, or a collection of a Qdrant server."""

    folder: Path | None = None
    url: str | None = None
    collection: str = "embedsmith"
    api_key: str | None = None

    def open(self) -> Store:
        if (self.folder is None) == (self.url is None):
            raise SearchError("where is the index?", expected="either a folder or --url of a Qdrant server")
        if self.url is not None:
            return ServerStore(self.url, self.collection, api_key=self.api_key)
        assert self.folder is not None
        return EdgeStore(self.folder)


def run_index(model: str, documents: str, place: Place, heads: Sequence[str] | None, batch: int) -> tuple[Written, int]:
    """Index the documents of a file or BEIR folder; what is there unchanged is left alone. Gives the size, too.

    The documents are read twice: what is wrong with them is said before anything is encoded.
    """
    from embedsmith.models import load

    total = sum(1 for _ in read_documents(documents))
    encoder = load(model)
    store = place.open()
    try:
        fresh = store.settings() is None
        names = heads or (tuple(name for name in encoder.outputs if name != "middle") if fresh else None)
        place_of_model = str(Path(model).resolve()) if Path(model).exists() else model
        index = open_index(encoder, store, heads=names, model=place_of_model, create=True)
        return index.add(read_documents(documents), batch=batch, total=total), len(index)
    finally:
        store.close()


@dataclass(frozen=True)
class Asked:
    """What to search for, and how."""

    queries: Sequence[str]
    k: int = 10
    weights: Mapping[str, float] | None = None
    rrf: bool = False
    candidates: int = 100
    filter: Filter | None = None

    def fusion(self, heads: Sequence[str]) -> Fusion | None:
        if self.rrf:
            return ReciprocalRank(self.weights or dict.fromkeys(heads, 1.0))
        return None if self.weights is None else WeightedSum(self.weights)


@dataclass(frozen=True)
class Answer:
    query: str
    hits: Sequence[Hit]
    explanations: Sequence[Explanation]


def run_search(place: Place, model: str | None, asked: Asked, explained: bool) -> list[Answer]:
    """The hits of every query. The model is the one that made the index, unless another place of it is given."""
    from embedsmith.models import load

    if not asked.queries:
        raise SearchError("no query", expected="one query or more, or --file")
    store = place.open()
    try:
        kept = store.settings() or _no_index(place)
        encoder = load(model or kept["model"])
        index = open_index(encoder, store, model=model or "")
        hits = index.search(
            asked.queries,
            asked.k,
            fusion=asked.fusion(index.heads),
            candidates=asked.candidates,
            filter=asked.filter,
        )
        return [
            Answer(query, found, [_explained(encoder, index, query, hit) for hit in found] if explained else [])
            for query, found in zip(asked.queries, hits, strict=True)
        ]
    finally:
        store.close()


def _no_index(place: Place) -> dict[str, Any]:
    raise SearchError(
        "there is no index here",
        where=place.folder or place.url,
        fix="make one: embedsmith index MODEL DOCUMENTS --to FOLDER",
    )


def _explained(model: Embedder, index: HybridIndex, query: str, hit: Hit) -> Explanation:
    mine = model.represent([query], role="query", outputs=index.heads)
    theirs = model.represent([hit.text], role="document", outputs=index.heads)
    return explain(mine, theirs, _tokens(model, query, "query"), _tokens(model, hit.text, "document"))


def _tokens(model: Embedder, text: str, role: Role) -> list[str]:
    found: list[str] = model.tokenizer.convert_ids_to_tokens(model.tokenize([text], role=role).id_S.tolist())
    return found


def read_queries(path: str | Path) -> Iterator[str]:
    """The texts of a queries file in any of the forms of documents."""
    return (document.text for document in read_documents(path))


def parse_pairs(texts: Sequence[str], what: str) -> dict[str, Any]:
    """`["dense=1", "lang=[en, zh]"]` as a mapping; values are YAML. Errors: `SearchError`."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise SearchError(f"{what} {text!r}", expected="key=value")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SearchError(f"{what} {text!r} is not YAML", expected="such as lang=en or year={gte: 2000}") from error
    return found


def parse_weights(texts: Sequence[str]) -> dict[str, float] | None:
    """Errors: `SearchError` for a weight that is no number."""
    found = parse_pairs(texts, "the weight")
    if wrong := [f"{head}={w}" for head, w in found.items() if isinstance(w, bool) or not isinstance(w, int | float)]:
        raise SearchError(f"the weight {wrong[0]} is not a number", expected="such as sparse=0.3")
    return {head: float(weight) for head, weight in found.items()} or None


def as_json(answer: Answer) -> str:
    """One line."""
    row: dict[str, Any] = {"query": answer.query, "hits": [asdict(hit) for hit in answer.hits]}
    if answer.explanations:
        row["explanations"] = [asdict(found) for found in answer.explanations]
    return json.dumps(row, ensure_ascii=False)


def table(answer: Answer) -> Table:
    """The hits of a query with the score of every head, and the strongest matches where they were asked for."""
    from rich.table import Table
    from rich.text import Text

    heads = sorted({head for hit in answer.hits for head in hit.scores})
    columns = ["", "score", *heads, "id", "text", *(["matches"] if answer.explanations else [])]
    made = Table(*columns, title=Text(answer.query), title_justify="left")
    for number, hit in enumerate(answer.hits):
        scores = [f"{hit.scores[head]:.3f}" if head in hit.scores else "-" for head in heads]
        cells: list[str | Text] = [str(number + 1), f"{hit.score:.3f}", *scores, Text(hit.id), Text(_short(hit.text))]
        if answer.explanations:
            cells.append(Text(_matches(answer.explanations[number])))
        made.add_row(*cells)
    return made


def _short(text: str, length: int = 120) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def _matches(found: Explanation, count: int = 5) -> str:
    lines = []
    for head, matches in found.matches.items():
        pairs = (
            f"{m.query_token} {m.score:.2f}"
            if m.query_token == m.document_token
            else f"{m.query_token}→{m.document_token} {m.score:.2f}"
            for m in matches[:count]
        )
        lines.append(f"{head}: {', '.join(pairs) or 'nothing shared'}")
    return "\n".join(lines)
