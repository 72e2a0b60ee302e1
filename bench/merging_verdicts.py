"""What the merging bench found: means over seeds, fits of growth, and a verdict on every target of the method's paper.

A verdict is a line with the figures it rests on and `met`: True, False, or None while its runs are missing.
"""

from __future__ import annotations

from typing import Any

from bench.common import read_json, write_json
from bench.merging_growth import Growth, growth_sections
from bench.merging_models import Study
from embedsmith.core.files import atomic_file
from embedsmith.report.page import page

Rows = dict[str, dict[str, Any]]
TASKS = {"retrieval": "debian-dev", "sts": "stsb-en-dev"}
MAIN = ("average", "average restored", "slerp", "karcher", "ties", "self_positioning")
"""The merges a verdict looks at; the table has all."""


def summarise(study: Study) -> None:
    """Means over seeds of every arm, the fits of growth and the verdicts, stored and printed."""
    table = read_json(study.results, {"runs": []})
    own = [run for run in table["runs"] if (run["steps"], run["layers"]) == (study.steps, study.layers)]
    rows = means(own)
    growth = growth_of_runs([run for run in own if run["part"] == "growth"])
    verdicts = [*table_verdicts(rows), *length_verdicts(rows), *forget_verdicts(rows), *growth_verdicts(growth)]
    summary = {"summary": rows, "growth": growth.as_dict(), "verdicts": verdicts}
    write_json(study.results, read_json(study.results, {"runs": []}) | summary)
    for name, row in rows.items():
        scores = "  ".join(f"{key} {value:6.2f}" for key, value in row["scores"].items())
        print(f"{name:40}{scores}  texts {row['texts']:9.0f}  minutes {row['minutes']:5.1f}  seeds {row['seeds']}")
    for verdict in verdicts:
        word = {True: "met", False: "NOT met", None: "no runs yet"}[verdict["met"]]
        print(f"{word:12}{verdict['target']}: {verdict['found']}")
    with atomic_file(study.work / "growth.html") as file:
        file.write(page("Task vectors against data", "bench.merging", [], growth_sections(growth)))


def means(runs: list[dict[str, Any]]) -> Rows:
    """`part: arm` to mean scores and costs over the seeds, and how many there are."""
    rows: Rows = {}
    for part in ("table", "plane", "three", "forget"):
        for arm in dict.fromkeys(run["arm"] for run in runs if run["part"] == part):
            own = [run for run in runs if (run["part"], run["arm"]) == (part, arm)]
            scores = {name: sum(r["scores"][name] for r in own) / len(own) for name in own[0]["scores"]}
            cost = {name: sum(r.get(name, 0.0) for r in own) / len(own) for name in ("texts", "minutes")}
            rows[f"{part}: {arm}"] = {"scores": scores, **cost, "seeds": len(own)}
    return rows


def verdict(target: str, met: bool | None, found: str) -> dict[str, Any]:
    return {"target": target, "met": met, "found": found}


def _missing(target: str) -> list[dict[str, Any]]:
    return [verdict(target, None, "run the part first")]


def table_verdicts(rows: Rows) -> list[dict[str, Any]]:
    """Merged against joint and against the parents; Self-Positioning against the best point of the grid."""
    table = {name.removeprefix("table: "): row for name, row in rows.items() if name.startswith("table: ")}
    merges = {name: table[name] for name in MAIN if name in table}
    joints = {name: row["scores"]["mean"] for name, row in table.items() if name.startswith("joint")}
    if not merges or not joints or not table.keys() >= TASKS.keys():
        return _missing("merged mean above joint")
    found = []
    best = max(merges, key=lambda name: merges[name]["scores"]["mean"])
    value = merges[best]["scores"]["mean"]
    for title, arms in (("joint training", {"joint": joints.get("joint", float("nan"))}), ("re-sampled joint", joints)):
        arm = max(arms, key=lambda name: arms[name])
        above = [name for name, row in table.items() if name not in joints and row["scores"]["mean"] > arms[arm]]
        said = f"{best} {value:.2f}, {arm} {arms[arm]:.2f}; above it: {', '.join(above) or 'none'}"
        found.append(verdict(f"merged mean above the best of {title}", value > arms[arm], said))
    found.append(parts_verdict(best, table))
    shares = {name: kept_of_parents(row, table) for name, row in merges.items()}
    first = max(shares, key=lambda name: min(shares[name].values()))
    said = "; ".join(f"{n} {', '.join(f'{p} {s:.1%}' for p, s in share.items())}" for n, share in shares.items())
    met = min(shares[first].values()) >= 0.98
    return [*found, verdict("a merge has 98 % of each parent on its task", met, said), *grid_verdict(rows, table)]


def parts_verdict(best: str, table: Rows) -> dict[str, Any]:
    """The best merge against the better of the two models that it is made of, on every score."""
    parts = {name: table[name]["scores"] for name in TASKS}
    below = []
    for score, value in table[best]["scores"].items():
        part = max(parts, key=lambda name: parts[name].get(score, float("-inf")))
        if value < parts[part].get(score, float("-inf")):
            below.append(f"{score} {value:.2f}, {part} {parts[part][score]:.2f}")
    said = f"{best} lies below its own part on {'; '.join(below)}" if below else f"{best}: below it on no score"
    top = max(scores["mean"] for scores in parts.values())
    return verdict("the best merge is above its own best part on the mean", table[best]["scores"]["mean"] > top, said)


