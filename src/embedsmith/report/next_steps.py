"""What a run's figures say about the next one: each rule reads its evidence and gives a step with its command.

The rules stand in the order in which they matter: a run that is not whole or not scored comes first, then what went
wrong, then what is left to gain. A rule that sees no evidence gives nothing.
"""

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from embedsmith.core.recipe import apply_override
from embedsmith.evaluate.compare import Difference
from embedsmith.evaluate.result import Results

SHOWN = 3
_CONFUSED = 0.25  # queries whose best wrong text comes as near as the right one
_EASY = 0.1  # a contrastive loss below this share of that of chance
_CUT = 0.05  # of a source's texts
_RISES = 1.02
_FALLS = 0.97
_SMALL_BATCH = 32


@dataclass(frozen=True)
class NextStep:
    """`what` to do, `why`: the figures that say so, `command`: the line that does it (`es.train(..., steps=9)` is the
    program's own call with these keywords). Plain text."""

    what: str
    why: str
    command: str


@dataclass(frozen=True)
class Evidence:
    """What is known of a run: its folder, the resolved recipe, the lines of metrics.jsonl, whether it finished, the
    differences of its scores to those before it, the results after it, and by source what `max_length` cuts: `cut` of
    `texts` texts, the longest of `longest` tokens."""

    folder: str
    recipe: Mapping[str, Any]
    lines: Sequence[Mapping[str, float]]
    finished: bool
    changes: Sequence[Difference] = ()
    after: Results | None = None
    cut: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def value(self, section: str, key: str, default: Any = None) -> Any:
        """A setting of the recipe; the default where it says nothing."""
        found = (self.recipe.get(section) or {}).get(key)
        return default if found is None else found

    def curve(self, start: str) -> list[tuple[int, float]]:
        """Step and mean over all values whose key starts so, where there are any."""
        found = []
        for line in self.lines:
            values = [value for key, value in line.items() if key.startswith(start) and math.isfinite(value)]
            if values:
                found.append((int(line["step"]), sum(values) / len(values)))
        return found

    @property
    def reranker(self) -> bool:
        """Whether a reranker was trained, of which nothing is merged or compared as of an embedder."""
        return self.recipe.get("task") == "rerank"

    @property
    def contrasted(self) -> list[int]:
        """Places of the sources of retrieval in the recipe, whose texts an embedder tells apart."""
        if self.reranker:
            return []
        kinds = [(source.get("task"), (source.get("loss") or {}).get("type")) for source in self.recipe.get("data", ())]
        return [place for place, (task, loss) in enumerate(kinds) if task in (None, "retrieval") and loss != "cosent"]

    @property
    def positions(self) -> int:
        """Tokens that the trained model has places for, two of which some families keep; 512 where it does not say."""
        with suppress(OSError, ValueError, TypeError, AttributeError):
            config = json.loads((Path(self.folder) / "model" / "config.json").read_text(encoding="utf-8"))
            return int(config.get("max_position_embeddings", 514)) - 2
        return 512

    @property
    def last_step(self) -> int:
        return max((int(line["step"]) for line in self.lines), default=0)

    def again(self, name: str, *changes: str) -> str:
        """The run once more with changes, in a folder beside it."""
        return self.train(*changes, f"output={self.folder}-{name}")

    def train(self, *changes: str) -> str:
        """The line that trains by the run's recipe; of rows that a program held, which no file has, its call."""
        if not self.in_memory:
            return shlex.join(["embedsmith", "train", f"{self.folder}/recipe.yaml", *changes])
        tree: dict[str, Any] = {}
        for change in changes:
            apply_override(tree, change)
        words = [f"{key}={value!r}" for key, value in (tree.pop("train", {}) | tree).items() if key != "data"]
        words += [f"data={{{place}: {settings!r}}}" for place, settings in tree.get("data", {}).items()]
        return f"es.train(..., {', '.join(words)})" if words else "es.train(...)"

    @property
    def in_memory(self) -> bool:
        """Whether some of the rows were in the memory of a program."""
        return any(source.get("rows") for source in self.recipe.get("data", ()))

    def steps(self, count: int) -> tuple[str, str]:
        return f"train.steps={max(count, 1)}", "train.epochs=null"


def next_steps(evidence: Evidence) -> list[NextStep]:
    """Three steps; of a run that stopped only that it goes on, and none for a folder without a recipe."""
    if not evidence.recipe.get("model") or not evidence.recipe.get("data"):
        return []
    if not evidence.finished:
        why = f"The run stopped after step {evidence.last_step}; it goes on from there."
        return [NextStep("Finish it", why, evidence.train())]
    return list(islice((step for rule in RULES if (step := rule(evidence)) is not None), SHOWN))


