"""What requests hold: the shapes of OpenAI, Cohere and TEI, checked to the last value before anything is computed."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, WithJsonSchema

from embedsmith.serve.model import Text


def checked_input(given: Any) -> list[Text]:
    """A text, a list of texts, the token ids of a text, or a list of those: as a list of texts and lists of ids.

    Errors: `ValueError` naming the place and what came.
    """
    if isinstance(given, str):
        return [_checked_text(given, "the text")]
    if not isinstance(given, list):
        raise ValueError(f"expected a text, a list of texts, or token ids; got {_kind(given)}")
    if not given:
        raise ValueError("the list is empty: send one text at least")
    if type(given[0]) is int:
        return [_checked_ids(given, "the list")]
    return [
        _checked_text(one, f"text {place}") if isinstance(one, str) else _checked_ids(one, f"text {place}")
        for place, one in enumerate(given)
    ]


def _checked_text(text: str, name: str) -> str:
    if not text:
        raise ValueError(f"{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half of a surrogate pair, which is no text") from None
    return text


def _checked_ids(ids: Any, name: str) -> list[int]:
    if not isinstance(ids, list):
        raise ValueError(f"{name} is {_kind(ids)}, not a text and not a list of token ids")
    if not ids:
        raise ValueError(f"{name} is empty")
    for place, one in enumerate(ids):
        if type(one) is not int or not 0 <= one < 2**31:
            raise ValueError(f"{name} holds {_kind(one)} at place {place}, not a token id")
    return ids


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number with a fraction", str: "a text", list: "a list"}
    return names.get(type(value), "an object")


def checked_documents(given: Any) -> list[str]:
    """A list of texts, or of Cohere's objects with a text. Errors: `ValueError`."""
    if not isinstance(given, list):
        raise ValueError(f"expected a list of texts; got {_kind(given)}")
    if not given:
        raise ValueError("the list is empty: send one text at least")
    texts = [one["text"] if isinstance(one, dict) and set(one) == {"text"} else one for one in given]
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {place} is {_kind(text)}, not a text")
        _checked_text(text, f"text {place}")
    return texts


_TEXTS_SCHEMA = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_INPUT_SCHEMA = {
    "description": "A text, a list of texts, the token ids of a text, or a list of those.",
    "oneOf": [
        {"type": "string"},
        _TEXTS_SCHEMA,
        {"type": "array", "items": {"type": "integer"}, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "minItems": 1}, "minItems": 1},
    ],
}
Input = Annotated[Any, AfterValidator(checked_input), WithJsonSchema(_INPUT_SCHEMA)]
OneText = Annotated[str, AfterValidator(lambda text: _checked_text(text, "the text"))]


Documents = Annotated[Any, AfterValidator(checked_documents), WithJsonSchema(_TEXTS_SCHEMA)]
Role = Literal["query", "document"]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Body(BaseModel):
    """An unknown key is an error, and so is a number that is a text."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class EmbeddingsBody(Body):
    """OpenAI's, with `input_type`, which says whose prompt goes before the texts."""

    input: Input
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    input_type: Role = "document"
    user: str | None = Field(None, description="Taken, and not used.")


class HeadBody(Body):
    """Texts for a head that gives more than one vector."""

    input: Input
    model: str | None = None
    input_type: Role = "document"


class RerankBody(Body):
    """Cohere's shape (`documents`, `top_n`, `return_documents`) or TEI's (`texts`, `return_text`, `raw_scores`)."""

    query: OneText
    documents: Documents | None = None
    texts: Documents | None = None
    model: str | None = None
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False
    return_text: bool = False
    raw_scores: bool = False
    truncate: bool | None = Field(None, description="Taken: what is too long is always cut.")
    truncation_direction: Literal["Right", "right"] | None = None
    max_chunks_per_doc: int | None = Field(None, description="Taken, and not used.")
    max_tokens_per_doc: int | None = Field(None, description="Taken, and not used.")


class SearchBody(Body):
    """A question to the index."""

    query: OneText
    k: Annotated[int, Field(ge=1)] = 10
    model: str | None = None
    weights: Annotated[dict[str, Weight], Field(min_length=1, max_length=16)] | None = None
    rrf: bool = Field(False, description="Fuse ranks instead of scores.")
    candidates: Annotated[int, Field(ge=1, le=10_000)] = 100
    filter: dict[str, Any] | None = Field(
        None, description='Conditions on fields: {"lang": "en", "year": {"gte": 2000}}'
    )
    explain: bool = False
    rerank: bool = False


class DocumentBody(Body):
    """A text with an id, and fields to filter by."""

    id: Annotated[str, Field(min_length=1, max_length=2000), AfterValidator(lambda id_: _checked_text(id_, "the id"))]
    text: OneText
    fields: dict[str, Any] = Field(default_factory=dict)


class DocumentsBody(Body):
    """Documents to write; what is there under the same id is replaced."""

    documents: Annotated[list[DocumentBody], FailFast(), Field(min_length=1)]
    model: str | None = None


class DeletionBody(Body):
    """Documents to delete, by their ids."""

    ids: Annotated[list[OneText], FailFast(), Field(min_length=1)]
    model: str | None = None


class ReloadBody(Body):
    """Which models are loaded anew; all of them where none is named."""

    models: Annotated[list[str], Field(max_length=1000)] | None = None
