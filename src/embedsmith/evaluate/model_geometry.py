"""The geometry of a model: how its vectors and token states lie on a sample of texts, alone or beside another's."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from embedsmith.core.encoder import Encoder, Role
from embedsmith.core.errors import EvaluationError, ModelError
from embedsmith.core.reps import MultiVector, Reps
from embedsmith.data.formats.texts import read_texts
from embedsmith.evaluate.encoding import Reader
from embedsmith.evaluate.geometry import MatrixShape, Space
from embedsmith.evaluate.result import finite_or_none, short_names
from embedsmith.evaluate.tasks.kinds import Task
from embedsmith.evaluate.tasks.labelled import ClassificationTask, ClusteringTask
from embedsmith.evaluate.tasks.pairs import PairClassificationTask, STSTask
from embedsmith.evaluate.tasks.ranking import LongDocumentTask, RankingTask

TEXTS = 1000
_TOKEN_TEXTS = 100  # token states are measured for this many


@dataclass(frozen=True)
class Sample:
    """Texts to measure, and pairs of them that belong together (may be empty)."""

    texts: tuple[str, ...] = field(repr=False)
    pairs: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if len(self.texts) < 3:
            raise EvaluationError(f"{len(self.texts)} different texts", expected="3 or more to see a shape")

    @staticmethod
    def of(task: Task, count: int = TEXTS, seed: int = 0) -> Sample:
        """Different texts of a task, and those that belong together: pairs scored in the highest fifth or labelled 1,
        queries with a relevant document.

        Errors: `EvaluationError` for a kind of task whose texts are not known here.
        """
        chance = random.Random(seed)
        texts, pairs = _texts_and_pairs(task)
        different = list(dict.fromkeys(texts))
        chosen = chance.sample(different, min(count, len(different)))
        return Sample(tuple(chosen), tuple(chance.sample(pairs, min(count, len(pairs)))))

    @staticmethod
    def read(path: Path, count: int = TEXTS, seed: int = 0) -> Sample:
        """Different texts of a file, such as the lines of a .txt. Errors: `DataError` for one that cannot be read."""
        texts = list(dict.fromkeys(text for one in read_texts(path) if (text := one.text.strip())))
        return Sample(tuple(texts if len(texts) <= count else random.Random(seed).sample(texts, count)))

    def agreement(self, encoder: Encoder, other: Encoder) -> dict[str, float]:
        """How alike two models see the same texts (see `Space.agreement`)."""
        return _space(encoder, self.texts, rows=3).agreement(_space(other, self.texts, rows=3))

    def logged(self, encoder: Encoder) -> dict[str, float]:
        """The few cheap measures that are logged while training."""
        measures = _space(encoder, self.texts, progress=False).measures()
        logged = ("anisotropy", "effective_rank", "uniformity", "hubness", "first_direction")
        tokens = self.of_tokens(encoder, 32)
        tokens.pop("texts", None)
        return {f"sentence/{name}": measures[name] for name in logged} | _named("token", tokens)

    def of_tokens(self, encoder: Encoder, count: int) -> dict[str, float]:
        """CoDiEmb's four measures, means over the first `count` texts (reconstructed); empty for an encoder without
        token states."""
        try:
            reps: Reps = encoder.represent(self.texts[:count], role="document", outputs=("tokens",))
        except (EvaluationError, ModelError):  # it has no such output
            return {}
        states = reps.get("tokens")
        if not isinstance(states, MultiVector):
            return {}
        rows = zip(states.vector_NTD, states.mask_NT, strict=True)
        return MatrixShape.means([vector_TD[mask_T].double().numpy() for vector_TD, mask_T in rows])


def _texts_and_pairs(task: Task) -> tuple[Sequence[str], list[tuple[str, str]]]:
    if isinstance(task, LongDocumentTask):
        task = task.task
    if isinstance(task, STSTask):
        high = float(np.quantile(task.score, 0.8))
        pairs = [(a, b) for a, b, score in zip(task.text1, task.text2, task.score) if score >= high]
        return [*task.text1, *task.text2], pairs
    if isinstance(task, PairClassificationTask):
        pairs = [(a, b) for a, b, label in zip(task.text1, task.text2, task.label) if label == 1]
        return [*task.text1, *task.text2], pairs
    if isinstance(task, RankingTask):
        relevant = [(query, doc) for query in task.judged() for doc, grade in task.qrels[query].items() if grade > 0]
        pairs = [(task.queries[query], task.corpus[doc]) for query, doc in relevant if doc in task.corpus]
        return list(task.corpus.values()), pairs
    if isinstance(task, ClassificationTask | ClusteringTask):
        return task.text, []
    raise EvaluationError(f"the texts of a task of the kind {task.kind!r} are not known", where=task.name)


@dataclass(frozen=True)
class Geometry:
    """What was measured. `numbers` by name (`sentence/...`, `token/...`, `pairs/...`, `prompt/...`, `width/...`,
    `length/...`); the rest is for pictures."""

    numbers: Mapping[str, float]
    spectrum: npt.NDArray[np.float64] = field(repr=False)
    variance: npt.NDArray[np.float64] = field(repr=False)
    cosines: npt.NDArray[np.float64] = field(repr=False)
    paired: npt.NDArray[np.float64] = field(repr=False)
    about: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        numbers = {name: finite_or_none(value) for name, value in self.numbers.items()}
        arrays = {name: getattr(self, name).tolist() for name in ("spectrum", "variance")}
        edges = np.linspace(float(np.concatenate([self.cosines, self.paired]).min()), 1.0 + 1e-9, 61)
        counts = {
            name: np.histogram(v, edges)[0].tolist() for name, v in (("random", self.cosines), ("pairs", self.paired))
        }
        histograms = {"edges": edges.tolist(), **counts}
        return {**self.about, "geometry": numbers, **arrays, "histograms": histograms}

    @staticmethod
    def of(
        encoder: Encoder, sample: Sample, *, about: Mapping[str, Any] | None = None, tokens: bool = True
    ) -> Geometry:
        """All measures of one model on a sample.

        Texts are encoded as documents. `tokens`: measure token states too, where the encoder has the output `tokens`.
        """
        space = _space(encoder, sample.texts, rows=3)
        numbers = {f"sentence/{name}": value for name, value in space.measures().items()}
        numbers["length/sensitivity"] = space.length_sensitivity([len(text) for text in sample.texts])
        numbers |= _named("prompt", space.prompt_sensitivity(_space(encoder, sample.texts, "query")))
        numbers |= {f"width/{width}": overlap for width, overlap in space.width_retention().items()}
        paired = np.zeros(0)
        if sample.pairs:
            left, right = zip(*sample.pairs)
            queries, documents = _space(encoder, left, "query", rows=1), _space(encoder, right, rows=1)
            numbers["pairs/alignment"] = queries.alignment(documents)
            paired = np.sum(queries.unit_ND * documents.unit_ND, axis=1)
        if tokens:
            numbers |= _named("token", sample.of_tokens(encoder, _TOKEN_TEXTS))
        return Geometry(numbers, space.spectrum(), space.variance(), space.some_cosines(), paired, dict(about or {}))


def _space(
    encoder: Encoder, texts: Sequence[str], role: Role = "document", *, rows: int = 2, progress: bool | None = None
) -> Space:
    rep = Reader(encoder, progress=progress).all(texts, role=role, task="geometry", label="geometry")
    return Space(rep.tensors()[0].double().numpy(), rows)


def _named(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def geometry_table(
    geometries: Sequence[Geometry], names: Sequence[str], together: Mapping[str, float] | None = None
) -> Table:
    """One row a measure, one column a model; `together`: how alike two of them are."""
    table = Table(title="geometry", title_justify="left")
    table.add_column("measure", no_wrap=True)
    for name in short_names(names):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("what it says")
    for name in dict.fromkeys(name for each in geometries for name in each.numbers):
        cells = [f"{each.numbers[name]:.4g}" if name in each.numbers else "" for each in geometries]
        table.add_row(name, *cells, meaning_of(name))
    for name, value in (together or {}).items():
        table.add_row(f"both/{name}", f"{value:.4g}", *[""] * (len(names) - 1), meaning_of(f"both/{name}"))
    return table


def meaning_of(measure: str) -> str:
    """What a measure says, in a few words."""
    if measure.startswith("width/"):
        return f"neighbours kept by the first {measure.removeprefix('width/')} numbers"
    return MEANING.get(measure, "")


MEANING: Mapping[str, str] = {
    "sentence/anisotropy": "mean cosine of two texts: 0 spread, 1 all in one direction",
    "sentence/rank": "independent directions among the texts",
    "sentence/svd_entropy": "how evenly the directions are used",
    "sentence/condition": "largest over smallest singular value",
    "sentence/effective_rank": "directions in use, weighted",
    "sentence/uniformity": "lower: more evenly on the sphere",
    "sentence/first_direction": "share of the variance along one direction",
    "sentence/directions_for_90": "directions that hold 90 % of the variance",
    "sentence/hubness": "skew of being a neighbour: 0 even, high a few hubs",
    "sentence/hub_never": "share of texts that are nobody's neighbour",
    "sentence/hub_largest": "the biggest hub, in lists over their mean",
    "sentence/variance_spread": "unevenness of the coordinates",
    "sentence/dead_dimensions": "coordinates that hardly vary",
    "length/sensitivity": "below 0: texts of like length look alike",
    "prompt/cosine": "a text as query and as document: 1 the same",
    "prompt/neighbours": "overlap of neighbours between the two prompts",
    "pairs/alignment": "squared distance of texts that belong together",
    "token/similarity": "mean cosine of two tokens of a text (reconstructed)",
    "token/rank": "independent tokens (reconstructed)",
    "token/relative_rank": "of those possible",
    "token/entropy": "SVD entropy of the tokens (reconstructed)",
    "token/condition": "condition number within the rank (reconstructed)",
    "token/deficient_share": "texts with linearly dependent tokens",
    "token/texts": "texts looked at",
    "both/cka": "linear CKA: 1 the same up to rotation",
    "both/cosines": "rank correlation of all pairs' cosines",
    "both/neighbours": "overlap of the ten nearest texts",
}
