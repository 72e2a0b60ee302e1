"""What a finished run is to the one who started it: its folder, its model, its scores before and after."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from embedsmith.core.terminal import Printed
from embedsmith.evaluate import Results
from embedsmith.evaluate.result import percent
from embedsmith.models import CrossEncoder, Embedder, load, load_reranker


@dataclass(frozen=True, repr=False)
class Trained(Printed):
    """A finished training run.

    `output`: the run's folder, with its report. `folder`: the model's folder in it. `results` and `results_before`:
    the evaluation after training and before the first step, `None` where no task was evaluated.
    """

    output: Path
    folder: Path
    results: Results | None
    results_before: Results | None

    @classmethod
    def of(cls, output: Path) -> Self:
        """What lies in the folder of a finished run."""
        files = (output / "evaluation" / f"{name}.json" for name in ("after", "before"))
        after, before = (Results.load(file) if file.is_file() else None for file in files)
        return cls(output, output / "model", after, before)

    @cached_property
    def model(self) -> Embedder:
        """The trained embedding model, loaded on first use. Errors: `ModelError` for a reranker."""
        return load(str(self.folder))

    @cached_property
    def reranker(self) -> CrossEncoder:
        """The trained reranker (`task: rerank`), loaded on first use. Errors: `ModelError` for an embedding model."""
        return load_reranker(str(self.folder))

    @property
    def scores(self) -> dict[str, float]:
        """The main score of every task after training."""
        return {} if self.results is None else self.results.main_scores()

    @property
    def scores_before(self) -> dict[str, float]:
        """The main score of every task before the first step."""
        return {} if self.results_before is None else self.results_before.main_scores()

    def table(self) -> RenderableType:
        """The model's folder, and a row a task with scores times 100."""
        head = Text(f"model: {self.folder}")
        return head if self.results is None else Group(self._scores(), head)

    def _scores(self) -> Table:
        table = Table()
        for name in ("task", "metric"):
            table.add_column(name)
        for name in ("before", "after", "change") if self.results_before else ("score",):
            table.add_column(name, justify="right")
        for result in self.results or ():
            cells = [percent(result.main_score)]
            if self.results_before is not None:
                before = self.scores_before.get(result.task, float("nan"))
                cells = [percent(before), *cells, f"{100 * (result.main_score - before):+.2f}"]
            table.add_row(result.task, result.metric, *cells)
        return table
