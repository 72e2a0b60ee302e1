"""How queries are filled up with a token, as ColBERT does."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embedsmith.core.errors import ModelError
from embedsmith.core.settings import Count, section


@section
@dataclass(frozen=True)
class Expansion:
    """Queries filled up with a token, whose vectors are scored too, as in ColBERT.

    `length`: tokens that a query then has. `token`: what fills it, by default the mask token, else the end token.
    `attend`: whether the words of a query see those tokens. `cut`: longer queries are cut to that length.
    """

    length: Count
    token: str | None = None
    attend: bool = False
    cut: bool = True


def with_token(expansion: Expansion | None, tokenizer: Any, path: str | Path) -> Expansion | None:
    """How queries are filled up, with the token that fills them. Errors: `ModelError` where there is none."""
    if expansion is None:
        return None
    token = expansion.token or tokenizer.mask_token or tokenizer.eos_token
    number = None if token is None else tokenizer.convert_tokens_to_ids(token)
    if number is None or (number == tokenizer.unk_token_id and token != tokenizer.unk_token):
        raise ModelError(
            f"queries are filled up with {token!r}, which the tokenizer has not"
            if token
            else "the tokenizer has no mask token, with which queries are filled up",
            where=path,
            fix="copy the folder again, as a whole",
        )
    return replace(expansion, token=token)
