"""Rules that look at one text at a time, and the measures they use, which treat languages alike whether they put
spaces between words or not. A language is recognised by its script where that decides, by a small model (py3langid)
where it does not. Thresholds are ours; the kinds of rules are those every web corpus uses.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any

from pydantic import Field

from embedsmith.core.encoder import Role
from embedsmith.core.errors import MissingExtraError, RecipeError
from embedsmith.core.settings import Count, Share
from embedsmith.core.shelf import curation_steps
from embedsmith.core.words import composed, letters, runs, words
from embedsmith.curate.ledger import Ledger, PerRecord, TextRule, Tools
from embedsmith.data.record import Record, text_id

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


_BY_SCRIPT = {
    "han": "zh",
    "kana": "ja",
    "hangul": "ko",
    "greek": "el",
    "hebrew": "he",
    "bengali": "bn",
    "tamil": "ta",
    "telugu": "te",
    "thai": "th",
}
"""Scripts that (nearly) one language of the web uses."""

SCRIPT_OF = {language: script for script, language in _BY_SCRIPT.items()}
SCRIPT_OF |= dict.fromkeys(("ru", "uk", "bg", "be", "sr", "mk", "kk", "ky", "mn"), "cyrillic")
SCRIPT_OF |= dict.fromkeys(("ar", "fa", "ur", "ps", "ug"), "arabic") | dict.fromkeys(("hi", "mr", "ne"), "devanagari")
"""The scripts of languages by their codes; those that are not here are written in Latin like most, or not known."""
_ENOUGH = 300
"""Characters the model reads: more change little and cost time."""
_OVERRATED = ("pcm", "la")
"""Nigerian Pidgin and Latin: what the model calls so is mostly technical English; they count only where asked for."""


def units(text: str) -> int:
    """The length of a text: words, and each character of a script that is written without spaces. An English sentence
    and its Chinese translation have about as many."""
    return sum(len(letters(run)) if unspaced else 1 for run, unspaced in runs(composed(text)))


def token_shingles(text: str, length: int) -> set[str]:
    """Overlapping runs of `length` characters of the words joined by spaces: about a word of English; two or three
    characters of Chinese, each of which is a token."""
    joined = " ".join(words(text))
    return {joined[start : start + length] for start in range(max(len(joined) - length + 1, 1))} if joined else set()


def main_script(text: str) -> str | None:
    """The script with most words (or characters, where words are not separated); `han` and `kana` as one, which is
    `kana` where a tenth of it is."""
    counts = Counter(found.lastgroup or "" for found in _SCRIPT.finditer(text))
    if not counts:
        return None
    others = {name: count for name, count in counts.items() if name not in ("han", "kana")}
    east = counts["han"] + counts["kana"]
    if east and east >= max(others.values(), default=0):
        return "kana" if counts["kana"] > 0.1 * east else "han"
    return max(others, key=lambda name: others[name])


@curation_steps.register("length", formula="query_min <= units(query) <= query_max; likewise for documents")
@dataclass(frozen=True)
class Length(TextRule):
    """Drop texts that are too short or too long.

    The unit is a word, or one character of a script written without spaces (Chinese, Japanese, Thai): an English
    sentence and its Chinese translation count about alike.

    `query_min`, `document_min`: units that a text has at least.
    `query_max`, `document_max`: units that a text has at most; `None` sets no limit.
    """

    query_min: Annotated[int, Field(ge=0)] = 2
    query_max: Count | None = 512
    document_min: Annotated[int, Field(ge=0)] = 4
    document_max: Count | None = None

    def __post_init__(self) -> None:
        for low, high in ((self.query_min, self.query_max), (self.document_min, self.document_max)):
            if high is not None and high < low:
                raise RecipeError(f"length from {low} to {high}", expected="0 <= lowest <= highest")

    def fault(self, text: str, role: Role) -> str | None:
        low, high = (self.query_min, self.query_max) if role == "query" else (self.document_min, self.document_max)
        count = units(text)
        if count < low:
            return f"shorter than {low} units"
        return f"longer than {high} units" if high is not None and count > high else None


@curation_steps.register("symbols", formula="letters / solid >= min_letters, digits / solid <= max_digits")
@dataclass(frozen=True)
class Symbols(TextRule):
    """Drop texts made of symbols, digits or one repeated character. Shares are of the characters that are not spaces.

    `min_letters`: the share of letters; code, formulas and tables have few letters too: lower it for them.
    `max_digits`: the share of digits.
    `max_run`: the share of the longest run of one character, if it has ten or more.
    """

    min_letters: Share = 0.4
    max_digits: Share = 0.5
    max_run: Share = 0.3

    def fault(self, text: str, role: Role) -> str | None:
        solid = "".join(text.split())
        if not solid:
            return "mostly symbols" if self.min_letters > 0 else None
        if sum(character.isdigit() for character in solid) / len(solid) > self.max_digits:
            return "mostly digits"
        if sum(unicodedata.category(character)[0] in "LM" for character in solid) / len(solid) < self.min_letters:
            return "mostly symbols"
        longest = max((found.end() - found.start() for found in _RUN.finditer(solid)), default=0)
        return "one character repeated" if longest / len(solid) > self.max_run else None


@curation_steps.register("links", formula="characters in addresses / solid <= max_share")
@dataclass(frozen=True)
class Links(TextRule):
    """Drop texts that are nothing but web or mail addresses, and those that are mostly such.

    `max_share`: the share of a text's characters, spaces not counted, that may belong to addresses.
    """

    max_share: Share = 0.5

    def fault(self, text: str, role: Role) -> str | None:
        linked = sum(len(found.group()) for found in _LINK.finditer(text))
        if not linked:
            return None
        if units(_LINK.sub(" ", text)) == 0:
            return "nothing but addresses"
        return "mostly addresses" if linked / len("".join(text.split())) > self.max_share else None


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
class Boilerplate(TextRule):
    """Drop texts that mostly consist of what every page says (cookies, copyright, 版权所有), or of repeated lines.

    A sentence with one of the phrases counts as boilerplate. Queries may ask about such things, so only their repeated
    lines count.

    `max_share`: the share of a document's characters that may be in such sentences.
    `max_repeated`: the share of a text's characters that may be in lines that stood before.
    `phrases`: more of what every page says, beside the list in `curate/rules.py`.
    """

    max_share: Share = 0.4
    max_repeated: Share = 0.3
    phrases: tuple[str, ...] = ()

    @cached_property
    def _known(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(phrase) for phrase in (*PHRASES, *self.phrases)), re.IGNORECASE)

    def fault(self, text: str, role: Role) -> str | None:
        if role == "document" and self._known.search(text):
            sentences = [found.group() for found in _SENTENCE.finditer(text)]
            common = sum(len(sentence) for sentence in sentences if self._known.search(sentence))
            if common / max(sum(map(len, sentences)), 1) > self.max_share:
                return "boilerplate"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        again = sum(len(line) * (count - 1) for line, count in Counter(lines).items())
        return "repeated lines" if again / max(sum(map(len, lines)), 1) > self.max_repeated else None


@dataclass(frozen=True)
class Guess:
    """A text's main script (`none` without letters), its language if it can be recognised, and how sure that is."""

    script: str
    language: str | None
    confidence: float = 1.0


