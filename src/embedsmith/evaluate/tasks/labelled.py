"""Tasks on labelled texts: classification by a linear probe, clustering.

Algorithms, settings and seeds are those of mteb 2, so the figures agree with it (tests/evaluate/test_mteb.py).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from embedsmith.core.errors import DataError, EvaluationError, MissingExtraError
from embedsmith.core.shelf import task_kinds
from embedsmith.data.formats.file_kinds import sound_rows
from embedsmith.data.formats.texts import text_in
from embedsmith.evaluate.encoding import Reader
from embedsmith.evaluate.metrics import Floats
from embedsmith.evaluate.result import TaskResult
from embedsmith.evaluate.tasks.kinds import Format, TaskKind, has_columns, refuse_empty

SEED = 42  # mteb's
Label = str | int
_labelled = has_columns({"text", "label"})


def need_sklearn() -> None:
    """Errors: `MissingExtraError` where scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "eval") from error


@task_kinds.register("classification")
@dataclass(frozen=True)
class ClassificationTask(TaskKind):
    """A logistic regression on the vectors of a few texts a label predicts the labels of other texts.

    mteb's protocol: `experiments` times, `samples_per_label` training texts of every label are drawn, a regression is
    fitted (scikit-learn, lbfgs, 100 iterations) and scored on all test texts. Scores are means over the experiments;
    main score: `accuracy`. The prompt is that of the task `classification`, else the one for queries.

    name: what results call it.
    train_text, train_label: the texts that are learned from, and their labels.
    text, label: the texts whose labels are predicted, and their labels.
    samples_per_label: training texts of every label that one experiment draws.
    experiments: how often that is done.
    """

    name: str
    train_text: Sequence[str] = field(repr=False)
    train_label: Sequence[Label] = field(repr=False)
    text: Sequence[str] = field(repr=False)
    label: Sequence[Label] = field(repr=False)
    samples_per_label: int = 8
    experiments: int = 10
    kind: ClassVar[str] = "classification"

    def __post_init__(self) -> None:
        if len(self.train_text) != len(self.train_label) or len(self.text) != len(self.label) or not self.text:
            raise EvaluationError("texts and labels differ in number, or there are none", where=self.name)
        if len(set(self.train_label)) < 2:
            raise EvaluationError("the training texts have one label only", where=self.name, expected="two or more")
        if unseen := sorted({str(label) for label in set(self.label) - set(self.train_label)}):
            raise EvaluationError(f"the label {unseen[0]!r} has no training text", where=self.name)

    @staticmethod
    def read(path: Path, name: str, split: str) -> ClassificationTask:
        """Rows of `text` and `label`; the texts to learn from are in the file of the split `train` beside it."""
        train = _train_file(path)
        if train is None:
            raise DataError(
                "there is no file with training texts beside it",
                where=path,
                expected="names by split, such as banking-test.jsonl beside banking-train.jsonl",
                fix="add the file, or use it for clustering: clustering:NAME",
            )
        (train_text, train_label), (text, label) = _read_labels(train), _read_labels(path)
        return ClassificationTask(name, train_text, train_label, text, label)

    formats: ClassVar[tuple[Format, ...]] = (
        Format(lambda path: _train_file(path) is not None and _labelled(path), read, 6),
    )

    def evaluate(self, reader: Reader) -> TaskResult:
        need_sklearn()
        draws = self.draws()
        used = sorted(set().union(*draws))
        place = {row: number for number, row in enumerate(used)}
        known = [self.train_text[row] for row in used]
        train_ND = reader.dense(known, task=self.kind, label=f"{self.name} train")
        test_ND = reader.dense(self.text, task=self.kind, label=f"{self.name} test")
        classes, train_code_N = np.unique(np.asarray(self.train_label), return_inverse=True)
        test_code_N = np.searchsorted(classes, np.asarray(self.label))
        correct: list[Floats] = []
        runs: list[dict[str, float]] = []
        for draw in draws:
            predicted_N = _probe(train_ND[[place[row] for row in draw]], train_code_N[draw], test_ND)
            correct.append((predicted_N == test_code_N) * 1.0)
            runs.append(_classified(test_code_N, predicted_N))
        scores = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
        items = {"accuracy": np.mean(correct, axis=0)}
        counts = {"texts": len(self.text), "labels": len(classes), "experiments": len(draws)}
        notes = _constant_note(test_ND)
        ids = [str(number) for number in range(len(self.text))]
        return TaskResult(self.name, self.kind, "accuracy", scores, counts, ids, items, notes)

    def draws(self) -> list[list[int]]:
        """Training rows of each experiment: the first so many of every label in an order shuffled once more each time,
        always with the same seed (mteb's undersampling)."""
        order = list(range(len(self.train_label)))
        draws = []
        for _ in range(self.experiments):
            np.random.RandomState(SEED).shuffle(order)
            taken: Counter[Label] = Counter()
            draw = []
            for row in order:
                if taken[self.train_label[row]] < self.samples_per_label:
                    taken[self.train_label[row]] += 1
                    draw.append(row)
            draws.append(draw)
        return draws


def _probe(train_ND: Any, code_N: Any, test_ND: Any) -> npt.NDArray[np.int64]:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 100 iterations are the protocol
        model = LogisticRegression(max_iter=100, random_state=SEED).fit(train_ND, code_N)
    predicted_N: npt.NDArray[np.int64] = model.predict(test_ND)
    return predicted_N


