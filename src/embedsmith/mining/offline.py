"""Offline mining: records and a corpus in, the same records with hard negatives out. In parts, so that a stopped run
goes on, and shared by all ranks of the ordinary launcher."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from embedsmith.core.collectives import objects_of_all_ranks
from embedsmith.core.encoder import Encoder, Reranker
from embedsmith.core.errors import DataError, RecipeError
from embedsmith.core.files import atomic_file
from embedsmith.core.inputs import local_path, read_json, read_typed
from embedsmith.core.outputs import clear_left, delivered, discard, refuse_foreign_records
from embedsmith.core.progress import log, progress_bar
from embedsmith.core.reps import exceeds
from embedsmith.core.settings import to_plain
from embedsmith.core.sharing import Shard, Sharing
from embedsmith.data import Record, RecordSet, read_source, text_id, write_records
from embedsmith.data.cache import MEMORY_BYTES, file_states, weight
from embedsmith.data.store import RecordStore
from embedsmith.mining.config import MineRecipe, Selection
from embedsmith.mining.corpus import StoredTexts, corpus_texts, stored_texts
from embedsmith.mining.searchers import PairScorer, Searcher, SearchTexts, SharedSearcher, no_reranker
from embedsmith.mining.selection import SUSPECT, Ranked, fuse, loose_id, order_of, take
from embedsmith.search.exact import FloatArray, IndexArray

VERSION = 3
OpenModel = Callable[[str], Encoder]
OpenReranker = Callable[[str], Reranker]


def mine(
    recipe: MineRecipe,
    open_model: OpenModel,
    open_reranker: OpenReranker = no_reranker,
    *,
    overwrite: bool = False,
    shard: Shard | None = None,
    join: bool = False,
) -> MineReport:
    """Mine as the recipe says, or go on where a stopped run of the same recipe was. A collective of all ranks.

    `open_model` gives the encoder of a path or id, `open_reranker` the reranker. `shard`: which of how many this is,
    `(0, 4)` or `"0/4"`, for shards that are started each by itself; `join`: end their work. The report of a shard is
    that of its own records. Errors: `CheckpointError` for an output that is not ours or that another process writes to,
    and for parts that are missing at the join; `DataError` for data that cannot be mined from, or that differ between
    ranks; `OthersFirstError` for a shard that needs the vectors of others; what reading, encoding and searching raise.
    """
    with delivered(recipe.output, "mine", shared=shard is not None or join) as place:
        recipe = replace(recipe, output=place)
        sharing = Sharing.asked("mine", recipe.output, shard, join)
        if overwrite and sharing.mode in ("shard", "join"):
            fix = f"delete {recipe.output} and {recipe.report_path}, then give the command without it"
            raise RecipeError("--overwrite with --shard or --join, where others are at work", fix=fix)
        with sharing.claim(recipe.folder):
            sharing.first(lambda: _check_output(recipe, overwrite, sharing))
            return _mine(recipe, open_model, open_reranker, overwrite, sharing)


def _check_output(recipe: MineRecipe, overwrite: bool, sharing: Sharing) -> None:
    under_way = any(recipe.folder.glob("parts-*"))
    refuse_foreign_records(
        Path(recipe.output), recipe.report_path, "corpus", recipe.folder, under_way, overwrite=overwrite
    )
    if sharing.mode == "shard":  # what others are writing would go
        return
    for ours in (*recipe.folder.glob("parts-*"), recipe.folder / "vectors"):  # beside them may be other people's files
        clear_left(ours)


def _mine(
    recipe: MineRecipe, open_model: OpenModel, open_reranker: OpenReranker, overwrite: bool, sharing: Sharing
) -> MineReport:
    started = time.monotonic()
    texts = sharing.every(lambda: Texts.read(recipe))
    sides = texts.searched(cache(open_model), open_reranker, recipe.vector_folder, sharing)
    searchers = [settings.open(sides) for settings in recipe.searchers]
    teacher = None if recipe.teacher is None else recipe.teacher.open(sides)
    models: dict[str, str] = {}
    for scorer in (*searchers, *([] if teacher is None else [teacher])):
        models |= scorer.models()
    facts = _facts(recipe, texts, models)
    key = _agreed_key(facts)
    earlier = lambda: MineReport.of_earlier_run(recipe.report_path, recipe.output, key)
    if not overwrite and (done := sharing.first(earlier)) is not None:
        sharing.first(sharing.end)
        return done
    sharing.agree(facts)
    parts = recipe.folder / f"parts-{key}"
    if overwrite:
        sharing.first(lambda: discard(parts))
    work = _Work(recipe, texts, searchers, teacher, parts, sharing)
    if sharing.mode != "join":
        sharing.every(work.all_parts)
    if not sharing.ends:
        sharing.tell(len(work.starts))
        return work.report_of_share(key, started)
    return sharing.first(lambda: work.finish(key, started))


@dataclass(frozen=True)
class Texts:
    """What is mined from: records, the corpus, and who is known to answer whom. Where there are many texts, neither
    the records' nor the corpus's are held in memory."""

    found: RecordSet
    corpus: Sequence[str]

    @staticmethod
    def read(recipe: MineRecipe) -> Texts:
        found = read_source(recipe.data).texts_only("mining", recipe.data.path)
        if found.task != "retrieval":
            raise DataError(
                f"records of task {found.task} have no hard negatives",
                where=recipe.data.path,
                expected="retrieval records: queries with positives",
                fix="declare task: retrieval, or make pairs of labels first (embedsmith curate, labels_to_pairs)",
            )
        files = {path: state for one in recipe.corpus for path, state in file_states(local_path(one.path)).items()}
        if isinstance(found.records, RecordStore) or weight(files) > MEMORY_BYTES:
            known = repr((found.fingerprint, recipe.corpus, sorted(files.items())))
            corpus: Sequence[str] = stored_texts(
                found.records, recipe.corpus, recipe.folder / f"corpus-{_short(known)}"
            )
        else:
            corpus = corpus_texts(found.records, recipe.corpus)
        texts = Texts(found, corpus)
        if len(texts.corpus) <= recipe.select.skip:
            raise DataError(
                f"the corpus has {len(texts.corpus)} texts, and the first {recipe.select.skip} ranks are left out",
                where=recipe.data.path,
                fix="add a corpus, or lower select.skip",
            )
        return texts

    @property
    def records(self) -> Sequence[Record]:
        return self.found.records

    @cached_property
    def queries(self) -> list[str]:
        return [record.query for record in self.records]

    @cached_property
    def instructions(self) -> list[str | None]:
        """Those of the records themselves, one a query."""
        return [record.instruction for record in self.records]

    @cached_property
    def place(self) -> dict[str, int]:
        """Of each positive in the corpus."""
        answers = {text for record in self.records for text in record.positives}
        return {text: index for index, text in enumerate(self.corpus) if text in answers}

    @cached_property
    def loose_K(self) -> IndexArray:
        """Loose ids of the corpus, shifted into the signed range."""
        if isinstance(self.corpus, StoredTexts):
            return self.corpus.loose_K
        return np.fromiter((loose_id(text) >> 1 for text in self.corpus), np.int64, len(self.corpus))

    @cached_property
    def positives(self) -> dict[int, list[int]]:
        """Corpus places of all positives of a query, over all records that ask it, by the query's id."""
        known: dict[int, dict[int, None]] = {}
        for record in self.records:
            known.setdefault(text_id(record.query), {}).update(dict.fromkeys(self.place[t] for t in record.positives))
        return {query: list(places) for query, places in known.items()}

    def positives_of(self, row: int) -> list[int]:
        return self.positives[text_id(self.queries[row])]

    def searched(
        self, open_model: OpenModel, open_reranker: OpenReranker, vectors: Path, sharing: Sharing | None = None
    ) -> SearchTexts:
        """As searchers and teachers take them."""
        about = (self.instructions, self.found.task, open_model, vectors, open_reranker, sharing)
        return SearchTexts(self.queries, self.corpus, *about)

    def hash(self) -> str:
        digest = hashlib.blake2b(self.found.fingerprint.encode(), digest_size=16)
        for text in self.corpus:
            digest.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def _facts(recipe: MineRecipe, texts: Texts, models: Mapping[str, str]) -> dict[str, Any]:
    """What the result depends on."""
    plain = {name: value for name, value in to_plain(recipe).items() if name not in ("output", "work", "vectors")}
    return {"recipe": plain, "texts": texts.hash(), "models": dict(models), "version": VERSION}


