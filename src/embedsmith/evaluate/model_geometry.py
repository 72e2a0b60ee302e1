"""Look inside a model: the geometry of its vectors and token states on a sample of texts, alone or beside another."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedsmith.core.encoder import Encoder
from embedsmith.core.errors import EvaluationError, ModelError
from embedsmith.core.reps import MultiVector, Reps
from embedsmith.evaluate import geometry
from embedsmith.evaluate.encoding import Reader
from embedsmith.evaluate.result import short_names
from embedsmith.evaluate.tasks.labels import ClassificationTask, ClusteringTask, PairClassificationTask
from embedsmith.evaluate.tasks.retrieval import LongDocumentTask, RerankingTask, RetrievalTask
from embedsmith.evaluate.tasks.similarity import STSTask, Task

if TYPE_CHECKING:
    from rich.table import Table


TEXTS = 1000
_TOKEN_TEXTS = 100  # token states are looked at for this many


@dataclass(frozen=True)
class Sample:
    """Texts to look at, and pairs of them that belong together (may be empty)."""

    texts: tuple[str, ...] = field(repr=False)
    pairs: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if len(self.texts) < 3:
            raise EvaluationError(f"{len(self.texts)} different texts", expected="3 or more to see a shape")


def sample_of(task: Task, count: int = TEXTS, seed: int = 0) -> Sample:
    """Different texts of a task, and those that belong together: pairs scored in the highest fifth or labelled 1,
    queries with a relevant document, texts of one label."""
    chance = random.Random(seed)
    pairs = _pairs_of(task)
    texts = list(dict.fromkeys(_texts_of(task)))
    return Sample(
        tuple(chance.sample(texts, min(count, len(texts)))), tuple(chance.sample(pairs, min(count, len(pairs))))
    )


def _texts_of(task: Task) -> Sequence[str]:
    if isinstance(task, LongDocumentTask):
        return _texts_of(task.task)
    if isinstance(task, STSTask | PairClassificationTask):
        return [*task.text1, *task.text2]
    if isinstance(task, RetrievalTask | RerankingTask):
        return list(task.corpus.values())
    if isinstance(task, ClassificationTask | ClusteringTask):
        return task.text
    raise EvaluationError(f"a task of the kind {task.kind!r} gives no texts to look at", where=task.name)


def _pairs_of(task: Task) -> list[tuple[str, str]]:
    if isinstance(task, LongDocumentTask):
        return _pairs_of(task.task)
    if isinstance(task, STSTask):
        high = float(np.quantile(task.score, 0.8))
        return [(a, b) for a, b, score in zip(task.text1, task.text2, task.score) if score >= high]
    if isinstance(task, PairClassificationTask):
        return [(a, b) for a, b, label in zip(task.text1, task.text2, task.label) if label == 1]
    if isinstance(task, RetrievalTask | RerankingTask):
        relevant = [(query, doc) for query in task.judged() for doc, grade in task.qrels[query].items() if grade > 0]
        return [(task.queries[query], task.corpus[doc]) for query, doc in relevant if doc in task.corpus]
    return []


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
        numbers = plain(self.numbers)
        arrays = {name: getattr(self, name).tolist() for name in ("spectrum", "variance")}
        edges = np.linspace(float(np.concatenate([self.cosines, self.paired]).min()), 1.0 + 1e-9, 61)
        counts = {
            name: np.histogram(v, edges)[0].tolist() for name, v in (("random", self.cosines), ("pairs", self.paired))
        }
        histograms = {"edges": edges.tolist(), **counts}
        return {**self.about, "geometry": numbers, **arrays, "histograms": histograms}


def look(encoder: Encoder, sample: Sample, *, about: Mapping[str, Any] | None = None, tokens: bool = True) -> Geometry:
    """All measures of one model on a sample.

    Texts are encoded as documents. `tokens`: look at token states too, for an encoder with the output `tokens`; one
    that has none is looked at without.
    """
    reader = Reader(encoder)
    vector_ND = _vectors(reader, sample.texts, "document")
    numbers = {f"sentence/{name}": value for name, value in geometry.sentence_space(vector_ND).items()}
    numbers["length/sensitivity"] = geometry.length_sensitivity(vector_ND, [len(text) for text in sample.texts])
    as_queries = _vectors(reader, sample.texts, "query")
    numbers |= _named("prompt", geometry.prompt_sensitivity(vector_ND, as_queries))
    widths = geometry.halved_widths(vector_ND.shape[1])
    numbers |= {f"width/{width}": kept for width, kept in geometry.width_retention(vector_ND, widths).items()}
    paired = np.zeros(0)
    if sample.pairs:
        left, right = zip(*sample.pairs)
        sides = _vectors(reader, left, "query"), _vectors(reader, right, "document")
        numbers["pairs/alignment"] = geometry.alignment(*sides)
        paired = np.sum(geometry.unit_rows(sides[0]) * geometry.unit_rows(sides[1]), axis=1)
    if tokens:
        numbers |= _named("token", token_space(encoder, sample.texts[:_TOKEN_TEXTS]))
    share, variance = geometry.spectrum(vector_ND), geometry.dimension_variance(vector_ND)
    return Geometry(numbers, share, variance, _some_cosines(vector_ND), paired, dict(about or {}))


def token_space(encoder: Encoder, texts: Sequence[str]) -> dict[str, float]:
    """CoDiEmb's four measures, means over texts (reconstructed); empty for an encoder without token states."""
    try:
        reps: Reps = encoder.represent(texts, role="document", outputs=("tokens",))
    except (EvaluationError, ModelError):  # it has no such output
        return {}
    states = reps.get("tokens")
    if not isinstance(states, MultiVector):
        return {}
    rows = zip(states.vector_NTD, states.mask_NT, strict=True)
    return geometry.token_shapes([vector_TD[mask_T].double().numpy() for vector_TD, mask_T in rows])


