"""How the tasks of a run got on with each other, from its lines of numbers: losses by task, the conflict of their
gradients, what is forgotten."""

import html
from collections.abc import Mapping, Sequence

from embedsmith.report.page import table

Numbers = Mapping[str, float]
COSINE, FORGETTING = "cosine/", "forgetting/"


def losses_by_task(lines: Sequence[Numbers], task_of: Mapping[str, str]) -> list[Numbers]:
    """The mean loss of the sources of each task, as `task_loss/TASK`, line by line; nothing where no task has several
    sources, for then it is the curve of its source. `task_of`: of every source."""
    tasks = [task_of[source] for source in task_of]
    if all(tasks.count(task) == 1 for task in tasks) or len(set(tasks)) == 1:
        return []
    found: list[Numbers] = []
    for line in lines:
        values: dict[str, list[float]] = {}
        for source, task in task_of.items():
            if f"loss/{source}" in line:
                values.setdefault(task, []).append(line[f"loss/{source}"])
        if values:
            means = {f"task_loss/{task}": sum(each) / len(each) for task, each in values.items()}
            found.append({"step": line["step"], **means})
    return found


def conflict_table(lines: Sequence[Numbers]) -> str:
    """A row a pair of tasks: mean cosine of their gradients, the share of measurements in which it was below 0, and its
    mean in every group of layers."""
    values: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        for key, value in line.items():
            if key.startswith(COSINE):
                pair, _, group = key.removeprefix(COSINE).partition("/")
                values.setdefault(pair, {}).setdefault(group, []).append(value)
    groups = [group for group in dict.fromkeys(group for each in values.values() for group in each) if group]
    rows = []
    for pair, each in values.items():
        whole = each.get("", [])
        if not whole:
            continue
        below = sum(value < 0 for value in whole) / len(whole)
        cells = [f"{sum(each[group]) / len(each[group]):+.3f}" if group in each else "" for group in groups]
        head = [html.escape(pair.replace("~", " and ")), str(len(whole)), f"{sum(whole) / len(whole):+.3f}"]
        rows.append([*head, f"{below:.0%}", *cells])
    return table(("gradients of", "measured", "mean cosine", "below 0", *groups), rows)


def conflict_words(lines: Sequence[Numbers]) -> str:
    """What the table means, and what it cost."""
    spent = [line["conflict_time"] for line in lines if "conflict_time" in line]
    if not spent:
        return ""
    return (
        '<p class="soft">Cosines below 0: a step for one task undoes some of the other. A pair of one task with itself '
        "are two of its batches: how alike gradients can be at most. Measuring took "
        f"{spent[-1]:.2%} of the time.</p>"
    )


def forgetting_words(lines: Sequence[Numbers]) -> list[str]:
    """A sentence a probe: how far it lies from its score at the start, by the last line that says so."""
    last: dict[str, float] = {}
    for line in lines:
        last |= {key.removeprefix(FORGETTING): value for key, value in line.items() if key.startswith(FORGETTING)}
    return [
        f"On the probe <b>{html.escape(name)}</b> the model lies {100 * abs(value):.2f} points "
        f"{'below' if value > 0 else 'above'} its start."
        for name, value in last.items()
    ]