def _agreed_key(facts: Mapping[str, Any]) -> str:
    """A hash of what the result depends on. Errors: `DataError` where ranks read other data or another model."""
    everywhere = objects_of_all_ranks(facts)
    for number, theirs in enumerate(everywhere):
        different = [name for name in facts if theirs[name] != everywhere[0][name]]
        if different:
            raise DataError(
                f"rank {number} has another {different[0]} than rank 0",
                where="mine",
                fix="give every machine the same files and models",
            )
    return _short(json.dumps(facts, sort_keys=True, ensure_ascii=False))


def _short(content: str) -> str:
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


@dataclass(frozen=True)
class _Work:
    recipe: MineRecipe
    texts: Texts
    searchers: Sequence[Searcher]
    teacher: PairScorer | None
    parts: Path
    sharing: Sharing

    @property
    def starts(self) -> range:
        """The first record of every part."""
        return range(0, len(self.texts.records), self.recipe.part)

    def path(self, start: int) -> Path:
        return self.parts / f"part-{start:09d}.jsonl"

    def done(self) -> set[int]:
        """The numbers of the parts that are whole."""
        return {number for number, start in enumerate(self.starts) if self.counts(start) is not None}

    def all_parts(self) -> None:
        """Mine this process's share of the parts that are not there. Searchers are prepared on every rank or shard:
        encoding is shared, too.

        Where all ranks search together, they go through the parts in rounds: each has one of its own, and one for whom
        none is left helps with the last.
        """
        for scorer in (*self.searchers, *([] if self.teacher is None else [self.teacher])):
            scorer.prepare(self.parts)
        sharing, numbers = self.sharing, range(len(self.starts))
        done = sharing.first(self.done)
        together = any(isinstance(one, SharedSearcher) for one in (*self.searchers, self.teacher))
        left = [number for number in numbers if number not in done]
        rounds = [left[first : first + sharing.count] for first in range(0, len(left), sharing.count)]
        mine = [one[min(sharing.index, len(one) - 1)] for one in rounds] if together else sharing.share(numbers, done)
        before = len(numbers) - len(mine) if sharing.count == 1 else 0
        with progress_bar("mine", before + len(mine), before) as bar:
            for place, number in enumerate(mine):
                self._part(self.starts[number], write=not together or sharing.index < len(rounds[place]))
                bar.advance()

    def counts(self, start: int) -> Counts | None:
        """Those of a part that is whole; `None` where its files are not what was written."""
        path = self.path(start)
        try:
            size, counts = TypeAdapter(tuple[int, Counts]).validate_json(
                path.with_suffix(".json").read_bytes(), strict=True
            )
            return counts if path.stat().st_size == size else None
        except (OSError, ValueError):
            return None

    def _part(self, start: int, write: bool) -> None:
        stop = min(start + self.recipe.part, len(self.texts.records))
        mined = mine_rows(self.texts, self.recipe, self.searchers, self.teacher, start, stop)
        if not write:
            return
        wanted, keeps_all = self.recipe.select.negatives, self.recipe.short == "keep"
        written = [record for record in mined if keeps_all or len(record.negatives) >= wanted]
        write_records(self.path(start), written)
        with atomic_file(self.path(start).with_suffix(".json")) as file:
            json.dump([self.path(start).stat().st_size, asdict(Counts.of(mined, written, wanted))], file)

    def total(self, numbers: Iterable[int]) -> Counts:
        """The sums of some parts that are whole."""
        whole = [counts for number in numbers if (counts := self.counts(self.starts[number])) is not None]
        columns = zip(*(asdict(counts).values() for counts in whole), strict=True)
        return Counts(*map(sum, columns)) if whole else Counts(*([0] * len(fields(Counts))))

    def report_of_share(self, key: str, started: float) -> MineReport:
        """Of a shard: what its own parts gave."""
        mine = range(len(self.starts))[self.sharing.index :: self.sharing.count]
        return self.total(mine).report(key, str(self.parts), len(self.texts.corpus), time.monotonic() - started)

    def finish(self, key: str, started: float) -> MineReport:
        """Put the parts together and report. On the first rank."""
        numbers = range(len(self.starts))
        self.sharing.refuse_missing(set(numbers) - self.done(), len(numbers))
        total, recall = self.total(numbers), self.recall()
        if total.negatives == 0:
            raise DataError(
                f"no record got a negative: {len(self.texts.corpus)} texts, of which every query's own are known",
                where=self.recipe.data.path,
                fix="add a corpus, or loosen select.limits, select.skip and select.near_duplicate",
            )
        self.join([self.path(start) for start in self.starts], Path(self.recipe.output))
        report = total.report(key, self.recipe.output, len(self.texts.corpus), time.monotonic() - started)
        report = replace(report, recall=recall)
        with atomic_file(self.recipe.report_path) as file:
            json.dump(asdict(report), file, indent=1)
        discard(self.parts)
        self.sharing.end()
        if report.empty:
            log.warning("%d records have no negative", report.empty)
        return report

    def recall(self) -> dict[str, float]:
        """What searchers have measured of their approximate indexes."""
        found = [read_json(path) for path in sorted(self.parts.glob("recall-*.json"))]
        return {f"{one['index']} of {', '.join(one['models'])}": one["recall"] for one in found}

    @staticmethod
    def join(paths: Sequence[Path], output: Path) -> None:
        """All parts as one file, gzipped if its name ends in .gz."""
        with atomic_file(output, "wb") as file:
            zipped = gzip.GzipFile("", "wb", 6, file, mtime=0) if output.suffix == ".gz" else None
            for path in paths:
                with path.open("rb") as part:
                    shutil.copyfileobj(part, zipped or file)
            if zipped is not None:
                zipped.close()


