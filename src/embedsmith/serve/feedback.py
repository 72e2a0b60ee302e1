"""What people thought of hits, as training records: one row a question, `{"query", "pos", "neg"}`, which `embedsmith
train` reads as it is."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedsmith.core.errors import DataError
from embedsmith.core.files import atomic_file
from embedsmith.core.inputs import read_text
from embedsmith.core.outputs import check_claim, claimed, refuse_foreign_file

LARGEST = 2**26
"""Bytes of a file, which is written anew with every mark: beyond that a server would be busy with it alone."""

Row = dict[str, Any]


class FeedbackFile:
    """A file of records. What stands in it stays: a new mark changes the record of its question, or adds one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def check(self) -> None:
        """Errors: those of `mark`, before there is one."""
        check_claim(self.path, "serve")
        refuse_foreign_file(self.path, True)
        self._read()

    def mark(self, query: str, vote_of: Mapping[str, int]) -> tuple[bool, int]:
        """Take marks of one question: 1 for a text that answers it, -1 for one that does not, 0 to take a mark back.
        The last mark of a text counts. Gives whether the question has a record now (it needs an answer), and the
        number of records.

        Errors: `DataError` where the file holds something else or is full; `CheckpointError` where it cannot be
        written, or another process is at it.
        """
        with self._lock, claimed(self.path, "serve"):
            rows = self._read()
            place = next((place for place, row in enumerate(rows) if row["query"] == query), len(rows))
            before = rows[place] if place < len(rows) else {"query": query, "pos": [], "neg": []}
            kept = {side: [text for text in before[side] if text not in vote_of] for side in ("pos", "neg")}
            kept["pos"] += [text for text, vote in vote_of.items() if vote > 0]
            kept["neg"] += [text for text, vote in vote_of.items() if vote < 0]
            after = {**before, **kept}
            rows[place : place + 1] = [after] if after["pos"] else []
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            if sum(len(line.encode()) for line in lines) > LARGEST:
                fix = "move it away; the next mark begins a new one"
                raise DataError(f"the file is full ({LARGEST >> 20} MiB)", where=self.path, fix=fix)
            with atomic_file(self.path) as file:
                file.writelines(lines)
            return bool(after["pos"]), len(rows)

    def _read(self) -> list[Row]:
        """Errors: `DataError` for a row that is no record: what others wrote is not replaced."""
        if not self.path.exists():
            return []
        rows = []
        lines = read_text(self.path, most=LARGEST).split("\n")  # a text may hold other line breaks of Unicode
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_record(line, f"{self.path} line {number}"))
        return rows


def _record(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    texts = [row.get("pos"), row.get("neg", [])] if isinstance(row, dict) and isinstance(row.get("query"), str) else [0]
    if not all(isinstance(each, list) and all(isinstance(text, str) for text in each) for each in texts):
        expected = '{"query": text, "pos": [texts], "neg": [texts]}'
        raise DataError("no record of marks", where=where, expected=expected, fix="start the server with another file")
    row.setdefault("neg", [])
    return dict(row)
