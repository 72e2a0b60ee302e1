"""Pairs from the structure of texts: what a title is to its body, a question to its answer, a heading to its section.

Rows of JSONL, CSV or Parquet by the names of their columns; Markdown by markdown-it-py; HTML by selectolax.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any, Literal

from embedsmith.core.errors import MissingExtraError
from embedsmith.data.formats.file_kinds import text_lines
from embedsmith.data.record import Record, RowError

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
class Form:
    """A structure by its columns: the first one present of each group counts. `more` continues the query."""

    kind: Kind
    query: tuple[str, ...]
    document: tuple[str, ...]
    more: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()


_BODY = ("body", "text", "content", "article", "document", "passage", "description", "maintext")

STRUCTURES = (
    Form("title_abstract", ("title", "headline"), ("abstract",)),
    Form("title_body", ("title", "headline", "subject"), _BODY),
    Form(
        "question_answer", ("question", "query"), ("answer", "answers", "best_answer", "response"), ("question_body",)
    ),
    Form("instruction_output", ("instruction",), ("output", "response", "completion"), ("input",)),
    Form("prompt_response", ("prompt",), ("response", "completion", "chosen", "output"), (), ("rejected",)),
    Form("summary_article", ("summary", "highlights", "tldr"), ("article", "document", "text", "body", "content")),
)
"""In a row with several, each gives a pair."""

_TURNS = ("messages", "conversations", "conversation")
_ASKING, _ANSWERING = ("user", "human", "prompter"), ("assistant", "gpt", "bot", "model", "chatgpt")


def row_pairs(row: Mapping[str, Any], wanted: Sequence[str] | None, source: str) -> Iterator[Record]:
    """The pairs of a row, by the names of its columns (case aside): those of `STRUCTURES`, the turns of a dialogue
    (`messages`, `conversations`: each question with the answer right after it), and translations ({"translation":
    {"en": ..., "zh": ...}}: each language as the other's query)."""
    cells = {str(name).lower(): value for name, value in row.items()}
    for form in STRUCTURES:
        query, documents = _first(form.query, cells), _first(form.document, cells)
        if query and documents and (wanted is None or form.kind in wanted):
            full = "\n".join([query[0], *_first(form.more, cells)])
            yield Record(full, tuple(documents), tuple(_first(form.negative, cells)), source=f"{source}/{form.kind}")
    if wanted is None or "prompt_response" in wanted:
        for turns in (cells[name] for name in _TURNS if isinstance(cells.get(name), list | tuple)):
            for first, second in pairwise(turn for turn in turns if isinstance(turn, Mapping)):
                if _speaker(first) in _ASKING and _speaker(second) in _ANSWERING:
                    asked, answer = _content(first), _content(second)
                    if asked and answer:
                        yield Record("\n".join(asked), ("\n".join(answer),), source=f"{source}/prompt_response")
    translations = cells.get("translation")
    if isinstance(translations, Mapping) and (wanted is None or "translation" in wanted):
        sides = [(language, text.strip()) for language, text in translations.items() if isinstance(text, str)]
        for (language, text), (other, translated) in permutations([side for side in sides if side[1]], 2):
            yield Record(text, (translated,), source=f"{source}/translation/{language}-{other}")


def _first(names: Sequence[str], cells: Mapping[str, Any]) -> list[str]:
    """The texts of the first column that has any. Dialogues as preference data have them count as their last turn."""
    return next((found for name in names if (found := _texts(cells.get(name)))), [])


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    if isinstance(value, Mapping):
        return _texts(value.get("text") or value.get("value") or value.get("content"))
    if isinstance(value, list | tuple):
        if value and all(isinstance(turn, Mapping) and _speaker(turn) for turn in value):
            return _content(value[-1])
        return [text for item in value for text in _texts(item)]
    return []


def _speaker(turn: Mapping[str, Any]) -> str:
    return str(turn.get("role") or turn.get("from") or turn.get("speaker") or "").lower()


def _content(turn: Mapping[str, Any]) -> list[str]:
    return _texts(turn.get("content") or turn.get("value") or turn.get("text"))


@dataclass
class PageSection:
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
    sections: list[PageSection] = field(default_factory=list)
    questions: list[tuple[str, str]] = field(default_factory=list)

    def heading(self, level: int, text: str) -> None:
        path: list[str] = []
        limit = level
        for section in reversed(self.sections):
            if section.level < limit:
                path.insert(0, section.path[-1])
                limit = section.level
        self.sections.append(PageSection((*path, text), level))

    def text(self, part: str) -> None:
        if part.strip():
            if not self.sections:
                self.sections.append(PageSection((self.title,), 0))
            self.sections[-1].parts.append(part.strip())

    def pairs(self, wanted: Sequence[str] | None, source: str) -> Iterator[Record]:
        """Title and whole text; title and description; each heading (after those above it) and its section; a heading
        that is a question and its section, or what the page marks as question and answer."""
        whole = "\n\n".join(section.text for section in self.sections if section.text)
        title = self.title or next((section.path[-1] for section in self.sections if section.path[-1]), "")
        pairs: list[tuple[Kind, str, str]] = [("title_body", title, whole), ("title_abstract", title, self.abstract)]
        for section in self.sections:
            heading = section.path[-1]
            if heading.endswith(("?", "？")):
                pairs.append(("question_answer", heading, section.text))
            elif heading and heading != title:
                path = section.path if section.path[0] == title or not title else (title, *section.path)
                pairs.append(("heading_section", ": ".join(path), section.text))
        pairs += [("question_answer", question, answer) for question, answer in self.questions]
        for kind, query, document in pairs:
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
    if text.startswith("---\n") and "\n---" in text[4:]:
        matter, _, text = text[4:].partition("\n---")
        titles = [line.partition(":")[2] for line in matter.splitlines() if line.startswith("title:")]
        page.title, text = "".join(titles[:1]).strip().strip("\"'"), text.lstrip("-")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    breaks = {"softbreak": " ", "hardbreak": "\n"}  # an image is its alternative text
    heading = 0
    cells: list[str] | None = None  # of the table's row that is being read
    for token in tokens:
        if token.type == "heading_open":
            heading = int(token.tag[1])
        elif token.type == "inline":
            inline = (breaks.get(t.type, "" if t.type == "html_inline" else t.content) for t in token.children or ())
            words = "".join(inline).strip()
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
    first = tree.css_first("h1")
    page.title = _words(first) or _words(tree.css_first("title"))
    for line_break in tree.css("br"):
        line_break.replace_with("\n")
    for node in tree.css(_NOISE):
        if first is None or node.css_first("h1") is None:
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
    lines: list[str] = []
    for number, line in text_lines(path):
        if isinstance(line, RowError):
            raise line.at(f"{path}:{number}")
        lines.append(line)
    return READERS[path.suffix.lower()]("\n".join(lines))