def kept_of_parents(row: dict[str, Any], table: Rows) -> dict[str, float]:
    """The merge's score over each parent's on that parent's task."""
    return {name: row["scores"][task] / table[name]["scores"][task] for name, task in TASKS.items()}


def grid_verdict(rows: Rows, table: Rows) -> list[dict[str, Any]]:
    target = "Self-Positioning within 0.2 of the best grid point for at most half its texts"
    grid = {name: row for name, row in rows.items() if name.startswith("plane: ")}
    own = table.get("self_positioning")
    if not grid or own is None:
        return _missing(target)
    best = max(grid, key=lambda name: grid[name]["scores"]["mean"])
    gap = grid[best]["scores"]["mean"] - own["scores"]["mean"]
    texts = sum(row["texts"] for row in grid.values())
    said = f"{gap:.2f} below {best} ({grid[best]['scores']['mean']:.2f}), {own['texts']:.0f} of {texts:.0f} texts"
    return [verdict(target, gap <= 0.2 and own["texts"] <= texts / 2, said)]


def length_verdicts(rows: Rows) -> list[dict[str, Any]]:
    """Three parents: Self-Positioning at every mu beside SLERP at every length."""
    three = {name.removeprefix("three: "): row["scores"]["mean"] for name, row in rows.items() if "three: " in name}
    mus = {float(name.partition("=")[2]): value for name, value in three.items() if " mu=" in name}
    lengths = {name: value for name, value in three.items() if "lambda=" in name}
    if not mus or not lengths:
        return _missing("mu below 0.05 is best")
    best, top = max(mus, key=lambda mu: mus[mu]), max(lengths, key=lambda name: lengths[name])
    said = ", ".join(f"mu {mu:g}: {value:.2f}" for mu, value in sorted(mus.items()))
    with_grid = f"{said}; best length {top} {lengths[top]:.2f}"
    return [
        verdict("three parents: mu below 0.05 is best", best < 0.05, said),
        verdict("three parents: Self-Positioning within 0.2 of the best length", lengths[top] - mus[best] <= 0.2,
                with_grid),
    ]  # fmt: skip


def forget_verdicts(rows: Rows) -> list[dict[str, Any]]:
    """The frontier of gain on debian-dev and loss on cranfield, and who keeps 95 % of the gain while losing nothing.

    The gain is counted against the larger of the retrieval parent's and the joint model's.
    """
    forget = {name.removeprefix("forget: "): row["scores"] for name, row in rows.items() if name.startswith("forget: ")}
    if not forget.keys() >= {"base", "joint lambda=1.0", "retrieval lambda=1.0"}:
        return _missing("a merge keeps 95 % of the gain and loses nothing")
    base = forget["base"]
    moved = {
        name: (scores["debian-dev"] - base["debian-dev"], scores["cranfield"] - base["cranfield"])
        for name, scores in forget.items()
        if name != "base"
    }
    joint = moved["joint lambda=1.0"]
    frontier = sorted((name for name in moved if not beaten(moved[name], moved)), key=lambda name: -moved[name][0])
    shown = "; ".join(f"{name} {moved[name][0]:+.2f}/{moved[name][1]:+.2f}" for name in frontier)
    whole = [name for name, (gain, other) in moved.items() if gain >= 0.95 * joint[0] and other >= 0]
    who = ", ".join(sorted(whole, key=lambda name: -moved[name][0])) or "none"
    said = f"{who}; the frontier (gain in domain / change on cranfield): {shown}"
    return [
        verdict("joint training gains in its domain and forgets cranfield", joint[0] > 0 > joint[1],
                f"{joint[0]:+.2f} and {joint[1]:+.2f}"),
        verdict("a merge keeps 95 % of the joint gain and loses nothing", bool(whole), said),
    ]  # fmt: skip


def beaten(own: tuple[float, float], moved: dict[str, tuple[float, float]]) -> bool:
    """Whether another is no worse in both and better in one."""
    return any(o[0] >= own[0] and o[1] >= own[1] and o != own for o in moved.values())


def growth_of_runs(runs: list[dict[str, Any]]) -> Growth:
    """The entries of the part `growth` as points; seeds are points of their own."""
    lengths = {
        task: points
        for task in TASKS
        if (points := [(run["x"], run["norm"]) for run in runs if run["arm"].startswith(f"{task} ")])
    }
    joint = [run for run in runs if run["arm"].startswith("joint")]
    directions = {
        task: [((run["x"] / (1 - run["x"])) ** sign, run["degrees"][place]) for run in joint]
        for place, (task, sign) in enumerate((("retrieval", 1), ("sts", -1)))
        if joint
    }
    return Growth(lengths, directions)


def growth_verdicts(growth: Growth) -> list[dict[str, Any]]:
    """The paper's two findings: length grows with data, direction leans to the larger data set."""
    found = []
    for task, fits in growth.length_fits().items():
        best = max(fits, key=lambda fit: fit.r2)
        said = f"{best.form}, slope {best.slope:.3f}, R^2 {best.r2:.3f}, {best.points} points"
        found.append(verdict(f"|V| of {task} grows with its data", best.slope > 0 and best.conclusive, said))
    for task, fit in growth.direction_fits().items():
        said = f"slope {fit.slope:.2f} degrees, R^2 {fit.r2:.3f}, {fit.points} points"
        found.append(
            verdict(f"the joint vector leans to {task} with its share", fit.slope < 0 and fit.conclusive, said)
        )
    return found or _missing("length and direction against data")
