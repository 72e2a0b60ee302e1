"""Which language a text is in: by its script where that decides, by a small model (py3langid) where it does not."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

from embedsmith.core.encoder import Role
from embedsmith.core.errors import MissingExtraError, RecipeError
from embedsmith.core.settings import Share
from embedsmith.core.shelf import curation_steps
from embedsmith.curate.rules import scripts, without_links
from embedsmith.curate.step import TextRule

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


@dataclass(frozen=True)
class Guess:
    """A text's main script (`none` without letters), its language if that can be told, and how sure that is."""

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
    ranked = _model().rank(without_links(text[: 2 * _ENOUGH])[:_ENOUGH])
    language, confidence = next(pair for pair in ranked if pair[0] not in _OVERRATED or pair[0] in wanted)
    return Guess(script, str(language), float(confidence))


def main_script(text: str) -> str | None:
    """The script with most words; `han` and `kana` as one, which is `kana` where a tenth of it is."""
    counts = scripts(text)
    if not counts:
        return None
    others = {name: count for name, count in counts.items() if name not in ("han", "kana")}
    east = counts["han"] + counts["kana"]
    if east and east >= max(others.values(), default=0):
        return "kana" if counts["kana"] > 0.1 * east else "han"
    return max(others, key=lambda name: others[name])


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
    """Keep texts in the named languages.

    A text whose script has one language is judged by that, however short. Others are judged by the model; what it
    cannot tell stays where one of the kept languages uses its script, and leaves where none does. A text without
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
