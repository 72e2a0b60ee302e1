"""The recipe of `embedsmith mine`, and of live negatives in a training recipe. These dataclasses are the schema."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from embedsmith.core import shelf
from embedsmith.core.errors import RecipeError
from embedsmith.core.inputs import local_path
from embedsmith.core.reps import exceeds
from embedsmith.core.settings import Count, Finite, Positive, Word, section
from embedsmith.data import Source
from embedsmith.mining.searchers import SearcherSettings, TeacherSettings
from embedsmith.search.exact import FloatArray

Whole = Annotated[int, Field(ge=0)]
Mask = npt.NDArray[np.bool_]


@section
@dataclass(frozen=True, kw_only=True)
class Limits:
    """Which scores s a negative may have; p is the score of the query's weakest positive. `None` limits nothing,
    and a score that equals a limit up to rounding is within it.

    max_score: the score s is at most this (none by default).
    min_score: the score s is at least this (none by default).
    absolute_margin: the score s is at most p - margin (none by default).
    relative_margin: the score s is at most p - margin |p| (none by default), so 0.05 keeps what is below 95 % of a
        positive score, and the limit stays below a negative one.
    """

    max_score: Finite | None = None
    min_score: Finite | None = None
    absolute_margin: Finite | None = None
    relative_margin: Finite | None = None

    def allow(self, score_C: FloatArray, positive: float) -> Mask:
        """mask_C of the scores within the limits, where `positive` is the score of the query's weakest positive; a
        score that equals a limit up to rounding is allowed."""
        highest = [limit for limit in (self.max_score,) if limit is not None]
        if self.absolute_margin is not None and np.isfinite(positive):
            highest.append(positive - self.absolute_margin)
        if self.relative_margin is not None and np.isfinite(positive):
            highest.append(positive - self.relative_margin * abs(positive))
        kept_C: Mask = ~np.isnan(score_C)
        if self.min_score is not None:
            kept_C &= ~exceeds(self.min_score, score_C)
        for limit in highest:
            kept_C &= ~exceeds(score_C, limit)
        return kept_C


@section
@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which candidates become negatives. Ranks count those left once known positives and repeated texts are out.

    negatives: the most a record gets.
    strategy: the order in which candidates are taken. `top`: as they rank; `random`: evenly, in the window;
        `proportional`: without replacement, with a probability proportional to exp(score / temperature); `stepped`:
        Conan's window of ranks of replacement `round`, [(round - 1) n + offset, round n + offset) for n negatives
        (round 0: the n ranks before `offset`).
    skip: the first ranks, which are left out.
    window: how many ranks after those are looked at (`None`: all there are).
    limits: which scores of the first searcher a negative may have.
    teacher_limits: which scores of the teacher it may have.
    near_duplicate: a candidate whose character 5-grams overlap those of a positive, the query or a chosen negative by
        this share (Jaccard) or more is left out; `None` allows it.
    round: the replacement whose window `stepped` takes.
    offset: the rank at which the window of `stepped` begins in the first replacement.
    temperature: of `proportional`; lower prefers high scores more.
    seed: decides every draw, together with the query and its positives.
    """

    negatives: Count = 7
    strategy: Literal["top", "random", "stepped", "proportional"] = "top"
    skip: Whole = 0
    window: Count | None = None
    limits: Limits = Limits()
    teacher_limits: Limits = Limits()
    near_duplicate: Annotated[float, Field(gt=0, le=1)] | None = 0.9
    round: Whole = 0
    offset: Whole = 10
    temperature: Positive = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.window is not None and self.window < self.negatives and self.strategy != "stepped":
            raise RecipeError(
                f"a window of {self.window} ranks cannot give {self.negatives} negatives",
                fix="make select.window larger, or select.negatives smaller",
            )


@section
@dataclass(frozen=True, kw_only=True)
class Corpus:
    """More texts to draw negatives from.

    path: a file of any kind that data are read from, or a BEIR folder, whose corpus is taken.
    column: the column that holds the text; `None` takes `text`, with `title` in front where there is one.
    """

    path: Word
    column: str | None = None


