"""How queries are filled up with a token, as ColBERT does."""

from __future__ import annotations

from dataclasses import dataclass

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
