"""What training changed, task by task and text by text: what got better, what got worse, and which items moved most."""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from embedsmith.core.errors import EmbedsmithError
from embedsmith.evaluate.compare import Comparison
from embedsmith.evaluate.result import TaskResult
from embedsmith.evaluate.tasks.kinds import Task, load_task
from embedsmith.evaluate.tasks.pairs import STSTask
from embedsmith.evaluate.tasks.ranking import RankingTask
from embedsmith.report.page import Section, table

_MOST = 3
_LEAST = 0.01  # a change of an item's value that is worth a row
_LENGTH = 140
_LARGEST = 2**26  # bytes of a task's files; above, only the texts that the results hold are shown

Texts = Mapping[str, Mapping[str, str]]


def readable_tasks(tasks: Sequence[str]) -> Iterator[Task]:
    """Those given as paths whose files are still there."""
    for given in tasks:
        path = Path(given)
        with suppress(EmbedsmithError, OSError):  # a task that cannot be read any more is shown by its ids
            files = [path, *path.rglob("*")] if path.exists() else []
            if files and sum(file.stat().st_size for file in files) <= _LARGEST:
                yield load_task(path)


def items_texts(tasks: Sequence[str]) -> Texts:
    """By task and item the text that an item is known by, of tasks given as paths whose files are still there."""
    found: dict[str, Mapping[str, str]] = {}
    for task in readable_tasks(tasks):
        if isinstance(task, RankingTask):
            found[task.name] = task.queries
        elif isinstance(task, STSTask):
            found[task.name] = {str(row): text for row, text in enumerate(task.text1)}
    return found


def change_section(made: Comparison, texts: Texts) -> Section:
    """Of the last model against the first; empty where there is only one."""
    if len(made.models) < 2:
        return Section("changes", "What changed", "")
    gaps = made.differences(len(made.models) - 1)
    groups = {
        "Got better": [gap for gap in gaps if gap.clear and gap.interval.value > 0],
        "Got worse": [gap for gap in gaps if gap.clear and gap.interval.value < 0],
        "No more than chance would do, or not known": [gap for gap in gaps if not gap.clear],
    }
    body = ""
    for title, group in ((title, group) for title, group in groups.items() if group):
        # one line a task, the largest change first
        ordered = sorted(group, key=lambda gap: 0 if math.isnan(gap.interval.value) else -abs(gap.interval.value))
        lines = "".join(f"<li><b>{html.escape(gap.task)}</b> {html.escape(str(gap))}</li>" for gap in ordered)
        body += f"<h3>{title}</h3><ul>{lines}</ul>"
    for old, new in zip(made.results[0], made.results[-1], strict=True):
        body += _items(old, new, texts.get(new.task, {}))
    return Section("changes", "What changed", body)


def _items(old: TaskResult, new: TaskResult, known: Mapping[str, str]) -> str:
    """Counts, and the items that fell and rose most, with their texts where they are known."""
    before_N, after_N = item_values(old), item_values(new)
    if before_N is None or after_N is None or list(old.item_ids) != list(new.item_ids):
        return ""
    change_N = after_N - before_N
    order = np.argsort(change_N, kind="stable").tolist()
    fell = [place for place in order[:_MOST] if change_N[place] < -_LEAST]
    rose = [place for place in order[::-1][:_MOST] if change_N[place] > _LEAST]
    if not fell and not rose:
        return ""
    counts = [int(found.sum()) for found in (change_N > _LEAST, change_N < -_LEAST)]
    shown = {example.item_id: next(iter(example.texts.values()), "") for example in (*old.examples, *new.examples)}
    texts = {**known, **shown}
    rows = []
    for place in (*fell, *rose):
        item, text = new.item_ids[place], texts.get(new.item_ids[place], "")
        short = text if len(text) <= _LENGTH else text[: _LENGTH - 1] + "…"
        named = html.escape(f"{item}: {short}" if text else item)
        rows.append([named, f"{before_N[place]:.2f}", f"{after_N[place]:.2f}"])
    words = (
        f"Of {len(change_N):,} items {counts[0]:,} went better and {counts[1]:,} worse. Those that moved most, with "
        f"{_MEANING.get(new.kind, 'their value')} before and after:"
    )
    return f"<h3>{html.escape(new.task)}, item by item</h3><p>{words}</p>" + table(("item", "before", "after"), rows)


_MEANING = {
    "sts": "1 less the distance of the pair's rank by the model from its rank by people",
    "retrieval": "the query's nDCG",
}


def item_values(result: TaskResult) -> npt.NDArray[np.float64] | None:
    """One value an item, 1 is best: the metric's own, for a correlation how near the ranks of a pair are; else None."""
    if result.metric in result.items:
        return result.items[result.metric]
    column = result.items.get("cosine", result.items.get("similarity"))
    if column is None or "score" not in result.items or len(column) < 2:
        return None
    rank_N, people_N = (rankdata(values) for values in (column, result.items["score"]))
    nearness_N: npt.NDArray[np.float64] = 1 - np.abs(rank_N - people_N) / (len(column) - 1)
    return nearness_N
