"""Rules that look at one text at a time. Thresholds are ours; the kinds of rules are those every web corpus uses."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from embedsmith.core.encoder import Role
from embedsmith.core.errors import RecipeError
from embedsmith.core.shelf import curation_steps
from embedsmith.curate.step import Ledger, Tools, check_range, sift, without
from embedsmith.data.record import Record, text_id

# Measures of a text that treat languages alike, whether they put spaces between words or not.

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


@curation_steps.register("length", formula="query_min <= units(query) <= query_max; likewise for documents")
@dataclass(frozen=True)
class Length:
    """Drop texts that are too short or too long.

    The unit is a word, or one character of a script written without spaces (Chinese, Japanese, Thai): an English
    sentence and its Chinese translation count about alike. `None` sets no limit.
    """

    query_min: int = 2
    query_max: int | None = 512
    document_min: int = 4
    document_max: int | None = None

    def __post_init__(self) -> None:
        for low, high in ((self.query_min, self.query_max), (self.document_min, self.document_max)):
            if low < 0 or (high is not None and high < max(low, 1)):
                raise RecipeError(f"length from {low} to {high}", expected="0 <= lowest <= highest")

    def __call__(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        return sift(records, ledger, self.fault)

    def fault(self, text: str, role: Role) -> str | None:
        low, high = (self.query_min, self.query_max) if role == "query" else (self.document_min, self.document_max)
        count = units(text)
        if count < low:
            return f"shorter than {low} units"
        return f"longer than {high} units" if high is not None and count > high else None


@curation_steps.register("symbols", formula="letters / solid >= min_letters, digits / solid <= max_digits")
@dataclass(frozen=True)
class Symbols:
    """Drop texts made of symbols, digits or one repeated character. Shares are of the characters that are not spaces.

    `max_run` is the share of the longest run of one character, if it has ten or more. Code, formulas and tables have
    few letters too: lower `min_letters` for them.
    """

    min_letters: float = 0.4
    max_digits: float = 0.5
    max_run: float = 0.3

    def __post_init__(self) -> None:
        check_range("min_letters", self.min_letters, 0, 1)
        check_range("max_digits", self.max_digits, 0, 1)
        check_range("max_run", self.max_run, 0, 1)

    def __call__(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        return sift(records, ledger, self.fault)

    def fault(self, text: str, role: Role) -> str | None:
        if digit_share(text) > self.max_digits:
            return "mostly digits"
        if letter_share(text) < self.min_letters:
            return "mostly symbols"
        return "one character repeated" if run_share(text) > self.max_run else None


@curation_steps.register("links", formula="characters in addresses / solid <= max_share")
@dataclass(frozen=True)
class Links:
    """Drop texts that are nothing but web or mail addresses, and those that are mostly such."""

    max_share: float = 0.5

    def __post_init__(self) -> None:
        check_range("max_share", self.max_share, 0, 1)

    def __call__(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        return sift(records, ledger, self.fault)

    def fault(self, text: str, role: Role) -> str | None:
        share = link_share(text)
        if share > 0 and units(without_links(text)) == 0:
            return "nothing but addresses"
        return "mostly addresses" if share > self.max_share else None


PHRASES = (
    "all rights reserved",
    "accept all cookies",
    "we use cookies",
    "this site uses cookies",
    "cookie policy",
    "privacy policy",
    "terms of service",
    "terms and conditions apply",
    "click here to",
    "sign up for our newsletter",
    "subscribe to our newsletter",
    "log in to continue",
    "please enable javascript",
    "javascript is disabled",
    "page not found",
    "lorem ipsum dolor sit amet",
    "share on facebook",
    "follow us on",
    "as an ai language model",
    "版权所有",
    "保留所有权利",
    "未经许可不得转载",
    "未经授权禁止转载",
    "转载请注明",
    "点击查看更多",
    "点击这里",
    "点击阅读原文",
    "扫码关注",
    "关注公众号",
    "关注我们的微信",
    "登录后查看",
    "请先登录",
    "立即注册",
    "免责声明",
    "隐私政策",
    "页面不存在",
    "该内容已被删除",
    "加载中",
    "此用户没有填写评价",
    "系统默认好评",
    "作为一个人工智能语言模型",
)
"""What pages say that no document is about, in English and Chinese."""

_SENTENCE = re.compile(r"[^.!?。！？；\n]+[.!?。！？；\n]*")


@curation_steps.register("boilerplate", formula="characters in boilerplate sentences / all <= max_share")
@dataclass(frozen=True)
class Boilerplate:
    """Drop texts that mostly consist of what every page says (cookies, copyright, 版权所有), or of repeated lines.

    A sentence with one of the phrases counts as boilerplate; a document leaves when such sentences make up more than
    `max_share` of its characters, or repeated lines more than `max_repeated`. `phrases` adds to the list. Queries
    may ask about such things, so only their repeated lines count.
    """

    max_share: float = 0.4
    max_repeated: float = 0.3
    phrases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_range("max_share", self.max_share, 0, 1)
        check_range("max_repeated", self.max_repeated, 0, 1)

    def __call__(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        known = re.compile("|".join(re.escape(phrase) for phrase in (*PHRASES, *self.phrases)), re.IGNORECASE)

        def fault(text: str, role: Role) -> str | None:
            if role == "document" and known.search(text) and _phrase_share(text, known) > self.max_share:
                return "boilerplate"
            return "repeated lines" if _repeated_share(text) > self.max_repeated else None

        return sift(records, ledger, fault)


def _phrase_share(text: str, known: re.Pattern[str]) -> float:
    sentences = [found.group() for found in _SENTENCE.finditer(text)]
    return sum(len(sentence) for sentence in sentences if known.search(sentence)) / max(sum(map(len, sentences)), 1)


def _repeated_share(text: str) -> float:
    """The share of the characters in lines that stood before."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    again = sum(len(line) * (count - 1) for line, count in Counter(lines).items())
    return again / max(sum(map(len, lines)), 1)


@curation_steps.register("trivial", formula="text_id(query) != text_id(positive) != text_id(negative)")
@dataclass(frozen=True)
class Trivial:
    """Drop positives that are the query itself, negatives that are the query or a positive, and texts named twice.

    Records for similarity (`task: sts`) keep equal pairs: their score says what they are worth.
    """

    def __call__(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        for record in records:
            ledger.taken += 1
            kept = record if record.task == "sts" else self._kept(record, ledger)
            if kept is not None:
                yield kept

    def _kept(self, record: Record, ledger: Ledger) -> Record | None:
        seen = {text_id(record.query): "the query itself"} if record.query else {}
        reasons: list[list[str | None]] = []
        for texts, again in ((record.positives, "named twice"), (record.negatives, "also a positive or named twice")):
            ids = [text_id(text) for text in texts]
            reasons.append(
                [
                    seen.get(id_) if seen.get(id_) else again if id_ in ids[:slot] else None
                    for slot, id_ in enumerate(ids)
                ]
            )
            seen |= dict.fromkeys(ids, again) | seen
        return without(record, reasons[0], reasons[1], ledger)