def _score_it(evidence: Evidence) -> NextStep | None:
    """Without a task nothing is known; the first source's own file is better than nothing to look at."""
    scores = evidence.value("evaluate", "tasks") or evidence.value("evaluate", "held_out")
    if evidence.changes or scores or evidence.reranker:
        return None
    read = [
        str(source["path"])
        for source in evidence.recipe["data"]
        if source.get("task") in ("sts", "retrieval", None) and not source.get("rows")
    ]
    if not read:
        return None
    words = ["embedsmith", "compare", str(evidence.value("model", "path")), f"{evidence.folder}/model", "--tasks"]
    pooling = evidence.value("model", "pooling")
    return NextStep(
        "Score it against the model it came from",
        "No task was scored, so nothing is known of what training changed. Texts that it was not trained on say more "
        "than those of the file here.",
        shlex.join([*words, read[0], *([f"model.pooling={pooling}"] if pooling else ())]),
    )


def _against_forgetting(evidence: Evidence) -> NextStep | None:
    worse = [change for change in evidence.changes if change.clear and change.interval.value < 0]
    if not worse or evidence.reranker:
        return None
    names = ", ".join(f"{change.task} ({100 * change.interval.value:+.2f})" for change in worse)
    changes = [
        f"parents=[{evidence.folder}/model]",
        f"base={evidence.value('model', 'path')}",
        "method={type: average, scale: 0.5}",
        f"output={evidence.folder}-halfway",
    ]
    return NextStep(
        "Go half of the way: merge the result with the model it came from",
        f"Clearly worse than before: {names}. Half of the change often keeps most of what was gained and loses much "
        "less; a soup of several runs does so too.",
        shlex.join(["embedsmith", "merge", "merge-checkpoints", *changes]),
    )


def _fewer_steps(evidence: Evidence) -> NextStep | None:
    curve = evidence.curve("validation_loss/")
    if len(curve) < 3:
        return None
    step, least = min(curve, key=lambda point: point[1])
    if step == curve[-1][0] or curve[-1][1] < _RISES * least:
        return None
    return NextStep(
        "Stop earlier, or take more data",
        f"The validation loss was lowest at step {step} ({least:.4g}) and rose to {curve[-1][1]:.4g}: from there on "
        "the run learned its texts by heart.",
        evidence.again("shorter", *evidence.steps(step)),
    )


def _best_checkpoint(evidence: Evidence) -> NextStep | None:
    curve = evidence.curve("score/")
    if len(curve) < 3 or evidence.value("train", "final", "last") == "best":
        return None
    step, best = max(curve, key=lambda point: point[1])
    if step == curve[-1][0] or 100 * (best - curve[-1][1]) < 0.5:
        return None
    return NextStep(
        "Keep the best checkpoint instead of the last",
        f"The mean score was {100 * best:.2f} at step {step} and {100 * curve[-1][1]:.2f} at the end. Choose by one "
        "set of texts and report another.",
        evidence.again("best", "train.final=best"),
    )


def _longer_texts(evidence: Evidence) -> NextStep | None:
    """Twice the length, or less where that is enough for all or more than the model has positions for."""
    shares = {name: found["cut"] / found["texts"] for name, found in evidence.cut.items() if found.get("texts")}
    if not shares or max(shares.values()) < _CUT:
        return None
    name = max(shares, key=lambda one: shares[one])
    now, longest = evidence.cut[name]["max_length"], max(found["longest"] for found in evidence.cut.values())
    wanted = min(longest, 2 * now, evidence.positions)
    if wanted <= now:
        return None
    return NextStep(
        "Read more of each text",
        f"{shares[name]:.0%} of the texts of {name} are longer than the {now} tokens that are read; the longest has "
        f"{longest}.",
        evidence.again("longer-texts", f"model.max_length={wanted}"),
    )


