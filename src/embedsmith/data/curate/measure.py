"""Measures of a text that treat languages alike, whether they put spaces between words or not."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff"
)
"""Characters of scripts that are written without spaces: kana and Han, among others."""

_UNIT = re.compile(f"[{UNSPACED}]|[^\\W{UNSPACED}]+")
_LINK = re.compile(r"(?:https?://|www\.)[^\s<>\"'，。）】]+|[\w.+-]+@[\w-]+\.[\w.]+", re.IGNORECASE)
_RUN = re.compile(r"(.)\1{9,}", re.DOTALL)
_SCRIPTS = (
    ("han", "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"),
    ("kana", "\u3040-\u30ff\uff66-\uff9d"),
    ("hangul", "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af"),
    ("latin", "A-Za-z\u00aa\u00ba\u00c0-\u024f\u1e00-\u1eff"),
    ("cyrillic", "\u0400-\u052f"),
    ("greek", "\u0370-\u03ff\u1f00-\u1fff"),
    ("arabic", "\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufeff"),
    ("hebrew", "\u0590-\u05ff"),
    ("devanagari", "\u0900-\u097f"),
    ("bengali", "\u0980-\u09ff"),
    ("tamil", "\u0b80-\u0bff"),
    ("telugu", "\u0c00-\u0c7f"),
    ("thai", "\u0e00-\u0e7f"),
)
_SCRIPT = re.compile(
    "|".join(f"(?P<{name}>[{span}]{'' if name in ('han', 'kana', 'thai') else '+'})" for name, span in _SCRIPTS)
)


def units(text: str) -> int:
    """The length of a text: words, and each character of a script that is written without spaces. An English sentence
    and its Chinese translation have about as many."""
    return sum(1 for _ in _UNIT.finditer(text))


def tokens(text: str) -> list[str]:
    """The units themselves, without differences of case and of Unicode form; marks and spaces fall away."""
    found: list[str] = _UNIT.findall(unicodedata.normalize("NFKC", text).casefold())
    return found


def shingles(text: str, length: int) -> set[str]:
    """Overlapping runs of `length` characters of the tokens joined by spaces: about a word of English; two or three
    characters of Chinese, each of which is a token."""
    joined = " ".join(tokens(text))
    return {joined[start : start + length] for start in range(max(len(joined) - length + 1, 1))} if joined else set()


def scripts(text: str) -> Counter[str]:
    """How many words (or characters, where words are not separated) each script contributes."""
    return Counter(found.lastgroup or "" for found in _SCRIPT.finditer(text))


def links(text: str) -> Iterator[str]:
    """Web and mail addresses."""
    yield from (found.group() for found in _LINK.finditer(text))


def without_links(text: str) -> str:
    return _LINK.sub(" ", text)


def link_share(text: str) -> float:
    """The share of the characters that belong to addresses, spaces not counted."""
    solid = sum(not character.isspace() for character in text)
    return sum(len(link) for link in links(text)) / solid if solid else 0.0


def letter_share(text: str) -> float:
    """The share of letters among all characters that are not spaces."""
    solid = [character for character in text if not character.isspace()]
    return sum(unicodedata.category(character)[0] in "LM" for character in solid) / len(solid) if solid else 0.0


def digit_share(text: str) -> float:
    solid = [character for character in text if not character.isspace()]
    return sum(character.isdigit() for character in solid) / len(solid) if solid else 0.0


def run_share(text: str) -> float:
    """The share of the longest run of one character, spaces not counted; 0 for runs of fewer than ten."""
    solid = "".join(text.split())
    longest = max((found.end() - found.start() for found in _RUN.finditer(solid)), default=0)
    return longest / len(solid) if longest else 0.0
