"""What is answered: vectors as JSON, in the shapes of OpenAI, Cohere and TEI."""

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from embedsmith.core.errors import SearchError
from embedsmith.core.reps import MultiVector, Reps, Sparse
from embedsmith.index.vector_store import check_finite, lexical_weights
from embedsmith.serve.model import Encoded, Model
from embedsmith.serve.served_index import Found

Vectors = npt.NDArray[np.float32]


def as_json(value: Any) -> bytes:
    """Errors: `ValueError` for NaN and infinities, which are no JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def embeddings(model: Model, made: Encoded, dimensions: int | None, base_64: bool) -> bytes:
    """OpenAI's list of vectors."""
    _check_finite(made.reps)
    vector_ND = np.ascontiguousarray(model.vectors(made.reps, dimensions), dtype="<f4")
    encoded = (base64.b64encode(vector_D.tobytes()).decode("ascii") for vector_D in vector_ND)
    return _listed(model, made, "embedding", encoded if base_64 else iter(vector_ND.tolist()))


def sparse(model: Model, made: Encoded) -> bytes:
    """The weights of vocabulary entries, largest first: their ids, their words, their weights."""
    _check_finite(made.reps)
    words = None if model.tokens is None else model.tokens.tokenizer.convert_ids_to_tokens

    def row(weights: Mapping[int, float]) -> dict[str, Any]:
        ids = sorted(weights, key=lambda entry: (-weights[entry], entry))
        told = {} if words is None else {"tokens": words(ids)}
        return {"indices": ids, **told, "values": [weights[entry] for entry in ids]}

    return _listed(model, made, "sparse_embedding", map(row, lexical_weights(cast(Sparse, made.reps["sparse"]))))


def multivector(model: Model, made: Encoded) -> bytes:
    """A vector for every token that takes part."""
    _check_finite(made.reps)
    rep = cast(MultiVector, made.reps["multivector"])
    rows = (vector_TD[mask_T].tolist() for vector_TD, mask_T in zip(rep.vector_NTD, rep.mask_NT, strict=True))
    return _listed(model, made, "multivector_embedding", rows)


def _listed(model: Model, made: Encoded, kind: str, values: Iterator[Any]) -> bytes:
    data = [{"object": kind, "index": place, "embedding": value} for place, value in enumerate(values)]
    tokens = sum(made.token_N)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return as_json({"object": "list", "data": data, "model": model.name, "usage": usage})


def _check_finite(reps: Reps) -> None:
    """Errors: `SearchError` naming the text: whose vectors are not finite, the weights are broken."""
    check_finite(reps, [f"text {place}" for place in range(len(next(iter(reps.values()))))])


def reranked_cohere(
    name: str, scores: Sequence[float], documents: Sequence[str], top: int | None, texts: bool
) -> bytes:
    """Cohere's results, best first, with relevance from 0 to 1."""
    results = [
        {"index": place, "relevance_score": scores[place]} | ({"document": {"text": documents[place]}} if texts else {})
        for place in _best(scores)[:top]
    ]
    return as_json({"object": "list", "model": name, "results": results})


def reranked_tei(scores: Sequence[float], documents: Sequence[str], texts: bool) -> bytes:
    """TEI's list, best first."""
    return as_json(
        [
            {"index": place, "score": scores[place]} | ({"text": documents[place]} if texts else {})
            for place in _best(scores)
        ]
    )


def _best(scores: Sequence[float]) -> list[int]:
    if not all(map(math.isfinite, scores)):
        raise SearchError("a score of the reranker is not finite", fix="check its weights")
    return sorted(range(len(scores)), key=lambda place: (-scores[place], place))


def hits(model: str, found: Sequence[Found]) -> bytes:
    """What a search found, best first."""
    rows = [
        {
            "id": one.hit.id,
            "score": one.hit.score,
            "text": one.hit.text,
            "fields": dict(one.hit.metadata),
            "heads": dict(one.hit.scores),
            "tokens": [
                {"token": each.token, "head": each.head, "weight": each.weight, "query_token": each.query_token}
                for each in one.matches
            ],
        }
        for one in found
    ]
    return as_json({"model": model, "hits": rows})
