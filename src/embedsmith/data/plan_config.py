"""How a recipe asks for its batches: the section `train.plan`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from embedsmith.core.errors import RecipeError
from embedsmith.core.recipe import section

MULTIPLE = 8
"""Rows of a token-budget batch are a multiple of it where they can be, so that 1, 2, 4 and 8 ranks plan the same."""


@section
@dataclass(frozen=True)
class PlanConfig:
    """Which rows meet in a batch, and in which order batches come. The default is CoDiEmb's dynamic sampler.

    - `schedule`: shares of the steps. `proportional`: of the batches each source has; `balanced`: equal for every
      task; `ratio`: by task, as in `ratio`; `temperature`: a source's share grows with rows ** `temperature`. With
      balanced and ratio an epoch sees all rows of every task and cycles the smaller ones; with temperature it has as
      many steps as with proportional;
    - `order`: `shuffle`; `strict` spreads every task and source evenly, in the same way every epoch; `sequential`
      runs through one source after the other, in an order drawn for the epoch (a baseline);
    - `batches`: `single`, one source a step; `mixed`, rows of all sources in every step (a baseline, see
      `docs/batching.md`);
    - `small`: a source with fewer rows than a batch gets smaller batches (`shrink`), is put together with the other
      small ones of its kind (`merge`), repeats rows (`pad`), or is left out with a warning (`drop`);
    - `duplicates`: whether rows of a batch may share a text among their queries and positives; `None` forbids it
      where batches are contrasted and allows it for scored pairs;
    - `lengths`: edges in tokens between groups of rows that never meet in a batch, or `auto`; `batch_sizes`: rows a
      step in each group, one more than there are edges (M3's table);
    - `batch_tokens`: padded tokens of a step, all ranks together, in place of `batch_size` for sources without one of
      their own: rows = batch_tokens / (longest text of the group x texts a row); `multiple`: what such rows are a
      multiple of, so that a run may go on with any number of ranks that divides it.

    Source: CoDiEmb (arXiv 2508.11442), its released sampler; M3-Embedding (arXiv 2402.03216), efficient batching.
    """

    schedule: Literal["proportional", "balanced", "ratio", "temperature"] = "proportional"
    ratio: dict[str, float] = field(default_factory=dict)
    temperature: float = 0.5
    order: Literal["shuffle", "strict", "sequential"] = "shuffle"
    batches: Literal["single", "mixed"] = "single"
    small: Literal["shrink", "merge", "pad", "drop"] = "shrink"
    duplicates: Literal["forbid", "allow"] | None = None
    lengths: Literal["auto"] | tuple[int, ...] | None = None
    batch_sizes: tuple[int, ...] | None = None
    batch_tokens: int | None = None
    multiple: int = MULTIPLE

    def __post_init__(self) -> None:
        if (self.schedule == "ratio") != bool(self.ratio):
            raise RecipeError(
                f"plan.schedule is {self.schedule} and plan.ratio {self.ratio or 'empty'}",
                fix="set both, for example schedule: ratio and ratio: {retrieval: 3, sts: 1}",
            )
        if any(not 0 < share < float("inf") for share in self.ratio.values()):
            raise RecipeError(f"plan.ratio is {self.ratio}", expected="numbers above 0")
        if not 0 <= self.temperature <= 1:
            raise RecipeError(f"plan.temperature is {self.temperature}", expected="0 (equal) to 1 (proportional)")
        self._check_lengths()

    def _check_lengths(self) -> None:
        edges = self.lengths if isinstance(self.lengths, tuple) else ()
        if list(edges) != sorted({edge for edge in edges if edge > 0}):
            raise RecipeError(f"plan.lengths is {list(edges)}", expected="token counts above 0, ascending")
        if self.batch_sizes is not None and (not edges or len(self.batch_sizes) != len(edges) + 1):
            raise RecipeError(
                f"plan.batch_sizes has {len(self.batch_sizes)} values for {len(edges)} edges in plan.lengths",
                expected="one value a group: one more than there are edges",
            )
        if self.batch_sizes is not None and (self.batch_tokens is not None or min(self.batch_sizes) < 1):
            raise RecipeError("plan.batch_sizes", expected="numbers above 0, and no plan.batch_tokens beside it")
        if self.multiple < 1 or (self.batch_tokens is not None and self.batch_tokens < 1):
            raise RecipeError(f"plan.batch_tokens {self.batch_tokens}, plan.multiple {self.multiple}: above 0, please")

    @property
    def by_length(self) -> bool:
        """Whether rows are grouped by length: asked for, or needed by a token budget."""
        return self.lengths is not None or self.batch_tokens is not None