def guess_language(text: str, min_letters: int = 20, wanted: Collection[str] = ()) -> Guess:
    """The script with most words decides where it has one language; else the model reads the text, if it has at least
    `min_letters` letters: guesses about shorter texts are worth little. Chinese with kana is Japanese. Nigerian Pidgin
    and Latin are found only if `wanted`.

    Errors: `MissingExtraError` without the package py3langid.
    """
    script = main_script(text)
    if script is None:
        return Guess("none", None)
    if script in _BY_SCRIPT:
        return Guess(script, _BY_SCRIPT[script])
    if sum(character.isalpha() for character in text) < min_letters:
        return Guess(script, None)
    ranked = _model().rank(_LINK.sub(" ", text[: 2 * _ENOUGH])[:_ENOUGH])
    language, confidence = next(pair for pair in ranked if pair[0] not in _OVERRATED or pair[0] in wanted)
    return Guess(script, str(language), float(confidence))


@cache
def _model() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise MissingExtraError("py3langid", "curate") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@curation_steps.register("language", formula="language(text) in keep")
@dataclass(frozen=True)
class Language(TextRule):
    """Keep texts in the named languages (ISO 639-1 codes).

    A text whose script has one language is judged by that, however short. Others are judged by the model; what it
    cannot decide stays where one of the kept languages uses its script, and leaves where none does. A text without
    letters has no language and stays.

    `keep`: the languages (ISO 639-1 codes).
    `min_letters`: the model judges texts of at least so many letters.
    `min_confidence`: how sure the model must be of a language for a text to leave.
    """

    keep: tuple[str, ...] = ("en", "zh")
    min_letters: int = 20
    min_confidence: Share = 0.7

    def __post_init__(self) -> None:
        wrong = [code for code in self.keep if not (len(code) in (2, 3) and code.isalpha() and code.islower())]
        if wrong or not self.keep:
            raise RecipeError(f"keep is {list(self.keep)}", expected="language codes such as [en, zh]")

    def fault(self, text: str, role: Role) -> str | None:
        guess = guess_language(text, self.min_letters, self.keep)
        if guess.script == "none" or guess.language in self.keep:
            return None
        if guess.language is not None and guess.confidence >= self.min_confidence:
            return f"language {guess.language}"
        known = {SCRIPT_OF.get(code, "latin") for code in self.keep}
        return None if guess.script in known else f"script {guess.script}"


@curation_steps.register("trivial", formula="text_id(query) != text_id(positive) != text_id(negative)")
@dataclass(frozen=True)
class Trivial(PerRecord):
    """Drop positives that are the query itself, negatives that are the query or a positive, and texts named twice.

    Records for similarity (`task: sts`) keep equal pairs: their score says what they are worth.
    """

    def over(self, records: Iterable[Record], ledger: Ledger, tools: Tools, known: None) -> Iterator[Record]:
        for record in records:
            ledger.taken += 1
            if record.task == "sts":
                yield record
                continue
            seen = {text_id(record.query): "the query itself"} if record.query else {}
            reasons: list[list[str | None]] = []
            repeats = ("named twice", "also a positive or named twice")
            for texts, again in zip((record.positives, record.negatives), repeats):
                ids = [text_id(text) for text in texts]
                reasons.append([seen.get(one, again if one in ids[:slot] else None) for slot, one in enumerate(ids)])
                seen = dict.fromkeys(ids, again) | seen
            if (left := ledger.without(record, reasons[0], reasons[1])) is not None:
                yield left
