"""An encoder to numbers: tasks, metrics and results."""

from embedsmith.evaluate.load import data_folder, known_tasks, load_task, split_names
from embedsmith.evaluate.result import Results, TaskResult
from embedsmith.evaluate.run import evaluate
from embedsmith.evaluate.tasks import RetrievalTask, STSTask, Task

__all__ = [
    "Results",
    "RetrievalTask",
    "STSTask",
    "Task",
    "TaskResult",
    "data_folder",
    "evaluate",
    "known_tasks",
    "load_task",
    "split_names",
]