def _harder_negatives(evidence: Evidence) -> NextStep | None:
    places = evidence.contrasted
    data = evidence.recipe["data"]
    curve = evidence.curve("loss/")
    if evidence.value("train", "mining") or len(data) != len(places) or not curve:
        return None
    rows = data[places[0]].get("batch_size") or evidence.value("train", "batch_size", 64)
    negatives = max(4, int(data[places[0]].get("negatives") or 0))
    end = float(np.mean([loss for _, loss in curve[-3:]]))
    if rows < 2 or end >= _EASY * math.log(rows):
        return None
    every = max(evidence.last_step // 3, 1)
    changes = [f"data.{place}.negatives={negatives}" for place in places]
    return NextStep(
        "Train with harder negatives, mined by the model itself",
        f"The loss ended at {end:.3g}, where telling one of {rows} texts by chance costs {math.log(rows):.3g}: the "
        "wrong texts of a batch are too easy to teach more.",
        evidence.again("harder", *changes, f"train.mining.remine_every={every}", "train.mining.skip=2"),
    )


def _temperature(evidence: Evidence) -> NextStep | None:
    near = [
        (result.task, float(np.mean(items["similarity_other"] >= items["similarity_relevant"])))
        for result in evidence.after or ()
        if "similarity_relevant" in (items := result.items)
    ]
    losses = [(place, evidence.recipe["data"][place].get("loss") or {}) for place in evidence.contrasted]
    warm = [(place, float(loss["temperature"])) for place, loss in losses if (loss.get("temperature") or 0) > 0.02]
    if not near or not warm or max(near, key=lambda one: one[1])[1] < _CONFUSED:
        return None
    task, share = max(near, key=lambda one: one[1])
    changes = [f"data.{place}.loss.temperature={max(value / 2, 0.02):.3g}" for place, value in warm]
    return NextStep(
        "Try a lower temperature",
        f"On {task} some wrong text is at least as near as the right one for {share:.0%} of the queries. A lower "
        "temperature makes the nearest wrong texts count more.",
        evidence.again("cooler", *changes),
    )


def _longer(evidence: Evidence) -> NextStep | None:
    """The curve that tells most: validation before training loss."""
    name = "validation loss" if evidence.curve("validation_loss/") else "training loss"
    curve = evidence.curve("validation_loss/") or evidence.curve("loss/")
    if len(curve) < 4:
        return None
    third = max(len(curve) // 4, 1)
    before, end = (float(np.mean([loss for _, loss in part])) for part in (curve[-2 * third : -third], curve[-third:]))
    if end >= _FALLS * before:
        return None
    return NextStep(
        "Train longer",
        f"The {name} still fell in the last quarter of the run, from {before:.4g} to {end:.4g}.",
        evidence.again("longer", *evidence.steps(2 * evidence.last_step)),
    )


def _further(evidence: Evidence) -> NextStep | None:
    if not evidence.changes or any(change.clear for change in evidence.changes):
        return None
    rate = float(evidence.value("train", "learning_rate", 2e-5))
    return NextStep(
        "Let the model move further",
        "No score changed by more than chance would do. Twice the learning rate shows whether the data have something "
        "to teach; more held-out texts make smaller changes visible.",
        evidence.again("further", f"train.learning_rate={2 * rate:.3g}"),
    )


def _larger_batch(evidence: Evidence) -> NextStep | None:
    data = evidence.recipe["data"]
    usual = evidence.value("train", "batch_size", 64)
    rows = {place: data[place].get("batch_size") or usual for place in evidence.contrasted}
    small = {place: size for place, size in rows.items() if size < _SMALL_BATCH}
    if not small:
        return None
    changes = [f"data.{place}.batch_size={4 * size}" for place, size in small.items()]
    return NextStep(
        "Take larger batches",
        f"A query sees the texts of {min(small.values())} rows at a time. More rows are more wrong texts to learn "
        "from, and the token budget bounds the memory.",
        evidence.again("larger-batches", *changes, "train.micro_batch=null", "train.token_budget=4096"),
    )


def _average(evidence: Evidence) -> NextStep | None:
    if evidence.value("train", "keep_checkpoints", 2) < 2 or evidence.reranker:
        return None
    changes = [
        f"parents.0.path={evidence.folder}/checkpoints/step-*/model",
        f"base={evidence.value('model', 'path')}",
        f"output={evidence.folder}-averaged",
    ]
    return NextStep(
        "Average the last checkpoints",
        "It costs no training, and the mean of several checkpoints is rarely worse than the last one.",
        shlex.join(["embedsmith", "merge", "merge-checkpoints", *changes]),
    )


def _another_seed(evidence: Evidence) -> NextStep | None:
    seed = int(evidence.value("train", "seed", 0)) + 1
    return NextStep(
        "See how much is chance: train once more with another seed",
        "The difference of two runs that differ in their seed alone is what a change must exceed to count, and their "
        "mean is a soup.",
        evidence.again(f"seed-{seed}", f"train.seed={seed}"),
    )


def _rate(evidence: Evidence) -> NextStep | None:
    rate = float(evidence.value("train", "learning_rate", 2e-5))
    return NextStep(
        "Try half the learning rate",
        f"Of all settings the learning rate decides most; it was {rate:.3g}.",
        evidence.again("gentler", f"train.learning_rate={rate / 2:.3g}"),
    )


RULES: Sequence[Callable[[Evidence], NextStep | None]] = (
    _score_it,
    _against_forgetting,
    _fewer_steps,
    _best_checkpoint,
    _longer_texts,
    _harder_negatives,
    _temperature,
    _longer,
    _further,
    _larger_batch,
    _average,
    _another_seed,
    _rate,
)
"""In the order in which they matter."""