def beside(encoder: Encoder, other: Encoder, sample: Sample) -> dict[str, float]:
    """How alike two models see the same texts (see `geometry.against`)."""
    mine, theirs = (_vectors(Reader(each), sample.texts, "document") for each in (encoder, other))
    return geometry.against(mine, theirs)


def brief(encoder: Encoder, sample: Sample) -> dict[str, float]:
    """The few cheap numbers that are logged while training."""
    vector_ND = _vectors(Reader(encoder, progress=False), sample.texts, "document")
    shown = ("anisotropy", "effective_rank", "uniformity", "hubness", "first_direction")
    space = geometry.sentence_space(vector_ND)
    numbers = {f"sentence/{name}": space[name] for name in shown}
    tokens = token_space(encoder, sample.texts[:32])
    return numbers | _named("token", {name: value for name, value in tokens.items() if name != "texts"})


def table(looks: Sequence[Geometry], names: Sequence[str], together: Mapping[str, float] | None = None) -> Table:
    """One row a measure, one column a model."""
    from rich.table import Table

    made = Table(title="geometry", title_justify="left")
    made.add_column("measure", no_wrap=True)
    for name in short_names(names):
        made.add_column(name, justify="right", overflow="fold")
    made.add_column("what it says")
    for name in dict.fromkeys(name for each in looks for name in each.numbers):
        cells = [f"{each.numbers[name]:.4g}" if name in each.numbers else "" for each in looks]
        kept = f"neighbours kept by the first {name[6:]} numbers" if name.startswith("width/") else ""
        made.add_row(name, *cells, MEANING.get(name, kept))
    for name, value in (together or {}).items():
        made.add_row(f"both/{name}", f"{value:.4g}", *[""] * (len(names) - 1), MEANING.get(f"both/{name}", ""))
    return made


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


def load_texts(path: Path, count: int = TEXTS, seed: int = 0) -> Sample:
    """Different lines of a text file, one text each. Errors: `EvaluationError` for a file that cannot be read."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read the texts ({error})", where=path) from error
    texts = list(dict.fromkeys(line for line in lines if line))
    return Sample(tuple(texts if len(texts) <= count else random.Random(seed).sample(texts, count)))


def plain(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers for JSON; one that does not exist is `null`."""
    return {name: float(value) if np.isfinite(value) else None for name, value in numbers.items()}


def _vectors(reader: Reader, texts: Sequence[str], role: Any) -> npt.NDArray[np.float64]:
    rep = reader.all(texts, role=role, task="geometry", label="geometry")
    wide: npt.NDArray[np.float64] = rep.tensors()[0].double().numpy()
    return wide


def _named(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def _some_cosines(vector_ND: npt.NDArray[np.float64], count: int = 5000) -> npt.NDArray[np.float64]:
    """Cosines of random pairs of different texts."""
    chance = np.random.default_rng(0)
    left = chance.integers(0, len(vector_ND), count)
    right = (left + chance.integers(1, len(vector_ND), count)) % len(vector_ND)
    unit = geometry.unit_rows(vector_ND)
    cosines: npt.NDArray[np.float64] = np.sum(unit[left] * unit[right], axis=1)
    return cosines