def mine_rows(
    texts: Texts,
    recipe: MineRecipe,
    searchers: Sequence[Searcher],
    teacher: PairScorer | None,
    start: int,
    stop: int,
) -> list[Record]:
    """Records `start` to `stop - 1` with their negatives, best first, and the scores of positives and negatives."""
    index_Q, score_Q = candidates_of(texts, searchers, recipe.candidates, recipe.select, start, stop)
    positive_Q = [texts.positives_of(row) for row in range(start, stop)]
    positive_score_Q = _scores(searchers[0], positive_Q, start)
    if score_Q is None:
        score_Q = _scores(searchers[0], index_Q, start)
    ranked = [
        Ranked(np.asarray(index_C, np.int64), score_C, float(min(scores, default=np.inf)))
        for index_C, score_C, scores in zip(index_Q, score_Q, positive_score_Q, strict=True)
    ]
    taught_Q: list[FloatArray] | None = None
    if teacher is not None:
        taught_Q = _scores(teacher, positive_Q, start)
        ranked = _taught(teacher, ranked, taught_Q, recipe, start)
    written_Q = taught_Q or positive_score_Q
    return [
        _record(texts, recipe, start + place, one, dict(zip(positives, scores.tolist(), strict=True)))
        for place, (one, positives, scores) in enumerate(zip(ranked, positive_Q, written_Q, strict=True))
    ]


