"""Pairs from the structure of texts: what a title is to its body, a question to its answer, a heading to its section.

Rows of JSONL, CSV or Parquet by the names of their columns; Markdown by markdown-it-py; HTML by selectolax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from embedsmith.core.errors import DataError, MissingExtraError
from embedsmith.data.record import Record

Kind = Literal[
    "title_body",
    "title_abstract",
    "question_answer",
    "instruction_output",
    "prompt_response",
    "heading_section",
    "summary_article",
    "translation",
]


@dataclass(frozen=True)
class Columns:
    """A structure by its columns: the first one present of each group counts. `more` continues the query."""

    kind: Kind
    query: tuple[str, ...]
    document: tuple[str, ...]
    more: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()


_BODY = ("body", "text", "content", "article", "document", "passage", "description", "maintext")

STRUCTURES = (
    Columns("title_abstract", ("title", "headline"), ("abstract",)),
    Columns("title_body", ("title", "headline", "subject"), _BODY),
    Columns(
        "question_answer", ("question", "query"), ("answer", "answers", "best_answer", "response"), ("question_body",)
    ),
    Columns("instruction_output", ("instruction",), ("output", "response", "completion"), ("input",)),
    Columns("prompt_response", ("prompt",), ("response", "completion", "chosen", "output"), (), ("rejected",)),
    Columns("summary_article", ("summary", "highlights", "tldr"), ("article", "document", "text", "body", "content")),
)
"""In a row with several, each gives a pair."""

_TURNS = ("messages", "conversations", "conversation")
_ASKING, _TELLING = ("user", "human", "prompter"), ("assistant", "gpt", "bot", "model", "chatgpt")


def row_pairs(row: Mapping[str, Any], wanted: Sequence[str] | None, source: str) -> Iterator[Record]:
    """The pairs of a row, by the names of its columns (case aside): those of `STRUCTURES`, the turns of a dialogue
    (`messages`, `conversations`: each question with the answer right after it), and translations ({"translation":
    {"en": ..., "zh": ...}}: each language as the other's query)."""
    cells = {str(name).lower(): value for name, value in row.items()}
    for form in STRUCTURES:
        if wanted is None or form.kind in wanted:
            yield from _column_pairs(form, cells, source)
    if wanted is None or "prompt_response" in wanted:
        for name in _TURNS:
            yield from _turn_pairs(cells.get(name), f"{source}/prompt_response")
    if wanted is None or "translation" in wanted:
        yield from _translation_pairs(cells.get("translation"), f"{source}/translation")


def _column_pairs(form: Columns, cells: Mapping[str, Any], source: str) -> Iterator[Record]:
    query, documents = _first(form.query, cells), _first(form.document, cells)
    if query and documents:
        full = "\n".join([query[0], *_first(form.more, cells)])
        yield Record(full, tuple(documents), tuple(_first(form.negative, cells)), source=f"{source}/{form.kind}")


def _first(names: Sequence[str], cells: Mapping[str, Any]) -> list[str]:
    """The texts of the first column that has any. Dialogues as preference data have them count as their last turn."""
    for name in names:
        if found := _texts(cells.get(name)):
            return found
    return []


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    if isinstance(value, Mapping):
        return _texts(value.get("text") or value.get("value") or value.get("content"))
    if isinstance(value, list | tuple):
        if value and all(isinstance(turn, Mapping) and _speaker(turn) for turn in value):
            return _texts(_said(value[-1]))
        return [text for item in value for text in _texts(item)]
    return []


def _turn_pairs(turns: Any, source: str) -> Iterator[Record]:
    if not isinstance(turns, list | tuple):
        return
    known = [turn for turn in turns if isinstance(turn, Mapping)]
    for asked, told in pairwise(known):
        if _speaker(asked) in _ASKING and _speaker(told) in _TELLING:
            query, answer = _texts(_said(asked)), _texts(_said(told))
            if query and answer:
                yield Record("\n".join(query), ("\n".join(answer),), source=source)


def _speaker(turn: Mapping[str, Any]) -> str:
    return str(turn.get("role") or turn.get("from") or turn.get("speaker") or "").lower()


def _said(turn: Mapping[str, Any]) -> Any:
    return turn.get("content") or turn.get("value") or turn.get("text")


def _translation_pairs(value: Any, source: str) -> Iterator[Record]:
    if not isinstance(value, Mapping):
        return
    sides = [(language, text) for language, text in value.items() if isinstance(text, str) and text.strip()]
    for language, text in sides:
        for other, translated in sides:
            if other != language:
                yield Record(text.strip(), (translated.strip(),), source=f"{source}/{language}-{other}")


@dataclass
class Section:
    """A heading, those above it, and the text right under it."""

    path: tuple[str, ...]
    level: int
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n\n".join(part for part in self.parts if part.strip()).strip()


@dataclass
class Page:
    """A document as its structure: title, abstract (a web page's own description), sections, and marked questions."""

    title: str = ""
    abstract: str = ""
    sections: list[Section] = field(default_factory=list)
    questions: list[tuple[str, str]] = field(default_factory=list)

    def heading(self, level: int, text: str) -> None:
        above = [s for s in self.sections if s.level < level]
        path: list[str] = []
        limit = level
        for section in reversed(above):
            if section.level < limit:
                path.insert(0, section.path[-1])
                limit = section.level
        self.sections.append(Section((*path, text), level))

    def text(self, part: str) -> None:
        if part.strip():
            if not self.sections:
                self.sections.append(Section((self.title,), 0))
            self.sections[-1].parts.append(part.strip())


def page_pairs(page: Page, wanted: Sequence[str] | None, source: str) -> Iterator[Record]:
    """Title and whole text; title and description; each heading (after those above it) and its section; a heading that
    is a question and its section, or what the page marks as question and answer."""
    whole = "\n\n".join(section.text for section in page.sections if section.text)
    title = page.title or next((section.path[-1] for section in page.sections if section.path[-1]), "")

    def pairs() -> Iterator[tuple[Kind, str, str]]:
        yield "title_body", title, whole
        yield "title_abstract", title, page.abstract
        for section in page.sections:
            heading = section.path[-1]
            if heading.endswith(("?", "？")):
                yield "question_answer", heading, section.text
            elif heading and heading != title:
                path = section.path if section.path[0] == title or not title else (title, *section.path)
                yield "heading_section", ": ".join(path), section.text
        yield from (("question_answer", question, answer) for question, answer in page.questions)

    for kind, query, document in pairs():
        if query.strip() and document.strip() and (wanted is None or kind in wanted):
            yield Record(query.strip(), (document.strip(),), source=f"{source}/{kind}")


def read_markdown(text: str) -> Page:
    """The structure of a Markdown document (CommonMark and tables). Marks fall away, code stays as it is. The title is
    front matter's `title`, or the first heading of level 1."""
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise MissingExtraError("markdown-it-py", "curate") from error
    page = Page()
    matter, body = _front_matter(text)
    page.title = matter
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    heading = 0
    cells: list[str] | None = None  # of the table's row that is being read
    for token in tokens:
        if token.type == "heading_open":
            heading = int(token.tag[1])
        elif token.type == "inline":
            words = _plain(token.children or [])
            if heading:
                page.title = page.title or (words if heading == 1 else "")
                page.heading(heading, words)
                heading = 0
            elif cells is not None:
                cells.append(words)
            else:
                page.text(words)
        elif token.type == "tr_open":
            cells = []
        elif token.type == "tr_close":
            page.text(" | ".join(cells or ()))
            cells = None
        elif token.type in ("fence", "code_block"):
            page.text(token.content)
    return page


def _front_matter(text: str) -> tuple[str, str]:
    """The title named between `---` lines at the start, and the rest."""
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return "", text
    matter, _, body = text[4:].partition("\n---")
    titles = (line.partition(":")[2].strip().strip("\"'") for line in matter.splitlines() if line.startswith("title:"))
    return next(titles, ""), body.lstrip("-")


def _plain(tokens: Sequence[Any]) -> str:
    """Inline tokens as plain text; an image is its alternative text, a line break inside a paragraph a space."""
    said = {"softbreak": " ", "hardbreak": "\n"}
    return "".join(said.get(t.type, "" if t.type == "html_inline" else t.content) for t in tokens).strip()


_NOISE = "script,style,noscript,template,nav,footer,header,aside,form,button,iframe,svg"
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_LISTS = ("ul", "ol", "li", "dl", "dd", "dt", "table", "tr")
_FRAMES = ("div", "section", "article", "main", "details", "summary", "figure", "figcaption", "caption")
_APART = frozenset(("p", "pre", "blockquote", *_HEADINGS, *_LISTS, *_FRAMES))
"""Elements that begin a new line."""


def read_html(text: str) -> Page:
    """The structure of a web page: title, description, headings and text of its main part. Navigation, footers, forms
    and scripts are left out; <details> and <dl> give questions and answers if the question ends in a question mark."""
    try:
        from selectolax.lexbor import LexborHTMLParser
    except ImportError as error:
        raise MissingExtraError("selectolax", "curate") from error
    tree = LexborHTMLParser(text)
    page = Page()
    if (described := tree.css_first('meta[name="description"]')) is not None:
        page.abstract = str(described.attributes.get("content") or "")
    title = tree.css_first("title")
    first = tree.css_first("h1")
    page.title = _words(first) or _words(title)
    for line_break in tree.css("br"):
        line_break.replace_with("\n")
    for node in tree.css(_NOISE):
        if first is None or not _holds(node, "h1"):
            node.decompose()
    main = tree.css_first("article") or tree.css_first("main") or tree.body
    if main is not None:
        _walk(main, page)
        page.questions = list(_marked_questions(main))
    return page


def _walk(node: Any, page: Page) -> None:
    """Headings and pieces of text in the order of the page. A piece is an element without others that stand apart from
    their surroundings, or a row of a table."""
    for child in node.iter(include_text=True):
        if child.tag in _HEADINGS:
            if words := _words(child):
                page.heading(int(child.tag[1]), words)
        elif child.tag == "tr":
            page.text(" | ".join(_words(cell) for cell in child.css("td,th")))
        elif child.tag == "-text" or not any(inner.tag in _APART for inner in child.traverse() if inner != child):
            page.text(_words(child))
        else:
            _walk(child, page)


def _holds(node: Any, selector: str) -> bool:
    return node.css_first(selector) is not None


def _words(node: Any) -> str:
    return "" if node is None else " ".join(node.text().split())


def _marked_questions(main: Any) -> Iterator[tuple[str, str]]:
    for details in main.css("details"):
        question = _words(details.css_first("summary"))
        if question.endswith(("?", "？")):
            yield question, _words(details).removeprefix(question).strip()
    for term in main.css("dt"):
        answer = term.next
        while answer is not None and answer.tag not in ("dd", "dt"):
            answer = answer.next
        if answer is not None and answer.tag == "dd" and _words(term).endswith(("?", "？")):
            yield _words(term), _words(answer)


READERS: dict[str, Callable[[str], Page]] = {
    ".md": read_markdown,
    ".markdown": read_markdown,
    ".html": read_html,
    ".htm": read_html,
}


def read_page(path: Path) -> Page:
    """Errors: `DataError` for a file that is not UTF-8 or cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 ({error.reason})", where=path, fix="save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"cannot read the file ({error.strerror})", where=path, fix="check its permissions") from error
    return READERS[path.suffix.lower()](text)
