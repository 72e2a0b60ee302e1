"""Queries made by a language model: for passages, for long articles, and in other languages."""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

from embedsmith.core.errors import RecipeError
from embedsmith.core.seeds import derive_seed
from embedsmith.core.settings import Count, Positive
from embedsmith.core.shelf import curation_steps, generators
from embedsmith.curate.ask import Asked, ask_all, lines_of
from embedsmith.curate.dedup import DistinctPositives, OnePositiveEach
from embedsmith.curate.keeper import Answer, Refusal
from embedsmith.curate.ledger import Chain, Ledger, Step, Tools
from embedsmith.curate.rules import SCRIPT_OF, main_script, units
from embedsmith.data.record import Record, text_id

LONGEST_QUERY = 100  # units; longer lines of an answer are no query

_QUERIES = {
    "en": "Below is a passage. Write {count} different questions that a person who has not seen the passage could "
    "type into a search engine and that the passage answers. Each question must be understood on its own: name the "
    "things it is about, do not mention the passage. Write in the language of the passage, one question a line, and "
    "nothing else.\n\nPassage:\n{text}",
    "zh": "下面有一段文字。请写出{count}个不同的问题：没有看过这段文字的人可能会在搜索引擎里输入这些问题，"
    "并且这段文字能够回答它们。每个问题必须能单独看懂：写明所问的对象，不要提到“这段文字”。每行写一个问题，不要写其他内容。\n\n文字：\n{text}",
}
_LONG = {
    "en": "Below is a paragraph of a long article. Ask one specific question that this paragraph answers. Use no "
    "pronouns and do not mention the paragraph or the article: the question must be clear to somebody who has read "
    "neither. Write in the language of the paragraph. Write only the question.\n\nParagraph:\n{text}",
    "zh": "下面是一篇长文章中的一个段落。请针对这个段落提出一个具体的、能由该段落回答的问题。不要使用代词，"
    "也不要提到“段落”或“文章”：没有读过它们的人也应当看懂这个问题。只写这个问题，不要写其他内容。\n\n段落：\n{text}",
}
_TRANSLATE = {
    "en": "Translate this search query into {language}. Keep names and technical terms as people who write {language} "
    "would write them. Write only the translation, on one line.\n\nQuery: {text}"
}


def _prompt(templates: dict[str, str], own: str | None, about: str, **values: object) -> str:
    """A user's own template, or ours in the language of the text it is about, filled in. Like str.format, but braces of
    anything else, the text's own too, are left alone."""
    template = own or templates.get("zh" if main_script(about) == "han" else "en", templates["en"])
    filled = {"text": about} | values
    return re.sub(r"\{(\w+)\}", lambda found: str(filled.get(found[1], found[0])), template)


def _check_prompt(prompt: str | None) -> None:
    if prompt is not None and "{text}" not in prompt:
        raise RecipeError("the prompt has no place for the text", expected="a prompt with {text} in it")


def _queries_in(answer: str) -> list[str]:
    return [line for line in lines_of(answer) if 2 <= units(line) <= LONGEST_QUERY]


def _has_query(answer: str) -> bool:
    return bool(_queries_in(answer))


def _queries_of(answer: Answer | Refusal, record: Record, ledger: Ledger) -> list[str]:
    """None where the answer holds none; the ledger says why."""
    if isinstance(answer, Refusal):
        ledger.record_left(answer.reason, record)
        return []
    if not answer.usable:
        ledger.record_left("no usable answer", record, answer.text[:200])
        return []
    return _queries_in(answer.text)