def candidates_of(
    texts: Texts, searchers: Sequence[Searcher], count: int, select: Selection, start: int, stop: int
) -> tuple[list[IndexArray], list[FloatArray] | None]:
    """For each row the candidates that are not known, each text once, in reach; with scores where one searcher gave
    both."""
    banned = []  # loose ids of the query and of all that is known to answer it
    for row in range(start, stop):
        known = [int(texts.loose_K[place]) for place in texts.positives_of(row)]
        banned.append(np.array([*known, loose_id(texts.queries[row]) >> 1], np.int64))
    wanted = min(count + max(map(len, banned)), len(texts.corpus))
    found = [searcher.top(start, stop, wanted) for searcher in searchers]
    index_Q: list[IndexArray] = []
    score_Q: list[FloatArray] = []
    for place, index_C in enumerate(fuse([index for _, index in found])):
        loose_C = texts.loose_K[index_C]
        kept_C = ~np.isin(loose_C, banned[place])
        first = np.zeros(len(loose_C), bool)
        first[np.unique(loose_C, return_index=True)[1]] = True
        kept = np.flatnonzero(kept_C & first)[:count]
        stop_rank = len(kept) if select.window is None else select.skip + select.window
        kept = kept[select.skip : stop_rank]
        index_Q.append(index_C[kept])
        if len(searchers) == 1:
            score_Q.append(found[0][0][place][: len(index_C)][kept])
    return index_Q, score_Q if len(searchers) == 1 else None


def _scores(scorer: PairScorer, index_Q: Sequence[Sequence[int] | IndexArray], start: int) -> list[FloatArray]:
    """Scores of ragged rows of documents."""
    sizes = [len(index_C) for index_C in index_Q]
    row_E = np.repeat(np.arange(start, start + len(sizes)), sizes)
    index_E = np.concatenate([np.asarray(index_C, np.int64) for index_C in index_Q])
    return np.split(scorer.pairs(row_E, index_E), np.cumsum(sizes)[:-1])


def _taught(
    teacher: PairScorer, ranked: Sequence[Ranked], positive_Q: Sequence[FloatArray], recipe: MineRecipe, start: int
) -> list[Ranked]:
    """With the teacher's scores of the candidates that the searcher's own limits let through; NaN for the others."""
    kept_Q = [np.flatnonzero(one.may_be_negative(recipe.select)) for one in ranked]
    score_Q = _scores(teacher, [one.index_C[kept] for one, kept in zip(ranked, kept_Q, strict=True)], start)
    out: list[Ranked] = []
    for one, kept, scores, positives in zip(ranked, kept_Q, score_Q, positive_Q, strict=True):
        teacher_C = np.full(len(one.index_C), np.nan, np.float32)
        teacher_C[kept] = scores
        out.append(replace(one, teacher_C=teacher_C, teacher_positive=float(min(positives, default=np.inf))))
    return out


