"""Live negatives in a training run: scores of the step's negatives to the state machine, its choices to the feed.

The state itself is in `mining/live.py`. Every rank holds the same one: after a step the scores of all rows, a few
numbers each, are gathered, and each rank takes the same decisions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from embedsmith.core.batch import ABSENT, Batch, Loss, RetrievalBatch
from embedsmith.core.collectives import gather_by_hosts, objects_of_all_ranks
from embedsmith.core.encoder import Role
from embedsmith.core.errors import RecipeError, TrainingError
from embedsmith.core.progress import log
from embedsmith.core.reps import Reps
from embedsmith.core.tokens import IntArray, TokenBatch
from embedsmith.core.transfer import to_device
from embedsmith.data import Record, text_id
from embedsmith.data.record import Text
from embedsmith.losses import M3RankedKD, MarginMSE, ScoreKL
from embedsmith.losses.candidates import Candidates
from embedsmith.mining import LiveNegatives
from embedsmith.mining.corpus import corpus_texts
from embedsmith.mining.live import EMPTY, LiveState, mine_pools
from embedsmith.mining.offline import Texts
from embedsmith.mining.searchers import TextReps
from embedsmith.models import Embedder
from embedsmith.train.feed import AHEAD, Feed, Lane, Supply
from embedsmith.train.step import Part

_NEWEST = 2**62


@dataclass
class LiveSource:
    """One source whose negatives change. `seen`: this rank's rows of the last step with the scores of their slots and
    of their weakest positive, [Q, S + 1]."""

    supply: Supply
    state: LiveState
    more: LiveNegatives
    seen: Tensor | None = field(default=None)

    def records(self, row_Q: IntArray, step: int) -> list[Record[Text]]:
        """The records of a batch, with the negatives of that step in place of their own."""
        records: list[Record[Text]] = []
        for row, candidate_S in zip(row_Q.tolist(), self.state.draw(row_Q, step), strict=True):
            record, pool_NP = self.supply.records.records[row], self.state.pool_NP
            chosen = [int(candidate) for candidate in candidate_S if candidate != EMPTY]
            if pool_NP is None:
                negatives = [record.negatives[place] for place in chosen]
                known = {name: getattr(record, name) for name in ("negative_scores", "teacher_negative_scores")}
            else:  # mined while training: places in the corpus, which nobody has scored
                negatives = [self.texts.corpus[int(pool_NP[row, place])] for place in chosen]
                known = dict.fromkeys(("negative_scores", "teacher_negative_scores"))
            scores = {name: each and tuple(each[place] for place in chosen) for name, each in known.items()}
            changed = {"negatives": tuple(negatives), **scores}
            records.append(replace(record, **changed))
        return records

    @cached_property
    def texts(self) -> Texts:
        found = self.supply.records.texts_only("mining anew while training", self.supply.records.name)
        return Texts(found, corpus_texts(found.records, self.more.corpus))

    @cached_property
    def head(self) -> str:
        """The head whose scores decide: dense where the loss reads it."""
        heads = self.supply.loss.heads()
        return "dense" if "dense" in heads else min(heads)

    @property
    def generation(self) -> int:
        return self.state.generation

    def watch(self, records: Sequence[Record[Text]]) -> Callable[[Batch], None]:
        """Leaves the scores of the records' negatives in `seen`."""
        id_QS = torch.full((len(records), self.supply.negatives), ABSENT)
        for row, record in enumerate(records):
            id_QS[row, : len(record.negatives)] = torch.tensor([text_id(text) for text in record.negatives])
        return partial(self._see, id_QS=id_QS)

    def _see(self, batch: Batch, id_QS: Tensor) -> None:
        assert isinstance(batch, RetrievalBatch)
        self.seen = slot_scores(batch, self.head, id_QS)


