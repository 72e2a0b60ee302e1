"""The code blocks of a documentation page, in order, and what is to be done with each.

A block is fenced, with its language and, for a file that the reader writes, its name as mkdocs shows it:

    ```json title="pairs.jsonl"

A block that cannot be run has the reason in a comment before its fence, which no reader of the page sees:

    <!-- not run: asks a hub -->
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)
_REASON = re.compile(r"<!-- not run: ((?:(?!-->).)+) -->\n+\Z", re.S)
_ANY_FENCE = re.compile(r"^ *```.*$", re.M)


@dataclass(frozen=True)
class Block:
    """`language`: of the fence. `file`: the name it is written under. `reason`: why it is not run, if it is not."""

    page: str
    line: int
    language: str
    file: str
    text: str
    reason: str

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block, those that go on after a backslash joined, without comments and empty ones."""
        joined = self.text.replace("\\\n", " ")
        return [line.strip() for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]

    @property
    def bare(self) -> str:
        """The text without comments: what two languages of one page have in common."""
        lines = (re.sub(r"(^|\s+)# .*$", "", line).rstrip() for line in self.text.splitlines())
        return "\n".join(line for line in lines if line)


def blocks_of(page: str) -> list[Block]:
    """All blocks of a page, given by its path in the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        reason = _REASON.search(text[: fence.start()])
        line = text.count("\n", 0, fence.start()) + 1
        language, file, body = fence.groups()
        found.append(Block(page, line, language, file or "", body, reason[1] if reason else ""))
    return found


def unread(page: str) -> list[str]:
    """Lines that look like code and belong to no block: fences of another form, and indented code."""
    text = (ROOT / page).read_text(encoding="utf-8")
    rest = _FENCE.sub("", text)
    indented = re.findall(r"(?<=\n\n)(?: {4}|\t)\S.*$", rest, re.M)
    return _ANY_FENCE.findall(rest) + indented
