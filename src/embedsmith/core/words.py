"""What a word is, in every room that cuts a text into words: a run of letters and digits, each with its combining
marks, as in Unicode's word segmentation (UAX 29). In scripts without spaces between words, such as Chinese or Thai,
there are only letters.
"""

import re
import unicodedata
from collections.abc import Iterator

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff"
)
"""Characters of scripts that are written without spaces: kana and Han, among others."""

_MARKS = "".join(mark for mark in map(chr, range(0x20000)) if unicodedata.category(mark)[0] == "M")
_LETTER = re.compile(f".[{_MARKS}]*", re.DOTALL)
_RUN = re.compile(f"(?P<unspaced>[{UNSPACED}][{UNSPACED}{_MARKS}]*)|[^\\W{UNSPACED}](?:[^\\W{UNSPACED}]|[{_MARKS}])*")
_ASCII_RUN = re.compile(r"\w+", re.ASCII)
_UNSEEN = dict.fromkeys((0xAD, 0x200C, 0x200D, 0x200E, 0x200F, 0x2060, 0xFEFF, *range(0xFE00, 0xFE10)))
"""Hyphens and joiners that are not shown, and choices between two forms of one sign: none of them ends a word."""


def composed(text: str) -> str:
    """A text without differences of NFC and NFD and of characters that are not shown; ASCII has none."""
    return text if text.isascii() else unicodedata.normalize("NFC", text.translate(_UNSEEN))


def folded(text: str) -> str:
    """The same without differences of case and width."""
    return unicodedata.normalize("NFKC", composed(text)).casefold()


def runs(text: str) -> Iterator[tuple[str, bool]]:
    """The words of a text as it stands, and whether each is a run of a script without spaces; what is between them
    falls away."""
    if text.isascii():  # the same, many times faster
        yield from ((run, False) for run in _ASCII_RUN.findall(text))
        return
    for found in _RUN.finditer(text):
        yield found[0], found["unspaced"] is not None


def letters(run: str) -> list[str]:
    """The letters of a word, each with its marks."""
    found: list[str] = _LETTER.findall(run)
    return found


def words(text: str) -> list[str]:
    """The words of a text, folded; of scripts without spaces every letter."""
    return [one for run, unspaced in runs(folded(text)) for one in (letters(run) if unspaced else [run])]