def slot_scores(batch: RetrievalBatch, head: str, id_QS: Tensor) -> Tensor:
    """score_QS of the negatives with the given ids, NaN for those the batch does not hold, and in one more column the
    lowest score of a drawn positive."""
    alone = batch.alone()
    pair, found = alone.pair(head), Candidates.of(alone, mask_false_negatives=False)
    absent_QM = to_device(found.negative_row_QM == ABSENT, found.device)
    negative_QM = found.scores_of(pair, found.negative_row_QM)[0].masked_fill(absent_QM, float("nan"))
    positive_QP = found.scores_of(pair, found.positive_row_QP)[0].masked_fill(~found.valid_QP, float("inf"))
    id_QM = batch.negative_id_QM
    if id_QM.shape[1] == 0:
        negative_QM, id_QM = negative_QM[:, :0], id_QM[:, :0]
    same_QSM = to_device(id_QS[:, :, None] == id_QM[:, None, :], found.device) & ~negative_QM.isnan()[:, None, :]
    score_QS = negative_QM.nan_to_num()[:, None, :].mul(same_QSM).sum(-1) / same_QSM.sum(-1)  # 0 / 0 is NaN
    return torch.cat([score_QS, positive_QP.amin(1, keepdim=True)], 1)


@dataclass
class LiveMining:
    """All live sources of a run, each with its lane. `seconds`: spent on mining anew so far."""

    feed: Feed
    sources: list[tuple[Lane, LiveSource]]
    seconds: float = 0.0

    @staticmethod
    def of(feed: Feed) -> LiveMining | None:
        """`None` for a feed without live sources."""
        lives = ((lane, supply.live) for lane in feed.lanes for supply in lane.supplies)
        sources = [(lane, live) for lane, live in lives if isinstance(live, LiveSource)]
        return LiveMining(feed, sources) if sources else None

    def begin(self, step: int) -> None:
        """Mine the pools of sources without any negatives, before the first step."""
        for lane, live in self.sources:
            if step == 0 and live.state.pool_NP is None and not live.state.size_N.any():
                self._remine(lane, live)

    def after_step(self, step: int, loss: Callable[[TokenBatch, Sequence[Part]], Tensor]) -> None:
        """Take in the scores of step `step`, and do what is due: `loss` encodes rows whose scores have aged.
        A collective of the lane's ranks."""
        for lane, live in self.sources:
            planned = lane.plan.at(step)
            if lane.supplies[planned.source].live is live:
                self._observe(lane, live, step, planned.rows, step)
            if live.state.due(step):
                self._rescore(lane, live, step, loss)
                live.state.check(step)
            if live.state.wants_new_pools(step):
                self._remine(lane, live)

    def _observe(self, lane: Lane, live: LiveSource, step: int, row_Q: IntArray, drawn: int) -> None:
        assert live.seen is not None
        score = _over_ranks(lane, live.seen).numpy()
        live.seen = None
        live.state.observe(step, row_Q, live.state.draw(row_Q, drawn), score[:, :-1], score[:, -1])

    def _rescore(
        self, lane: Lane, live: LiveSource, step: int, loss: Callable[[TokenBatch, Sequence[Part]], Tensor]
    ) -> None:
        """One more batch without gradient: rows seen once, scored again by the model as it is now."""
        limit = live.more.rescored
        count = len(lane.plan.at(step).rows) if limit is None else limit
        world = 1 if lane.spread else lane.world
        rows = live.state.to_rescore(step, count)
        rows = rows[: len(rows) // world * world]
        if len(rows) == 0:
            return
        mine = rows if lane.spread else np.split(rows, world)[lane.rank]
        share = (lane.rank, lane.world) if lane.spread else (0, 1)
        supply = replace(live.supply, live=live)
        tokens, part = supply.draw(self.feed.model, mine, self.feed.seed, step=_NEWEST, share=share)
        loss(tokens, [replace(part, group=lane.group)])
        self._observe(lane, live, step, rows, _NEWEST)

    def _remine(self, lane: Lane, live: LiveSource) -> None:
        started = time.perf_counter()
        encoder, task, texts = _WithoutBars(cast(Embedder, self.feed.model)), live.supply.records.task, live.texts
        queries = TextReps(encoder, texts.queries, "query", task, live.head, texts.instructions)
        documents = TextReps(encoder, texts.corpus, "document", task, live.head)
        live.state.install_pools(*mine_pools(texts, queries, documents, live.more, lane.group))
        seconds = time.perf_counter() - started
        self.seconds += seconds
        counts = f"{len(texts.queries):,} queries against {len(texts.corpus):,} texts"
        log.info("%s: mined negatives anew, %s, in %.1f s", live.supply.records.name, counts, seconds)

    def curves(self) -> dict[str, float]:
        """Numbers for the journal, by source; the seconds spent on mining anew so far."""
        values = {
            f"negatives_{key}/{live.supply.records.name}": value
            for _, live in self.sources
            for key, value in live.state.curves().items()
        }
        return values | ({"remine_seconds": self.seconds} if self.seconds else {})

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint. A collective. Errors: `TrainingError` where ranks that share a source disagree."""
        for lane, live in self.sources:
            if len(set(objects_of_all_ranks(live.state.digest(), lane.group))) > 1:
                raise TrainingError(
                    "ranks disagree about the negatives in use",
                    where=live.supply.records.name,
                    fix="continue from the last checkpoint; report it if it happens again",
                )
        return {live.supply.records.name: live.state.state_dict() for _, live in self.sources}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """A rank that has no part in a source's lane does not hold its state."""
        for _, live in self.sources:
            live.state.load_state_dict(states[live.supply.records.name])


@dataclass(frozen=True)
class _WithoutBars:
    """The live model as an encoder without bars of its own."""

    model: Embedder

    def represent(
        self,
        texts: Sequence[str],
        *,
        role: Role,
        task: str | None = None,
        outputs: Sequence[str] = ("dense",),
        instruction: Sequence[str | None] | None = None,
    ) -> Reps:
        return self.model.represent(
            texts, role=role, task=task, outputs=outputs, instruction=instruction, show_progress=False
        )


def _learns_from_scores(loss: Loss) -> bool:
    """Whether the loss, or one that it holds, reads a teacher's scores of documents."""
    held = [getattr(loss, one.name) for one in fields(cast(Any, loss))]
    inner = [each for value in held for each in (value if isinstance(value, tuple) else (value,))]
    scored = isinstance(loss, ScoreKL | MarginMSE | M3RankedKD)
    return scored or any(_learns_from_scores(each) for each in inner if isinstance(each, Loss))


def _over_ranks(lane: Lane, score_QX: Tensor) -> Tensor:
    """Scores of the rows of all ranks in row order; of a slot that only some ranks hold, theirs."""
    if lane.world == 1:
        return score_QX.cpu()
    gathered = gather_by_hosts(score_QX.cpu(), lane.group)
    if not lane.spread:
        return gathered
    stacked = gathered.unflatten(0, (lane.world, -1))
    joined = stacked.nan_to_num(float("-inf")).amax(0)
    return torch.where(stacked.isnan().all(0), float("nan"), joined)


def with_live_negatives(feed: Feed, config: LiveNegatives | None) -> Feed:
    """The feed whose sources have live negatives where the recipe says so. Errors: `RecipeError` for a source that is
    not there, or that cannot have any."""
    if config is None:
        return feed
    names = [supply.records.name for supply in feed.supplies]
    for name in config.sources or ():
        if name not in names:
            raise RecipeError(f"no source is called {name!r}", where="train.mining.sources", expected=", ".join(names))
    lanes = [
        lane if lane.holds else replace(lane, supplies=[_live(supply, config) for supply in lane.supplies])
        for lane in feed.lanes
    ]
    return replace(feed, lanes=lanes)


def _live(supply: Supply, config: LiveNegatives) -> Supply:
    name = supply.records.name
    wanted = name in config.sources if config.sources is not None else not supply.in_pairs
    if not wanted:
        return supply
    may_mine = config.remine_every is not None or config.refill == "remine"
    if may_mine:
        supply.records.texts_only("mining anew while training", name)
    sizes = [supply.negatives] if supply.streamed else [len(record.negatives) for record in supply.records.records]
    if supply.in_pairs or supply.streamed or supply.negatives == 0 or (not any(sizes) and not may_mine):
        if config.sources is None and not supply.in_pairs and not any(sizes) and not may_mine:
            return supply
        raise RecipeError(
            "no negatives to keep alive",
            expected="retrieval records in a fixed order, with negatives, and `negatives` of the source above 0",
            where=f"source {name!r}",
            fix="run embedsmith mine first, or set train.mining.remine_every and the source's negatives",
        )
    if may_mine and _learns_from_scores(supply.loss):
        raise RecipeError(
            "the loss learns from a teacher's scores, and negatives mined while training have none",
            where=f"source {name!r}",
            fix="leave out train.mining.remine_every and train.mining.refill, or choose a loss without scores such as "
            "infonce",
        )
    state = LiveState(config, sizes, supply.negatives, AHEAD)
    return replace(supply, live=LiveSource(supply, state, config))