@curation_steps.register(
    "synthetic_queries",
    formula="LLM(passage) -> `count` queries, each with the passage as its positive",
    source="GPL (arXiv 2112.07577) and others; prompts are ours",
)
@dataclass(frozen=True)
class SyntheticQueries(Chain):
    """Let a language model write queries for passages.

    Every distinct positive of the records is a passage (documents read with `input.kind: documents` have one each).

    `generator`: the language model that is asked.
    `count`: queries written for a passage.
    `prompt`: what it is asked, with {text} and perhaps {count} in it; `None` is one in English and one for Chinese.
    `max_characters`: so much of a passage is shown.
    `keep_originals`: the new records come beside the old ones instead of replacing them.
    """

    generator: Annotated[Any, generators]
    count: Count = 1
    prompt: str | None = None
    max_characters: Count = 6000
    keep_originals: bool = False

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)

    def passes(self) -> tuple[Step, ...]:
        return OnePositiveEach(), DistinctPositives(what="passage"), Asked(self)

    def asked(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        def prompts() -> Iterator[tuple[Record, str]]:
            for record in records:
                text = record.positives[0]
                shown = text[: self.max_characters]
                yield record, _prompt(_QUERIES, self.prompt, text, text=shown, count=self.count)

        for record, answer in ask_all(self.generator, prompts(), _has_query, tools):
            if self.keep_originals and record.query:
                yield record
            for query in _queries_of(answer, record, ledger)[: self.count]:
                yield Record(query, record.positives, task="retrieval", source=record.source)


@curation_steps.register(
    "long_documents",
    formula="LLM(a sampled paragraph) -> query, whose positive is the whole article",
    source="M3-Embedding (arXiv 2402.03216), MultiLongDoc: one specific question without pronouns about a sampled "
    "passage; the prompt's words and the paragraph's bounds are reconstructed",
)
@dataclass(frozen=True)
class LongDocuments(Chain):
    """Sample a paragraph of a long article, let a language model ask about it, pair the question with the article.

    M3's articles have about 4,700 tokens.

    `generator`: the language model that is asked.
    `per_article`: different paragraphs drawn of an article.
    `article_min`: articles of fewer units leave.
    `paragraph_min`: units that a paragraph has at least.
    `paragraph_max`: units that a paragraph has at most; longer ones are cut between sentences.
    `prompt`: what it is asked, with {text} in it; `None` is one in English and one for Chinese.
    `seed`: of the draws, with the article's text.
    """

    generator: Annotated[Any, generators]
    per_article: Count = 1
    article_min: int = 1000
    paragraph_min: Count = 40
    paragraph_max: Count = 400
    prompt: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        if self.paragraph_min > self.paragraph_max:
            raise RecipeError("long_documents needs paragraph_min <= paragraph_max")

    def passes(self) -> tuple[Step, ...]:
        return OnePositiveEach(), DistinctPositives(what="article"), Asked(self)

    def asked(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        for record, answer in ask_all(self.generator, self._prompts(records, ledger), _has_query, tools):
            for query in _queries_of(answer, record, ledger)[:1]:
                yield Record(query, record.positives, task="retrieval", source=record.source)

    def _prompts(self, records: Iterable[Record], ledger: Ledger) -> Iterator[tuple[Record, str]]:
        for record in records:
            article = record.positives[0]
            if units(article) < self.article_min:
                ledger.record_left(f"article shorter than {self.article_min} units", record)
                continue
            fitting = [part for part in paragraphs(article, self.paragraph_max) if units(part) >= self.paragraph_min]
            if not fitting:
                ledger.record_left("no paragraph of a fitting length", record)
            chance = random.Random(derive_seed(self.seed, text_id(article)))
            for part in chance.sample(fitting, min(self.per_article, len(fitting))):
                yield record, _prompt(_LONG, self.prompt, part)


_SENTENCES = re.compile(r".+?(?:[。！？；]+|[.!?]+(?=\s)|$)", re.DOTALL)


def paragraphs(article: str, most: int) -> list[str]:
    """An article's lines, those over `most` units cut between sentences."""
    found: list[str] = []
    for line in (line.strip() for line in article.splitlines()):
        if units(line) <= most:
            found += [line] if line else []
            continue
        part = ""
        for sentence in _SENTENCES.findall(line):
            if part and units(part) + units(sentence) > most:
                found.append(part.strip())
                part = ""
            part += sentence
        found += [part.strip()] if part.strip() else []
    return [part for part in found if units(part) <= most]


@curation_steps.register(
    "translate_queries",
    formula="LLM(query, language) -> query', with the same documents",
    source="Conan-embedding-v2 (arXiv 2509.12892), cross-lingual retrieval data; the prompt is ours",
)
@dataclass(frozen=True)
class TranslateQueries(Chain):
    """Cross-lingual retrieval data: translate the query, leave the documents.

    Each record gets one language, drawn by its query. An answer in another script than the language's, where that is
    known, does not count.

    `generator`: the language model that is asked.
    `languages`: what to translate into, name in English or code, with its share (shares need not add up to 1).
    `prompt`: what it is asked, with {text} and perhaps {language} in it; `None` is our own.
    `keep_originals`: the record itself comes too.
    `seed`: of the draws of languages.
    """

    generator: Annotated[Any, generators]
    languages: dict[str, Positive]
    prompt: str | None = None
    keep_originals: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        if not self.languages:
            raise RecipeError("translate_queries needs languages", expected="names and shares, as {German: 2, zh: 1}")

    def passes(self) -> tuple[Step, ...]:
        return (Asked(self),)

    def asked(self, records: Iterable[Record], ledger: Ledger, tools: Tools) -> Iterator[Record]:
        made: Counter[str] = Counter()
        prompts = self._prompts(records, ledger)
        for (record, language), answer in ask_all(self.generator, prompts, _has_query, tools):
            if self.keep_originals:
                yield record
            found = [] if isinstance(answer, Refusal) else _queries_in(answer.text)[:1]
            script = SCRIPT_OF.get(_CODES.get(language, language))
            if isinstance(answer, Refusal):
                ledger.text_lost(f"translation: {answer.reason}", record, record.query)
            elif not found:
                ledger.text_lost("translation: no usable answer", record, answer.text)
            elif script is not None and main_script(found[0]) != script:
                ledger.text_lost(f"translation: not in {language}", record, found[0])
            elif text_id(found[0]) == text_id(record.query):
                ledger.text_lost("translation: the query itself", record, found[0])
            else:
                made[language] += 1
                yield replace(record, query=found[0])
        ledger.notes["translated"] = dict(made)

    def _prompts(self, records: Iterable[Record], ledger: Ledger) -> Iterator[tuple[tuple[Record, str], str]]:
        names, shares = list(self.languages), list(self.languages.values())
        for record in records:
            ledger.taken += 1
            language = random.Random(derive_seed(self.seed, text_id(record.query))).choices(names, shares)[0]
            full = _NAMES.get(language, language)
            yield (record, language), _prompt(_TRANSLATE, self.prompt, record.query, language=full)


_NAMES = {
    "en": "English", "zh": "Chinese", "es": "Spanish", "fr": "French", "ja": "Japanese", "de": "German",
    "ru": "Russian", "it": "Italian", "pt": "Portuguese", "ar": "Arabic", "ko": "Korean", "bn": "Bengali",
    "da": "Danish", "sv": "Swedish", "th": "Thai", "ms": "Malay", "tr": "Turkish", "vi": "Vietnamese",
    "nl": "Dutch", "pl": "Polish", "hi": "Hindi", "km": "Khmer", "fi": "Finnish", "he": "Hebrew",
    "hu": "Hungarian", "no": "Norwegian",
}  # fmt: skip
"""The languages of Conan-embedding-v2's cross-lingual data."""
_CODES = {name: code for code, name in _NAMES.items()}