def _classified(true_N: npt.NDArray[np.int64], predicted_N: npt.NDArray[np.int64]) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, average_precision_score, precision_recall_fscore_support

    scores = {"accuracy": float(accuracy_score(true_N, predicted_N))}
    for ending, average in (("", "macro"), ("_weighted", "weighted")):
        values = precision_recall_fscore_support(true_N, predicted_N, average=average, zero_division=0)
        scores |= {f"{name}{ending}": float(v) for name, v in zip(("precision", "recall", "f1"), values)}
    if len(np.unique(true_N)) == 2 and true_N.max() == 1:
        scores["ap"] = float(average_precision_score(true_N, predicted_N))
    return scores


@task_kinds.register("clustering")
@dataclass(frozen=True)
class ClusteringTask(TaskKind):
    """Do texts of one label lie together? v-measure between the labels and the clusters of mini-batch k-means.

    mteb's protocol: `experiments` times, `sample` texts are drawn with replacement and put into as many clusters as
    there are labels. Main score: the mean `v_measure`. A label may be a list, from coarse to fine: every level is
    scored, and all count alike.

    name: what results call it.
    text, label: the texts, and the labels that their clusters should find.
    sample: texts that one experiment draws, with replacement.
    experiments: how often that is done, at every level.
    max_documents: how many texts are embedded, drawn at random (`None`: all).
    """

    name: str
    text: Sequence[str] = field(repr=False)
    label: Sequence[Label | Sequence[Label]] = field(repr=False)
    sample: int = 16_384
    experiments: int = 10
    max_documents: int | None = None
    kind: ClassVar[str] = "clustering"

    def __post_init__(self) -> None:
        if len(self.text) != len(self.label) or not self.text:
            raise EvaluationError(f"{len(self.text)} texts and {len(self.label)} labels", where=self.name)

    @staticmethod
    def read(path: Path, name: str, split: str) -> ClusteringTask:
        """Rows of `text` and `label`; a label may be a list, from coarse to fine."""
        text, label = _read_labels(path)
        return ClusteringTask(name, text, label)

    formats: ClassVar[tuple[Format, ...]] = (Format(_labelled, read, 7),)

    def evaluate(self, reader: Reader) -> TaskResult:
        need_sklearn()
        chance = random.Random(SEED)
        rows = list(range(len(self.text)))
        if self.max_documents is not None:
            rows = chance.sample(rows, k=min(self.max_documents, len(rows)))
        vector_ND = reader.dense([self.text[row] for row in rows], task=self.kind, label=self.name)
        labels = [list(one) if isinstance(one, list | tuple) else [one] for one in (self.label[row] for row in rows)]
        levels = []  # of every level the labels of the texts that have one, and which texts those are
        for level in range(max(map(len, labels))):
            has_N = np.array([len(label) > level for label in labels])
            levels.append((np.array([label[level] for label in labels if len(label) > level]), has_N))
        values: dict[str, list[float]] = {"v_measure": [], "ami": []}
        for label_N, has_N in levels:
            for v_measure, ami in _clusterings(vector_ND[has_N], label_N, self, chance):
                values["v_measure"].append(v_measure)
                values["ami"].append(ami)
        items = {name: np.asarray(each) for name, each in values.items()}
        scores = {name: float(each.mean()) for name, each in items.items()}
        scores |= {f"{name}_std": float(each.std()) for name, each in items.items()}
        counts = {"texts": len(rows), "labels": len(np.unique(levels[-1][0])), "levels": len(levels)}
        ids = [f"experiment {number}" for number in range(len(values["v_measure"]))]
        return TaskResult(self.name, self.kind, "v_measure", scores, counts, ids, items, _constant_note(vector_ND))


def _clusterings(
    vector_ND: Any, label_N: Any, task: ClusteringTask, chance: random.Random
) -> list[tuple[float, float]]:
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics.cluster import adjusted_mutual_info_score, v_measure_score

    clusters = np.unique(label_N).size
    model = MiniBatchKMeans(n_clusters=clusters, batch_size=512, init="k-means++", n_init=1, random_state=SEED)
    found = []
    for _ in range(task.experiments):
        drawn = chance.choices(range(len(vector_ND)), k=task.sample)
        cluster_N = model.fit_predict(vector_ND[drawn])
        label_S = label_N[drawn]
        scores = (v_measure_score(label_S, cluster_N), adjusted_mutual_info_score(label_S, cluster_N))
        found.append((float(scores[0]), float(scores[1])))
    return found


def _constant_note(vector_ND: npt.NDArray[np.floating]) -> tuple[str, ...]:
    constant = len(vector_ND) > 1 and float(np.ptp(vector_ND, axis=0).max()) == 0.0
    return ("the model gives every text the same vector",) if constant else ()


def _train_file(path: Path) -> Path | None:
    """`banking-train.jsonl` for `banking-test.jsonl`, `train.jsonl` for `test.jsonl`, where it exists."""
    stem, dot, ending = path.name.partition(".")
    base, dash, split = stem.rpartition("-")
    file = path.with_name(f"{base}{dash}train{dot}{ending}")
    return file if split != "train" and file.is_file() else None


def _read_labels(path: Path) -> tuple[list[str], list[Label]]:
    text: list[str] = []
    label: list[Label] = []
    for where, row in sound_rows(path):
        text.append(text_in(row, "text", where))
        value: Any = row.get("label")
        plain = value if isinstance(value, list) else [value]
        if not plain or any(isinstance(each, bool) or not isinstance(each, str | int) for each in plain):
            raise DataError(f"the label is {value!r}", where=where, expected="`label`, a text or a whole number")
        label.append(value)
    refuse_empty(label, path, "text, label")
    if len({type(each) for each in label}) > 1:
        raise DataError("some labels are numbers and some are texts", where=path, fix="write all of them the same way")
    return text, label