@section
@dataclass(frozen=True, kw_only=True)
class MineRecipe:
    """Everything a mining depends on.

    data: the records that get negatives.
    output: the file that is written, `.jsonl` or `.jsonl.gz`; the report stands beside it.
    searchers: who proposes candidates; theirs are united, and the scores of the first are those of `select.limits`.
    corpus: files of more texts; the records' own positives and negatives always belong to the corpus.
    candidates: how many every searcher proposes for a query.
    select: which of the candidates become negatives.
    teacher: scores what is left; its scores, else those of the first searcher, are written as `teacher_*_scores`.
    short: what becomes of a record with fewer negatives than asked for.
    part: records mined and written at a time; a stopped run goes on behind its last part.
    work: folder for the parts under way and the vectors (`None`: `OUTPUT.work`).
    vectors: folder for the vectors, which several runs may share (`None`: in `work`).
    """

    data: Source
    output: Word
    searchers: tuple[Annotated[SearcherSettings, shelf.searchers], ...]
    corpus: tuple[Corpus, ...] = ()
    candidates: Count = 100
    select: Selection = Selection()
    teacher: Annotated[TeacherSettings, shelf.teachers] | None = None
    short: Literal["keep", "drop"] = "keep"
    part: Count = 4096
    work: str | None = None
    vectors: str | None = None

    def __post_init__(self) -> None:
        if not self.output.removesuffix(".gz").endswith(".jsonl"):
            raise RecipeError(f"output is {self.output!r}", expected="a name in .jsonl or .jsonl.gz")
        read = [self.data.path, *(corpus.path for corpus in self.corpus)]
        if os.path.realpath(self.output) in [os.path.realpath(local_path(path, RecipeError)) for path in read]:
            raise RecipeError(f"output is {self.output!r}, which is read from", fix="name another file")
        if not self.searchers:
            raise RecipeError("searchers: at least one is needed", expected="type: embedding or type: bm25")
        if self.select.teacher_limits != Limits() and self.teacher is None:
            raise RecipeError("select.teacher_limits needs a teacher", fix="set teacher, or use select.limits")
        reach = self.select.skip + self.select.negatives
        if self.select.strategy == "stepped":
            reach = self.select.skip + self.select.offset + self.select.round * self.select.negatives
        if reach > self.candidates:
            raise RecipeError(
                f"{self.candidates} candidates do not reach rank {reach}, where the negatives asked for end",
                fix=f"set candidates to {reach} or more",
            )

    @property
    def folder(self) -> Path:
        return Path(self.work or f"{self.output}.work")

    @property
    def vector_folder(self) -> Path:
        return Path(self.vectors) if self.vectors else self.folder / "vectors"

    @property
    def report_path(self) -> Path:
        return Path(f"{self.output.removesuffix('.gz').removesuffix('.jsonl')}.report.json")


@section
@dataclass(frozen=True, kw_only=True)
class LiveNegatives:
    """Negatives that are replaced while the model trains (Conan-embedding's dynamic hard-negative mining).

    A record's negatives, best first, are its pool; as many as its source's `negatives` are in use. S is the score of a
    negative, S0 its first one since it is in use.

    rule: when a negative gives way. `each_loss` (v2): every time a record is seen, each one with S0 < `too_easy`, or
        with `factor` S < S0 and S < `ceiling`, gives way to the next of the pool. `scheduled` (v1): every `every`
        steps, by the means over a record's negatives, `factor` S < S0 and S < `ceiling` replaces all by the ranks
        [(i - 1) n + `offset`, i n + `offset`) in the i-th replacement.
    factor: how far S must fall below S0 (`None`: 1.2 with `each_loss`, 1.15 with `scheduled`).
    ceiling: S below which a negative may be replaced (`None`: 0.7 with `each_loss`, 0.8 with `scheduled`).
    too_easy: S0 below which `each_loss` replaces a negative at once.
    every: steps between two checks of `scheduled`.
    rescored: rows that a check of `scheduled` scores again with the model as it is, beside those seen again since they
        were measured (`None`: one step's rows).
    offset: rank at which the first replacement of `scheduled` begins (`None`: 10).
    guard: a negative with S above guard times the score of the weakest drawn positive is taken for a false one and
        replaced (`None`: off; not in the papers). The share of such negatives is logged either way, at 0.95.
    refill: what an exhausted pool does: `stay` keeps the last negatives, `remine` mines all pools anew with the current
        model once a tenth of the rows are exhausted.
    remine_every: steps after which all pools are mined anew whatever their state, as ANCE does (`None`: never).
    pool: candidates that a row gets when pools are mined anew.
    skip: the first ranks, which a new pool leaves out.
    corpus: files of more texts to mine new pools from.
    sources: names of the sources it applies to (`None`: all retrieval sources that have negatives).

    Sources: 2408.15710, section 3.2 (v1); 2509.12892 (v2). Round 0, the fit of a window to a short pool, the buffer
    that is scored again and the reset of S0 are reconstructed.
    """

    rule: Literal["each_loss", "scheduled"] = "each_loss"
    factor: Finite | None = None
    ceiling: Finite | None = None
    too_easy: Finite = 0.4
    every: Count = 100
    rescored: Whole | None = None
    offset: Whole | None = None
    guard: Positive | None = None
    refill: Literal["stay", "remine"] = "stay"
    remine_every: Count | None = None
    pool: Count = 100
    skip: Whole = 0
    corpus: tuple[Corpus, ...] = field(default_factory=tuple)
    sources: tuple[str, ...] | None = None

    @property
    def decay(self) -> float:
        return self.factor if self.factor is not None else 1.2 if self.rule == "each_loss" else 1.15

    @property
    def roof(self) -> float:
        return self.ceiling if self.ceiling is not None else 0.7 if self.rule == "each_loss" else 0.8
