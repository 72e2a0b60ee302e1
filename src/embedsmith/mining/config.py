"""The recipe of `embedsmith mine`, and of live negatives in a training recipe. These dataclasses are the schema."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from embedsmith.core.errors import RecipeError
from embedsmith.core.settings import section
from embedsmith.data import Source

Tokens = Literal["mixed", "characters", "words"]


@section
@dataclass(frozen=True, kw_only=True)
class EmbeddingSearch:
    """Candidates by an embedding model.

    `head`: dense, sparse, multivector or hybrid; `weights`: of the heads in a hybrid score (M3's by default).
    `index`: `exact`, or a FAISS factory string (`HNSW32,Flat`, `IVF4096,Flat`) for dense vectors; `effort`: how many
    candidates a query looks at in it. `task`: whose prompts are used (`None`: that of the data). `instructions`: a
    record's own instruction takes the place of the query's prompt, as in training; false for a model that was not
    trained with any.
    """

    type: Literal["embedding"] = "embedding"
    model: str
    head: str = "dense"
    weights: dict[str, float] | None = None
    index: str = "exact"
    effort: Annotated[int, Field(gt=0)] = 128
    task: str | None = None
    instructions: bool = True

    def __post_init__(self) -> None:
        if self.weights is not None and self.head != "hybrid":
            raise RecipeError("weights are those of a hybrid score", fix="set head: hybrid")
        if self.index != "exact" and self.head != "dense":
            raise RecipeError(f"an approximate index holds dense vectors, not {self.head}", fix="set index: exact")


@section
@dataclass(frozen=True, kw_only=True)
class Bm25Search:
    """Candidates by BM25 (library bm25s). `tokens`: `mixed` takes words, and single characters and pairs of them where
    a script has no spaces (Chinese, Japanese, Thai, ...); `characters` the latter everywhere; `words` only words."""

    type: Literal["bm25"] = "bm25"
    tokens: Tokens = "mixed"
    k1: Annotated[float, Field(gt=0)] = 1.5
    b: Annotated[float, Field(ge=0, le=1)] = 0.75


@section
@dataclass(frozen=True, kw_only=True)
class CrossEncoder:
    """A model that reads query and document together (sentence-transformers' CrossEncoder)."""

    type: Literal["cross-encoder"] = "cross-encoder"
    model: str
    batch_size: Annotated[int, Field(gt=0)] = 32


Searcher = Annotated[EmbeddingSearch | Bm25Search, Field(discriminator="type")]
Teacher = Annotated[EmbeddingSearch | CrossEncoder, Field(discriminator="type")]


@section
@dataclass(frozen=True, kw_only=True)
class Limits:
    """Which scores a negative may have. p is the score of the query's weakest positive.

    s <= max_score; s >= min_score; s <= p - absolute_margin; s <= p - relative_margin |p| (so 0.05 keeps what is below
    95 % of a positive score, and the limit stays below a negative one). A score that equals a limit up to rounding is
    within it.
    """

    max_score: float | None = None
    min_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None


@section
@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which candidates become negatives.

    `negatives`: the most a record gets. Ranks count the candidates left once known positives and repeated texts are
    out; the first `skip` ranks are left out, then `window` ranks are looked at (`None`: all there are). `limits` and
    `teacher_limits` drop by score. `near_duplicate`: a candidate whose character 5-grams overlap those of a positive,
    the query or a chosen negative by this share (Jaccard) or more is left out; `None` allows it.

    strategy: `top`; `random` (evenly, in the window); `proportional` (without replacement, probability proportional to
    exp(score / temperature)); `stepped`: Conan's window of ranks of replacement `round`, [(round - 1) n + offset, round
    n + offset) for n negatives (round 0: the n ranks before `offset`). Every draw is seeded by `seed` and the query.
    """

    negatives: Annotated[int, Field(gt=0)] = 7
    strategy: Literal["top", "random", "stepped", "proportional"] = "top"
    skip: Annotated[int, Field(ge=0)] = 0
    window: Annotated[int, Field(gt=0)] | None = None
    limits: Limits = Limits()
    teacher_limits: Limits = Limits()
    near_duplicate: Annotated[float, Field(gt=0, le=1)] | None = 0.9
    round: Annotated[int, Field(ge=0)] = 0
    offset: Annotated[int, Field(ge=0)] = 10
    temperature: Annotated[float, Field(gt=0)] = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.window is not None and self.window < self.negatives and self.strategy != "stepped":
            raise RecipeError(
                f"a window of {self.window} ranks cannot give {self.negatives} negatives",
                fix="make window larger, or negatives smaller",
            )


@section
@dataclass(frozen=True, kw_only=True)
class Corpus:
    """More texts to draw from: a file of any kind the data room reads, or the corpus of a BEIR folder. `column` holds
    the text; `None` takes `text`, with `title` in front where there is one."""

    path: str
    column: str | None = None


@section
@dataclass(frozen=True, kw_only=True)
class MineRecipe:
    """Everything a mining depends on.

    `data`: the records; `corpus`: files of more texts (the records' own positives and negatives always belong to it);
    `searchers`: their candidates are united, `candidates` of each; the first one's scores are those of the limits.
    `teacher` scores what is left; its scores, else those of the first searcher, are written as `teacher_*_scores`.
    `short`: what becomes of a record with fewer negatives than asked for. `work` holds the parts under way and the
    vectors (`None`: `OUTPUT.work`); `vectors` another folder for these, which several runs may share.
    """

    data: Source
    output: str
    searchers: tuple[Searcher, ...]
    corpus: tuple[Corpus, ...] = ()
    candidates: Annotated[int, Field(gt=0)] = 100
    select: Selection = Selection()
    teacher: Teacher | None = None
    short: Literal["keep", "drop"] = "keep"
    part: Annotated[int, Field(gt=0)] = 4096
    work: str | None = None
    vectors: str | None = None

    def __post_init__(self) -> None:
        if not self.output.removesuffix(".gz").endswith(".jsonl"):
            raise RecipeError(f"output is {self.output!r}", expected="a name in .jsonl or .jsonl.gz")
        read = [self.data.path, *(corpus.path for corpus in self.corpus)]
        if Path(self.output).resolve() in [Path(path).expanduser().resolve() for path in read]:
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

    A record's negatives, best first, are its pool; `negatives` of them are in use. S is the score of a negative, S0
    its first one since it is in use.

    - `rule: each_loss` (v2): every time a record is seen, each negative with S0 < `too_easy`, or with `factor` S < S0
      and S < `ceiling`, gives way to the next of the pool (defaults 0.4, 1.2, 0.7);
    - `rule: scheduled` (v1): every `every` steps, with the means over a record's negatives: `factor` S < S0 and
      S < `ceiling` replaces all by ranks [(i - 1) n + `offset`, i n + `offset`) in the i-th replacement (defaults 100,
      1.15, 0.8). Rows seen again since they were measured are judged by that; beside them `rescored` rows a check (one
      step's rows by default) are scored again by the model as it is.
    - `guard`: a negative with S > guard times the score of the weakest drawn positive is taken for a false one and
      replaced (off by default, not in the papers); the share of such negatives is logged either way (at 0.95).
    - `refill`: what an exhausted pool does: `stay` keeps the last ones, `remine` mines all pools anew with the current
      model once a tenth of the rows are exhausted. `remine_every` mines anew every so many steps (ANCE).
      `pool`: candidates a row then gets; `corpus`: more texts to mine from; `skip`: first ranks left out.
    - `sources`: names of the sources it applies to (`None`: all retrieval sources that have negatives).

    Sources: 2408.15710, section 3.2 (v1); 2509.12892 (v2). Round 0, the fit of a window to a short pool, the buffer
    that is scored again and the reset of S0 are reconstructed.
    """

    rule: Literal["each_loss", "scheduled"] = "each_loss"
    factor: float | None = None
    ceiling: float | None = None
    too_easy: float = 0.4
    every: Annotated[int, Field(gt=0)] = 100
    rescored: Annotated[int, Field(ge=0)] | None = None
    offset: Annotated[int, Field(ge=0)] | None = None
    guard: Annotated[float, Field(gt=0)] | None = None
    refill: Literal["stay", "remine"] = "stay"
    remine_every: Annotated[int, Field(gt=0)] | None = None
    pool: Annotated[int, Field(gt=0)] = 100
    skip: Annotated[int, Field(ge=0)] = 0
    corpus: tuple[Corpus, ...] = field(default_factory=tuple)
    sources: tuple[str, ...] | None = None

    @property
    def decay(self) -> float:
        return self.factor if self.factor is not None else 1.2 if self.rule == "each_loss" else 1.15

    @property
    def roof(self) -> float:
        return self.ceiling if self.ceiling is not None else 0.7 if self.rule == "each_loss" else 0.8