def _record(texts: Texts, recipe: MineRecipe, row: int, ranked: Ranked, scores: dict[int, float]) -> Record:
    """The record with its negatives in rank order. Scores are the teacher's, else the first searcher's."""
    select, record = recipe.select, texts.records[row]
    kept = np.flatnonzero(ranked.may_be_negative(select))
    candidates = [texts.corpus[int(index)] for index in ranked.index_C[kept]]
    order = order_of(ranked.score_C[kept], select, (text_id(record.query), record.positives))
    against = [record.query, *(texts.corpus[place] for place in texts.positives_of(row))]
    taken = sorted(take(order, candidates, against, select.negatives, select.near_duplicate))
    written_C = ranked.score_C if ranked.teacher_C is None else ranked.teacher_C
    return replace(
        record,
        negatives=tuple(candidates[place] for place in taken),
        negative_scores=None,
        teacher_positive_scores=tuple(scores[texts.place[text]] for text in record.positives),
        teacher_negative_scores=tuple(float(written_C[kept[place]]) for place in taken) if taken else None,
    )


@dataclass(frozen=True)
class MineReport:
    """What a mining gave. `suspect`: share of the negatives with a score above 0.95 times their weakest positive's (an
    estimate of the false ones). `short`: records with fewer negatives than asked for, `empty`: with none, `dropped`:
    left out for that. `recall`: by approximate index, which share of the 10 nearest texts it finds, on a sample of up
    to 100 queries."""

    key: str
    output: str
    records: int
    corpus: int
    negatives: int
    short: int
    empty: int
    dropped: int
    suspect: float
    negative_score: float
    positive_score: float
    seconds: float
    output_bytes: int = 0
    recall: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def of_earlier_run(path: Path, output: str, key: str) -> MineReport | None:
        """The report of an earlier run of the same, if its output is as it was left."""
        try:
            known = read_typed(path, MineReport)
            return known if (known.key, known.output_bytes) == (key, Path(output).stat().st_size) else None
        except (OSError, DataError):
            return None

    def __str__(self) -> str:
        return self.lines()

    def lines(self) -> str:
        return (
            f"{self.records:,} records, {self.negatives:,} negatives from {self.corpus:,} texts in {self.output}\n"
            f"short {self.short:,}, without any {self.empty:,}, left out {self.dropped:,}; mean score of negatives "
            f"{self.negative_score:.3f}, of positives {self.positive_score:.3f}, suspect {self.suspect:.1%}"
            + "".join(f"\n{index} finds {share:.1%} of the nearest texts" for index, share in self.recall.items())
        )


@dataclass(frozen=True)
class Counts:
    """The same of one part, as sums."""

    records: int
    negatives: int
    short: int
    empty: int
    dropped: int
    suspect: int
    negative_score: float
    positive_score: float
    positives: int

    @staticmethod
    def of(mined: Sequence[Record], kept: Sequence[Record], wanted: int) -> Counts:
        sizes = [len(record.negatives) for record in mined]
        scores = [(r.teacher_positive_scores or (), r.teacher_negative_scores or ()) for r in kept]
        positives = [[s for s in p if s is not None] for p, _ in scores]
        negatives = [[s for s in n if s is not None] for _, n in scores]
        suspect = sum(exceeds(s, SUSPECT * min(p)) for p, n in zip(positives, negatives, strict=True) if p for s in n)
        return Counts(
            records=len(kept),
            negatives=sum(len(record.negatives) for record in kept),
            short=sum(size < wanted for size in sizes),
            empty=sum(size == 0 for size in sizes),
            dropped=len(mined) - len(kept),
            suspect=suspect,
            negative_score=sum(map(sum, negatives)),
            positive_score=sum(map(sum, positives)),
            positives=sum(map(len, positives)),
        )

    def report(self, key: str, output: str, corpus: int, seconds: float) -> MineReport:
        sums = asdict(self)
        positives, negatives = max(sums.pop("positives"), 1), max(self.negatives, 1)
        sums |= {"suspect": self.suspect / negatives, "negative_score": self.negative_score / negatives}
        size = Path(output).stat().st_size if Path(output).is_file() else 0  # parts of a shard lie in a folder
        sums |= {"positive_score": self.positive_score / positives, "output_bytes": size}
        return MineReport(key=key, output=output, corpus=corpus, seconds=round(seconds, 1), **sums)
