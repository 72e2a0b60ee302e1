"""Batches of P classes with K texts of each, for losses that need other texts of a text's class beside it: drawn at
random, a batch of a source with many classes has hardly any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from embedsmith.core.errors import RecipeError
from embedsmith.core.tokens import IntArray
from embedsmith.data.plan.separate import Ints
from embedsmith.data.record import Record, Text, typed_for_source


@dataclass(frozen=True)
class ClassBatches:
    """The order of N rows in which each batch of `classes` x `texts` rows holds that many classes with that many rows
    of each, as often as the source allows it in a pass. Rows behind the last batch are left out of the pass: those of
    classes with fewer rows, and what large classes have more than fits one group a batch (other rows each time).

    `label_N`: the class of each row.
    """

    label_N: IntArray = field(repr=False)
    classes: int
    texts: int

    @staticmethod
    def of(records: Sequence[Record[Text]], batch_size: int | None, texts: int, name: str) -> ClassBatches:
        """Errors: `RecipeError` for rows without a class, and for batches that the classes do not fill."""
        where = f"source {name!r}"
        if batch_size is None or batch_size % texts:
            raise RecipeError(
                f"per_class={texts} with batch_size {batch_size or 'by tokens'}",
                where=where,
                expected="a batch_size that is a multiple of per_class",
                fix=f"set batch_size of the source {typed_for_source(f'batch_size={16 * texts}')}",
            )
        labels = [record.label for record in records]
        if (unknown := labels.count(None)) > 0:
            raise RecipeError(
                f"per_class={texts}, and {unknown:,} of {len(labels):,} rows have no class",
                where=where,
                fix="leave per_class out, or give the rows a label",
            )
        made = ClassBatches(np.asarray(labels, np.int64), batch_size // texts, texts)
        if made.batches == 0:
            large = int((made.groups_C > 0).sum())
            most = max(large, 1) * texts
            raise RecipeError(
                f"{batch_size} rows with {texts} of a class are {made.classes} classes, and {large} have so many rows",
                where=where,
                fix=f"lower per_class, or set batch_size to {most} or less {typed_for_source(f'batch_size={most}')}",
            )
        return made

    @cached_property
    def groups_C(self) -> IntArray:
        """How many groups of `texts` rows each class has."""
        groups_C: IntArray = np.unique(self.label_N, return_counts=True)[1] // self.texts
        return groups_C

    @cached_property
    def batches(self) -> int:
        """The most batches that can be filled with a class once in each."""
        low, high = 0, int(self.groups_C.sum()) // self.classes
        while low < high:  # what is left over falls from some number of batches on
            middle = (low + high + 1) // 2
            if np.minimum(self.groups_C, middle).sum() >= self.classes * middle:
                low = middle
            else:
                high = middle - 1
        return low

    def __call__(self, chance: np.random.Generator) -> Ints:
        """A permutation of all rows, those of the batches in front."""
        order_N = np.arange(len(self.label_N))
        chance.shuffle(order_N)
        _, class_N = np.unique(self.label_N, return_inverse=True)
        by_class_N = order_N[np.argsort(class_N[order_N], kind="stable")]
        start_C = np.concatenate([[0], np.cumsum(np.bincount(class_N))])[:-1]
        whole_C = np.minimum(self.groups_C, self.batches)
        of_E = np.repeat(np.arange(len(whole_C)), whole_C)  # the class of each group
        within_E = np.arange(len(of_E)) - np.repeat(np.cumsum(whole_C) - whole_C, whole_C)
        taken_E = np.arange(len(of_E))
        chance.shuffle(taken_E)
        taken_E = taken_E[: self.classes * self.batches]
        place_C = np.arange(len(whole_C))
        chance.shuffle(place_C)
        # Groups class by class, dealt to the batches in turn: no batch gets two groups of a class.
        taken_E = taken_E[np.argsort(place_C[of_E[taken_E]], kind="stable")]
        place_B = np.arange(self.batches)
        chance.shuffle(place_B)
        dealt_E = taken_E.reshape(self.classes, self.batches)[:, place_B].T.reshape(-1)
        first_E = start_C[of_E[dealt_E]] + within_E[dealt_E] * self.texts
        used = (first_E[:, None] + np.arange(self.texts)).reshape(-1)
        left_N = np.ones(len(order_N), bool)
        left_N[used] = False
        return np.concatenate([by_class_N[used], by_class_N[left_N]])
