"""An encoder to numbers: tasks, metrics and results."""

from embedsmith.evaluate.result import Example, Results, TaskResult
from embedsmith.evaluate.run import evaluate
from embedsmith.evaluate.tasks.kinds import Task, data_folder, known_tasks, load_task, load_tasks, split_names
from embedsmith.evaluate.tasks.labelled import ClassificationTask, ClusteringTask
from embedsmith.evaluate.tasks.pairs import PairClassificationTask, STSTask
from embedsmith.evaluate.tasks.ranking import LongDocumentTask, RerankingTask, RetrievalTask, across_languages
from embedsmith.evaluate.variants import HeadScores, NarrowEncoder, score_heads, score_widths
from embedsmith.search.hybrid import HybridEncoder

__all__ = [
    "ClassificationTask",
    "ClusteringTask",
    "Example",
    "HeadScores",
    "HybridEncoder",
    "LongDocumentTask",
    "NarrowEncoder",
    "PairClassificationTask",
    "RerankingTask",
    "Results",
    "RetrievalTask",
    "STSTask",
    "Task",
    "TaskResult",
    "across_languages",
    "data_folder",
    "evaluate",
    "known_tasks",
    "load_task",
    "load_tasks",
    "score_heads",
    "score_widths",
    "split_names",
]
