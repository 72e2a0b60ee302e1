"""Evaluated texts that a model was trained on: counted and told, since a score on them says little."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from embedsmith.core.encoder import Role
from embedsmith.core.errors import RecipeError
from embedsmith.core.progress import log
from embedsmith.data import RecordSet, row_facts, text_id
from embedsmith.data.record import Text, ids_among
from embedsmith.data.stream import HasOrder
from embedsmith.evaluate.tasks.kinds import Task
from embedsmith.evaluate.tasks.labelled import ClassificationTask, ClusteringTask
from embedsmith.evaluate.tasks.pairs import PairClassificationTask, STSTask
from embedsmith.evaluate.tasks.ranking import LongDocumentTask, RankingTask

Ids = npt.NDArray[np.int64]
_ROWS = 1_000_000


def texts_of(task: Task) -> list[tuple[Role, Iterable[str]]] | None:
    """The texts of a task by role: texts of pairs and texts to classify count as queries, and what a classifier is
    fitted on does not count. `None` for a kind of task that is not ours."""
    match task:
        case LongDocumentTask():
            return texts_of(task.task)
        case RankingTask():
            return [("query", task.queries.values()), ("document", task.corpus.values())]
        case STSTask() | PairClassificationTask():
            return [("query", task.text1), ("query", task.text2)]
        case ClassificationTask() | ClusteringTask():
            return [("query", task.text)]
        case _:
            return None


def warn_of_overlap(tasks: Sequence[Task], trained_on: Sequence[RecordSet[Text]], probes: Sequence[Task] = ()) -> None:
    """Tell how many of a task's texts are queries or positives of the training data. A corpus may share documents with
    it without giving answers away; queries and scored pairs that were trained on are a warning. Streams, which would be
    read whole, are not looked at.

    Errors: `RecipeError` where queries or pairs of one of the `probes` were trained on: it would not tell what is
    forgotten.
    """
    known = [found for found in trained_on if not isinstance(found.records, HasOrder)]
    for task in tasks:
        seen: list[str] = []
        asked = False
        words = {"query": "queries" if isinstance(task, RankingTask) else "texts", "document": "documents"}
        for role, what in words.items():
            texts = [text for each, some in texts_of(task) or () if each == role for text in some]
            ids = np.unique(np.fromiter(map(text_id, texts), np.int64, len(texts)))
            if len(ids) and (found := len(_among(ids, known))):
                seen.append(f"{found:,} of {len(ids):,} {what}")
                asked = asked or role == "query"
        if asked and any(task is probe for probe in probes):
            names = ", ".join(one.name for one in known)
            raise RecipeError(
                f"the probe {task.name} is trained on: {' and '.join(seen)} are in the training data ({names})",
                where="evaluate.probes",
                fix="leave it out of evaluate.probes, or train on a part that shares no text with it: embedsmith split",
            )
        if seen:
            tell, advice = (log.warning, _ADVICE) if asked else (log.info, "")
            names = ", ".join(one.name for one in known)
            tell("%s: %s are in the training data (%s)%s", task.name, " and ".join(seen), names, advice)


_ADVICE = "; embedsmith split makes parts that share no text"


def _among(ids: Ids, sets: Sequence[RecordSet[Text]]) -> Ids:
    """Those of some sorted ids that are texts of the sets."""
    found: list[Ids] = [np.zeros(0, np.int64)]
    for one in sets:
        facts = row_facts(one.records)
        for trained in (facts.query_id_N, facts.positive_id_P):
            for start in range(0, len(trained), _ROWS):
                some = np.asarray(trained[start : start + _ROWS])
                found.append(np.unique(some[ids_among(some, ids)]))
    return np.unique(np.concatenate(found))
